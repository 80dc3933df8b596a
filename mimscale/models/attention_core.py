"""The inside of window attention, from queries, keys and values to their mixture, chosen by device.

All ways compute softmax(cos(q, k) * scale + bias + penalty) v:

- on a CPU, one autograd function whose passes over memory are counted: nothing is stored that the backward pass can do
  without, and the logits are made, biased and normalised in one buffer;
- on a GPU, mimscale's own kernel (``kernels.window_attention``), which a compiler takes as one operator;
- where that does not run (no Triton, an old card, a window or head too large, fp64), torch's fused kernel that carries a bias
  with a gradient (memory-efficient attention);
- under ``torch.compile`` without the kernel, plain formulas, which the compiler fuses.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimscale.models.kernels.functions import takes_attention, window_attention
from mimscale.models.layers import widens
from mimscale.torch_private import softmax_backward

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
    if (penalty is None or regions is not None) and takes_attention(qkv, len(scale)):
        return window_attention(qkv, scale, bias, regions)
    if torch.compiler.is_compiling():
        return attend_plainly(qkv, scale, bias, penalty)
    if qkv.is_cuda:
        return attend_fused(qkv, scale, bias, penalty)
    if widens(qkv):
        return _CosineAttention.apply(qkv.float(), scale.float(), bias, penalty).to(qkv.dtype)
    return _CosineAttention.apply(qkv, scale, bias, penalty)


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
