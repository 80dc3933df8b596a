"""How much of an image is masked, and on which grid: the arithmetic that data and objectives share, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# SimMIM (section 3.1): squares of 32 pixels, 60 % of them. MAE (He et al., 2022): its ViT's patches, 75 % of them.
SIMMIM_PATCH = 32
SIMMIM_RATIO = 0.6
MAE_RATIO = 0.75

Count = Callable[[int, float], int]


def masked_up(patches: int, ratio: float) -> int:
    """SimMIM's count: the masked are rounded up (22 of 36 at 0.6)."""
    # Rounding away float noise: 0.6 * 35 is 21, not a hair above it.
    return math.ceil(round(patches * ratio, 6))


def visible_down(patches: int, ratio: float) -> int:
    """MAE's count: the visible are rounded down (147 of 196 are masked at 0.75)."""
    return patches - int(round(patches * (1 - ratio), 6))


@dataclass(frozen=True)
class MaskGeometry:
    """Masks of one image size.

    Attributes:
        patch: side of what is masked as one, in pixels.
        grid: rows and columns of the mask.
        masked: how many of them are masked.
    """

    patch: int
    grid: tuple[int, int]
    masked: int

    @classmethod
    def of(
        cls, image_size: int | tuple[int, int], patch: int, ratio: float, count: Count = masked_up, whose: str = ""
    ) -> MaskGeometry:
        """The masks of images.

        Args:
            image_size: side of the images in pixels, or (height, width).
            patch: side of what is masked as one, in pixels.
            ratio: share that is masked.
            count: how the share is rounded.
            whose: what has such patches, for the error.

        Raises:
            ValueError: images that are not whole patches (the nearest smaller size is named), or a ratio outside (0, 1).
        """
        if not 0 < ratio < 1:
            raise ValueError(f"the masked share must lie between 0 and 1, not {ratio}")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        for side in (height, width):
            if side < patch or side % patch:
                of = f" of {whose}" if whose else ""
                raise ValueError(
                    f"data.image_size={side} is not a multiple of the {patch}-pixel mask patch{of}; "
                    f"{side // patch * patch or patch} would fit"
                )
        grid = (height // patch, width // patch)
        return cls(patch, grid, count(grid[0] * grid[1], ratio))
