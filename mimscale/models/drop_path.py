"""Stochastic depth whose draws belong to the sample, not to the process that happens to compute it.

A draw from the process's random generator changes with the number of ranks, the micro-batch and after every resume.
Here each decision is a hash of (the sample's key, the residual branch), so that a sample loses the same branches
wherever, and however often, it is computed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

_MASK = {shift: (1 << (64 - shift)) - 1 for shift in (11, 27, 30, 31)}


def _signed(value: int) -> int:
    """Write an unsigned 64-bit constant as the int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift an int64 tensor right without its sign."""
    return (z >> bits) & _MASK[bits]


def _splitmix(z: torch.Tensor) -> torch.Tensor:
    """Mix the bits of an int64 tensor (the finaliser of SplitMix64); products wrap around."""
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def keyed_uniform(keys: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """Hash keys (B,) with branch indices (K,), both int64, to integers (K, B) uniform on [0, 2**53)."""
    mixed_keys = _splitmix(keys + _GAMMA)
    return _shift(_splitmix(mixed_keys[None, :] + (branches[:, None] + 1) * _GAMMA), 11)


def keep_scales(rates: list[float], batch: int, draw_keys: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Decide for every residual branch and sample whether the branch is kept.

    Args:
        rates: the drop rate of each of K branches, in [0, 1).
        batch: samples in the batch.
        draw_keys: (B,) int64, non-negative, one per sample draw; None draws from torch's generator.
        device: where the result is wanted.

    Returns:
        (K, B, 1, 1) fp64: 1 / (1 - rate) where the branch is kept, 0 where it is dropped.

    Raises:
        ValueError: ``draw_keys`` is not an int64 tensor of shape (B,).
    """
    if draw_keys is None:
        uniform = (torch.rand(len(rates), batch, dtype=torch.float64, device=device) * 2.0**53).long()
    elif draw_keys.dtype != torch.int64 or tuple(draw_keys.shape) != (batch,):
        raise ValueError(
            f"draw_keys must be int64 of shape ({batch},), one key per image, "
            f"but is {draw_keys.dtype} of shape {tuple(draw_keys.shape)}"
        )
    else:
        uniform = keyed_uniform(draw_keys.to(device), torch.arange(len(rates), device=device))
    keep = torch.tensor([1.0 - rate for rate in rates], dtype=torch.float64)
    threshold = (keep * 2.0**53).long().to(device)
    scale = (1.0 / keep).to(device)
    return ((uniform < threshold[:, None]) * scale[:, None])[:, :, None, None]


class Draw(NamedTuple):
    """What becomes of one residual branch in a batch.

    Attributes:
        factor: of the branch: a number for all samples that are computed, or (B, 1, 1).
        rows: (K,) int64, the samples that are computed; None for all.
    """

    factor: float | torch.Tensor = 1.0
    rows: torch.Tensor | None = None

    def run(
        self, branch: Callable[[torch.Tensor, float | torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """Apply ``branch`` to x (B, L, C): it takes (K, L, C) and the factor, and adds itself to what it was given."""
        if self.rows is None:
            return branch(x, self.factor)
        return x.index_copy(0, self.rows, branch(x.index_select(0, self.rows), self.factor))


KEEP_ALL = Draw()


def draw_branches(
    rates: list[float],
    batch: int,
    draw_keys: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    fixed_shapes: bool = False,
) -> list[Draw]:
    """Decide for every residual branch which samples it is computed for (see ``keep_scales``).

    On a CPU a branch that a sample drops is not computed for it. An accelerator would have to wait to learn the number
    of samples, so there it is computed and multiplied by 0. At least one sample runs through every branch, since all
    ranks have to gather the same parameters under ZeRO-3.

    Returns:
        A draw for each branch.
    """
    scales = keep_scales(rates, batch, draw_keys, device)
    if device.type != "cpu" or fixed_shapes:
        return [Draw(scale) for scale in scales.to(dtype).unbind(0)]
    draws = []
    for rate, row in zip(rates, (scales[:, :, 0, 0] > 0).tolist(), strict=True):
        kept = [sample for sample, keep in enumerate(row) if keep]
        # Also where all samples are kept: with checkpointing under ZeRO-3 the order in which parameters are gathered again
        # follows the graph, which therefore has to look the same on every rank.
        rows = None if rate == 0 else torch.tensor(kept or [0])
        draws.append(Draw(1.0 / (1.0 - rate) if kept else 0.0, rows))
    return draws
