"""Stochastic depth whose draws belong to the sample, not to the process that happens to compute it.

A draw from the process's random generator changes with the number of ranks, the micro-batch and after every resume.
Here each decision is a hash of (the sample's key, the residual branch), so that a sample loses the same branches
wherever, and however often, it is computed.
"""

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
        (K, B, 1, 1) fp32: 1 / (1 - rate) where the branch is kept, 0 where it is dropped.

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
    scale = (1.0 / keep).float().to(device)
    return ((uniform < threshold[:, None]) * scale[:, None])[:, :, None, None]
