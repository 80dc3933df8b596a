"""Semantic segmentation: what it reads, what it learns, how it is scored."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import ROOT, go_on, kill_after_a_checkpoint, losses, records, run_ranks, write_config

from mimscale.cli import main
from mimscale.data import DamagedSample, ShardError
from mimscale.training.checkpoint import Checkpoint
from mimscale.training.ranks import Ranks
from mimscale.training.recipe import RecipeError
from mimscale.training.task import PlainEvaluator
from mimscale.transfer.dense.stream import DenseStream
from mimscale.transfer.dense.sync_batch_norm import SyncedBatchNorm2d
from mimscale.transfer.recipe import load_finetune_recipe
from mimscale.transfer.segmentation.images import SegmentationImages, distort, windows
from mimscale.transfer.segmentation.label_maps import LabelPictures, read_classes
from mimscale.transfer.segmentation.scores import Confusion, slide
from mimscale.transfer.segmentation.task import Segmentation
from mimscale.transfer.segmentation.upernet import drop_channels
from mimscale.transfer.task import finetune

RECIPES = ROOT / "launchers/recipes/finetune"
RECIPE = RECIPES / "demo_segmentation.yaml"
STEPS = 4
# Narrow, but all the parts: drop path, dropout, both heads, windows that slide.
SMALL = [
    "model.embed_dim=16",
    "model.depths=[1,1,1,1]",
    "model.drop_path=0.2",
    "model.pretrained_window_size=0",
    "decoder.channels=16",
    "decoder.auxiliary_channels=16",
    "data.image_size=64",
    "data.test_size=[64,256]",
    "data.stride=48",
    "data.workers=0",
    "model.window_size=4",
    "optimizer.lr_batch=4",
    "train.global_batch=4",
]
SHORT = [f"train.iterations={STEPS}", "train.checkpoint_every=1", "train.validate_every=2", "schedule.warmup=1"]
ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def where(scenes: Path, images: int | None = None) -> list[str]:
    return [
        f"data.images={scenes}/images/training",
        f"data.annotations={scenes}/annotations/training",
        f"data.classes={scenes}/classes.txt",
        f"data.validation={scenes}/images/validation",
        f"data.validation_annotations={scenes}/annotations/validation",
        f"data.validation_images={images or 'null'}",
    ]


@pytest.fixture(scope="module")
def base(scenes) -> list[str]:
    return [*SMALL, *SHORT, *where(scenes, 5)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base) -> Path:
    """One training, on one rank and on two; and in bf16."""
    folder = tmp_path_factory.mktemp("segmented")

    def cell(name: str, stage: int, *overrides: str, **config) -> dict:
        config = {"zero_optimization": {"stage": stage}, **config}
        return {"output": folder / name, "config": config, "overrides": [*base, *overrides], "recipe": RECIPE}

    run_ranks(1, [cell("1-zero0", 0)])
    two = [cell("2-zero2", 2), cell("2-zero3", 3)]
    run_ranks(2, [*two, cell("2-bf16", 3, "train.iterations=2", bf16={"enabled": True})])
    return folder


@pytest.mark.parametrize("name", ["2-zero2", "2-zero3"])
def test_losses_statistics_and_figures_agree(runs: Path, name: str):
    assert losses(runs / name) == pytest.approx(losses(runs / "1-zero0"), rel=1e-5)
    for here, there in zip(records(runs / name, "val_miou"), records(runs / "1-zero0", "val_miou"), strict=True):
        assert here == pytest.approx(there, abs=0.05)  # a pixel between two classes may fall either way
        assert here["val_images"] == 5
    ours, plain = (Checkpoint.open(runs / run / f"checkpoints/step_{STEPS:08d}") for run in (name, "1-zero0"))
    statistics = [key for key in plain.manifest["shapes"] if key.endswith(("running_mean", "running_var"))]
    assert (
        len(statistics) == 2 * 13
    )  # pooling and its fusion, laterals, the pyramid's, the last fusion, the auxiliary head's
    for key in statistics:
        assert torch.allclose(ours.tensor(key), plain.tensor(key), rtol=1e-3, atol=2e-4), key
        assert not torch.equal(plain.tensor(key), torch.full_like(plain.tensor(key), float(key.endswith("var"))))


def test_losses_agree_within_two_percent_in_bf16(runs: Path):
    assert losses(runs / "2-bf16") == pytest.approx(losses(runs / "1-zero0")[:2], rel=0.02)


def test_a_run_killed_in_a_step_repeats_every_digit(runs: Path, tmp_path, base):
    run, config = tmp_path / "run", write_config(tmp_path, zero_optimization={"stage": 0})
    named = ["--deepspeed_config", str(config), "--recipe", str(RECIPE), "--output", str(run)]
    command = [sys.executable, "launchers/finetune.py", *named, *base]
    kill_after_a_checkpoint(command, run, 1)
    go_on(command)
    assert losses(run) == losses(runs / "1-zero0")
    assert records(run, "val_miou") == records(runs / "1-zero0", "val_miou")


def test_a_run_folder_and_the_commands_on_it(runs: Path, scenes, tmp_path, capsys):
    run = runs / "2-zero3"
    assert (run / f"segmentations/step_{STEPS:08d}.png").exists() and list((run / "tensorboard").glob("events*"))
    result = json.loads((run / "result.json").read_text())
    assert (result["task"], result["metric"], result["value"]) == (
        "segmentation",
        "miou",
        result["validation"]["val_miou"],
    )
    ious = [iou for iou in result["iou"].values() if iou is not None]
    assert set(result["iou"]) == set(read_classes(scenes / "classes.txt"))
    assert result["value"] == pytest.approx(np.mean(ious))
    assert main(["evaluate", str(run), "--output", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["validation"]["val_miou"] == pytest.approx(result["value"], abs=0.05)
    picture = next((scenes / "images/validation").glob("*.jpg"))
    capsys.readouterr()
    assert main(["predict", str(picture), "--run", str(run), "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert any(f" {name} " in told for name in result["iou"])
    with Image.open(tmp_path / f"{picture.stem}_segmentation.png") as drawn, Image.open(picture) as plain:
        assert drawn.width == plain.width and drawn.height > plain.height


def objects_iou(result: dict) -> float:
    """Mean over the objects' classes: saying "photograph" everywhere scores 0."""
    return float(
        np.nanmean([np.nan if iou is None else iou for name, iou in result["iou"].items() if name != "photograph"])
    )


def test_it_learns(alone, scenes, tmp_path):
    """From scratch, a few seconds: objects are found, which an untrained model does not do."""
    longer = ["train.iterations=120", "train.validate_every=120", "schedule.warmup=10", "optimizer.lr=3e-3"]
    still = ["model.drop_path=0", "decoder.channels=32", "train.log_every=10"]
    recipe = load_finetune_recipe(RECIPE, [*SMALL, *longer, *still, *where(scenes)])
    task = Segmentation(recipe)
    torch.manual_seed(0)
    task.validate(PlainEvaluator(task.build(), 1, ONE), 0)
    untrained = objects_iou(task.result([]))
    result = finetune(recipe, {}, str(tmp_path / "run"))
    assert result["iou"]["photograph"] > 80
    assert objects_iou(result) > max(6, 3 * untrained)


# -- scores ----------------------------------------------------------------------------------------------------------------


def test_figures_are_the_reference_librarys():
    """segmentation-models-pytorch's, on predictions that are right in part, with ignored pixels and an absent class."""
    from segmentation_models_pytorch import metrics

    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(-1, 5, (6, 40, 50)))
    said = torch.where(torch.from_numpy(rng.random((6, 40, 50))) < 0.6, labels.clamp(min=0), (labels + 2) % 5)
    found = Confusion.none(6)  # the sixth class is neither there nor said
    for truth, guess in zip(labels, said, strict=True):
        found = found.and_image(truth.to(torch.int16), guess)
    counts = metrics.get_stats(said, labels, mode="multiclass", num_classes=6, ignore_index=-1)
    tp, fp, fn, tn = (part.sum(0, keepdim=True) for part in counts)
    ious = 100 * metrics.iou_score(tp, fp, fn, tn, reduction=None, zero_division=float("nan"))[0].numpy()
    assert np.isnan(ious[5]) and np.isnan(found.ious()[5])
    assert found.ious()[:5] == pytest.approx(ious[:5], rel=1e-6)
    assert found.figures()["val_miou"] == pytest.approx(ious[:5].mean(), rel=1e-6)
    right = (said == labels)[labels >= 0].double().mean().item()
    assert found.figures()["val_pixel_accuracy"] == pytest.approx(100 * right)


def test_windows_cover_an_image_and_are_averaged():
    assert list(windows(torch.empty(3, 640, 853), 640, 426)) == [(0, 0), (0, 213)]
    assert [left for _, left in windows(torch.empty(3, 640, 2560), 640, 426)] == [0, 426, 852, 1278, 1704, 1920]
    scene = torch.zeros(3, 100, 150, dtype=torch.uint8)
    scene[0, :, 75:] = 200
    asked: list[torch.Tensor] = []

    def model(crops: torch.Tensor) -> tuple[torch.Tensor]:
        asked.append(crops)
        small = torch.nn.functional.avg_pool2d(crops.float(), 4)[:, 0] / 100 - 1
        return (torch.stack([-small, small], 1),)

    said = slide(model, scene, 64, 32, (0, 0, 0), (50, 75))
    assert [tuple(crops.shape) for crops in asked] == [(12, 3, 64, 64)]
    expected = (torch.arange(75) >= 37.5).long().expand(50, 75)
    assert (said == expected).float().mean() > 0.97
    assert slide(model, scene[:, :20, :30], 64, 32, (0, 0, 0), (20, 30)).shape == (20, 30)


# -- images and labels ------------------------------------------------------------------------------------------------------


def pictures_of(scenes: Path, split: str = "training") -> LabelPictures:
    names = read_classes(scenes / "classes.txt")
    return LabelPictures.find(scenes / "images" / split, scenes / "annotations" / split, len(names), 1, (0,))


def test_labels_move_with_their_pixels(scenes, tmp_path):
    """The images are painted in the values of their labels, so that every crop tells whether it was cut alike."""
    (tmp_path / "images").mkdir()
    for path in sorted((scenes / "annotations/training").glob("*.png"))[:6]:
        with Image.open(path) as labels:
            painted = np.repeat(np.asarray(labels)[..., None] * 30, 3, axis=2)
        Image.fromarray(painted).save(tmp_path / "images" / path.name)
    painted_pictures = LabelPictures.find(tmp_path / "images", scenes / "annotations/training", 7, 1, (0,))
    assert len(painted_pictures.alone) > 0  # label pictures whose image is not there
    images = SegmentationImages(painted_pictures, 64, (0.5, 2.0), 0.5, False, 0.75, (64, 256), (0, 0, 0))
    seen, padded = set(), False
    for batch in [DenseStream(images, 0, 4)[step] for step in range(6)]:
        crops, labels, draw_keys = batch.tensors
        assert crops.shape == (4, 3, 64, 64) and labels.shape == (4, 64, 64) and len(draw_keys) == 4
        told = (crops[:, 0].float() / 30).round().long() - 1
        assert (told == labels).float().mean() > 0.9
        seen |= set(labels.unique().tolist())
        padded |= bool((labels == -1).flatten(1).float().mean(1).max() > 0.5)
    assert len(seen) > 3 and padded


def test_crops_are_the_same_for_any_number_of_ranks(scenes):
    images = SegmentationImages(pictures_of(scenes), 64, (0.5, 2.0), 0.5, True, 0.75, (64, 256), (0, 0, 0))
    whole = DenseStream(images, 3, 4)[5]
    parts = [DenseStream(images, 3, 4, rank, 2)[5] for rank in (0, 1)]
    for place, tensor in enumerate(whole.tensors):
        assert torch.equal(torch.cat([part.tensors[place] for part in parts]), tensor)
    assert not torch.equal(DenseStream(images, 4, 4)[5].tensors[0], whole.tensors[0])


def test_distortion_changes_colours_within_bounds(scenes):
    with Image.open(next((scenes / "images/training").glob("*.jpg"))) as file:
        image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(distort(image, np.array([0.9, 0, 0.9, 0, 0, 0.9, 0, 0.9, 0])), image)
    brighter = distort(image, np.array([0.1, 1.0, 0.9, 0, 0, 0.9, 0, 0.9, 0]))
    assert torch.equal(brighter.int(), (image.int() + 32).clamp(max=255))
    contrast = distort(image, np.array([0.9, 0, 0.1, 0.0, 0.9, 0.9, 0, 0.9, 0]))
    assert (contrast.float() - image.float() / 2).abs().max() <= 1
    grey = distort(image, np.array([0.9, 0, 0.9, 0, 0, 0.1, 0.0, 0.9, 0]))
    spread = [(x.float().amax(0) - x.float().amin(0)).mean() for x in (image, grey)]
    assert spread[1] < 0.6 * spread[0]


@pytest.fixture
def own_scenes(scenes, tmp_path) -> Path:
    """A few scenes that a test may spoil."""
    for kind, ending in (("images", "jpg"), ("annotations", "png")):
        (tmp_path / kind / "training").mkdir(parents=True)
        for number in range(5):
            name = f"{kind}/training/scene_{number:05d}.{ending}"
            shutil.copy(scenes / name, tmp_path / name)
    shutil.copy(scenes / "classes.txt", tmp_path / "classes.txt")
    return tmp_path


def test_label_pictures_that_do_not_go_with_their_images_are_named(own_scenes):
    labels = own_scenes / "annotations/training"
    with Image.open(labels / "scene_00000.png") as picture:
        values = np.asarray(picture)
    Image.fromarray(values[:-1]).save(labels / "scene_00000.png")
    with Image.open(own_scenes / "images/training/scene_00001.jpg") as image:
        Image.new("L", image.size, 9).save(labels / "scene_00001.png")
        Image.new("RGB", image.size).save(labels / "scene_00002.png")
    pictures = pictures_of(own_scenes)
    (labels / "scene_00003.png").write_bytes(b"no picture")
    whats = ("has .* pixels, its", "has the label 9: classes are 1 to 7, and 0 is", "has colours", "is no picture")
    for number, what in enumerate(whats):
        with pytest.raises(DamagedSample, match=rf"^\S*/scene_0000{number}\.png {what}"):
            pictures.read(number)
    # Training continues with the one that is whole, and counts the others.
    images = SegmentationImages(pictures, 64, (0.5, 2.0), 0.5, True, 0.75, (64, 256), (0, 0, 0))
    batch = DenseStream(images, 0, 5)[0]
    assert batch.keys == ["scene_00004.jpg"] * 5
    assert {key for key, _ in batch.skipped} == {f"scene_0000{number}.jpg" for number in range(4)}


def test_images_without_labels_are_left_out_and_said(own_scenes):
    (own_scenes / "annotations/training/scene_00001.png").unlink()
    recipe = load_finetune_recipe(RECIPE, [*SMALL, *where(own_scenes)[:3]])
    task = Segmentation(recipe)
    assert task.images.keys == [f"scene_0000{number}.jpg" for number in (0, 2, 3, 4)]
    assert "left out, since one of image and labels is not there: 1 (scene_00001.jpg, ...)" in task.describe()
    assert task.result([])["left_out_without_pair"] == ["scene_00001.jpg"]


def test_other_mistakes_are_named(own_scenes):
    with pytest.raises(ShardError, match=r"no image of .* has a label picture of its name"):
        LabelPictures.find(own_scenes / "images/training", own_scenes / "images/training", 7, 1, (0,))
    with pytest.raises(ShardError, match="No such file"):
        pictures_of(own_scenes, "tests")
    (own_scenes / "twice.txt").write_text("sky\nsea\nsky\n")
    with pytest.raises(ShardError, match="names 'sky' twice"):
        read_classes(own_scenes / "twice.txt")
    (own_scenes / "objectInfo.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t5\t6\twall\n2\t0.1\t5\t6\tbuilding, edifice\n"
    )
    assert read_classes(own_scenes / "objectInfo.txt") == ["wall", "building, edifice"]
    with pytest.raises(RecipeError, match=r"give data\.images=FOLDER"):
        Segmentation(load_finetune_recipe(RECIPE, SMALL))
    with pytest.raises(RecipeError, match="take a feature pyramid"):
        load_finetune_recipe(RECIPE, ["model.name=vit_b"])


def test_a_package_that_is_not_installed_is_named():
    """When the task is asked for; its recipe can be read without."""
    load = "from mimscale.transfer.recipe import find_task, load_finetune_recipe; load_finetune_recipe(sys.argv[1])"
    script = f"import sys; sys.modules['segmentation_models_pytorch'] = None; {load}; find_task('segmentation')"
    done = subprocess.run([sys.executable, "-c", script, RECIPE], cwd=ROOT, capture_output=True, text=True)
    assert "RecipeError" in done.stderr and "needs segmentation_models_pytorch" in done.stderr
    assert "pip install 'mimscale[dense]'" in done.stderr


# -- parts -----------------------------------------------------------------------------------------------------------------


def test_synced_batch_norm_is_torchs_and_keeps_fp32_statistics():
    ours, theirs = SyncedBatchNorm2d(5), torch.nn.BatchNorm2d(5)
    for step in range(3):
        x = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(step)) * 3 + 1
        pairs = [(module, x.clone().requires_grad_()) for module in (ours, theirs)]
        out = [module(value) for module, value in pairs]
        assert torch.allclose(out[0], out[1], atol=1e-5)
        for result in out:
            (result**3).sum().backward()
        assert torch.allclose(pairs[0][1].grad, pairs[1][1].grad, atol=1e-3)
    assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-5)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)
    kept = ours.running_var.clone()
    assert ours.bfloat16().weight.dtype == torch.bfloat16
    assert torch.equal(ours.running_var, kept) and ours(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(RecipeError, match="two images or more"):
        ours.train()(torch.zeros(1, 5, 1, 1))


def test_dropped_channels_belong_to_the_sample():
    x, keys = torch.ones(6, 400, 2, 2), torch.arange(6) * 104729
    whole = drop_channels(x, 0.1, keys, 0)
    assert torch.equal(drop_channels(x[4:], 0.1, keys[4:], 0), whole[4:])
    assert not torch.equal(drop_channels(x, 0.1, keys, 1), whole)
    assert whole.mean() == pytest.approx(1, abs=0.03) and whole.max() == pytest.approx(1 / 0.9)


@pytest.mark.parametrize(("size", "decay"), [("s", 0.95), ("b", 0.95), ("l", 0.9), ("h", 0.9), ("g", 0.9)])
def test_the_papers_settings(size, decay):
    recipe = load_finetune_recipe(RECIPES / f"ade20k_swinv2_{size}.yaml")
    assert recipe.finetune.layer_decay == decay and 1e-4 <= recipe.learning_rate <= 3e-4
    assert (recipe.train.iterations, recipe.train.global_batch, recipe.optimizer.weight_decay) == (80_000, 32, 0.05)
    assert recipe.schedule.kind == "linear" and recipe.model.drop_path == 0.1
    assert (recipe.data.image_size, recipe.data.stride, recipe.data.test_size) == (640, 426, (640, 2560))
    with torch.device("meta"):
        module = Segmentation.module_of(recipe, {"classes": ["one"] * 150})
        assert [rows for rows, _ in module.encoder.references] == [12, 12, 12, 6]
