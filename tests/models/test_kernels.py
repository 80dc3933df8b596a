"""The kernels for GPUs give the plain formulas' results and gradients: here in Triton's interpreter, which runs them on a CPU."""

import os

import pytest
import torch
from reference_photographs import photographs, random_mask

from mimscale.mim import SimMIM
from mimscale.models import create_encoder
from mimscale.models.kernels import functions

pytest.importorskip("triton")


pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="with a GPU, tests/gpu runs the kernels"
)


@pytest.mark.parametrize(
    ("tokens", "dtype", "bound"),
    [(36, torch.float32, 1e-5), (49, torch.float32, 1e-5), (49, torch.float16, 2e-3), (144, torch.float16, 2e-3)],
)
def test_every_kernel_equals_plain_formulas_forward_and_backward(tokens, dtype, bound):
    worst = functions.trial(torch.device("cpu"), dtype, tokens)
    assert set(worst) == {"attention", "norm", "linear", "gelu"}
    assert max(worst.values()) < bound, worst


@pytest.mark.parametrize("tokens", [144, 196, 400])
def test_attention_in_large_windows(tokens):
    assert functions.trial(torch.device("cpu"), torch.float32, tokens, only="attention", heads=1)["attention"] < 1e-5


def test_a_head_that_is_no_power_of_two_and_padded_windows():
    torch.manual_seed(0)
    from mimscale.models.attention_core import attend_plainly
    from mimscale.models.windows import PADDING, PADDING_PENALTY

    regions = torch.tensor([[0] * 20 + [1] * 16, [PADDING] * 36, [2] * 30 + [PADDING] * 6], dtype=torch.int32)
    apart = torch.where(regions[:, :, None] != regions[:, None, :], -100.0, 0.0)
    penalty = torch.where((regions == PADDING)[:, None, :], PADDING_PENALTY, apart)[:, None]
    qkv = torch.randn(6, 36, 3 * 3 * 24, requires_grad=True)
    with torch.no_grad():
        qkv[0, 3] = 0  # no direction, and no NaN
    leaves = [qkv, (5 + torch.rand(3, 1, 1)).requires_grad_(), torch.randn(3, 36, 36, requires_grad=True)]
    # What comes of padding is cut off.
    incoming = torch.randn(6, 36, 72) * (regions != PADDING).repeat(2, 1)[:, :, None]
    found = []
    for out in (functions.window_attention(*leaves, regions), attend_plainly(*leaves, penalty)):
        found.append([out, *torch.autograd.grad(out, leaves, incoming)])
    for ours, plain in zip(*found, strict=True):
        ours, plain = (t.clone() for t in (ours, plain))
        if ours.shape == incoming.shape:
            ours, plain = ours * (incoming != 0), plain * (incoming != 0)
        if ours.shape == qkv.shape:  # the plain formulas divide by 1e-12 there, the kernel likewise: both are rounding
            ours[0, 3], plain[0, 3] = 0, 0
        assert (ours - plain).norm() <= 1e-5 * plain.norm() and torch.isfinite(ours).all()


def test_equal_inputs_give_equal_bits():
    first, second = (functions.trial(torch.device("cpu"), torch.float16) for _ in range(2))
    assert first == second


def test_a_model_on_the_kernels_trains_as_one_without(monkeypatch):
    torch.manual_seed(0)
    encoder = create_encoder(
        "swinv2_s",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(1, 2),
        drop_path=0.4,
        pad_windows=True,
    )
    model = SimMIM(encoder, target_window=15, mask_patch=8)
    for name, parameter in model.named_parameters():
        if ".norm" in name and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    images, mask, keys = photographs(2, 64), random_mask(2, 8, 8, 40), torch.tensor([1, 2])
    # Both with drop path as factors, as on a GPU.
    encoder.compiled = True
    model(images, mask, keys).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    used = set()
    monkeypatch.setattr(functions, "takes", lambda x: True)
    for name in ("window_attention", "residual_norm", "linear", "linear_gelu"):
        kernel = getattr(functions, name)
        monkeypatch.setattr(functions, name, lambda *a, n=name, k=kernel: (used.add(n), k(*a))[1])
    monkeypatch.setattr("mimscale.models.attention_core.window_attention", functions.window_attention)
    model(images, mask, keys).loss.backward()
    assert used == {"window_attention", "residual_norm", "linear", "linear_gelu"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-8, name
