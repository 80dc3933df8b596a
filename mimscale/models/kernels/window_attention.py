"""Cosine attention within windows, forward and backward, as Triton kernels.

For one window and head, with q, k, v (N, D): u = q / |q| * scale, w = k / |k|, P = softmax(u w' + bias + penalty), out = P v.

- Lengths, bias, penalty and softmax happen on chip; queries, keys and values are read where the linear layer wrote them, and
  go into the products as they are: their lengths are factors of the logits.
- The penalty is worked out from a region number for each token, not read from a table.
- Only the kernel's inputs and the lengths are kept for the backward pass. It runs twice over the logits: by rows for the
  gradients of q, the bias and the scale, then by columns for those of k and v.
- A program keeps its part of the bias in registers and goes through windows that share it. Gradients of the bias are summed
  in registers over these windows and written once for each program; nothing is added atomically, so equal inputs give equal
  bits.
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
    """How a kernel is cut: ``block`` rows (of keys, in the last) for each program, its warps, and loads begun ahead."""

    block: int
    warps: int
    stages: int = 3


# By the columns that the two tiles hold together, up to so many: forward, backward by rows, backward by columns.
LAUNCHES = {
    64: (Launch(32, 2), Launch(16, 2), Launch(32, 2)),
    256: (Launch(64, 4), Launch(16, 2), Launch(64, 4)),
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
def _lengths(
    qkv, inverse, tokens_in_all, groups, heads, TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """1 / max(|x|, epsilon) of every query and key: (2, groups, heads, N) in fp32."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    segment = tl.program_id(1)  # queries head after head, then keys
    places = tl.arange(0, WIDTH)
    inside = (token < tokens_in_all)[:, None] & (places < SIZE)[None, :]
    x = tl.load(qkv + token[:, None] * (3 * heads * SIZE) + segment * SIZE + places[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    found = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), EPSILON)
    group, row = token // TOKENS, token % TOKENS
    place = ((segment // heads) * groups + group) * heads + segment % heads
    tl.store(inverse + place * TOKENS + row, found, mask=token < tokens_in_all)


@triton.jit
def _vector(base, places, tokens: tl.constexpr):
    """One number for each token, 0 outside."""
    return tl.load(base + places, mask=places < tokens, other=0.0)


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
def _logits(u, keys, inverse, stride, columns, rows, places, bias, regions, TOKENS: tl.constexpr, SIZE: tl.constexpr,
            SHIFTED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Logits of rows u against a tile of columns, in units of log 2; with the keys and their inverse lengths."""
    k = _rows_of(keys, stride, columns, places, TOKENS, SIZE)
    length = _vector(inverse, columns, TOKENS)
    s = tl.dot(u, tl.trans(k), input_precision=PRECISION) * length[None, :] + bias
    if SHIFTED:
        s += _penalty(regions, rows, columns, TOKENS)
    return s, k, length


@triton.jit
def _forward(
    qkv, inverse, scale, bias, regions, out, groups, heads, windows, chunks,
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
    inside = (rows < TOKENS)[:, None] & (places < SIZE)[None, :]
    for group in range(chunk, groups, chunks):
        base = qkv + group * TOKENS * stride + head * SIZE
        keys = base + heads * SIZE
        values = keys + heads * SIZE
        of_queries = inverse + (group * heads + head) * TOKENS
        of_keys = of_queries + groups.to(tl.int64) * heads * TOKENS
        here = regions + (group % windows) * TOKENS
        q = _rows_of(base, stride, rows, places, TOKENS, SIZE).to(tl.float32)
        u = (q * (_vector(of_queries, rows, TOKENS) * factor)[:, None]).to(dtype)
        s_1, _, _ = _logits(
            u, keys, of_keys, stride, first, rows, places, bias_1, here, TOKENS, SIZE, SHIFTED, PRECISION
        )
        highest = tl.max(s_1, axis=1)
        if SECOND:
            s_2, _, _ = _logits(
                u, keys, of_keys, stride, second, rows, places, bias_2, here, TOKENS, SIZE, SHIFTED, PRECISION
            )
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
        tl.store(target + rows[:, None] * heads * SIZE + places[None, :], mixed.to(dtype), mask=inside)


@triton.jit
def _backward_rows(
    qkv, inverse, scale, bias, regions, grad, grad_qkv, grad_bias, grad_scale, logsum, inner,
    groups, heads, windows, chunks,
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
        kept = (group * heads + head) * TOKENS
        of_keys = inverse + groups.to(tl.int64) * heads * TOKENS + kept
        here = regions + (group % windows) * TOKENS
        q = _rows_of(qkv + offset, stride, rows, places, TOKENS, SIZE).to(tl.float32)
        length = _vector(inverse + kept, rows, TOKENS)
        unit = q * length[:, None]
        u = (unit * (plain * LOG2E)).to(dtype)
        incoming = grad + group * TOKENS * heads * SIZE + head * SIZE
        do = _rows_of(incoming, heads * SIZE, rows, places, TOKENS, SIZE).to(dtype)
        s_1, k_1, inv_1 = _logits(
            u, keys, of_keys, stride, first, rows, places, bias_1, here, TOKENS, SIZE, SHIFTED, PRECISION
        )
        highest = tl.max(s_1, axis=1)
        if SECOND:
            s_2, k_2, inv_2 = _logits(
                u, keys, of_keys, stride, second, rows, places, bias_2, here, TOKENS, SIZE, SHIFTED, PRECISION
            )
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
        share = 1.0 / total
        along = along * share
        ds_1 = (p_1 * share[:, None]) * (dp_1 - along[:, None])
        sum_1 += ds_1
        du = tl.dot((ds_1 * inv_1[None, :]).to(dtype), k_1, input_precision=PRECISION)
        if SECOND:
            ds_2 = (p_2 * share[:, None]) * (dp_2 - along[:, None])
            sum_2 += ds_2
            du += tl.dot((ds_2 * inv_2[None, :]).to(dtype), k_2, input_precision=PRECISION)
        tl.store(logsum + kept + rows, highest + tl.log2(total), mask=rows < TOKENS)
        tl.store(inner + kept + rows, along, mask=rows < TOKENS)
        # u = scale * q / |q|: what lies along q is taken out, and is the scale's.
        shared = tl.sum(du * unit, axis=1)
        scales += shared
        shared = tl.where(length < 1.0 / EPSILON, shared, 0.0)
        dq = (du - unit * shared[:, None]) * (length * plain)[:, None]
        tl.store(grad_qkv + offset + rows[:, None] * stride + places[None, :], dq.to(dtype), mask=inside)
    part = chunk * heads + head
    tl.store(grad_scale + part * blocks + block, tl.sum(scales, axis=0))
    target = grad_bias + part * TOKENS * TOKENS + rows[:, None] * TOKENS
    tl.store(target + first[None, :], sum_1, mask=(rows < TOKENS)[:, None] & (first < TOKENS)[None, :])
    if SECOND:
        tl.store(target + second[None, :], sum_2, mask=(rows < TOKENS)[:, None] & (second < TOKENS)[None, :])


@triton.jit
def _column_part(
    rows, columns, queries, inverse, stride, incoming, out_stride, scale, bias_tile, here, logsum, inner, w, v, places,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """What one tile of rows adds to the gradients of a tile of keys and values."""
    q = _rows_of(queries, stride, rows, places, TOKENS, SIZE)
    factor = _vector(inverse, rows, TOKENS) * scale
    do = _rows_of(incoming, out_stride, rows, places, TOKENS, SIZE).to(dtype)
    s = tl.dot(q, tl.trans(w), input_precision=PRECISION) * (factor * LOG2E)[:, None] + bias_tile
    if SHIFTED:
        s += _penalty(here, rows, columns, TOKENS)
    # Rows outside get the weight 2 ** -inf.
    p = tl.exp2(s - tl.load(logsum + rows, mask=rows < TOKENS, other=float("inf"))[:, None])
    dv = tl.dot(tl.trans(p.to(dtype)), do, input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - _vector(inner, rows, TOKENS)[:, None]) * factor[:, None]
    return tl.dot(tl.trans(ds.to(dtype)), q, input_precision=PRECISION), dv


@triton.jit
def _backward_columns(
    qkv, inverse, scale, bias, regions, grad, grad_qkv, logsum, inner, groups, heads, windows, chunks,
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
    plain = tl.load(scale + head).to(tl.float32)
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
        kept = (group * heads + head) * TOKENS
        here = regions + (group % windows) * TOKENS
        k = _rows_of(keys, stride, columns, places, TOKENS, SIZE).to(tl.float32)
        v = _rows_of(keys + heads * SIZE, stride, columns, places, TOKENS, SIZE)
        length = _vector(inverse + groups.to(tl.int64) * heads * TOKENS + kept, columns, TOKENS)
        unit = k * length[:, None]
        w = unit.to(dtype)
        dw, dv = _column_part(
            first, columns, queries, inverse + kept, stride, incoming, heads * SIZE, plain, bias_1, here,
            logsum + kept, inner + kept, w, v, places, TOKENS, SIZE, SHIFTED, PRECISION, dtype,
        )  # fmt: skip
        if SECOND:
            more_dw, more_dv = _column_part(
                second, columns, queries, inverse + kept, stride, incoming, heads * SIZE, plain, bias_2, here,
                logsum + kept, inner + kept, w, v, places, TOKENS, SIZE, SHIFTED, PRECISION, dtype,
            )  # fmt: skip
            dw += more_dw
            dv += more_dv
        shared = tl.where(length < 1.0 / EPSILON, tl.sum(dw * unit, axis=1), 0.0)
        dk = (dw - unit * shared[:, None]) * length[:, None]
        target = grad_qkv + offset + heads * SIZE + columns[:, None] * stride + places[None, :]
        tl.store(target, dk.to(dtype), mask=inside)
        tl.store(target + heads * SIZE, dv.to(dtype), mask=inside)


def _width(size: int) -> int:
    return max(SMALLEST_TILE, triton.next_power_of_2(size))


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
            "WIDTH": _width(self.size),
            "BLOCK": self.launch.block,
            "FIRST": self.tiles[0],
            "SECOND": self.tiles[1],
            "SHIFTED": shifted,
            "PRECISION": "ieee" if precise else "tf32",
            "num_warps": self.launch.warps,
            "num_stages": self.launch.stages,
        }


def inverse_lengths(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """1 / length of every query and key of qkv (B * windows, N, 3 * C): (2, B * windows, heads, N), fp32."""
    groups, tokens, width = qkv.shape
    size = width // 3 // heads
    inverse = qkv.new_empty(2, groups, heads, tokens, dtype=torch.float32)
    block = 64
    _lengths[triton.cdiv(groups * tokens, block), 2 * heads](
        qkv, inverse, groups * tokens, groups, heads, TOKENS=tokens, SIZE=size, WIDTH=_width(size), BLOCK=block
    )
    return inverse


def forward(
    qkv: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, regions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix values by cosine attention.

    Args:
        qkv: (B * windows, N, 3 * C), contiguous, bf16, fp16 or fp32.
        scale: (heads,) or (heads, 1, 1) of the cosines.
        bias: (heads, N, N), fp32, contiguous.
        regions: (windows, N) int32, tokens of unequal numbers do not attend to each other; None: all do.

    Returns:
        (B * windows, N, C), and what the backward pass wants beside the arguments, as of :func:`inverse_lengths`.
    """
    shifted = regions is not None
    call = _Call.of(FORWARD, qkv, len(scale), regions)
    inverse = inverse_lengths(qkv, call.heads)
    out = qkv.new_empty(call.groups, call.tokens, call.heads * call.size)
    numbers = regions if shifted else qkv
    _forward[call.grid](qkv, inverse, scale, bias, numbers, out, *call.sizes, **call.options(qkv.dtype, shifted))
    return out, inverse


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    regions: torch.Tensor | None,
    inverse: torch.Tensor,
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
        qkv, inverse, scale, bias, numbers, grad, grad_qkv, grad_bias, grad_scale, logsum, inner, *call.sizes,
        **call.options(qkv.dtype, shifted),
    )  # fmt: skip
    call = _Call.of(BY_COLUMNS, qkv, len(scale), regions)
    _backward_columns[call.grid](
        qkv, inverse, scale, bias, numbers, grad, grad_qkv, logsum, inner, *call.sizes,
        **call.options(qkv.dtype, shifted),
    )  # fmt: skip
    return grad_qkv, grad_scale.sum((0, 2)).view_as(scale).to(scale.dtype), grad_bias.sum(0).to(bias.dtype)
