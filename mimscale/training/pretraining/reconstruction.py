"""Filling in images with the trained model of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from mimscale.training.checkpoint import open_newest
from mimscale.training.pretraining.module import MIMModule, build_objective
from mimscale.training.recipe import Recipe, stored_recipe


def load_run(run: Path, step: int | None = None) -> tuple[Recipe, MIMModule, int]:
    """The recipe and the trained model of a run, in eval mode on the CPU.

    Args:
        run: the run folder.
        step: which checkpoint; the newest if ``None``.

    Raises:
        CheckpointError: there is none, or it is damaged.
        RecipeError: its recipe does not build.
    """
    checkpoint = open_newest(run, step)
    recipe: Recipe = stored_recipe(checkpoint.manifest["recipe"], str(checkpoint.path))
    objective = build_objective(recipe)
    checkpoint.check_shapes({name: tuple(p.shape) for name, p in objective.named_parameters()})
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            parameter.copy_(checkpoint.tensor(name))
    return recipe, objective.eval(), checkpoint.step


def read_images(paths: list[Path], size: int) -> Tensor:
    """Centre crops (N, 3, size, size) uint8 of image files.

    Raises:
        ValueError: a file is not there or is no image; it is named.
    """
    images = []
    for path in paths:
        pixels = transforms.pil_to_tensor(read_image(path))
        images.append(transforms.center_crop(transforms.resize(pixels, [size], antialias=True), [size, size]))
    return torch.stack(images)


def read_image(path: Path) -> Image.Image:
    """An image file in RGB.

    Raises:
        ValueError: it is not there or is no image; it is named.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"there is no image {path}") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read ({error})") from None


def random_masks(count: int, recipe: Recipe, seed: int) -> Tensor:
    """Masks (count, h, w) that hide as many patches as in training."""
    generator = torch.Generator().manual_seed(seed)
    grid = recipe.mask_grid
    ranks = torch.rand(count, grid * grid, generator=generator).argsort(1).argsort(1)
    return (ranks < recipe.hidden).view(count, grid, grid)
