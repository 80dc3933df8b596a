"""How much of an image each objective hides, and on which grid."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIMMIM_RATIO = 0.6
SIMMIM_PATCH = 32
MAE_KEEP = 0.25


def hidden_patches(objective: str, patches: int, ratio: float | None = None) -> int:
    """Count the patches that are hidden of ``patches``.

    SimMIM rounds the hidden up (22 of 36 at 0.6); MAE rounds the visible down (147 of 196 hidden at 0.75).

    Args:
        objective: "simmim" or "mae".
        patches: patches of an image.
        ratio: share that is hidden; by default the paper's, 0.6 and 0.75.

    Raises:
        ValueError: an unknown objective, or a ratio outside (0, 1).
    """
    if objective not in ("simmim", "mae"):
        raise ValueError(f'objective is "simmim" or "mae", not "{objective}"')
    if ratio is None:
        ratio = SIMMIM_RATIO if objective == "simmim" else 1 - MAE_KEEP
    if not 0 < ratio < 1:
        raise ValueError(f"the hidden share must lie between 0 and 1, not {ratio}")
    # Rounding away float noise: 0.6 * 35 is 21, not a hair above it.
    if objective == "simmim":
        return math.ceil(round(patches * ratio, 6))
    return patches - int(round(patches * (1 - ratio), 6))


def mask_grid(objective: str, img_size: int | tuple[int, int], patch: int | None = None) -> tuple[int, int]:
    """Give the rows and columns of an image's mask.

    Args:
        objective: "simmim" or "mae".
        img_size: side of the images, or (height, width).
        patch: side of what is hidden as one, in pixels: 32 for SimMIM, the ViT's patch (16 or 14) for MAE, where it is
            needed.

    Raises:
        ValueError: images that are not whole patches; MAE without a patch.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if patch is None:
        if objective != "simmim":
            raise ValueError("MAE hides the patches of its ViT: give patch=16, or 14 for vit_h")
        patch = SIMMIM_PATCH
    if height % patch or width % patch:
        raise ValueError(f"images of {height} x {width} are not whole patches of {patch} pixels")
    return height // patch, width // patch


def expand_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """Repeat every cell of a mask (B, h, w) to ``factor`` x ``factor``: (B, h * factor, w * factor)."""
    return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
