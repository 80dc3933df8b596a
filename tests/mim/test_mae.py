"""MAE: the released weights give the reference's numbers; only visible patches are encoded."""

import pytest
import timm
import torch
from reference_mae import decode, encode, patch_target, positions, released_checkpoint
from reference_photographs import photographs, random_mask

from mimscale.mim import MAE, SimMIM
from mimscale.models import CheckpointMismatch, create_encoder, load_released
from mimscale.models.vit import sincos_positions


def small(img_size=64, norm_pix=True, **overrides):
    encoder = create_encoder("vit_b", img_size=img_size, **{"embed_dim": 48, "depth": 2, "num_heads": 4, **overrides})
    return MAE(encoder, norm_pix=norm_pix, decoder_dim=32, decoder_depth=2, decoder_heads=2)


@pytest.fixture(scope="module")
def state():
    return released_checkpoint(48, 2, 32, 2, patch=16, image=64, seed=1)


@pytest.mark.parametrize(
    ("name", "parameters"), [("vit_b", 85_798_656), ("vit_l", 303_301_632), ("vit_h", 630_764_800)]
)
def test_vits_have_the_size_of_timms_on_the_meta_device(name, parameters):
    with torch.device("meta"):
        encoder = create_encoder(name)
        model = MAE(encoder)
        patch = encoder.patch_size
        mask = torch.zeros(2, 224 // patch, 224 // patch, dtype=torch.bool)
        output = model(torch.zeros(2, 3, 224, 224), mask)
    table = (1 + (224 // patch) ** 2) * encoder.embed_dim  # timm counts the positions, which are no parameter here
    assert sum(p.numel() for p in encoder.parameters()) == parameters - table
    assert output.prediction.shape == (2, 3, 224, 224)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_a_released_checkpoint_gives_the_reference_tokens_and_losses(tmp_path, state, normalised, dtype, within):
    torch.save({"model": state}, tmp_path / "w.pth")
    model = small(norm_pix=normalised).to(dtype)
    loaded = load_released(model, tmp_path / "w.pth")
    assert set(loaded) == {name for name, _ in model.named_parameters()}
    images, mask = photographs(3, 64), random_mask(3, 4, 4, 12)
    # The released code shuffles the visible patches: their order makes no difference.
    visible = [(~m).flatten().nonzero().flatten()[torch.randperm(4)] for m in mask]
    tokens = encode(images.double(), state, 2, 4, 16, visible)
    predicted = decode(tokens, state, 2, 2, visible, 16)
    target = patch_target(images.double(), 16, normalised)
    hidden = mask.flatten(1)
    output = model(images.to(dtype), mask)
    for kind in ("l1", "l2"):
        error = (predicted - target).abs() if kind == "l1" else (predicted - target) ** 2
        assert output.per_sample[kind].mean().item() == pytest.approx(error.mean(-1)[hidden].mean().item(), rel=within)
    assert output.loss.item() == pytest.approx(output.per_sample["l2"].mean().item(), rel=within)
    pixels = patch_target(output.prediction.double(), 16, False)
    assert (pixels - predicted).norm() <= within * predicted.norm()
    ours = model.encode(images.to(dtype), mask)
    assert ours.shape == (3, 5, 48)
    for sample, chosen in enumerate(visible):
        expected = tokens[sample, 1:][chosen.argsort()]
        assert (ours[sample, 1:] - expected).norm() <= within * expected.norm()


def test_positions_are_the_released_ones_also_after_a_cast_to_bf16():
    table = sincos_positions(48, (4, 4), (4, 4), torch.device("cpu"), torch.float64)
    torch.testing.assert_close(table, positions(48, 4, 4), rtol=0, atol=1e-12)
    model = small().bfloat16()
    assert all(not t.is_floating_point() or t.dtype == torch.bfloat16 for t in model.buffers())
    assert all(p.requires_grad for p in model.parameters())
    output = model(photographs(2, 64), random_mask(2, 4, 4, 12))
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and all(p.grad is not None for p in model.parameters())


def test_weights_go_back_into_the_released_names(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    model = small().double()
    load_released(model, tmp_path / "w.pth")
    back = model.to_released({name: p.detach() for name, p in model.named_parameters()})
    assert back.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(back[name].double(), value, rtol=0, atol=1e-6)


def test_a_vit_takes_its_part_of_a_released_file_and_equals_timms(tmp_path, state):
    part = {n: v for n, v in state.items() if n != "mask_token" and not n.startswith("decoder")}
    torch.save({"model": part}, tmp_path / "encoder.pth")
    torch.save({"model": state}, tmp_path / "whole.pth")
    images = photographs(2, 64).double()
    other = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=4, num_classes=0
    ).double()
    other.load_state_dict(part)
    for name in ("encoder.pth", "whole.pth"):
        encoder = create_encoder("vit_b", img_size=64, embed_dim=48, depth=2, num_heads=4).double()
        load_released(encoder, tmp_path / name)
        torch.testing.assert_close(encoder.forward_features(images), other.eval().forward_features(images))
    classifier = create_encoder("vit_b", img_size=64, embed_dim=48, depth=2, num_heads=4, num_classes=3)
    assert not any(
        name.startswith(("norm.", "fc_norm", "head")) for name in load_released(classifier, tmp_path / "encoder.pth")
    )
    assert classifier(photographs(2, 64)).shape == (2, 3)
    with pytest.raises(CheckpointMismatch, match=r"decoder\.pred\.weight"):
        load_released(small(), tmp_path / "encoder.pth")


def test_learned_positions_in_a_file_are_never_dropped_in_silence(tmp_path, state):
    torch.save({**state, "pos_embed": state["pos_embed"] + 0.1}, tmp_path / "w.pth")
    with pytest.raises(CheckpointMismatch, match="learned_positions=True"):
        load_released(small(), tmp_path / "w.pth")
    encoder = create_encoder("vit_b", img_size=64, embed_dim=48, depth=2, num_heads=4, learned_positions=True)
    load_released(encoder, tmp_path / "w.pth")
    torch.testing.assert_close(encoder.pos_embed.double(), state["pos_embed"] + 0.1, rtol=0, atol=1e-6)
    assert encoder(photographs(1, 96), output="map").shape == (1, 48, 6, 6)
    with pytest.raises(CheckpointMismatch, match="img_size"):
        load_released(small(img_size=96), tmp_path / "w.pth")


def test_hidden_pixels_never_reach_the_encoder_and_pictures_are_of_pixels():
    model, images, mask = small().eval(), photographs(2, 64), random_mask(2, 4, 4, 12)
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].float()
    with torch.no_grad():
        assert torch.equal(model.encode(images, mask), model.encode(images + 5 * hidden, mask))
        torch.testing.assert_close(model.reconstruct(images, model.target(images), mask), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"attention_only": True}])
def test_checkpointing_and_drop_path_leave_gradients_as_they_are(options):
    torch.manual_seed(0)
    model = small(drop_path=0.5).double()
    images, mask, keys = photographs(2, 64).double(), random_mask(2, 4, 4, 12), torch.tensor([5, 8])
    model(images, mask, keys).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(True, **options)
    model(images, mask, keys).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_misfits_are_errors_that_say_what_would_fit():
    with pytest.raises(ValueError, match=r"not whole patches of 16: \[192, 208\] would be"):
        create_encoder("vit_b", img_size=200)
    with pytest.raises(ValueError, match=r"\[6, 8, 12\] would|would"):
        create_encoder("vit_b", num_heads=7)
    with pytest.raises(ValueError, match="ViT encoder"):
        MAE(create_encoder("swinv2_s", embed_dim=6, num_heads=(1, 1, 1, 1)))
    with pytest.raises(ValueError, match="mask_token=True"):
        SimMIM(small().encoder)
    with pytest.raises(ValueError, match="equally many"):
        mask = random_mask(2, 4, 4, 12)
        mask[0] = False
        small()(photographs(2, 64), mask)
    with pytest.raises(ValueError, match="mask must be"):
        small()(photographs(2, 64), random_mask(2, 2, 2, 1))
    with pytest.raises(ValueError, match='no "window_size"'):
        create_encoder("vit_b", window_size=7)
