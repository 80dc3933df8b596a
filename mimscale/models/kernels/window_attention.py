"""Cosine attention within windows, forward and backward, as Triton kernels.

For one window and head, with q, k, v (N, D): u = q / |q| * scale, w = k / |k|, P = softmax(u w' + bias + penalty), out = P v.

- Normalising, bias, penalty and softmax happen on chip; queries, keys and values are read where the linear layer wrote them.
- The penalty is worked out from a region number for each token, not read from a table.
- Only the kernel's inputs are kept for the backward pass. It runs twice over the logits: by rows for the gradients of q, the
  bias and the scale, then by columns for those of k and v.
- A program keeps its part of the bias in registers and goes through windows that share it. Gradients of the bias are summed in
  registers over these windows and written once for each program; nothing is added atomically, so equal inputs give equal bits.
- The N columns are two tiles whose sizes are powers of two: 144 = 128 + 16, so little is computed for nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mimscale.models.windows import PADDING, PADDING_PENALTY, REGION_PENALTY

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EPSILON = tl.constexpr(1e-12)  # below which a query's or key's length counts as this much
OUTSIDE = tl.constexpr(PADDING)
APART = tl.constexpr(REGION_PENALTY * 1.4426950408889634)
NOTHING = tl.constexpr(PADDING_PENALTY * 1.4426950408889634)
# Programs for each multiprocessor, among which the windows are shared out.
PROGRAMS_PER_PROCESSOR = 8
SMALLEST_TILE = 16


class Launch(NamedTuple):
    """How a kernel is cut: ``block`` rows (of keys, in the last) for each program, and its warps."""

    block: int
    warps: int


# By the columns that the two tiles hold together, up to so many: forward, backward by rows, backward by columns.
LAUNCHES = {
    64: (Launch(32, 2), Launch(16, 2), Launch(32, 2)),
    256: (Launch(32, 4), Launch(16, 4), Launch(32, 4)),
    512: (Launch(16, 8), Launch(16, 8), Launch(16, 8)),
}
FORWARD, BY_ROWS, BY_COLUMNS = range(3)


def tiles(tokens: int) -> tuple[int, int]:
    """Cut ``tokens`` columns into two tiles, powers of two and the second possibly 0: as few too many as that allows."""
    first = max(SMALLEST_TILE, 1 << (tokens.bit_length() - 1))
    rest = max(tokens - first, 0)
    return first, 0 if not rest else max(SMALLEST_TILE, 1 << (rest - 1).bit_length())


@triton.jit
def _rows_of(base, stride, rows, columns, tokens: tl.constexpr, size: tl.constexpr):
    """Load rows of q, k, v or a gradient, (rows, columns) in fp32 or as stored; 0 outside."""
    inside = (rows < tokens)[:, None] & (columns < size)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _inverse_length(x):
    """1 / max(|x|, epsilon) of every row, (rows,) in fp32."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), EPSILON)


@triton.jit
def _bias_of(bias, rows, columns, tokens: tl.constexpr):
    """The bias in units of log 2; columns outside can get no weight."""
    inside = (rows < tokens)[:, None] & (columns < tokens)[None, :]
    values = tl.load(bias + rows[:, None] * tokens + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where((columns < tokens)[None, :], values * LOG2E, float("-inf"))


@triton.jit
def _penalty(regions, rows, columns, tokens: tl.constexpr):
    """What keeps regions apart, from the numbers of one window's tokens."""
    own = tl.load(regions + rows, mask=rows < tokens, other=0)
    other = tl.load(regions + columns, mask=columns < tokens, other=0)
    apart = tl.where(own[:, None] != other[None, :], APART, 0.0)
    return tl.where((other == OUTSIDE)[None, :], NOTHING, apart)


@triton.jit
def _unit_rows(base, stride, rows, columns, tokens: tl.constexpr, size: tl.constexpr, dtype: tl.constexpr):
    """Rows of length 1, in ``dtype``."""
    x = _rows_of(base, stride, rows, columns, tokens, size).to(tl.float32)
    return (x * _inverse_length(x)[:, None]).to(dtype)


@triton.jit
def _forward(
    qkv, scale, bias, regions, out, groups, heads, windows, chunks,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, chunk = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = qkv.dtype.element_ty
    stride = 3 * heads * SIZE
    places = tl.arange(0, WIDTH)
    first = tl.arange(0, FIRST)
    factor = tl.load(scale + head).to(tl.float32) * LOG2E
    bias += head * TOKENS * TOKENS
    bias_1 = _bias_of(bias, rows, first, TOKENS)
    if SECOND:
        second = FIRST + tl.arange(0, SECOND)
        bias_2 = _bias_of(bias, rows, second, TOKENS)
    for group in range(chunk, groups, chunks):
        base = qkv + group * TOKENS * stride + head * SIZE
        keys = base + heads * SIZE
        values = keys + heads * SIZE
        q = _rows_of(base, stride, rows, places, TOKENS, SIZE).to(tl.float32)
        u = (q * (_inverse_length(q) * factor)[:, None]).to(dtype)
        w_1 = _unit_rows(keys, stride, first, places, TOKENS, SIZE, dtype)
        s_1 = tl.dot(u, tl.trans(w_1), input_precision=PRECISION) + bias_1
        if SHIFTED:
            here = regions + (group % windows) * TOKENS
            s_1 += _penalty(here, rows, first, TOKENS)
        highest = tl.max(s_1, axis=1)
        if SECOND:
            w_2 = _unit_rows(keys, stride, second, places, TOKENS, SIZE, dtype)
            s_2 = tl.dot(u, tl.trans(w_2), input_precision=PRECISION) + bias_2
            if SHIFTED:
                s_2 += _penalty(here, rows, second, TOKENS)
            highest = tl.maximum(highest, tl.max(s_2, axis=1))
        p_1 = tl.exp2(s_1 - highest[:, None])
        total = tl.sum(p_1, axis=1)
        v_1 = _rows_of(values, stride, first, places, TOKENS, SIZE)
        mixed = tl.dot(p_1.to(dtype), v_1, input_precision=PRECISION)
        if SECOND:
            p_2 = tl.exp2(s_2 - highest[:, None])
            total += tl.sum(p_2, axis=1)
            v_2 = _rows_of(values, stride, second, places, TOKENS, SIZE)
            mixed += tl.dot(p_2.to(dtype), v_2, input_precision=PRECISION)
        mixed = mixed / total[:, None]
        target = out + group * TOKENS * heads * SIZE + head * SIZE
        inside = (rows < TOKENS)[:, None] & (places < SIZE)[None, :]
        tl.store(target + rows[:, None] * heads * SIZE + places[None, :], mixed.to(dtype), mask=inside)


@triton.jit
def _backward_rows(
    qkv, scale, bias, regions, grad, grad_qkv, grad_bias, grad_scale, logsum, inner, groups, heads, windows, chunks,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q, and this program's part of those of bias and scale; leaves what the columns need."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    head, chunk = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = qkv.dtype.element_ty
    stride = 3 * heads * SIZE
    places = tl.arange(0, WIDTH)
    first = tl.arange(0, FIRST)
    plain = tl.load(scale + head).to(tl.float32)
    bias += head * TOKENS * TOKENS
    bias_1 = _bias_of(bias, rows, first, TOKENS)
    sum_1 = tl.zeros((BLOCK, FIRST), tl.float32)
    if SECOND:
        second = FIRST + tl.arange(0, SECOND)
        bias_2 = _bias_of(bias, rows, second, TOKENS)
        sum_2 = tl.zeros((BLOCK, SECOND), tl.float32)
    scales = tl.zeros((BLOCK,), tl.float32)
    inside = (rows < TOKENS)[:, None] & (places < SIZE)[None, :]
    for group in range(chunk, groups, chunks):
        offset = group * TOKENS * stride + head * SIZE
        keys = qkv + offset + heads * SIZE
        values = keys + heads * SIZE
        q = _rows_of(qkv + offset, stride, rows, places, TOKENS, SIZE).to(tl.float32)
        length = tl.sqrt(tl.sum(q * q, axis=1))
        inverse = 1.0 / tl.maximum(length, EPSILON)
        unit = q * inverse[:, None]
        u = (q * (inverse * (plain * LOG2E))[:, None]).to(dtype)
        incoming = grad + group * TOKENS * heads * SIZE + head * SIZE
        do = _rows_of(incoming, heads * SIZE, rows, places, TOKENS, SIZE).to(dtype)
        w_1 = _unit_rows(keys, stride, first, places, TOKENS, SIZE, dtype)
        s_1 = tl.dot(u, tl.trans(w_1), input_precision=PRECISION) + bias_1
        if SHIFTED:
            here = regions + (group % windows) * TOKENS
            s_1 += _penalty(here, rows, first, TOKENS)
        highest = tl.max(s_1, axis=1)
        if SECOND:
            w_2 = _unit_rows(keys, stride, second, places, TOKENS, SIZE, dtype)
            s_2 = tl.dot(u, tl.trans(w_2), input_precision=PRECISION) + bias_2
            if SHIFTED:
                s_2 += _penalty(here, rows, second, TOKENS)
            highest = tl.maximum(highest, tl.max(s_2, axis=1))
        p_1 = tl.exp2(s_1 - highest[:, None])
        total = tl.sum(p_1, axis=1)
        v_1 = _rows_of(values, stride, first, places, TOKENS, SIZE)
        dp_1 = tl.dot(do, tl.trans(v_1), input_precision=PRECISION)
        along = tl.sum(p_1 * dp_1, axis=1)
        if SECOND:
            p_2 = tl.exp2(s_2 - highest[:, None])
            total += tl.sum(p_2, axis=1)
            v_2 = _rows_of(values, stride, second, places, TOKENS, SIZE)
            dp_2 = tl.dot(do, tl.trans(v_2), input_precision=PRECISION)
            along += tl.sum(p_2 * dp_2, axis=1)
        along = along / total
        ds_1 = (p_1 / total[:, None]) * (dp_1 - along[:, None])
        sum_1 += ds_1
        du = tl.dot(ds_1.to(dtype), w_1, input_precision=PRECISION)
        if SECOND:
            ds_2 = (p_2 / total[:, None]) * (dp_2 - along[:, None])
            sum_2 += ds_2
            du += tl.dot(ds_2.to(dtype), w_2, input_precision=PRECISION)
        kept = group * heads * TOKENS + head * TOKENS + rows
        tl.store(logsum + kept, highest + tl.log2(total), mask=rows < TOKENS)
        tl.store(inner + kept, along, mask=rows < TOKENS)
        # u = scale * q / |q|: what lies along q is taken out, and is the scale's.
        share = tl.sum(du * unit, axis=1)
        scales += share
        dq = (du - unit * tl.where(length > EPSILON, share, 0.0)[:, None]) * (inverse * plain)[:, None]
        tl.store(grad_qkv + offset + rows[:, None] * stride + places[None, :], dq.to(dtype), mask=inside)
    part = chunk * heads + head
    tl.store(grad_scale + part * blocks + block, tl.sum(scales, axis=0))
    target = grad_bias + part * TOKENS * TOKENS + rows[:, None] * TOKENS
    tl.store(target + first[None, :], sum_1, mask=(rows < TOKENS)[:, None] & (first < TOKENS)[None, :])
    if SECOND:
        tl.store(target + second[None, :], sum_2, mask=(rows < TOKENS)[:, None] & (second < TOKENS)[None, :])


@triton.jit
def _column_part(
    rows, columns, qkv, stride, incoming, out_stride, factor, bias_tile, here, logsum, inner, w, v, places,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """What one tile of rows adds to the gradients of a tile of keys and values."""
    q = _rows_of(qkv, stride, rows, places, TOKENS, SIZE).to(tl.float32)
    u = (q * (_inverse_length(q) * factor)[:, None]).to(dtype)
    do = _rows_of(incoming, out_stride, rows, places, TOKENS, SIZE).to(dtype)
    s = tl.dot(u, tl.trans(w), input_precision=PRECISION) + bias_tile
    if SHIFTED:
        s += _penalty(here, rows, columns, TOKENS)
    # Rows outside get the weight 2 ** -inf.
    p = tl.exp2(s - tl.load(logsum + rows, mask=rows < TOKENS, other=float("inf"))[:, None])
    dv = tl.dot(tl.trans(p.to(dtype)), do, input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - tl.load(inner + rows, mask=rows < TOKENS, other=0.0)[:, None])
    return tl.dot(tl.trans(ds.to(dtype)), u, input_precision=PRECISION), dv


@triton.jit
def _backward_columns(
    qkv, scale, bias, regions, grad, grad_qkv, logsum, inner, groups, heads, windows, chunks,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, chunk = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = qkv.dtype.element_ty
    stride = 3 * heads * SIZE
    places = tl.arange(0, WIDTH)
    first = tl.arange(0, FIRST)
    factor = tl.load(scale + head).to(tl.float32) * LOG2E
    bias += head * TOKENS * TOKENS
    bias_1 = _bias_of(bias, first, columns, TOKENS)
    if SECOND:
        second = FIRST + tl.arange(0, SECOND)
        bias_2 = _bias_of(bias, second, columns, TOKENS)
    inside = (columns < TOKENS)[:, None] & (places < SIZE)[None, :]
    for group in range(chunk, groups, chunks):
        offset = group * TOKENS * stride + head * SIZE
        queries = qkv + offset
        keys = queries + heads * SIZE
        incoming = grad + group * TOKENS * heads * SIZE + head * SIZE
        kept = group * heads * TOKENS + head * TOKENS
        here = regions + (group % windows) * TOKENS
        k = _rows_of(keys, stride, columns, places, TOKENS, SIZE).to(tl.float32)
        v = _rows_of(keys + heads * SIZE, stride, columns, places, TOKENS, SIZE)
        length = tl.sqrt(tl.sum(k * k, axis=1))
        inverse = 1.0 / tl.maximum(length, EPSILON)
        unit = k * inverse[:, None]
        w = unit.to(dtype)
        dw, dv = _column_part(
            first, columns, queries, stride, incoming, heads * SIZE, factor, bias_1, here, logsum + kept, inner + kept,
            w, v, places, TOKENS, SIZE, SHIFTED, PRECISION, dtype,
        )  # fmt: skip
        if SECOND:
            more_dw, more_dv = _column_part(
                second, columns, queries, stride, incoming, heads * SIZE, factor, bias_2, here, logsum + kept,
                inner + kept, w, v, places, TOKENS, SIZE, SHIFTED, PRECISION, dtype,
            )  # fmt: skip
            dw += more_dw
            dv += more_dv
        dw = dw * LN2  # u holds the logits' factor of log2(e)
        share = tl.where(length > EPSILON, tl.sum(dw * unit, axis=1), 0.0)
        dk = (dw - unit * share[:, None]) * inverse[:, None]
        target = grad_qkv + offset + heads * SIZE + columns[:, None] * stride + places[None, :]
        tl.store(target, dk.to(dtype), mask=inside)
        tl.store(target + heads * SIZE, dv.to(dtype), mask=inside)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _Call(NamedTuple):
    """What one of the kernels is called with, for inputs of one shape."""

    groups: int
    tokens: int
    heads: int
    size: int
    windows: int
    tiles: tuple[int, int]
    launch: Launch
    blocks: int
    chunks: int

    @classmethod
    def of(cls, kind: int, qkv: torch.Tensor, heads: int, regions: torch.Tensor | None) -> _Call:
        groups, tokens, width = qkv.shape
        cut = tiles(tokens)
        launch = next(launches[kind] for most, launches in LAUNCHES.items() if sum(cut) <= most)
        blocks = triton.cdiv(tokens, launch.block)
        chunks = max(1, min(groups, PROGRAMS_PER_PROCESSOR * _processors(qkv.device) // (blocks * heads)))
        windows = 1 if regions is None else len(regions)
        return cls(groups, tokens, heads, width // 3 // heads, windows, cut, launch, blocks, chunks)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.blocks, self.heads, self.chunks

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.groups, self.heads, self.windows, self.chunks

    def options(self, dtype: torch.dtype, shifted: bool) -> dict[str, Any]:
        precise = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        return {
            "TOKENS": self.tokens,
            "SIZE": self.size,
            "WIDTH": max(SMALLEST_TILE, triton.next_power_of_2(self.size)),
            "BLOCK": self.launch.block,
            "FIRST": self.tiles[0],
            "SECOND": self.tiles[1],
            "SHIFTED": shifted,
            "PRECISION": "ieee" if precise else "tf32",
            "num_warps": self.launch.warps,
        }


def forward(qkv: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, regions: torch.Tensor | None) -> torch.Tensor:
    """Mix values by cosine attention.

    Args:
        qkv: (B * windows, N, 3 * C), contiguous, bf16, fp16 or fp32.
        scale: (heads,) or (heads, 1, 1) of the cosines.
        bias: (heads, N, N), fp32, contiguous.
        regions: (windows, N) int32, tokens of unequal numbers do not attend to each other; None: all do.

    Returns:
        (B * windows, N, C)
    """
    shifted = regions is not None
    call = _Call.of(FORWARD, qkv, len(scale), regions)
    out = qkv.new_empty(call.groups, call.tokens, call.heads * call.size)
    numbers = regions if shifted else qkv
    _forward[call.grid](qkv, scale, bias, numbers, out, *call.sizes, **call.options(qkv.dtype, shifted))
    return out


def backward(
    grad: torch.Tensor, qkv: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, regions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``forward``'s qkv, scale and bias, in their shapes and types, from that of its result (contiguous)."""
    shifted = regions is not None
    numbers = regions if shifted else qkv
    call = _Call.of(BY_ROWS, qkv, len(scale), regions)
    grad_qkv = torch.empty_like(qkv)
    logsum, inner = (qkv.new_empty(call.groups, call.heads, call.tokens, dtype=torch.float32) for _ in range(2))
    grad_bias = qkv.new_empty(call.chunks, call.heads, call.tokens, call.tokens, dtype=torch.float32)
    grad_scale = qkv.new_empty(call.chunks, call.heads, call.blocks, dtype=torch.float32)
    _backward_rows[call.grid](
        qkv, scale, bias, numbers, grad, grad_qkv, grad_bias, grad_scale, logsum, inner, *call.sizes,
        **call.options(qkv.dtype, shifted),
    )  # fmt: skip
    call = _Call.of(BY_COLUMNS, qkv, len(scale), regions)
    _backward_columns[call.grid](
        qkv, scale, bias, numbers, grad, grad_qkv, logsum, inner, *call.sizes, **call.options(qkv.dtype, shifted)
    )
    return grad_qkv, grad_scale.sum((0, 2)).view_as(scale).to(scale.dtype), grad_bias.sum(0).to(bias.dtype)
