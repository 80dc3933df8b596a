"""The inside of window attention, from queries, keys and values to their mixture, chosen by device.

All ways compute softmax(cos(q, k) * scale + bias + penalty) v:

- on a CPU, one autograd function whose passes over memory are counted: nothing is stored that the backward pass can do
  without, and the logits are made, biased and normalised in one buffer;
- on a GPU, mimscale's own kernel (``kernels.window_attention``), which a compiler takes as one operator;
- where that does not run (no Triton, an old card, a window or head too large, fp64), torch's fused kernel that carries a bias
  with a gradient (memory-efficient attention);
- under ``torch.compile`` without the kernel, plain formulas, which the compiler fuses.
"""

import functools
import os
import warnings

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimscale.models.layers import widens
from mimscale.torch_private import is_fake, softmax_backward

CACHE_ELEMENTS = 2**20
EPSILON = 1e-12  # below which a query's or key's length counts as this much


def attend(
    qkv: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    penalty: torch.Tensor | None,
    regions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mix values by cosine attention.

    Args:
        qkv: (B * windows, N, 3 * C): queries, keys and values, head after head.
        scale: (heads, 1, 1) of the cosines.
        bias: (heads, N, N), fp32 or fp64.
        penalty: (windows, 1, N, N) that keeps regions apart, or None.
        regions: (windows, N) int32, the numbers that ``penalty`` is made of; a kernel reads these.

    Returns:
        (B * windows, N, C)
    """
    compiling = torch.compiler.is_compiling()
    told = penalty is None or regions is not None
    if qkv.is_cuda and told and (compiling or not is_fake(qkv)) and _kernel_takes(qkv, len(scale)):
        if compiling:
            return torch.ops.mimscale.window_attention(qkv, scale, bias, regions)
        return _WindowKernel.apply(qkv, scale, bias, regions)
    if compiling:
        return attend_plainly(qkv, scale, bias, penalty)
    if qkv.is_cuda:
        return attend_fused(qkv, scale, bias, penalty)
    if widens(qkv):
        return _CosineAttention.apply(qkv.float(), scale.float(), bias, penalty).to(qkv.dtype)
    return _CosineAttention.apply(qkv, scale, bias, penalty)


KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# "triton": mimscale's kernel; "sdpa": torch's. Unset: the first that works.
CHOICE = "MIMSCALE_ATTENTION"


def _kernel_takes(qkv: torch.Tensor, heads: int) -> bool:
    # The limits are those of kernels.window_attention, which cannot be imported without Triton.
    fits = qkv.dtype in KERNEL_DTYPES and qkv.shape[1] <= 512 and qkv.shape[2] // 3 // heads <= 128
    return fits and kernel_runs(qkv.device.index)


@torch.compiler.assume_constant_result
@functools.cache
def kernel_runs(device: int | None = None) -> bool:
    """Whether mimscale's kernel runs on a GPU, and right: tried once a process; where it does not, a warning says why.

    Args:
        device: number of the GPU; None for the present one.
    """
    if (choice := os.environ.get(CHOICE, "")) not in ("", "triton"):
        return False
    if not torch.cuda.is_available() or (
        torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            worst = _kernel_error(torch.device("cuda", device))
    except Exception as problem:  # whatever a compiler may throw at us
        if choice:
            raise
        warnings.warn(f"mimscale's attention kernel does not run here, torch's is used: {problem}", stacklevel=2)
        return False
    if worst > KERNEL_BOUND:
        warnings.warn(f"mimscale's attention kernel is wrong here by {worst:.1e}, torch's is used", stacklevel=2)
    return worst <= KERNEL_BOUND


KERNEL_BOUND = 2e-2  # of bf16 against fp32 formulas


def _kernel_error(device: torch.device) -> float:
    """Largest relative difference of the kernel's result and gradients from the formulas', on a small example."""
    tokens, heads, windows = 36, 2, 2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    regions = (torch.arange(tokens, device=device)[None] // torch.tensor([[tokens], [20]], device=device)).int()
    penalty = torch.where(regions[:, :, None] != regions[:, None, :], -100.0, 0.0)[:, None]
    qkv, grad = draw(2 * windows, tokens, 3 * 32 * heads).bfloat16(), draw(2 * windows, tokens, 32 * heads).bfloat16()
    scale, bias = 10 + draw(heads, 1, 1), 4 * draw(heads, tokens, tokens)
    found = []
    for way in (_WindowKernel.apply, attend_plainly):
        wide = qkv.float() if way is attend_plainly else qkv
        leaves = [t.clone().requires_grad_() for t in (wide, scale, bias)]
        out = way(*leaves, regions if way is not attend_plainly else penalty)
        found.append([out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    pairs = zip(*found, strict=True)
    return max(((ours.float() - right).norm() / right.norm()).item() for ours, right in pairs)


class _WindowKernel(torch.autograd.Function):
    """mimscale's kernel, called directly: an operator's dispatch would cost more than the launch."""

    @staticmethod
    def forward(ctx, qkv, scale, bias, regions):
        from mimscale.models.kernels import window_attention

        bias = bias.contiguous()
        ctx.save_for_backward(qkv, scale, bias, regions)
        return window_attention.forward(qkv, scale, bias, regions)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from mimscale.models.kernels import window_attention

        return *window_attention.backward(grad.contiguous(), *ctx.saved_tensors), None


@torch.library.custom_op("mimscale::window_attention", mutates_args=(), device_types="cuda")
def _operator(
    qkv: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, regions: torch.Tensor | None
) -> torch.Tensor:
    from mimscale.models.kernels import window_attention

    return window_attention.forward(qkv.contiguous(), scale, bias.contiguous(), regions)


@_operator.register_fake
def _(qkv, scale, bias, regions):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@torch.library.custom_op("mimscale::window_attention_backward", mutates_args=(), device_types="cuda")
def _operator_backward(
    grad: torch.Tensor, qkv: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, regions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from mimscale.models.kernels import window_attention

    return window_attention.backward(grad.contiguous(), qkv.contiguous(), scale, bias.contiguous(), regions)


@_operator_backward.register_fake
def _(grad, qkv, scale, bias, regions):
    return torch.empty_like(qkv), torch.empty_like(scale), torch.empty_like(bias)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    return *_operator_backward(grad, *ctx.saved_tensors), None


_operator.register_autograd(_gradients, setup_context=_keep)


def _heads(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups, tokens, width = qkv.shape
    q, k, v = qkv.view(groups, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attend_plainly(
    qkv: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, penalty: torch.Tensor | None
) -> torch.Tensor:
    """Mix values by the formulas as they stand; shapes as in ``attend``."""
    groups, tokens, width = qkv.shape
    q, k, v = _heads(qkv, len(scale))
    # The scale is folded into q: one product over the queries instead of one over the logits.
    q = F.normalize(q, dim=-1, eps=EPSILON) * scale.to(q.dtype)
    logits = q @ F.normalize(k, dim=-1, eps=EPSILON).transpose(-2, -1) + bias
    if penalty is not None:
        logits = (logits.view(-1, len(penalty), *logits.shape[1:]) + penalty).view(logits.shape)
    weights = logits.softmax(dim=-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).reshape(groups, tokens, width // 3)


def attend_fused(
    qkv: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, penalty: torch.Tensor | None
) -> torch.Tensor:
    """Mix values by a GPU's memory-efficient attention; shapes as in ``attend``.

    The windows of an image stand beside its heads, so that one copy of bias and penalty serves the whole batch. The
    bias is shifted by a constant, which no softmax sees, so that it rounds half as coarsely in bf16.
    """
    groups, tokens, width = qkv.shape
    heads, windows = len(scale), 1 if penalty is None else len(penalty)
    q, k, v = (t.reshape(groups // windows, windows * heads, tokens, -1) for t in _heads(qkv, heads))
    factor = scale.to(q.dtype).repeat(windows, 1, 1)
    q, k = F.normalize(q, dim=-1, eps=EPSILON) * factor, F.normalize(k, dim=-1, eps=EPSILON)
    shifted = bias - 8 if penalty is None else (bias - 8 + penalty).flatten(0, 1)
    # The kernel wants rows of the bias aligned to 16 bytes.
    padded = F.pad(shifted.to(q.dtype), (0, -tokens % 8))[..., :tokens]
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        mixed = F.scaled_dot_product_attention(q, k, v, padded.expand(len(q), -1, -1, -1), scale=1.0)
    return mixed.reshape(groups, heads, tokens, -1).transpose(1, 2).reshape(groups, tokens, width // 3)


def _chunks(groups: int, heads: int, tokens: int, windows: int) -> int:
    """Count the groups whose logits fit into the cache together; a divisor of the windows, or a multiple."""
    fit = max(1, CACHE_ELEMENTS // (heads * tokens * tokens))
    if fit >= windows:
        return min(groups, fit // windows * windows)
    return max(c for c in range(1, fit + 1) if windows % c == 0)


class _CosineAttention(torch.autograd.Function):
    """Attention on a CPU. With u = q / |q| * scale and w = k / |k|: P = softmax(u w' + bias + penalty), out = P v.

    It goes through the windows in chunks whose logits stay in the core's cache from the product that makes them to the
    product that uses them; only P is written to memory, for the backward pass.
    """

    @staticmethod
    def forward(ctx, qkv, scale, bias, penalty):
        groups, tokens, width = qkv.shape
        heads = len(scale)
        size = width // 3 // heads
        split = qkv.view(groups, tokens, 3, heads, size)
        # Lengths of queries and keys, where they lie; the scale goes into the queries' factor.
        factor = torch.linalg.vector_norm(split[:, :, :2], dim=-1, keepdim=True).clamp_min_(EPSILON).reciprocal_()
        factor[:, :, 0] *= scale.to(qkv.dtype)[..., 0]
        units = qkv.new_empty(3, groups, heads, tokens, size)
        torch.mul(split[:, :, :2].permute(2, 0, 3, 1, 4), factor.permute(2, 0, 3, 1, 4), out=units[:2])
        units[2].copy_(split[:, :, 2].transpose(1, 2))
        weights = qkv.new_empty(groups, heads, tokens, tokens)
        mixed = qkv.new_empty(groups, heads, tokens, size)
        windows = 1 if penalty is None else len(penalty)
        step = _chunks(groups, heads, tokens, windows)
        exact = qkv.dtype == bias.dtype
        for start in range(0, groups, step):
            part = slice(start, min(start + step, groups))
            u, w, v = (unit[part].flatten(0, 1) for unit in units)
            share = weights[part]
            torch.bmm(u, w.transpose(1, 2), out=share.flatten(0, 1))
            logits = share if exact else share.to(bias.dtype)
            logits += bias
            if penalty is not None:
                place = start % windows
                logits.view(-1, min(step, windows), heads, tokens, tokens).add_(penalty[place : place + step])
            torch.softmax(logits, -1, out=logits)
            if not exact:
                share.copy_(logits)
            torch.bmm(share.flatten(0, 1), v, out=mixed[part].flatten(0, 1))
        ctx.save_for_backward(units, weights, factor, scale)
        ctx.bias_dtype, ctx.step = bias.dtype, step
        return mixed.transpose(1, 2).reshape(groups, tokens, heads * size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        units, weights, factor, scale = ctx.saved_tensors
        _, groups, heads, tokens, size = units.shape
        grad = grad.view(groups, tokens, heads, size).transpose(1, 2).contiguous()
        grads = torch.empty_like(units)
        step = min(ctx.step, groups)
        scratch = weights.new_empty(step * heads, tokens, tokens)
        grad_bias = weights.new_zeros(heads, tokens, tokens, dtype=ctx.bias_dtype)
        for start in range(0, groups, step):
            part = slice(start, min(start + step, groups))
            u, w, v = (unit[part].flatten(0, 1) for unit in units)
            grad_u, grad_w, grad_v = (unit[part].flatten(0, 1) for unit in grads)
            incoming, share = grad[part].flatten(0, 1), weights[part].flatten(0, 1)
            inner = scratch[: len(share)]
            torch.bmm(share.transpose(1, 2), incoming, out=grad_v)
            torch.bmm(incoming, v.transpose(1, 2), out=inner)
            # P * (dP - sum(dP * P)), in the buffer of dP
            softmax_backward(inner, share, out=inner)
            for window in inner.view(-1, heads, tokens, tokens):
                grad_bias += window
            torch.bmm(inner, w, out=grad_u)
            torch.bmm(inner.transpose(1, 2), u, out=grad_w)
        # d(q / |q| * s) takes out what lies along q: ds = g.u / s, and dq = (s / |q|) (g - u (g.u) / s^2)
        along = torch.linalg.vecdot(grads[:2], units[:2]).unsqueeze(-1)
        grad_scale = along[0].sum((0, 2), dtype=ctx.bias_dtype).view_as(scale) / scale
        along[0] /= (scale * scale).to(along.dtype)
        grads[:2].addcmul_(units[:2], along, value=-1)
        result = units.new_empty(groups, tokens, 3, heads, size)
        torch.mul(grads[:2], factor.permute(2, 0, 3, 1, 4), out=result[:, :, :2].permute(2, 0, 3, 1, 4))
        result[:, :, 2] = grads[2].transpose(1, 2)
        return result.view(groups, tokens, -1), grad_scale.to(scale.dtype), grad_bias, None
