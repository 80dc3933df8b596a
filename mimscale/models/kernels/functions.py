"""The kernels as differentiable functions, and when they are used: on a GPU where they were tried and found right.

Under ``torch.compile`` attention is one operator that the compiler does not look into; the others are left to it.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimscale.torch_private import is_fake

# "triton": mimscale's kernels, or an error; "torch": torch's alone. Unset: mimscale's where they work.
CHOICE = "MIMSCALE_KERNELS"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_TOKENS = 512
LARGEST_HEAD = 128
WIDEST_NORM = 8192
# Largest relative difference of bf16 results and gradients from those of fp32 formulas that passes the trial.
BOUND = 2e-2


def takes(x: Tensor) -> bool:
    """Whether a kernel takes ``x``, by its device and type."""
    if not x.is_cuda or x.dtype not in DTYPES:
        return False
    return (torch.compiler.is_compiling() or not is_fake(x)) and kernels_run(x.device.index)


def takes_pointwise(x: Tensor) -> bool:
    """Whether the kernels for what stands between products are used: a compiler makes its own."""
    return not torch.compiler.is_compiling() and takes(x)


def takes_attention(qkv: Tensor, heads: int) -> bool:
    """Whether the attention kernel takes qkv (B * windows, N, 3 * C)."""
    return takes(qkv) and qkv.shape[1] <= MOST_TOKENS and qkv.shape[2] // 3 // heads <= LARGEST_HEAD


@torch.compiler.assume_constant_result
@functools.cache
def kernels_run(device: int | None = None) -> bool:
    """Whether mimscale's kernels run on a GPU, and right: tried once a process; where they do not, a warning says why.

    Args:
        device: number of the GPU; None for the present one.
    """
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "triton") or not torch.cuda.is_available():
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            worst = max(trial(torch.device("cuda" if device is None else f"cuda:{device}")).values())
    except Exception as problem:  # whatever a compiler may throw at us
        if choice:
            raise
        warnings.warn(f"mimscale's kernels do not run on this GPU, torch's are used: {problem}", stacklevel=2)
        return False
    if worst > BOUND:
        warnings.warn(f"mimscale's kernels are off by {worst:.1e} on this GPU, torch's are used", stacklevel=2)
    return worst <= BOUND


def trial(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, tokens: int = 36, only: str | None = None, heads: int = 2
) -> dict[str, float]:
    """Largest relative difference of each kernel's result and gradients from those of plain formulas in fp32.

    Args:
        device: where they run.
        dtype: of the kernels' arguments.
        tokens: of a window.
        only: the name of one kernel; None tries all.
        heads: of the attention; as many images, of two windows each.
    """
    from mimscale.models.attention_core import attend_plainly

    windows = 2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    places = torch.arange(tokens, device=device)
    regions = torch.stack((0 * places, (places >= tokens // 2).long())).int()
    penalty = torch.where(regions[:, :, None] != regions[:, None, :], -100.0, 0.0)[:, None]
    width = 32 * heads
    weight, shift, factor = draw(width), draw(width), torch.tensor([0.0, 1.25, 1.25, 1.25], device=device)
    wide, narrow = draw(4 * width, width) / 8, draw(4 * width)
    x, residual = draw(4, tokens, width), draw(4, tokens, width)

    def plain_norm(x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return residual + factor[:, None, None] * F.layer_norm(x, (width,), weight, shift)

    def plain_attention(qkv: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return attend_plainly(qkv, scale, bias, penalty)

    cases: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], list[Tensor]]] = {
        "attention": (
            lambda qkv, scale, bias: _WindowAttention.apply(qkv, scale, bias, regions),
            plain_attention,
            [draw(heads * windows, tokens, 3 * width)],
            [10 + draw(heads, 1, 1), 4 * draw(heads, tokens, tokens)],
        ),
        "norm": (
            lambda *args: _ResidualNorm.apply(*args, factor, 1e-5),
            plain_norm,
            [x, residual, weight, shift],
            [],
        ),
        "linear": (linear, F.linear, [x, wide, narrow], []),
        "gelu": (linear_gelu, lambda *args: F.gelu(F.linear(*args)), [x, wide, narrow], []),
    }
    worst, incoming = {}, x
    for name, (ours, plain, low, exact) in cases.items():
        if only not in (None, name):
            continue
        found: list[list[Tensor]] = []
        for way in (ours, plain):
            # Both get the numbers that the kernels get, rounded.
            wide_or_not = dtype if way is ours else torch.float32
            leaves = [t.to(dtype).to(wide_or_not, copy=True).requires_grad_() for t in low]
            leaves += [t.clone().requires_grad_() for t in exact]
            out = way(*leaves)
            incoming = draw(*out.shape).to(dtype) if not found else incoming
            found.append([out, *torch.autograd.grad(out, leaves, incoming.to(out.dtype))])
        pairs = zip(*found, strict=True)
        worst[name] = max(((a.float() - b).norm() / b.norm().clamp(min=1e-6)).item() for a, b in pairs)
    return worst


class _WindowAttention(torch.autograd.Function):
    """Called directly: an operator's dispatch would cost more than the launch."""

    @staticmethod
    def forward(ctx, qkv, scale, bias, regions):
        from mimscale.models.kernels import window_attention

        qkv, bias = qkv.contiguous(), bias.contiguous()
        out, inverse = window_attention.forward(qkv, scale, bias, regions)
        ctx.save_for_backward(qkv, scale, bias, regions, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from mimscale.models.kernels import window_attention

        return *window_attention.backward(grad.contiguous(), *ctx.saved_tensors), None


def window_attention(qkv: Tensor, scale: Tensor, bias: Tensor, regions: Tensor | None) -> Tensor:
    """Mix values by cosine attention; see :func:`mimscale.models.kernels.window_attention.forward`."""
    if torch.compiler.is_compiling():
        return torch.ops.mimscale.window_attention(qkv, scale, bias, regions)[0]
    return _WindowAttention.apply(qkv, scale, bias, regions)


@torch.library.custom_op("mimscale::window_attention", mutates_args=(), device_types="cuda")
def _operator(qkv: Tensor, scale: Tensor, bias: Tensor, regions: Tensor | None) -> tuple[Tensor, Tensor]:
    from mimscale.models.kernels import window_attention

    return window_attention.forward(qkv.contiguous(), scale, bias.contiguous(), regions)


@_operator.register_fake
def _(qkv, scale, bias, regions):
    groups, tokens, width = qkv.shape
    return qkv.new_empty(groups, tokens, width // 3), qkv.new_empty(2, groups, len(scale), tokens, dtype=torch.float32)


@torch.library.custom_op("mimscale::window_attention_backward", mutates_args=(), device_types="cuda")
def _operator_backward(
    grad: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor, regions: Tensor | None, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from mimscale.models.kernels import window_attention

    qkv, bias = qkv.contiguous(), bias.contiguous()
    return window_attention.backward(grad.contiguous(), qkv, scale.contiguous(), bias, regions, inverse)


@_operator_backward.register_fake
def _(grad, qkv, scale, bias, regions, inverse):
    return qkv.new_empty(qkv.shape), scale.new_empty(scale.shape), bias.new_empty(bias.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad, _):
    return *_operator_backward(grad, *ctx.saved_tensors), None


_operator.register_autograd(_gradients, setup_context=_keep)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, branch, residual, weight, bias, factor, eps):
        from mimscale.models.kernels import pointwise

        branch = branch.contiguous()
        out, mean, deviation = pointwise.residual_norm(branch, residual.contiguous(), weight, bias, factor, eps)
        ctx.save_for_backward(branch, weight, factor, mean, deviation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from mimscale.models.kernels import pointwise

        grad = grad.contiguous()
        branch, weight, bias = pointwise.residual_norm_backward(grad, *ctx.saved_tensors)
        return branch, grad, weight, bias, None, None


def residual_norm(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, factor: Tensor | None, eps: float
) -> Tensor:
    """Give residual + factor * norm(branch), (B, L, C); ``factor`` is (B, 1, 1), or None for 1."""
    return _ResidualNorm.apply(branch, residual, weight, bias, None if factor is None else factor.flatten(), eps)


class _Linear(torch.autograd.Function):
    """A linear layer whose bias gradient takes one pass."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from mimscale.models.kernels import pointwise

        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        bias = pointwise.column_sums(grad).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return *_products(ctx, grad, x, weight), bias


class _LinearGelu(torch.autograd.Function):
    """A linear layer and GELU, whose backward passes share one over memory."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        before = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, before)
        return F.gelu(before)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from mimscale.models.kernels import pointwise

        x, weight, before = ctx.saved_tensors
        grad, bias = pointwise.gelu_backward(grad.contiguous(), before)
        return *_products(ctx, grad, x, weight), bias.to(weight.dtype) if ctx.needs_input_grad[2] else None


def _products(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a linear layer's argument and weight."""
    rows = grad.flatten(0, -2)
    of_x = (rows @ weight).view_as(x) if ctx.needs_input_grad[0] else None
    of_weight = rows.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
    return of_x, of_weight


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map x (..., inputs) by weight (outputs, inputs) and bias (outputs,) to (..., outputs)."""
    return _Linear.apply(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of :func:`linear`."""
    return _LinearGelu.apply(x, weight, bias)
