"""What stands between matrix products, each in one pass over memory: a norm and its residual sum, GELU, sums of columns.

Sums over rows are made in registers by few programs, and their parts added by one call after it: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
# Numbers that one program holds of one tensor.
TILE = 4096
PROGRAMS_PER_PROCESSOR = 4


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _norm_forward(
    branch, residual, weight, bias, factor, out, mean, deviation, rows, length, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    x = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
    centre = tl.sum(x, axis=1) / WIDTH
    x = tl.where(inside, x - centre[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    y = x * inverse[:, None] * scale[None, :] + shift[None, :]
    if SCALED:
        y = y * tl.load(factor + row // length, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    y += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(deviation + row, inverse, mask=row < rows)


@triton.jit
def _norm_backward(
    grad, branch, weight, factor, mean, deviation, grad_branch, sums, rows, length,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for start in range(first, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            g = g * tl.load(factor + row // length, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        x = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(deviation + row, mask=row < rows, other=0.0)
        unit = (x - tl.load(mean + row, mask=row < rows, other=0.0)[:, None]) * inverse[:, None]
        unit = tl.where(inside, unit, 0.0)
        sum_weight += g * unit
        sum_bias += g
        g = g * scale[None, :]
        level = tl.sum(g, axis=1) / WIDTH
        along = tl.sum(g * unit, axis=1) / WIDTH
        dx = (g - level[:, None] - unit * along[:, None]) * inverse[:, None]
        tl.store(grad_branch + place, dx.to(grad_branch.dtype.element_ty), mask=inside)
    part = tl.program_id(0) * 2 * WIDTH + column
    tl.store(sums + part, tl.sum(sum_weight, axis=0), mask=column < WIDTH)
    tl.store(sums + part + WIDTH, tl.sum(sum_bias, axis=0), mask=column < WIDTH)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile that holds whole rows."""
    columns = triton.next_power_of_2(width)
    return max(1, TILE // columns), columns


def residual_norm(
    branch: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    factor: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give residual + factor * norm(branch).

    Args:
        branch: (B, L, C), contiguous.
        residual: (B, L, C), contiguous.
        weight: (C,) of the norm.
        bias: (C,).
        factor: (B,), one for each sample; None for 1.
        eps: added to the variance.

    Returns:
        (B, L, C); and for the backward pass the mean and inverse deviation of every row of ``branch``, (B * L,) in fp32.
    """
    samples, length, width = branch.shape
    rows = samples * length
    out = torch.empty_like(residual)
    mean, deviation = (branch.new_empty(rows, dtype=torch.float32) for _ in range(2))
    height, columns = _tile(width)
    _norm_forward[(triton.cdiv(rows, height),)](
        branch, residual, weight, bias, weight if factor is None else factor, out, mean, deviation, rows, length, eps,
        WIDTH=width, COLUMNS=columns, ROWS=height, SCALED=factor is not None, num_warps=4 if columns < 4096 else 8,
    )  # fmt: skip
    return out, mean, deviation


def residual_norm_backward(
    grad: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    factor: torch.Tensor | None,
    mean: torch.Tensor,
    deviation: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`residual_norm`'s branch, weight and bias from that of its result (contiguous), its residual's too."""
    samples, length, width = branch.shape
    rows = samples * length
    height, columns = _tile(width)
    programs = min(triton.cdiv(rows, height), PROGRAMS_PER_PROCESSOR * _processors(branch.device))
    grad_branch = torch.empty_like(branch)
    sums = branch.new_empty(programs, 2, width, dtype=torch.float32)
    _norm_backward[(programs,)](
        grad, branch, weight, weight if factor is None else factor, mean, deviation, grad_branch, sums,
        rows, length, WIDTH=width, COLUMNS=columns, ROWS=height, SCALED=factor is not None,
        num_warps=4 if columns < 4096 else 8,
    )  # fmt: skip
    grad_weight, grad_bias = sums.sum(0).to(weight.dtype).unbind(0)
    return grad_branch, grad_weight, grad_bias


@triton.jit
def _column_sums(
    grad, before, after, sums, rows, width, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GELU: tl.constexpr
):
    """Sum rows; with GELU, of what the gradient is before it, which is written too."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(1).to(tl.int64) * ROWS
    for start in range(first, rows, chunks * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            x = tl.load(before + place, mask=inside, other=0.0).to(tl.float32)
            share = 0.5 * (1.0 + tl.erf(x * INVERSE_SQRT_2))
            g = g * (share + x * INVERSE_SQRT_2_PI * tl.exp(-0.5 * x * x))
            tl.store(after + place, g.to(after.dtype.element_ty), mask=inside)
        total += g
    tl.store(sums + tl.program_id(1) * width + column, tl.sum(total, axis=0), mask=column < width)


def column_sums(grad: torch.Tensor) -> torch.Tensor:
    """Sum grad (..., C), contiguous, over all but its last dimension: (C,) in fp32."""
    return _sum_columns(grad, None)[1]


def gelu_backward(grad: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of GELU's argument ``before`` from its result's, (..., C), contiguous; and its sum over rows, (C,) in fp32."""
    return _sum_columns(grad, before)


def _sum_columns(grad: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    width = grad.shape[-1]
    rows = grad.numel() // width
    columns = min(128, triton.next_power_of_2(width))
    height = TILE // columns
    across = triton.cdiv(width, columns)
    chunks = max(1, min(triton.cdiv(rows, height), PROGRAMS_PER_PROCESSOR * _processors(grad.device) // across))
    after = grad if before is None else torch.empty_like(grad)
    sums = grad.new_empty(chunks, width, dtype=torch.float32)
    _column_sums[across, chunks](
        grad, grad if before is None else before, after, sums, rows, width, chunks,
        ROWS=height, COLUMNS=columns, GELU=before is not None, num_warps=4,
    )  # fmt: skip
    return after, sums.sum(0)
