"""A classifier's fine-tuning: one curve however it is computed, every held-out image once, resumed to the digit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from training_runs import (
    ROOT,
    TINY,
    go_on,
    kill_after_a_checkpoint,
    losses,
    records,
    run_ranks,
    write_config,
)

from mimscale.cli import main
from mimscale.data import EvaluationStream, ShardError, ShardIndex
from mimscale.training.checkpoint import Checkpoint
from mimscale.training.errors import TrainingError
from mimscale.training.planning.counting import PLANNED_SHARE, kept_bytes
from mimscale.training.planning.memory import plan_rank
from mimscale.training.pretraining.module import normalise
from mimscale.training.ranks import Ranks
from mimscale.training.run_folder import saved_steps
from mimscale.transfer.classification.labels import ClassCounts
from mimscale.transfer.classification.mixing import Mixing
from mimscale.transfer.classification.scores import Predictions
from mimscale.transfer.classification.task import Classification
from mimscale.transfer.load import load_run
from mimscale.transfer.recipe import load_finetune_recipe
from mimscale.transfer.task import finetune

RECIPE = ROOT / "launchers/recipes/finetune/demo.yaml"
IMAGES, STEPS, EMA = 33, 6, 0.8  # an odd number of held-out images: the last batches of two ranks are filled up
# The encoder of TINY with everything that is drawn at random: rand-augment, erasing, mixing and drop path.
SMALL = [
    *[key for key in TINY if key.startswith(("model.", "data.image_size", "data.workers"))],
    f"data.validation_images={IMAGES}",
    "data.rand_augment=rand-m9-mstd0.5-inc1",
    "data.erasing=0.25",
    "mix.mixup=0.8",
    "mix.cutmix=1.0",
    "optimizer.lr_batch=8",
    "schedule.warmup=2",
    f"finetune.ema={EMA}",
    "train.global_batch=8",
    f"train.iterations={STEPS}",
    "train.checkpoint_every=1",
    "train.validate_every=3",
    "train.validate_batch=8",
]
CONFIGS = {f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """Where the first launch leaves a short pre-training."""
    return tmp_path_factory.mktemp("pretrained") / "run"


@pytest.fixture(scope="module")
def base(shards, pretrained) -> list[str]:
    """The overrides of every fine-tuning here."""
    return [*SMALL, f"data.shards={shards}", f"finetune.from={pretrained}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, pretrained, shards) -> Path:
    """All variants of one fine-tuning: folders named ranks-variant."""
    folder = tmp_path_factory.mktemp("finetuned")

    def cell(name: str, config: dict, *overrides: str) -> dict:
        return {"output": folder / name, "config": config, "overrides": [*base, *overrides], "recipe": RECIPE}

    short = [*TINY, "train.iterations=2", "train.validate_every=9", f"data.shards={shards}"]
    micro = {"train_micro_batch_size_per_gpu": 2}
    bf16 = {**CONFIGS["zero2"], **micro, "bf16": {"enabled": True}}
    one = [{"output": pretrained, "config": {}, "overrides": short}, cell("1-zero0", CONFIGS["zero0"])]
    run_ranks(1, [*one, cell("1-zero3", {**CONFIGS["zero3"], **micro})])
    two = [cell("2-zero1", CONFIGS["zero1"]), cell("2-zero2", {**CONFIGS["zero2"], **micro})]
    two += [cell("2-zero3", CONFIGS["zero3"]), cell("2-bf16", bf16, "train.iterations=3")]
    run_ranks(2, two)
    return folder


@pytest.mark.parametrize("name", ["1-zero3", "2-zero1", "2-zero2", "2-zero3"])
def test_losses_validations_and_averages_agree(runs: Path, name: str):
    assert losses(runs / name) == pytest.approx(losses(runs / "1-zero0"), rel=1e-5)
    for here, there in zip(records(runs / name, "val_loss"), records(runs / "1-zero0", "val_loss"), strict=True):
        assert here == pytest.approx(there, rel=1e-4)
    ours, plain = (Checkpoint.open(runs / run / f"checkpoints/step_{STEPS:08d}") for run in (name, "1-zero0"))
    for key in ("encoder.head.weight", "encoder.layers.0.blocks.0.attn.qkv.weight"):
        assert torch.allclose(ours.trained(key), plain.trained(key), atol=2e-5), key


def test_losses_agree_within_two_percent_in_bf16(runs: Path):
    assert losses(runs / "2-bf16") == pytest.approx(losses(runs / "1-zero0")[:3], rel=0.02)


def test_the_average_is_that_of_the_weights_after_each_update(runs: Path):
    before, after = (Checkpoint.open(runs / f"2-zero3/checkpoints/step_{step:08d}") for step in (STEPS - 1, STEPS))
    decay = min(EMA, (1 + STEPS) / (10 + STEPS))
    assert decay != EMA
    for name in ("encoder.head.weight", "encoder.layers.1.blocks.0.attn.qkv.weight"):
        expected = decay * before.tensor(f"average/{name}") + (1 - decay) * after.tensor(name)
        assert torch.allclose(after.tensor(f"average/{name}"), expected, atol=1e-7)
        assert not torch.equal(after.trained(name), after.tensor(name))


def by_hand(run: Path, shards: str) -> Predictions:
    """One image after the other through the averaged weights, by no part of the evaluation."""
    finetuned = load_run(str(run))
    module, index = finetuned.module(), ShardIndex.load(shards)
    data = finetuned.recipe.data
    samples = index.samples("val")
    chosen = {int(samples[i * len(samples) // IMAGES]) for i in range(IMAGES)}
    labels, top, found = [], [], []
    for batch in EvaluationStream(index, "val", 96, 1, resize_shorter=192):
        if int(samples[int(batch.positions[0])]) in chosen:
            with torch.no_grad():
                logits = module(normalise(batch.images, data.mean, data.std))[0].double()
            labels.append(int(batch.labels[0]))
            top.append(logits[0].argsort(descending=True)[:5].tolist())
            found.append(torch.nn.functional.cross_entropy(logits, batch.labels).item())
    return Predictions(np.array(labels), np.array(top), np.array(found))


def test_every_held_out_image_counts_once(runs: Path, base):
    shards = next(key for key in base if key.startswith("data.shards=")).partition("=")[2]
    expected = by_hand(runs / "2-zero2", shards)
    assert len(expected.labels) == IMAGES
    result = json.loads((runs / "2-zero2/result.json").read_text())
    validation = result["validation"]
    assert validation["val_images"] == IMAGES
    assert validation["val_top1"] == pytest.approx(100 * (expected.top[:, 0] == expected.labels).mean())
    assert validation["val_top5"] == pytest.approx(100 * (expected.top == expected.labels[:, None]).any(1).mean())
    assert validation["val_loss"] == pytest.approx(expected.losses.mean(), rel=1e-4)
    assert result["metric"] == "top1" and result["value"] == validation["val_top1"]


def test_a_run_folder_has_figures_curves_and_pictures(runs: Path):
    run = runs / "2-zero2"
    for name in ("predictions", "confusion"):
        assert (run / name / f"step_{STEPS:08d}.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "curves.png").exists() and list((run / "tensorboard").glob("events*"))
    result = json.loads((run / "result.json").read_text())
    tail = result["long_tail"]  # of the solar cells' 8 classes two have fewer than 100 training photographs
    assert tail["many"]["classes"] + tail["medium"]["classes"] == result["classes"] == 8
    assert result["classes_without_images"] == 0
    assert tail["many"]["top1"] == result["validation"]["val_top1_many"]


def test_evaluate_predict_and_probe_use_a_run(runs: Path, base, solar_folders, tmp_path, capsys):
    run = runs / "1-zero3"
    assert main(["evaluate", str(run), "--batch", "7", "--output", str(tmp_path)]) == 0
    again, before = (json.loads((path / "result.json").read_text()) for path in (tmp_path, run))
    for key in ("val_top1", "val_top5", "val_loss"):
        assert again["validation"][key] == pytest.approx(before["validation"][key], rel=1e-5)
    image = next((solar_folders / "val").glob("*/*.png"))
    capsys.readouterr()
    assert main(["predict", str(image), "--run", f"{run}@{STEPS - 1}"]) == 0
    assert capsys.readouterr().out.count("%") == 5
    small = {"--fraction": "10", "--validation": "10", "--knn": "1"}
    shards = next(key for key in base if key.startswith("data.shards=")).partition("=")[2]
    words = [word for pair in small.items() for word in pair]
    for _ in range(2):  # the second time from kept features
        assert main(["probe", str(run), "--shards", shards, *words]) == 0
        found = json.loads((run / "probe/result.json").read_text())["validation"]
        assert found["knn_top1"] == 100  # each photograph is its own nearest neighbour
        assert found["linear_top1"] > found["commonest_class"]
    assert main(["evaluate", str(run), "model.name=swinv2_b"]) == 1
    assert "is not data.KEY=VALUE" in capsys.readouterr().err


def test_a_run_killed_in_a_step_repeats_every_digit(runs: Path, tmp_path, base):
    run, config = tmp_path / "run", write_config(tmp_path, **CONFIGS["zero0"])
    named = ["--deepspeed_config", str(config), "--recipe", str(RECIPE), "--output", str(run)]
    command = [sys.executable, "launchers/finetune.py", *named, *base]
    kill_after_a_checkpoint(command, run, 3)
    go_on(command)
    assert losses(run) == losses(runs / "1-zero0")
    # The average that was restored is what is validated.
    assert records(run, "val_loss") == records(runs / "1-zero0", "val_loss")


def test_mixing_belongs_to_the_place_in_the_run():
    mixing = Mixing(8, mixup=0.8, cutmix=1.0, label_smoothing=0.1, erasing=0.5)
    images, labels, keys = torch.rand(8, 3, 32, 32), torch.arange(8), torch.arange(8) * 7919
    whole, targets = mixing(images.clone(), labels, keys)
    parts = [mixing(images[part].clone(), labels[part], keys[part]) for part in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)
    assert torch.allclose(targets.sum(1), torch.ones(8))
    assert all(targets[row].topk(2).indices.tolist() in ([row, row ^ 1], [row ^ 1, row]) for row in range(8))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_labels_are_smoothed_also_where_nothing_is_mixed(smoothing):
    """1 - e + e / K for the label and e / K for every other class, as the cross-entropy of label smoothing has them."""
    labels, logits = torch.tensor([2, 0, 4]), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    plain = Mixing(5, mixup=0.0, cutmix=0.0, label_smoothing=smoothing, erasing=0.0)
    images = torch.rand(3, 3, 16, 16)
    same, targets = plain(images.clone(), labels, torch.arange(3))
    assert torch.equal(same, images)
    expected = torch.full((3, 5), smoothing / 5)
    expected[range(3), labels] += 1 - smoothing
    assert torch.allclose(targets, expected, atol=1e-7)
    loss = -(targets * logits.log_softmax(1)).sum(1).mean()
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    mixed = Mixing(5, mixup=0.8, cutmix=1.0, label_smoothing=smoothing, erasing=0.0)
    _, targets = mixed(torch.rand(2, 3, 16, 16), labels[:2], torch.arange(2))
    assert torch.allclose(targets[:, [1, 3, 4]], torch.full((2, 3), smoothing / 5), atol=1e-6)


def test_the_long_tail_has_three_groups():
    counts = ClassCounts(np.array([101, 100, 20, 19, 1, 0]))
    groups = {name: np.flatnonzero(classes).tolist() for name, classes in counts.shots().items()}
    assert groups == {"many": [0], "medium": [1, 2], "few": [3, 4]}
    found = Predictions(np.array([0, 0, 1, 3]), np.array([[0], [1], [1], [0]]), np.zeros(4))
    figures = found.figures(counts.shots())
    assert (figures["val_top1_many"], figures["val_top1_medium"], figures["val_top1_few"]) == (50, 100, 0)
    assert found.worst_classes(2) == [3, 0]


def test_a_micro_batch_of_auto_is_what_fits_the_free_memory(shards, monkeypatch):
    found = task(shards)
    with torch.device("meta"):
        sizes = [p.numel() for p in found.build().parameters()]
    one = kept_bytes(found.build, lambda: found.example(2), recompute=False, bf16=False)
    state = plan_rank(sizes, 0, {"bf16": {"enabled": False}}, 1).total
    for images in (3, 7):
        free = (state + (images + 0.5) * one) / PLANNED_SHARE
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        bound = found.largest_micro_batch({"bf16": {"enabled": False}}, Ranks(0, 1, 0, 1, torch.device("cpu")))
        assert images <= bound <= images + state // one + 1
    less = [*SMALL, f"data.shards={shards}", "train.activation_checkpointing=true"]
    checkpointed = Classification(load_finetune_recipe(RECIPE, less))
    assert kept_bytes(checkpointed.build, lambda: found.example(2), recompute=True, bf16=False) < one / 2


# -- mistakes --------------------------------------------------------------------------------------------------------------


def task(shards: Path, *overrides: str) -> Classification:
    return Classification(load_finetune_recipe(RECIPE, [*SMALL, f"data.shards={shards}", *overrides]))


def test_a_label_out_of_range_is_named(photo_shards, monkeypatch):
    monkeypatch.setattr(ShardIndex, "classes", property(lambda index: index.content.classes[:3]))
    with pytest.raises(ShardError, match=r"samples\.npy has labels that are none of the 3 classes"):
        task(photo_shards)


def test_an_empty_class_is_counted_and_said(photo_shards, monkeypatch):
    monkeypatch.setattr(ShardIndex, "classes", property(lambda index: [*index.content.classes, "yeti"]))
    found = task(photo_shards)
    assert "5 classes, 1 of them without an image" in found.describe()
    assert found.result([])["classes_without_images"] == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.validation=tset"], "tset"),
        (["train.global_batch=9"], "does not give each an even number of images"),
        (["finetune.from=nowhere"], "no such run or file"),
        ([], "a moving average of the weights does not go with an offloaded optimizer"),
    ],
)
def test_a_mistake_is_an_error_before_the_first_step(alone, shards, tmp_path, overrides, said):
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    recipe = load_finetune_recipe(RECIPE, [*SMALL, f"data.shards={shards}", *overrides])
    with pytest.raises((ValueError, ShardError, TrainingError), match=said):
        finetune(recipe, config, str(tmp_path / "run"))
    assert not saved_steps(tmp_path / "run")
