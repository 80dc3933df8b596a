"""Every fast path gives the plain formulas' loss and gradients: attention, drop path, targets, checkpoints, compilation."""

import pytest
import torch
from reference_photographs import photographs, random_mask
from reference_swin_v2 import normalised_target, pixels, released_checkpoint, simmim_loss, swin_features
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimscale.commands.bench import main
from mimscale.commands.bench.memory import activation_bytes
from mimscale.commands.bench.step import plain_target
from mimscale.mim import SimMIM
from mimscale.models import attention_core, create_encoder, load_released
from mimscale.models.attention_core import attend, attend_fused, attend_plainly
from mimscale.models.drop_path import keep_scales

HEADS = (1, 2, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("cache", [1, 500, 2**20])
@pytest.mark.parametrize("path", [attend, attend_fused])
def test_attention_equals_the_plain_formulas(monkeypatch, dtype, shifted, cache, path):
    monkeypatch.setattr(attention_core, "CACHE_ELEMENTS", cache)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    wide = torch.promote_types(dtype, torch.float32)
    inputs = (draw(12, 9, 3 * 3 * 8), draw(3, 1, 1).exp().detach().requires_grad_(), draw(3, 9, 9, dtype=wide))
    penalty = torch.where(torch.rand(4, 1, 9, 9, generator=generator) > 0.6, -100.0, 0.0).to(wide) if shifted else None
    expected, got = attend_plainly(*inputs, penalty), path(*inputs, penalty)
    incoming = torch.randn_like(expected)
    within = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=within, atol=within)
    for a, b in zip(*(torch.autograd.grad(out, inputs, incoming) for out in (got, expected)), strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= 10 * within * b.norm()


def test_the_gradient_of_attention_is_its_derivative():
    q = torch.randn(4, 4, 18, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(2, 1, 1, dtype=torch.float64) + 1).requires_grad_()
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    penalty = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: attend(*inputs, penalty), (q, scale, bias))


def test_an_attention_row_of_zeros_has_no_direction_and_no_nan():
    qkv = torch.zeros(2, 4, 12, requires_grad=True)
    out = attend(qkv, torch.ones(1, 1, 1), torch.zeros(1, 4, 4), None)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(qkv.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [36, 144, 196, 49])
def test_the_gpu_path_keeps_shapes_and_takes_the_kernel_that_carries_a_bias(dtype, tokens):
    with FakeTensorMode():
        qkv = torch.empty(8, tokens, 3 * 64, dtype=dtype, device="cuda", requires_grad=True)
        bias, scale = torch.empty(2, tokens, tokens, device="cuda"), torch.empty(2, 1, 1, dtype=dtype, device="cuda")
        for penalty in (None, torch.empty(4, 1, tokens, tokens, device="cuda")):
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                out = attend(qkv, scale, bias, penalty)
            assert out.shape == (8, tokens, 64) and out.dtype == dtype and out.is_cuda


@pytest.mark.parametrize(
    ("image", "window", "trained", "depths"),
    [
        (192, 12, None, (2, 2, 1, 1)),  # shifted in two stages, one window in the others
        (224, 14, (12, 12, 12, 6), (2, 1, 1, 1)),  # clipped, shifted, and pre-trained in other windows
    ],
)
def test_losses_and_every_gradient_equal_the_reference_with_drop_path(tmp_path, image, window, trained, depths):
    state = released_checkpoint(8, depths, HEADS, window, image, seed=2)
    torch.save(state, tmp_path / "w.pth")
    images, mask = photographs(2, image), random_mask(2, image // 32, image // 32, image // 32)
    keys = torch.tensor([7, 2**40])

    weights = {
        n.removeprefix("encoder."): v.double().requires_grad_() for n, v in state.items() if v.is_floating_point()
    }
    blocks = sum(depths)
    rates = [0.6 * block / (blocks - 1) for block in range(blocks) for _ in range(2)]
    factors = keep_scales(rates, 2, keys, torch.device("cpu"))[:, :, 0, 0].double()
    assert (factors == 0).any() and (factors > 0).any()
    expected = swin_features(images.double(), mask, weights, depths, HEADS, window, trained, factors)
    loss = simmim_loss(pixels(expected, weights), normalised_target(images, 47), mask, "l2")
    loss.backward()

    cases = ((torch.float64, False, 1e-9, 1e-9), (torch.float32, True, 1e-5, 1e-4))
    for dtype, checkpointed, loss_within, within in cases:
        encoder = create_encoder(
            "swinv2_s",
            img_size=image,
            window_size=window,
            pretrained_window_size=trained or 0,
            drop_path=0.6,
            embed_dim=8,
            depths=depths,
            num_heads=HEADS,
        )
        model = SimMIM(encoder).to(dtype)
        load_released(model, tmp_path / "w.pth")
        model.set_grad_checkpointing(checkpointed)
        output = model(images.to(dtype), mask, keys)
        assert output.loss.item() == pytest.approx(loss.item(), rel=loss_within)
        output.loss.backward()
        for name, parameter in model.named_parameters():
            reference = weights[name.removeprefix("encoder.")].grad
            # A gradient that is 0 in exact arithmetic is rounding in both.
            assert (parameter.grad - reference).norm() <= within * max(reference.norm(), 1e-3), name


@pytest.mark.parametrize(("dtype", "steps", "within"), [(torch.float32, 200, 1e-3), (torch.float64, 60, 1e-9)])
def test_training_with_the_fast_and_the_plain_encoder_ends_alike(dtype, steps, within):
    depths, heads, dim = (2, 1), (1, 2), 8
    torch.manual_seed(0)
    encoder = create_encoder(
        "swinv2_s", img_size=32, window_size=4, embed_dim=dim, depths=depths, num_heads=heads, drop_path=0.2
    )
    fast = SimMIM(encoder, target_window=15, mask_patch=8).to(dtype)
    plain = {name: value.detach().clone().requires_grad_() for name, value in fast.named_parameters()}
    images = photographs(16, 32).to(dtype)
    targets = normalised_target(images, 15)
    rates = [0.2 * block / 2 for block in range(3) for _ in range(2)]

    def plain_loss(pick, mask, keys):
        weights = {name.removeprefix("encoder."): value for name, value in plain.items()}
        factors = keep_scales(rates, len(pick), keys, torch.device("cpu"))[:, :, 0, 0].to(dtype)
        features = swin_features(images[pick], mask, weights, depths, heads, 4, None, factors)
        return simmim_loss(pixels(features, weights, stride=8), targets[pick], mask, "l2")

    optimizers = [torch.optim.AdamW(p, lr=4e-4, weight_decay=0.05) for p in (fast.parameters(), plain.values())]
    losses = []
    for step in range(steps):
        pick = torch.arange(4) + 4 * (step % 4)
        mask, keys = random_mask(4, 4, 4, 10, seed=step), torch.arange(4) + 4 * step
        pair = [fast(images[pick], mask, keys).loss, plain_loss(pick, mask, keys)]
        for optimizer, loss in zip(optimizers, pair, strict=True):
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = 4e-4 * min(1, (step + 1) / 20)
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    fast_end, plain_end = torch.tensor(losses, dtype=torch.float64)[-20:].mean(0).tolist()
    assert fast_end < losses[0][0]
    assert fast_end == pytest.approx(plain_end, rel=within)


def test_a_branch_that_every_sample_drops_still_gives_every_parameter_a_gradient():
    torch.manual_seed(0)
    encoder = create_encoder(
        "swinv2_s", img_size=64, window_size=4, embed_dim=8, depths=(2, 2, 2, 2), num_heads=HEADS, drop_path=0.95
    )
    model = SimMIM(encoder, target_window=15)
    model(photographs(1, 64), random_mask(1, 2, 2, 2), torch.tensor([3])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_compiled_blocks_give_the_same_loss_and_gradients():
    torch.manual_seed(0)
    encoder = create_encoder(
        "swinv2_s", img_size=32, window_size=4, embed_dim=8, depths=(2,), num_heads=(2,), drop_path=0.3
    )
    model = SimMIM(encoder, target_window=15, mask_patch=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images, mask, keys = photographs(2, 32), random_mask(2, 8, 8, 40), torch.tensor([1, 2])
    loss = model(images, mask, keys).loss
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    encoder.compile_blocks(backend="aot_eager")
    again = model(images, mask, keys).loss
    again.backward()
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7


def test_the_rivals_target_is_ours():
    images = photographs(2, 96)
    model = SimMIM(create_encoder("swinv2_s", embed_dim=6, num_heads=(1, 1, 1, 1)))
    assert (plain_target(images.double(), 47) - model.target(images.double())).abs().max() < 1e-9


def test_the_benchmarks_run_and_count_memory(capsys):
    assert main(["memory", "--model", "swinv2_s", "--batch", "1"]) == 0
    printed = capsys.readouterr().out
    assert "every block" in printed and "MB an image" in printed
    model = SimMIM(create_encoder("swinv2_s", embed_dim=6, num_heads=(1, 1, 1, 1)))
    images, mask = photographs(1, 192), random_mask(1, 6, 6, 22)
    real = activation_bytes(model, images, mask)
    with torch.device("meta"):
        ghost = SimMIM(create_encoder("swinv2_s", embed_dim=6, num_heads=(1, 1, 1, 1)))
    assert activation_bytes(ghost, images.to("meta"), mask.to("meta")) == pytest.approx(real, rel=0.1)
