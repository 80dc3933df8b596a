"""``mimscale reconstruct``: look at what a pre-trained model fills in, on any images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from mimscale.data import ShardError, ShardIndex, ValidationStream
from mimscale.training.checkpoint import open_newest
from mimscale.training.errors import CheckpointError
from mimscale.training.pictures import reconstruction_sheet, save_png, to_uint8
from mimscale.training.pretraining.module import MIMModule, build_objective
from mimscale.training.recipe import Recipe, RecipeError, resolve


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
    recipe: Recipe = resolve(checkpoint.manifest["recipe"], str(checkpoint.path))
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


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="mimscale reconstruct", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of a pre-training")
    parser.add_argument("images", nargs="*", type=Path, help="image files; without any, the run's validation images")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--count", type=int, default=8, help="how many validation images (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default: 0)")
    parser.add_argument("--output", type=Path, help="PNG to write (default: RUN/reconstructions/images_STEP.png)")
    args = parser.parse_args(argv)
    try:
        recipe, objective, step = load_run(args.run, args.step)
        if args.images:
            images = read_images(args.images, recipe.data.image_size)
            mask = random_masks(len(images), recipe, args.seed)
        else:
            assert recipe.data.shards is not None
            grid, hidden = recipe.mask_grid, recipe.hidden
            index = ShardIndex.load(recipe.data.shards)
            stream = ValidationStream(index, recipe.data.image_size, args.count, mask_grid=grid, hidden=hidden)
            batch = next(iter(stream))
            images, mask = batch.images[batch.valid], batch.mask[batch.valid]
    except (CheckpointError, RecipeError, ShardError, ValueError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    with torch.no_grad():
        l1, l2, prediction = objective(images, mask)
        filled = to_uint8(objective.fill_in(images, mask, prediction))
    output = args.output or args.run / "reconstructions" / f"images_{step:08d}.png"
    save_png(reconstruction_sheet(images, mask, filled), output)
    print(f"{output}: {len(images)} images at step {step}, l1 {l1.mean():.4f}, l2 {l2.mean():.4f}")
    return 0
