"""The SwinV2 encoders: the paper's sizes, timm's dialect and numbers, safe to build and cast in any way."""

import copy

import pytest
import timm
import torch
from reference_photographs import photographs, random_mask
from timm.optim._param_groups import param_groups_layer_decay

from mimscale.mim import SimMIM
from mimscale.models import create_encoder


def small(**overrides):
    settings = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 2, 3, 2), "num_heads": (2, 2, 4, 4)}
    return create_encoder("swinv2_s", **{**settings, **overrides})


def randomise(model, seed=0):
    """Norms start at 0, which would hide whatever a block does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("name", "parameters", "giga_macs"),
    [
        ("swinv2_s", 48_959_514, 6.81),
        ("swinv2_b", 86_893_944, 11.86),
        ("swinv2_l", 195_203_124, 26.1),
        ("swinv2_h", 655_211_274, 86.0),
        ("swinv2_g", 1_060_977_444, 138.6),
    ],
)
def test_encoders_have_the_sizes_of_table_1_on_the_meta_device(name, parameters, giga_macs):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        encoder = create_encoder(name)
        images, mask = torch.empty(2, 3, 192, 192), torch.empty(2, 6, 6, dtype=torch.bool)
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        features = encoder(images, mask=mask, output="map")
    assert features.shape == (2, encoder.num_features, 6, 6)
    assert counter.get_total_flops() / 4e9 == pytest.approx(giga_macs, rel=0.01)


@pytest.mark.parametrize(("image", "window"), [(64, 4), (96, 3), (128, 8)])
def test_features_equal_timms(image, window):
    encoder = randomise(small(img_size=image, window_size=window)).eval().double()
    other = timm.models.swin_transformer_v2.SwinTransformerV2(
        img_size=image, window_size=window, embed_dim=16, depths=(2, 2, 3, 2), num_heads=(2, 2, 4, 4), num_classes=0
    )
    names = {}
    for name, value in encoder.state_dict().items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) + 1)
        if name != "mask_token":
            names[".".join(parts)] = value
    other.load_state_dict(names, strict=True)
    other = other.eval().double()
    images = photographs(2, image).double()
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward_features(images), other.forward_features(images), rtol=0, atol=1e-6)
        torch.testing.assert_close(encoder(images), other(images), rtol=0, atol=1e-6)
        ours, theirs = encoder.forward_intermediates(images)[1], other.forward_intermediates(images)[1]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_layer_decay_groups_blocks_as_the_released_code_does():
    encoder = create_encoder("swinv2_s", embed_dim=6, num_heads=(1, 1, 1, 1), num_classes=3)
    groups = param_groups_layer_decay(encoder, layer_decay=0.5, no_weight_decay_list=encoder.no_weight_decay())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    last = 25

    def layer(parameter):
        return last + round(torch.tensor(scale[id(parameter)]).log2().item())

    assert layer(encoder.patch_embed.proj.weight) == layer(encoder.mask_token) == 0
    assert layer(encoder.layers[0].blocks[0].mlp.fc1.weight) == 1
    assert layer(encoder.layers[0].downsample.reduction.weight) == layer(encoder.layers[0].blocks[1].norm1.weight) == 2
    assert layer(encoder.layers[2].blocks[0].attn.q_bias) == 5
    assert layer(encoder.layers[3].blocks[1].norm2.weight) == 24
    assert layer(encoder.norm.weight) == layer(encoder.head.weight) == last


def test_blocks_start_as_the_identity_and_weights_come_from_the_seed_alone():
    torch.manual_seed(5)
    encoder = small()
    x = torch.randn(2, 256, 16)
    plan = encoder._plan(photographs(1, 64))
    assert torch.equal(encoder.layers[0].blocks[1](x, positions=plan.stages[0].positions[1]), x)
    torch.manual_seed(5)
    again = small()
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    assert encoder.mask_token.std().item() == pytest.approx(0.02, rel=0.5)


def test_every_layer_sets_its_own_weights_when_it_is_constructed(monkeypatch):
    """deepspeed.zero.Init partitions a layer's parameters when its constructor returns, and then a sweep is lost."""

    def no_sweep(*_):
        raise AssertionError("a sweep over the finished model")

    monkeypatch.setattr(torch.nn.Module, "apply", no_sweep)
    seen = {}
    original = torch.nn.Module.__setattr__

    def watch(self, name, value):
        if isinstance(value, torch.nn.Module):
            for key, parameter in value.named_parameters():
                seen.setdefault(id(parameter), (key, parameter, parameter.detach().clone()))
        original(self, name, value)

    monkeypatch.setattr(torch.nn.Module, "__setattr__", watch)
    model = SimMIM(small())
    assert len(seen) == sum(1 for _ in model.encoder.parameters()) + 2
    for key, parameter, when_constructed in seen.values():
        assert torch.equal(parameter, when_constructed), key


def test_a_bf16_model_trains_and_stays_close_to_fp32():
    model = randomise(SimMIM(small(drop_path=0.3), target_window=15), seed=1)
    images, mask, keys = photographs(4, 64), random_mask(4, 2, 2, 2), torch.arange(4)
    expected = model(images, mask, keys).loss.item()
    low = copy.deepcopy(model).bfloat16()
    assert all(t.dtype == torch.bfloat16 for t in [*low.parameters(), *low.buffers()])
    loss = low(images, mask, keys).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in low.parameters())


def test_an_image_size_other_than_the_constructed_one_is_padded_into_windows():
    encoder = randomise(small()).eval()
    with torch.no_grad():
        assert encoder(photographs(2, 64)[:, :, :40, :52], output="map").shape == (2, 128, 2, 2)
        maps = encoder(photographs(1, 128)[:, :, :88, :120], output="pyramid")
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 22, 30), (32, 11, 15), (64, 6, 8), (128, 3, 4)]
    assert all(torch.isfinite(m).all() for m in maps)


def test_padding_changes_nothing_inside_the_image():
    """A window that reaches beyond the map attends as if it ended there."""
    encoder = randomise(small(img_size=32, depths=(1,), num_heads=(2,))).eval().double()
    images = photographs(1, 32).double()
    with torch.no_grad():
        whole = encoder(images, output="map")
        part = encoder(images[:, :, :, :24], output="map")
    assert torch.equal(part[:, :, :, :4], encoder(images[:, :, :, :16], output="map")[:, :, :, :4])
    torch.testing.assert_close(part[:, :, :, :4], whole[:, :, :, :4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"img_size": 200, "window_size": 12}, r"img_size 200 .* \[96, 192\] would"),
        ({"img_size": 192, "window_size": 7}, r"at img_size 192, window_size \[2, 3, 6, 12\] would"),
        ({"num_heads": (3, 2, 4, 4)}, r"3 heads do not divide the 16 channels of stage 1; .* would"),
        ({"depths": (2, 2)}, "one entry a stage"),
        ({"embed_dims": 96}, 'the nearest is "embed_dim"'),
        ({"pretrained_window_size": (12, 6)}, "one number or 4"),
    ],
)
def test_sizes_that_do_not_fit_are_errors_that_say_what_would(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'swinv2_b'"):
        create_encoder("swin_v2_b")


def test_wrong_inputs_are_named():
    encoder = small()
    with pytest.raises(ValueError, match="mask must be"):
        encoder(photographs(2, 64), mask=torch.zeros(2, 3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="multiples of the patch"):
        encoder(photographs(2, 64)[:, :, :63])
    with pytest.raises(ValueError, match="takes no mask"):
        small(mask_token=False)(photographs(2, 64), mask=torch.zeros(2, 2, 2, dtype=torch.bool))


def test_classifiers_are_replaced():
    encoder = small(num_classes=3)
    assert encoder(photographs(2, 64)).shape == (2, 3)
    encoder.reset_classifier(7)
    assert encoder(photographs(2, 64)).shape == (2, 7) and encoder.get_classifier() is encoder.head
    encoder.reset_classifier(0)
    assert encoder(photographs(2, 64)).shape == (2, 128)
