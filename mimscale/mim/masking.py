"""Masks as tensors. How much is masked, and on which grid, is :mod:`mimscale.masking`'s."""

import torch


def expand_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """Repeat every cell of a mask (B, h, w) to ``factor`` x ``factor``: (B, h * factor, w * factor)."""
    return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
