"""Images to fill in, and what of them is masked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mimscale.data import DamagedSample
from mimscale.data.decode import read_rgb
from mimscale.data.stream.augment import resize_and_centre_crop
from mimscale.training.recipe import Recipe


def read_images(paths: list[Path], size: int) -> Tensor:
    """Centre crops (N, 3, size, size) uint8 of image files, cut as validation cuts them.

    Raises:
        DamagedSample: a file cannot be read or is no image; it is named.
    """
    return torch.stack([_crop(path, size) for path in paths])


def read_whole_images(paths: list[Path], size: int) -> tuple[Tensor | None, list[str]]:
    """As :func:`read_images`, of those that can be read; ``None`` where none can, and why the others cannot."""
    crops, damaged = [], []
    for path in paths:
        try:
            crops.append(_crop(path, size))
        except DamagedSample as error:
            damaged.append(error.reason)
    return torch.stack(crops) if crops else None, damaged


def _crop(path: Path, size: int) -> Tensor:
    return resize_and_centre_crop(read_rgb(path), size, size, "bilinear")


def random_masks(count: int, recipe: Recipe, seed: int) -> Tensor:
    """Masks (count, h, w) that hide as many patches as in training."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = recipe.mask.grid
    ranks = torch.rand(count, rows * columns, generator=generator).argsort(1).argsort(1)
    return (ranks < recipe.mask.masked).view(count, rows, columns)
