"""Exported weights mean the same to timm, transformers, the released code and mimscale itself."""

import subprocess
import sys

import pytest
import timm
import torch
import transformers
from reference_photographs import photographs, random_mask
from safetensors.torch import load_file

from mimscale.mim import MAE, SimMIM
from mimscale.models import create_encoder, load_released
from mimscale.models.weights.export import ExportError, Part, export_weights, load, usage, write_safetensors

SIZES = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4)}


def trained(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def simmim(**overrides):
    return trained(SimMIM(create_encoder("swinv2_s", **{**SIZES, **overrides})))


@pytest.fixture(scope="module")
def mae():
    encoder = create_encoder("vit_b", img_size=64, embed_dim=48, depth=2, num_heads=4)
    return trained(MAE(encoder, decoder_dim=32, decoder_depth=2, decoder_heads=2))


@pytest.mark.parametrize(("image", "window", "before"), [(192, 12, 0), (224, 14, 12)])
def test_transformers_gives_the_same_features_and_prediction(tmp_path, image, window, before):
    model = simmim(img_size=image, window_size=window, pretrained_window_size=before)
    export_weights(model, "huggingface", tmp_path)
    images, mask = photographs(2, image), random_mask(2, image // 32, image // 32, 20)
    cells = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1)
    other, info = transformers.Swinv2ForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain = transformers.Swinv2Model.from_pretrained(tmp_path)
    with torch.no_grad():
        predicted = other.eval()(images, bool_masked_pos=cells).reconstruction
        features = plain.eval()(images).last_hidden_state
        ours = model.encoder(images, output="map").flatten(2).transpose(1, 2)
        assert (model(images, mask).prediction - predicted).abs().max() < 1e-3 * predicted.abs().max()
        assert (ours - features).abs().max() < 1e-3 * features.abs().max()


def test_timm_gives_the_same_features(tmp_path, mae):
    model = simmim()
    export_weights(model, "timm", tmp_path / "swin.safetensors")
    other = timm.create_model("swinv2_base_window12_192", num_classes=0, **SIZES)
    other.load_state_dict(load_file(tmp_path / "swin.safetensors"), strict=True)
    export_weights(mae, "timm", tmp_path / "vit.safetensors")
    vit = timm.create_model(
        "vit_base_patch16_224",
        num_classes=0,
        img_size=64,
        embed_dim=48,
        depth=2,
        num_heads=4,
        checkpoint_path=str(tmp_path / "vit.safetensors"),
    )
    images = photographs(2, 192)
    with torch.no_grad():
        ours, theirs = model.encoder.forward_features(images), other.eval().forward_features(images)
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
        ours, theirs = mae.encoder.forward_features(photographs(2, 64)), vit.eval().forward_features(photographs(2, 64))
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_swinv2_b_has_timms_names_and_shapes(tmp_path):
    with torch.device("meta"):
        model = SimMIM(create_encoder("swinv2_b"))
        other = timm.create_model("swinv2_base_window12_192", num_classes=0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    export_weights(model, "timm", tmp_path / "b.safetensors", lambda name: torch.zeros(shapes[name]))
    stored = load_file(tmp_path / "b.safetensors")
    assert {n: v.shape for n, v in stored.items()} == {n: p.shape for n, p in other.named_parameters()}


@pytest.mark.parametrize("kind", ["simmim", "mae"])
def test_the_released_form_loads_again_into_the_same_model(tmp_path, mae, kind):
    model = simmim() if kind == "simmim" else mae
    export_weights(model, "released", tmp_path / "w.pth")
    state = torch.load(tmp_path / "w.pth", weights_only=True)["model"]
    assert ("decoder.0.weight" if kind == "simmim" else "decoder_pred.weight") in state
    if kind == "simmim":
        again = SimMIM(create_encoder("swinv2_s", **SIZES))
    else:
        encoder = create_encoder("vit_b", img_size=64, embed_dim=48, depth=2, num_heads=4)
        again = MAE(encoder, decoder_dim=32, decoder_depth=2, decoder_heads=2)
    load_released(again, tmp_path / "w.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_an_encoder_is_one_line_to_use_at_any_image_size(tmp_path, mae):
    model = simmim()
    export_weights(model, "safetensors", tmp_path / "e.safetensors")
    encoder = load(tmp_path / "e.safetensors")
    images = photographs(2, 192)
    with torch.no_grad():
        assert torch.equal(encoder(images), model.encoder(images))
        for size in (64, 100, 224, 256):
            assert encoder(photographs(1, size)).shape == (1, 128)
        export_weights(mae, "safetensors", tmp_path / "v.safetensors")
        assert torch.equal(load(tmp_path / "v.safetensors")(photographs(2, 64)), mae.encoder(photographs(2, 64)))
        assert load(tmp_path / "v.safetensors")(photographs(2, 96)).shape == (2, 48)
    tuned = load(tmp_path / "e.safetensors", num_classes=5, img_size=224, window_size=14, pretrained_window_size=12)
    assert tuned(photographs(1, 224)).shape == (1, 5)
    with pytest.raises(ValueError, match="does not fit"):
        load(tmp_path / "e.safetensors", embed_dim=32)


def test_what_a_format_cannot_hold_and_files_of_others_are_errors(tmp_path, mae):
    with pytest.raises(ExportError, match="safetensors, timm, released"):
        export_weights(mae, "huggingface", tmp_path)
    with pytest.raises(ExportError, match="extra norms"):
        export_weights(simmim(extra_norm_every=2), "timm", tmp_path / "x")
    blocks = SimMIM(create_encoder("swinv2_s", **SIZES), decoder="4-blocks")
    with pytest.raises(ExportError, match="decoder of blocks"):
        export_weights(blocks, "huggingface", tmp_path)
    assert not [path for path in tmp_path.iterdir()]
    export_weights(simmim(), "timm", tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="does not say which encoder"):
        load(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "missing.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "junk.safetensors")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    def read(name):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_safetensors(tmp_path / "w.safetensors", [Part("a", "a")], {"a": (2,)}, read, {})
    assert not list(tmp_path.iterdir())


def test_exporting_holds_one_tensor_at_a_time(tmp_path):
    """A model of 40 tensors of 16 MB is written with far less memory than it has."""
    script = f"""
import resource, torch
from pathlib import Path
from mimscale.models.weights.export import Part, write_safetensors
shapes = {{str(i): (4096, 1024) for i in range(40)}}
parts = [Part(n, n) for n in shapes]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_safetensors(Path({str(tmp_path / "w.safetensors")!r}), parts, shapes, lambda n: torch.full((4096, 1024), float(n)), {{}})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = (
        int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout) * 1024
    )
    assert grown < 4 * 16 * 2**20
    stored = load_file(tmp_path / "w.safetensors")
    assert all((value == float(name)).all() for name, value in stored.items()) and len(stored) == 40


def test_the_line_that_is_printed_works(tmp_path, mae):
    for model, kinds in ((simmim(), ("safetensors", "timm", "huggingface")), (mae, ("safetensors", "timm"))):
        images = photographs(1, model.encoder.img_size[0])
        for kind in kinds:
            output = tmp_path / f"{kind}_{type(model).__name__}"
            output = output if kind == "huggingface" else output.with_suffix(".safetensors")
            export_weights(model, kind, output)
            line = usage(kind, output, model.encoder).partition(" = ")[2].replace("mimscale.load", "load")
            made = eval(line, {"load": load, "timm": timm, "transformers": transformers}).eval()
            with torch.no_grad():
                got = made(images)
            got = got.pooler_output if kind == "huggingface" else got
            if kind == "timm" and model is mae:
                continue  # timm pools the class token by default
            assert (got - model.encoder(images)).norm() < 1e-3 * got.norm()
