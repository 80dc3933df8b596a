"""Training detection: the same losses however it is spread out, killed or cut off, and figures that rise."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import ROOT, kill_after_a_checkpoint, losses, records, run_ranks

from mimscale.cli import main
from mimscale.transfer.dense.stream import DenseStream
from mimscale.transfer.detection.task import Detection
from mimscale.transfer.recipe import load_finetune_recipe

RECIPE = ROOT / "launchers/recipes/finetune/demo_detection.yaml"
# Small, but all the parts: shifted and padded windows, drop path, all five levels, masks.
TINY = [
    "model.embed_dim=16",
    "model.depths=[2,1,1,1]",
    "model.num_heads=[1,2,4,8]",
    "model.drop_path=0.2",
    "data.image_size=96",
    "data.test_size=[64,96]",
    "data.workers=0",
    "data.validation_images=6",
    "detector.channels=16",
    "detector.hidden=32",
    "detector.anchors=[16,24,32,48,64]",
    "detector.anchors_sampled=32",
    "detector.proposals=40",
    "detector.proposals_sampled=32",
    "detector.detections=8",
    "detector.score_threshold=0.0",
    "schedule.warmup=2",
    "train.global_batch=4",
    "train.iterations=6",
    "train.validate_every=6",
    "train.checkpoint_every=2",
    "train.keep_checkpoints=9",
]
STAGE = {f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)}
# Crops of a small part of a scene: at step 1 both of the second rank show no object.
NEARLY_EMPTY = ["data.jitter=[6,7]", "train.iterations=4"]


def data_of(scenes: Path) -> list[str]:
    return [
        f"data.images={scenes}/images/training",
        f"data.annotations={scenes}/instances_training.json",
        f"data.validation={scenes}/images/validation",
        f"data.validation_annotations={scenes}/instances_validation.json",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, scenes) -> Path:
    """Variants of one short run, in folders named ranks-variant; "2-resumed" began on one rank, which was killed."""
    folder = tmp_path_factory.mktemp("detection")
    fixed = [*TINY, *data_of(scenes)]

    def cell(name: str, config: dict[str, Any], *overrides: str) -> dict[str, Any]:
        return {"output": folder / name, "config": config, "overrides": [*fixed, *overrides], "recipe": str(RECIPE)}

    one = {"train_micro_batch_size_per_gpu": 1}
    config = folder / "ds.json"
    config.write_text(json.dumps(STAGE["zero2"]))
    named = ["--deepspeed_config", str(config), "--recipe", str(RECIPE), "--output", str(folder / "2-resumed")]
    kill_after_a_checkpoint([sys.executable, "launchers/finetune.py", *named, *fixed], folder / "2-resumed", 2)
    run_ranks(1, [cell("1-zero0", STAGE["zero0"]), cell("1-empty", STAGE["zero2"] | one, *NEARLY_EMPTY)])
    bf16 = {**STAGE["zero2"], **one, "bf16": {"enabled": True}}
    cells = [cell("2-resumed", STAGE["zero1"]), cell("2-zero2", STAGE["zero2"])]
    cells.append(cell("2-zero3-checkpointing", STAGE["zero3"] | one, "train.activation_checkpointing=true"))
    cells.append(cell("2-empty", STAGE["zero3"], *NEARLY_EMPTY))
    cells.append(cell("2-bf16", bf16, "train.iterations=2", "train.validate_every=99"))
    run_ranks(2, cells)
    return folder


@pytest.mark.parametrize("name", ["2-resumed", "2-zero2", "2-zero3-checkpointing"])
def test_losses_and_figures_do_not_depend_on_how_it_was_run(runs, name):
    plain = losses(runs / "1-zero0")
    assert len(plain) == 6
    assert losses(runs / name) == pytest.approx(plain, rel=1e-4)
    (figures,), (expected,) = records(runs / name, "val_box_ap"), records(runs / "1-zero0", "val_box_ap")
    assert figures == pytest.approx(expected, abs=0.05)


def test_crops_without_an_object_do_not_part_the_ranks(runs, scenes):
    """Under ZeRO-3 a rank that calls other modules than its neighbour would wait for ever."""
    task = Detection(load_finetune_recipe(RECIPE, [*TINY, *data_of(scenes), *NEARLY_EMPTY]))
    objects = torch.stack([(DenseStream(task.images, 0, 4)[step].tensors[2] > 0).sum(1) for step in range(4)])
    ranks = (objects.reshape(4, 2, 2) > 0).any(-1)
    assert bool((ranks[:, 0] != ranks[:, 1]).any()), "no step has objects on one rank only"
    assert losses(runs / "2-empty") == pytest.approx(losses(runs / "1-empty"), rel=1e-4)


def test_losses_agree_within_two_percent_in_bf16(runs):
    assert losses(runs / "2-bf16") == pytest.approx(losses(runs / "1-zero0")[:2], rel=0.02)


# -- learning, from a pre-training ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(alone, tmp_path_factory, scenes, shards) -> Path:
    """A short pre-training, and a detector trained from it."""
    from mimscale.training.pretraining.task import pretrain
    from mimscale.training.recipe import load_recipe
    from mimscale.transfer.task import finetune

    folder = tmp_path_factory.mktemp("learnt")
    short = ["train.iterations=40", "train.checkpoint_every=40", "train.validate_every=40", "data.validation_images=16"]
    small = ["data.image_size=96", "data.workers=0", f"data.shards={shards}"]
    pretrain(load_recipe(ROOT / "launchers/recipes/demo.yaml", [*small, *short]), {}, folder / "pretrained")
    learning = [
        f"finetune.from={folder / 'pretrained'}@40",
        "model.pretrained_window_size=[6,6,6,3]",
        "data.workers=0",
        "data.image_size=128",
        "data.test_size=[112,168]",
        "detector.channels=32",
        "train.iterations=70",
        "train.validate_every=70",
        "train.checkpoint_every=70",
    ]
    finetune(load_finetune_recipe(RECIPE, [*learning, *data_of(scenes)]), {}, folder / "run")
    return folder / "run"


def test_a_detector_learns_from_a_pre_training(learnt, runs):
    result = json.loads((learnt / "result.json").read_text())
    untrained = records(runs / "1-zero0", "val_box_ap")[-1]
    figures = result["validation"]
    assert (result["task"], result["metric"], result["value"]) == ("detection", "box_ap", figures["val_box_ap"])
    assert untrained["val_box_ap50"] < 2
    assert figures["val_box_ap50"] > 6
    assert figures["val_mask_ap50"] > 2
    assert result["from"].endswith("pretrained@40")
    assert result["objects"] > result["images"] == 48
    assert (learnt / "detections/step_00000070.png").read_bytes().startswith(b"\x89PNG")
    assert list((learnt / "tensorboard").glob("events*"))


def test_evaluate_gives_the_figures_of_training_again(learnt, tmp_path):
    assert main(["evaluate", str(learnt), "--output", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "result.json").read_text())
    first = json.loads((learnt / "result.json").read_text())
    assert again["validation"] == pytest.approx(first["validation"], abs=1e-6)
    assert (tmp_path / "detections/step_00000070.png").exists()


def test_predict_draws_what_it_finds(learnt, scenes, tmp_path, capsys):
    image = sorted((scenes / "images/validation").glob("*.jpg"))[1]
    assert main(["predict", str(image), "--run", str(learnt), "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert str(image) in said
    assert (tmp_path / f"{image.stem}_detection.png").exists()


def test_a_run_does_not_go_on_with_other_annotations(runs, scenes, tmp_path, alone):
    from mimscale.training.errors import CheckpointError
    from mimscale.transfer.task import finetune

    content = json.loads((scenes / "instances_training.json").read_text())
    content["annotations"].pop()
    (tmp_path / "other.json").write_text(json.dumps(content))
    overrides = [*TINY, *data_of(scenes), f"data.annotations={tmp_path / 'other.json'}", "train.iterations=6"]
    with pytest.raises(CheckpointError, match="was trained on other data"):
        finetune(load_finetune_recipe(RECIPE, overrides), STAGE["zero0"], str(runs / "1-zero0"))
