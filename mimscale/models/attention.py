"""Window attention of SwinV2: cosine similarity, a learnt scale per head, a log-spaced continuous position bias."""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from mimscale.models.attention_core import attend
from mimscale.models.layers import Linear, QkvLinear

SCALE_START = 10.0
SCALE_LIMIT = 100.0
BIAS_RANGE = 16.0


class Positions(NamedTuple):
    """What attention needs to know of one way of cutting windows.

    Attributes:
        offsets: (T, 2) log-spaced relative positions, fp32 or fp64.
        pairs: (N * N,) rows of that table for every pair of tokens.
        penalty: (windows, 1, N, N) added to the logits, or None.
        tokens: N.
        regions: (windows, N) int32, the numbers that the penalty keeps apart; None where there is none.
    """

    offsets: torch.Tensor
    pairs: torch.Tensor
    penalty: torch.Tensor | None
    tokens: int
    regions: torch.Tensor | None = None


def log_spaced(offsets: torch.Tensor, reference: tuple[int, int]) -> torch.Tensor:
    """Space relative positions logarithmically (SwinV2, section 3.3).

    Args:
        offsets: (T, 2) relative positions in tokens, any floating dtype.
        reference: (rows, columns) of the window at pre-training, which is mapped to [-8, 8].

    Returns:
        sign(x) * log2(1 + |x|) / log2(8), (T, 2).
    """
    span = offsets.new_tensor([max(reference[0] - 1, 1), max(reference[1] - 1, 1)])
    x = offsets / span * 8
    return torch.sign(x) * torch.log2(x.abs() + 1) / math.log2(8)


class PositionLinear(Linear):
    """A linear layer of the bias MLP, computed in fp32 at least: the table is tiny and its precision is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (T, in) to (T, out), both in fp32 or fp64."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class PositionBias(nn.Sequential):
    """The log-spaced continuous position bias: an MLP from relative positions to one value a head.

    Args:
        num_heads: heads.
    """

    def __init__(self, num_heads: int):
        super().__init__(PositionLinear(2, 512), nn.ReLU(inplace=True), PositionLinear(512, num_heads, bias=False))

    def forward(self, positions: Positions) -> torch.Tensor:
        """Evaluate 16 * sigmoid(MLP) for every pair of tokens, as (heads, N, N) in fp32 or fp64."""
        table = BIAS_RANGE * torch.sigmoid(super().forward(positions.offsets))
        return table.index_select(0, positions.pairs).view(positions.tokens, positions.tokens, -1).permute(2, 0, 1)


class WindowAttention(nn.Module):
    """Multi-head attention within windows (SwinV2, section 3.2 and 3.3).

    Args:
        dim: channels C.
        num_heads: heads, a divisor of C.
        own_bias: own a position bias; without, ``forward`` is given one.
    """

    def __init__(self, dim: int, num_heads: int, own_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(SCALE_START)))
        self.cpb_mlp = PositionBias(num_heads) if own_bias else None
        self.qkv = QkvLinear(dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, positions: Positions, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within windows.

        Args:
            x: (B * windows, N, C), window after window.
            positions: of the way the windows are cut.
            bias: (heads, N, N), where the module owns none.

        Returns:
            (B * windows, N, C)
        """
        if self.cpb_mlp is not None:
            bias = self.cpb_mlp(positions)
        if bias is None:
            raise ValueError("this attention owns no position bias and was given none")
        qkv = self.qkv(x, torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias)))
        scale = self.logit_scale.clamp(max=math.log(SCALE_LIMIT)).exp()
        return self.proj(attend(qkv, scale, bias, positions.penalty, positions.regions))
