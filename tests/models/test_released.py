"""Released checkpoints give the features and losses of an implementation that shares no code with the product."""

import argparse
import itertools
import sys
import types

import pytest
import torch
from reference_photographs import photographs, random_mask
from reference_swin_v2 import normalised_target, pixels, released_checkpoint, simmim_loss, swin_features
from safetensors.torch import save_file

from mimscale.mim import SimMIM
from mimscale.mim.targets import create_target
from mimscale.models import CheckpointMismatch, create_encoder, load_released

HEADS = (2, 2, 4, 4)


def small(**overrides):
    settings = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": HEADS, "drop_path": 0.0}
    return create_encoder("swinv2_s", **{**settings, **overrides})


@pytest.fixture(scope="module")
def checkpoint():
    return released_checkpoint(16, (2, 2, 2, 2), HEADS, window=12, image=192, seed=3)


@pytest.mark.parametrize(
    ("image", "window", "trained_image", "trained_window", "before", "depths"),
    [
        (192, 12, 192, 12, None, (2, 2, 2, 2)),
        (224, 14, 192, 12, (12, 12, 12, 6), (2, 2, 2, 2)),
        (128, 4, 128, 4, None, (2, 3, 4, 2)),  # shifted windows in three stages, an odd depth
    ],
)
def test_a_released_checkpoint_gives_the_reference_features_and_losses(
    tmp_path, image, window, trained_image, trained_window, before, depths
):
    state = released_checkpoint(16, depths, HEADS, trained_window, trained_image, seed=3)
    torch.save({"model": state}, tmp_path / "w.pth")
    count = 2 if image == 128 else 1
    images, mask = photographs(count, image), random_mask(count, image // 32, image // 32, image // 32)
    # The reference is always fp64: in fp32 its own rounding would be as large as the product's.
    weights = {name.removeprefix("encoder."): value for name, value in state.items()}
    expected = swin_features(images.double(), mask, weights, depths, HEADS, window, before)
    prediction = pixels(expected, weights)
    targets = {None: images.double(), 47: normalised_target(images, 47)}

    for dtype, within in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        encoder = small(img_size=image, window_size=window, pretrained_window_size=before or 0, depths=depths)
        model = SimMIM(encoder).to(dtype)
        load_released(model, tmp_path / "w.pth")
        x = images.to(dtype)
        with torch.no_grad():
            features = model.encode(x, mask)
        assert features.dtype == dtype
        assert (features - expected).norm() <= within * expected.norm()
        for kind, target_window in itertools.product(("l1", "l2"), targets):
            raw, options = target_window is None, {} if target_window is None else {"window": target_window}
            model.loss = kind
            model.predicts = create_target("raw-pixels" if raw else "normalised-pixels", **options)
            loss = simmim_loss(prediction, targets[target_window], mask, kind).item()
            with torch.no_grad():
                for output in (model.eval()(x, mask), model.train()(x, mask)):
                    assert output.loss.item() == pytest.approx(loss, rel=within)
                    assert (output.prediction - prediction).norm() <= within * prediction.norm()


@pytest.mark.parametrize("form", ["model", "bare", "safetensors", "old-names", "settings"])
def test_every_form_of_a_released_file_loads(tmp_path, checkpoint, form, monkeypatch):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(checkpoint, path)
    elif form == "bare":
        torch.save(checkpoint, path)
    elif form == "old-names":
        torch.save({"model": {n.replace("cpb_mlp", "rpe_mlp"): v for n, v in checkpoint.items()}}, path)
    elif form == "settings":

        def fill(node, **entries):
            dict.__init__(node, entries)
            node.__dict__["__immutable__"] = True

        module = types.ModuleType("yacs.config")
        module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config", "__init__": fill})
        monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        monkeypatch.setitem(sys.modules, "yacs.config", module)
        settings = module.CfgNode(DATA=module.CfgNode(IMG_SIZE=192))
        torch.save({"model": checkpoint, "config": settings, "args": argparse.Namespace(epochs=1)}, path)
        monkeypatch.delitem(sys.modules, "yacs.config")
    else:
        torch.save({"model": checkpoint}, path)
    model = SimMIM(small())
    loaded = load_released(model, path)
    assert set(loaded) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, checkpoint[name].float())


def test_an_encoder_takes_its_part_of_a_pre_training_checkpoint(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "w.pth")
    encoder = small(mask_token=False, num_classes=5, img_size=224, window_size=14, pretrained_window_size=12)
    head = encoder.head.weight.clone()
    loaded = load_released(encoder, tmp_path / "w.pth")
    assert "layers.0.blocks.0.attn.qkv.weight" in loaded and "head.weight" not in loaded
    assert torch.equal(encoder.head.weight, head)


def test_a_fine_tuned_checkpoint_loads_with_its_classifier(tmp_path):
    state = released_checkpoint(16, (2, 2, 2, 2), HEADS, 12, 192, seed=4, head=False, prefix="")
    del state["mask_token"]
    state |= {"head.weight": torch.randn(5, 128), "head.bias": torch.randn(5)}
    torch.save({"model": state}, tmp_path / "w.pth")
    encoder = small(mask_token=False, num_classes=5)
    load_released(encoder, tmp_path / "w.pth")
    assert torch.equal(encoder.head.weight, state["head.weight"])
    load_released(small(mask_token=False), tmp_path / "w.pth")
    with pytest.raises(CheckpointMismatch, match=r"head\.weight is \(5, 128\) in the file, \(7, 128\) in the model"):
        load_released(small(mask_token=False, num_classes=7), tmp_path / "w.pth")
    with pytest.raises(CheckpointMismatch, match="mask_token=False"):
        load_released(small(num_classes=5), tmp_path / "w.pth")


def test_what_does_not_fit_is_one_error_that_lists_it_and_nothing_is_loaded(tmp_path, checkpoint):
    state = dict(checkpoint)
    del state["encoder.norm.bias"]
    state["encoder.layers.9.surplus"] = torch.zeros(3)
    state["decoder.0.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "w.pth")
    model = SimMIM(small())
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointMismatch) as caught:
        load_released(model, tmp_path / "w.pth")
    for name in ("encoder.norm.bias", "encoder.layers.9.surplus", "decoder.0.bias is (7,) in the file, (3072,)"):
        assert name in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_extra_norms_in_a_file_are_named_and_can_be_had(tmp_path, checkpoint):
    state = dict(checkpoint)
    for stage in range(4):
        for end in ("weight", "bias"):
            state[f"encoder.layers.{stage}.blocks.1.norm3.{end}"] = torch.rand(16 * 2**stage)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointMismatch, match="extra_norm_every"):
        load_released(SimMIM(small()), tmp_path / "w.pth")
    load_released(SimMIM(small(extra_norm_every=2)), tmp_path / "w.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_holds_no_weights_is_named(tmp_path, content):
    path = tmp_path / "w.pth"
    if content is None:
        torch.save({"model": {"a": 3}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pth"):
        load_released(small(), path)
    with pytest.raises(ValueError, match="no checkpoint"):
        load_released(small(), tmp_path / "missing.pth")
