"""SimMIM: the paper's masks and targets, the loss on hidden pixels, pictures a person can look at."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_photographs import photographs, random_mask
from reference_swin_v2 import normalised_target

from mimscale.masking import MAE_RATIO, SIMMIM_RATIO, MaskGeometry, masked_up, visible_down
from mimscale.mim import SimMIM, local_normalise
from mimscale.mim.targets import create_target
from mimscale.models import create_encoder


def small(**overrides):
    encoder = create_encoder(
        "swinv2_s", img_size=64, window_size=4, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2)
    )
    return SimMIM(encoder, **{"target_window": 15, **overrides})


def test_masks_hide_what_the_papers_hide():
    assert masked_up(36, SIMMIM_RATIO) == 22
    assert masked_up(35, 0.6) == 21
    assert visible_down(196, MAE_RATIO) == 147
    assert visible_down(256, MAE_RATIO) == 192
    assert MaskGeometry.of(192, 32, SIMMIM_RATIO) == MaskGeometry(32, (6, 6), 22)
    assert MaskGeometry.of((224, 112), 16, MAE_RATIO, visible_down) == MaskGeometry(16, (14, 7), 74)
    with pytest.raises(ValueError, match="200 is not a multiple of the 32-pixel mask patch; 192 would fit"):
        MaskGeometry.of(200, 32, SIMMIM_RATIO)
    with pytest.raises(ValueError, match="between 0 and 1"):
        MaskGeometry.of(192, 32, 1.0)


@pytest.mark.parametrize("window", [47, 15])
def test_the_target_of_photographs_is_the_plain_formula(window):
    images = photographs(3, 64)
    expected = normalised_target(images, window)
    assert (local_normalise(images, window) - expected).abs().max() < 1e-5
    torch.testing.assert_close(local_normalise(images.double(), window), expected, rtol=0, atol=1e-9)


@given(
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    half=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    flat=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_the_target_is_the_plain_formula_at_any_size(height, width, half, seed, flat):
    images = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if flat:
        images = images.round()
    expected = normalised_target(images, 2 * half + 1)
    torch.testing.assert_close(local_normalise(images, 2 * half + 1), expected, rtol=0, atol=1e-9)


def test_an_even_target_window_is_an_error():
    with pytest.raises(ValueError, match="odd"):
        small(target_window=46)
    with pytest.raises(ValueError, match="odd"):
        local_normalise(photographs(1, 64), 46)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("window", [15, None])
def test_the_loss_is_the_mean_over_hidden_pixels_and_only_those(loss, window):
    model = small(loss=loss, target_window=window)
    images, mask = photographs(3, 64), random_mask(3, 2, 2, 2)
    mask[0] = torch.tensor([[True, False], [False, False]])  # samples may hide different numbers
    output = model(images, mask)
    hidden = F.interpolate(mask[:, None].float(), scale_factor=32).bool().expand(-1, 3, -1, -1)
    target = images if window is None else local_normalise(images, window)
    difference = (output.prediction - target)[hidden]
    expected = difference.abs().mean() if loss == "l1" else (difference**2).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output["loss"] is output.loss and output.loss.requires_grad
    whole = model.eval()(images, mask)
    for kind in ("l1", "l2"):
        torch.testing.assert_close(output.per_sample[kind], whole.per_sample[kind])
        assert output.per_sample[kind].shape == (3,) and not output.per_sample[kind].requires_grad
    first = (output.prediction - target)[0][hidden[0]]
    assert whole.per_sample["l1"][0].item() == pytest.approx(first.abs().mean().item(), rel=1e-5)


def test_hidden_pixels_never_reach_the_encoder():
    model, images, mask = small().eval(), photographs(2, 64), random_mask(2, 2, 2, 2)
    changed = images + 5 * F.interpolate(mask[:, None].float(), scale_factor=32)
    with torch.no_grad():
        assert torch.equal(model.encode(images, mask), model.encode(changed, mask))
        assert not torch.equal(model.encode(images, ~mask), model.encode(changed, ~mask))


@pytest.mark.parametrize("window", [15, None])
def test_a_perfect_prediction_reconstructs_the_photograph(window):
    model, images, mask = small(target_window=window), photographs(2, 64), random_mask(2, 2, 2, 2)
    picture = model.reconstruct(images, model.target(images), mask)
    torch.testing.assert_close(picture, images, rtol=0, atol=1e-4)
    blank = model.reconstruct(images, torch.zeros_like(images), mask)
    hidden = F.interpolate(mask[:, None].float(), scale_factor=32).bool().expand(-1, 3, -1, -1)
    assert torch.equal(blank[~hidden], images[~hidden]) and not torch.equal(blank[hidden], images[hidden])


def test_the_paper_spares_the_bias_mlp_and_the_released_code_decays_it():
    model = small()
    paper, released = model.no_weight_decay(), model.no_weight_decay("released")
    assert released == {"encoder.mask_token"}
    assert released < paper <= {name for name, _ in model.named_parameters()}
    assert "encoder.layers.0.blocks.0.attn.cpb_mlp.2.weight" in paper
    assert "encoder.layers.0.blocks.0.attn.logit_scale" in paper
    assert not any("qkv" in name or "decoder" in name for name in paper)
    with pytest.raises(ValueError, match="fidelity"):
        model.no_weight_decay("exact")


def test_unknown_losses_decoders_and_encoders_are_errors():
    with pytest.raises(ValueError, match="l2"):
        small(loss="mse")
    with pytest.raises(ValueError, match="4-blocks"):
        small(decoder="four")
    with pytest.raises(ValueError, match="mask token"):
        SimMIM(create_encoder("swinv2_s", embed_dim=6, num_heads=(1, 1, 1, 1), mask_token=False))


@pytest.mark.parametrize("name", ["swinv2_s", "vit_b"])
@pytest.mark.parametrize("patch", [16, 32, 64])
def test_squares_of_any_whole_number_of_patches_can_be_masked(name, patch):
    """Finer and coarser than a feature: masked pixels alone count, and never reach the encoder."""
    sizes = (
        {"window_size": 4, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)}
        if name == "swinv2_s"
        else {"embed_dim": 32, "depth": 2, "num_heads": 2}
    )
    torch.manual_seed(0)
    encoder = create_encoder(name, img_size=128, drop_path=0.0, mask_token=True, **sizes)
    model = SimMIM(encoder, target_window=15, mask_patch=patch)
    images, cells = photographs(2, 128), 128 // patch
    assert model.mask_geometry.grid == (cells, cells)
    mask = random_mask(2, cells, cells, model.mask_geometry.masked)
    masked = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    output, whole = model(images, mask), model.eval()(images, mask)
    expected = ((whole.prediction - local_normalise(images, 15)) ** 2)[masked.expand(-1, 3, -1, -1)].mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert whole.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        assert torch.equal(model.encode(images, mask), model.encode(images + 5 * masked, mask))
        changed = model.reconstruct(images, torch.zeros_like(images), mask) != images
    assert not changed[~masked.expand_as(changed)].any() and changed[masked.expand_as(changed)].float().mean() > 0.9


def test_masks_that_do_not_fit_are_errors_that_say_what_would():
    encoder = create_encoder("vit_h", img_size=224, embed_dim=32, depth=1, num_heads=2, mask_token=True)
    with pytest.raises(
        ValueError, match=r"mask_patch=32 is not a multiple of the 14-pixel patch .*; 28 or 42 would fit"
    ):
        SimMIM(encoder)
    with pytest.raises(ValueError, match=r"mask must be \(2, 4, 4\) .* squares of 16 pixels"):
        small(mask_patch=16)(photographs(2, 64), random_mask(2, 2, 2, 1))
    with pytest.raises(ValueError, match="without a classifier"):
        SimMIM(create_encoder("swinv2_s", num_classes=3))
    with pytest.raises(ValueError, match="SwinV2 alone"):
        SimMIM(create_encoder("vit_b", mask_token=True), decoder="4-blocks")


@pytest.mark.parametrize("target", ["raw-pixels", "patch-normalised-pixels", "normalised-pixels"])
def test_every_target_of_pixels_has_a_way_back_to_the_photograph(target):
    images = photographs(2, 64)
    predicts = create_target(target)
    seen = predicts(images)
    assert seen.shape == images.shape
    torch.testing.assert_close(predicts.pixels(seen, images), images, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=f"{target} has no option bins"):
        create_target(target, bins=3)
