"""How large the images of dense tasks become, and what fills them up."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_to(size: tuple[int, int], test_size: tuple[int, int]) -> float:
    """What an image (height, width) is scaled by, so that its shorter side is test_size[0] or its longer one test_size[1].

    Whichever is reached first.
    """
    return min(test_size[0] / min(size), test_size[1] / max(size))


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """A size in pixels times a factor."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def fill(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The 8-bit colour that becomes nothing when the mean is taken out."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def filled(image: Tensor, height: int, width: int, fill: tuple[int, int, int]) -> Tensor:
    """An image (3, h, w) uint8 in the upper left of a larger one (3, height, width)."""
    canvas = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas
