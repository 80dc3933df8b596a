"""A released weight's validation loss is measured both ways and set beside the published one; what does not fit is refused."""

from __future__ import annotations

import json

import pytest
import torch
from reference_swin_v2 import normalised_target, pixels, released_checkpoint, simmim_loss, swin_features

from mimscale.cli import main
from mimscale.commands.verify_checkpoint import table
from mimscale.data import ShardIndex, ValidationStream
from mimscale.study.results.release_names import ReleaseName, read_name
from mimscale.study.results.released import published_loss

HEADS = (2, 2, 4, 4)
DEPTHS = (2, 2, 2, 2)


@pytest.fixture(scope="module")
def weights():
    return released_checkpoint(16, DEPTHS, HEADS, window=4, image=128, seed=3)


@pytest.fixture
def released(tmp_path, weights):
    """A file under a released name; returns its path."""

    def write(name="swinv2_small_img128_window4.pth", state=None):
        path = tmp_path / name
        torch.save({"model": weights if state is None else state}, path)
        return path

    return write


def test_both_losses_are_those_of_an_implementation_that_shares_no_code(
    released, weights, solar_shards, tmp_path, capsys
):
    count = 1
    found = tmp_path / "found.json"
    arguments = ["--shards", str(solar_shards), "--images", str(count), "--json", str(found)]
    assert main(["verify-checkpoint", str(released()), *arguments]) == 0
    figures = json.loads(found.read_text())
    stream = ValidationStream(ShardIndex.load(solar_shards), image_size=128, batch_size=count, mask_grid=4, masked=10)
    batch = next(iter(stream))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (batch.images.double() / 255 - mean) / std
    state = {name.removeprefix("encoder."): value for name, value in weights.items()}
    prediction = pixels(swin_features(images, batch.mask, state, DEPTHS, HEADS, 4), state)
    target = normalised_target(images, 47)
    for kind in ("l1", "l2"):
        expected = simmim_loss(prediction, target, batch.mask, kind).item()
        assert figures[f"val_loss_{kind}"] == pytest.approx(expected, rel=1e-5)
    assert (figures["image_size"], figures["window_size"], figures["validation_images"]) == (128, 4, count)
    said = capsys.readouterr().out
    assert f"{figures['val_loss_l1']:.4f}" in said and f"{figures['val_loss_l2']:.4f}" in said
    assert "the weights are of none of Table 1's sizes" in said


def test_the_published_loss_of_a_run_is_found_and_set_beside():
    assert published_loss("swinv2_s", "in1k_10", 125_000) == 0.4820
    assert published_loss("swinv2_s", "in22k", 125_000) is None
    figures = {
        "file": "swinv2_small_1kper10_125k.pth",
        "model": "swinv2_s",
        "encoder_parameters": 48_960_000,
        "image_size": 192,
        "validation_images": 50_000,
        "dataset": "in1k_10",
        "iterations": 125_000,
        "val_loss_l1": 0.4825,
        "val_loss_l2": 0.5333,
        "baseline_l1": 0.8,
        "baseline_l2": 1.0,
        "published_val_loss": 0.4820,
    }
    said = table(figures).splitlines()
    assert said[2].split() == ["l1", "0.4825", "0.4820", "+0.0005", "0.8000"]
    assert said[3].split() == ["l2", "0.5333", "0.4820", "+0.0513", "1.0000"]
    assert "l1 is the nearer" in said[4]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("swinv2_small_1kper10_125k.pth", ReleaseName("swinv2_s", "in1k_10", 125_000)),
        ("swinv2_giant_22k_500k.pth", ReleaseName("swinv2_g", "in22k", 500_000)),
        ("swinv2_base_1k_250k.pth", ReleaseName("swinv2_b", "in1k_100", 250_000)),
        (
            "simmim_pretrain__swinv2_base__img192_window12__800ep.pth",
            ReleaseName("swinv2_b", image_size=192, window_size=12),
        ),
        ("weights.pth", ReleaseName()),
    ],
)
def test_names_of_released_files_say_what_they_are(name, says):
    assert read_name(name) == says


def test_what_cannot_be_verified_is_said_in_a_line(released, weights, solar_shards, photo_shards, tmp_path, capsys):
    bare = {name: value for name, value in weights.items() if not name.startswith("decoder.")}
    short = {name: value for name, value in weights.items() if name != "encoder.layers.1.blocks.0.attn.proj.weight"}
    text = tmp_path / "notes.pth"
    text.write_text("not weights")
    cases = [
        ([released("bare_img128.pth", bare), "--shards", solar_shards], "an encoder without its decoder"),
        ([released("short_img128.pth", short), "--shards", solar_shards], "layers.1.blocks.0.attn.proj.weight"),
        (
            [released("head.pth", {"head.weight": torch.zeros(2, 2)}), "--shards", solar_shards],
            "not the weights of a SwinV2",
        ),
        ([text, "--shards", solar_shards], "notes.pth"),
        ([released(), "--shards", photo_shards], "has no split 'val'"),
        ([released(), "--shards", tmp_path / "nowhere"], "nowhere"),
    ]
    for arguments, says in cases:
        assert main(["verify-checkpoint", *map(str, arguments)]) == 1, arguments
        said = capsys.readouterr()
        assert says in said.err and said.err.startswith("mimscale: error:") and said.out == "", said.err
    with pytest.raises(SystemExit, match="2"):
        main(["verify-checkpoint", str(released()), "--shards", str(solar_shards), "--images", "0"])
    assert "argument --images: '0' is not a number of at least 1" in capsys.readouterr().err
