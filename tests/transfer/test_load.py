"""A trained run, of any kind, is one line to use, and sees of an image file what training sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from training_runs import ROOT, TINY

import mimscale
from mimscale.cli import main
from mimscale.data import ShardIndex, ValidationStream
from mimscale.data.build import writer
from mimscale.data.build.sources.image_folder import ImageFolder
from mimscale.training.checkpoint import open_newest
from mimscale.training.pretraining.reconstruction import read_images
from mimscale.training.pretraining.task import pretrain
from mimscale.training.recipe import RecipeError, load_recipe
from mimscale.transfer.load import load_run
from mimscale.transfer.recipe import load_finetune_recipe
from mimscale.transfer.task import finetune

RECIPES = ROOT / "launchers/recipes"
SHORT = [
    *[key for key in TINY if key.startswith(("model.", "data.image_size", "data.workers", "optimizer.lr_batch"))],
    "schedule.warmup=1",
    "train.iterations=2",
    "train.checkpoint_every=1",
    "train.validate_every=9",
    "data.validation_images=8",
]


@pytest.fixture(scope="module")
def runs(alone, tmp_path_factory, shards) -> Path:
    """Two steps of a pre-training, of a classification with averaged weights, on SwinV2 and a ViT, and of a segmentation."""
    folder = tmp_path_factory.mktemp("runs")
    data, small = f"data.shards={shards}", "train.global_batch=4"
    pretrain(load_recipe(RECIPES / "demo.yaml", [*SHORT, data, small]), {}, folder / "pretraining")
    start, ema = f"finetune.from={folder}/pretraining", "finetune.ema=0.5"
    demo = RECIPES / "finetune/demo.yaml"
    finetune(load_finetune_recipe(demo, [*SHORT, data, small, start, ema]), {}, str(folder / "classification"))
    vit = ["model.name=vit_b", "model.embed_dim=32", "model.depth=2", "model.num_heads=2", "data.image_size=64"]
    vit += [key for key in SHORT if not key.startswith(("model.", "data.image_size"))]
    recipe = load_finetune_recipe(
        RECIPES / "finetune/imagenet1k_vit_b.yaml", [*vit, data, small, ema, "finetune.from=null"]
    )
    finetune(recipe, {}, str(folder / "vit"))
    return folder


@pytest.fixture(scope="module")
def segmentation(alone, runs, scenes) -> Path:
    """Two steps of a segmentation, which has batch norms."""
    places = {
        "images": scenes / "images/training",
        "annotations": scenes / "annotations/training",
        "classes": scenes / "classes.txt",
    }
    narrow = ["decoder.channels=16", "decoder.auxiliary_channels=16", "model.pretrained_window_size=[6,6,6,3]"]
    overrides = [*SHORT, *narrow, "train.global_batch=4", f"finetune.from={runs}/pretraining"]
    overrides += [f"data.{key}={place}" for key, place in places.items()]
    recipe = load_finetune_recipe(RECIPES / "finetune/demo_segmentation.yaml", overrides)
    finetune(recipe, {}, str(runs / "segmentation"))
    return runs / "segmentation"


@pytest.fixture(scope="module")
def photograph(photographs) -> Image.Image:
    return Image.open(photographs / "class_0" / "photo_00.JPEG")


def test_a_run_and_its_export_are_the_same_encoder_with_the_same_images(runs, photograph, tmp_path, capsys):
    for name in ("pretraining", "classification", "vit"):
        run, file = runs / name, tmp_path / f"{name}.safetensors"
        assert main(["export", str(run), "--to", "safetensors", "--output", str(file)]) == 0
        loaded, exported = mimscale.load(run), mimscale.load(str(file))
        images = mimscale.transform(loaded)([photograph, np.array(photograph)])
        assert torch.equal(images[0], images[1])
        assert torch.equal(mimscale.transform(exported)(photograph), images[0])
        size = load_run(run).recipe.data.image_size
        assert images.shape == (2, 3, size, size) and images.dtype == torch.float32
        with torch.no_grad():
            features = loaded(images)
            assert features.shape[1] == loaded.forward_head(loaded.forward_features(images), pre_logits=True).shape[1]
            assert torch.equal(exported(images), features)
            assert not torch.equal(mimscale.load(f"{run}@1")(images), features)


def test_a_fine_tuned_runs_encoder_has_the_averaged_weights_and_its_classifier_on_demand(runs, photograph):
    for name in ("classification", "vit"):
        run = load_run(runs / name)
        checkpoint = open_newest(runs / name)
        encoder = mimscale.load(runs / name)
        weights = dict(encoder.named_parameters())
        assert not any(weight.startswith("head.") for weight in weights)
        for weight, value in weights.items():
            assert torch.equal(value, checkpoint.tensor(f"average/encoder.{weight}")), weight
        classes = len(checkpoint.manifest["data"]["classes"])
        images = mimscale.transform(encoder)([photograph])
        with torch.no_grad():
            logits = mimscale.load(runs / name, num_classes=classes)(images)
            assert torch.equal(logits, run.module()(images)[0])
            assert mimscale.load(runs / name, num_classes=classes + 1)(images).shape == (1, classes + 1)


def test_a_pretraining_at_a_larger_size_sees_larger_images(runs, photograph):
    encoder = mimscale.load(runs / "pretraining", img_size=128, window_size=8, pretrained_window_size=6)
    image = mimscale.transform(encoder)(photograph)
    assert image.shape == (3, 128, 128)
    with torch.no_grad():
        assert encoder(image[None]).shape == (1, 128)


def test_batch_norms_bring_their_statistics(segmentation):
    run = load_run(segmentation)
    statistics = {name: value for name, value in run.module().named_buffers() if "running" in name}
    assert statistics
    for name, value in statistics.items():
        assert torch.equal(value, run.checkpoint.tensor(name)), name
    assert any(not torch.equal(value, torch.ones_like(value)) for name, value in statistics.items() if "var" in name)
    with torch.no_grad():
        assert mimscale.load(segmentation)(torch.zeros(1, 3, 96, 96)).shape == (1, 128)


def test_what_cannot_be_done_is_said(runs, tmp_path, capsys):
    tuned = str(runs / "classification")
    assert main(["export", tuned, "--to", "timm", "--output", str(tmp_path / "t.safetensors")]) == 1
    assert "a fine-tuned encoder goes --to safetensors" in capsys.readouterr().err
    assert main(["reconstruct", tuned]) == 1
    assert "is a fine-tuning, which fills nothing in" in capsys.readouterr().err
    assert main(["predict", "x.png", "--run", str(runs / "pretraining")]) == 1
    assert "is a pre-training, which has no head" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no run or file nowhere"):
        mimscale.load("nowhere")
    with pytest.raises(RecipeError, match="there is no run nowhere"):
        load_run("nowhere")
    transform = mimscale.transform(mimscale.load(runs / "pretraining"))
    with pytest.raises(ValueError, match=r"an array of uint8 \(height, width, 3\), not float32 \(9, 9, 3\)"):
        transform(np.zeros((9, 9, 3), np.float32))


def test_a_file_of_before_that_says_nothing_of_its_images_has_imagenets(runs, photograph, tmp_path):
    file = tmp_path / "e.safetensors"
    main(["export", str(runs / "pretraining"), "--to", "safetensors", "--output", str(file)])
    with safe_open(file, "pt") as opened:
        kept, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    from safetensors.torch import save_file

    del kept["mimscale.images"]
    save_file(tensors, file, kept)
    images = mimscale.transform(mimscale.load(file))(photograph)
    assert torch.equal(images, mimscale.transform(mimscale.load(runs / "pretraining"))(photograph))


def test_16_bits_a_pixel_are_to_predict_and_reconstruct_what_they_are_to_training(runs, photograph, tmp_path, capsys):
    grey = np.array(photograph.convert("L"))[:200, :260]
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(grey).save(tmp_path / "eight.png")
    source = ImageFolder(folder.parent)
    writer.build(source, tmp_path / "shards", val=source)
    trained_on = next(iter(ValidationStream(ShardIndex.load(tmp_path / "shards"), 96, 1))).images
    sixteen, eight = folder / "sixteen.png", tmp_path / "eight.png"
    assert torch.equal(read_images([sixteen], 96), trained_on)
    assert torch.equal(read_images([eight], 96), trained_on)
    transform = mimscale.transform(mimscale.load(runs / "pretraining"))
    with Image.open(sixteen) as opened:
        assert torch.equal(transform(opened), transform(np.repeat(grey[:, :, None], 3, axis=2)))
    capsys.readouterr()
    assert main(["predict", str(sixteen), str(eight), "--run", str(runs / "classification")]) == 0
    said = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 2 and said[0] == said[1]
    for path in (sixteen, eight):
        assert main(["reconstruct", str(runs / "pretraining"), str(path), "--output", f"{path}.filled.png"]) == 0
    assert Path(f"{sixteen}.filled.png").read_bytes() == Path(f"{eight}.filled.png").read_bytes()
