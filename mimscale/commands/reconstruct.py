"""``mimscale reconstruct``: look at what a pre-trained model fills in, on any images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mimscale.commands import Parser
from mimscale.commands.numbers import whole
from mimscale.wording import counted, printable


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="mimscale reconstruct", description=__doc__, allow_abbrev=False)
    made.add_argument("run", help="run folder of a pre-training; RUN@STEP for an earlier checkpoint")
    made.add_argument("images", nargs="*", type=Path, help="image files; without any, the run's validation images")
    made.add_argument("--step", type=whole(0), help="which checkpoint (default: the newest)")
    made.add_argument("--count", type=whole(1, 1000), default=8, help="how many validation images (default: 8)")
    made.add_argument("--seed", type=whole(0), default=0, help="of the masks (default: 0)")
    made.add_argument("--output", type=Path, help="PNG to write (default: RUN/reconstructions/images_STEP.png)")
    return made


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    import torch

    from mimscale.data import ShardError, ShardIndex, ValidationStream
    from mimscale.training.errors import CheckpointError
    from mimscale.training.pictures import reconstruction_sheet, save_png, to_uint8
    from mimscale.training.pretraining.reconstruction import random_masks, read_whole_images
    from mimscale.training.recipe import RecipeError
    from mimscale.transfer.load import load_run

    try:
        run = load_run(args.run, args.step)
        if run.kind is not None:
            raise RecipeError(
                f"{args.run} is a fine-tuning, which fills nothing in: mimscale predict shows what it makes of images"
            )
        recipe, objective = run.recipe, run.module()
        if args.images:
            read, damaged = read_whole_images(args.images, recipe.data.image_size)
            for reason in damaged:
                print(f"mimscale: skipped {reason}", file=sys.stderr)
            if read is None:
                raise ValueError(f"none of {counted(len(args.images), 'image')} can be read")
            images, mask = read, random_masks(len(read), recipe, args.seed)
        else:
            damaged = []
            if recipe.data.shards is None:
                raise RecipeError(f"{printable(args.run)} names no shards: give images")
            index = ShardIndex.load(recipe.data.shards)
            if "val" not in index.fractions:
                raise ShardError(
                    f"{recipe.data.shards} holds none out: give images, mimscale reconstruct {args.run} IMAGE ..."
                )
            mask_grid, masked = recipe.mask.grid[0], recipe.mask.masked
            stream = ValidationStream(index, recipe.data.image_size, args.count, mask_grid=mask_grid, masked=masked)
            batch = next(iter(stream), None)
            if batch is None or not batch.valid.any():
                raise ShardError(f"{recipe.data.shards} has no validation image that can be read")
            images, mask = batch.images[batch.valid], batch.mask[batch.valid]
        with torch.no_grad():
            l1, l2, prediction = objective(images, mask)
            filled = to_uint8(objective.fill_in(images, mask, prediction))
        step = run.checkpoint.step
        output = args.output or run.folder / "reconstructions" / f"images_{step:08d}.png"
        save_png(reconstruction_sheet(images, mask, filled), output)
    except (CheckpointError, RecipeError, ShardError, ValueError, OSError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    print(
        f"{printable(output)}: {counted(len(images), 'image')} at step {step}, l1 {l1.mean():.4f}, l2 {l2.mean():.4f}"
    )
    if damaged:
        print(
            f"mimscale: error: {len(damaged)} of {counted(len(args.images), 'image')} cannot be read", file=sys.stderr
        )
    return 1 if damaged else 0
