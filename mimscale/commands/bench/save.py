"""``mimscale bench save``: how long a step waits for a checkpoint, written beside training and in line with it."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mimscale.training.ds_config import DeepSpeedConfigError, read_ds_config, reconcile, split_batch
from mimscale.training.engine import Engine, start_ranks, stop_ranks
from mimscale.training.errors import CheckpointError
from mimscale.training.optimizer import decay_groups
from mimscale.training.pretraining.module import build_objective
from mimscale.training.recipe import Recipe, RecipeError, load_recipe
from mimscale.training.saver import Saver
from mimscale.wording import counted


def bench(recipe: Recipe, engine: Engine, folder: Path, steps: int) -> dict[str, float]:
    """Train on noise with a save in each mode, and print what it costs.

    Returns:
        Seconds: ``step``, and for each mode ``stall`` (the step waits) and ``slower`` (the steps after it, while it is
        being written); ``bytes`` of the checkpoint.
    """
    local, side, grid = recipe.train.global_batch, recipe.data.image_size, recipe.mask.grid[0]
    images = torch.randint(0, 256, (local, 3, side, side), dtype=torch.uint8)
    mask = (torch.rand(local, grid**2).argsort(1) < recipe.mask.masked).view(local, grid, grid)

    def timed(action: Callable[[], object]) -> float:
        if engine.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if engine.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def train() -> None:
        engine.forward_backward((images, mask, torch.arange(local)))
        engine.apply(lambda scale: 1e-5 * scale)

    def step() -> float:
        return timed(train)

    step()  # warms up
    usual = statistics.median(step() for _ in range(steps))
    found = {"step": usual}
    for number, mode in enumerate(("blocking", "async"), 1):
        saver = Saver(folder, 1, (), mode, engine.ranks)  # type: ignore[arg-type]
        found[f"{mode}, stall"] = timed(lambda s=saver, n=number: s.save(n, engine.shapes(), engine.full_state, {}))  # type: ignore[misc]
        slower = 0.0
        while saver.is_writing():
            slower += step() - usual
        found[f"{mode}, slower"] = slower
        saver.finish()
    size = sum(path.stat().st_size for path in folder.glob("checkpoints/step_*/*"))
    found["bytes"] = size
    print(
        f"{recipe.model.name}, {counted(local, 'image')} a step of {usual:.2f} s; a checkpoint of {size / 1e9:.2f} GB"
    )
    print(f"{'':10}{'the step waits':>16}{'of a step':>11}{'later steps, in all':>21}{'a save costs':>14}")
    for mode in ("blocking", "async"):
        stall, slower = found[f"{mode}, stall"], found[f"{mode}, slower"]
        print(f"{mode:10}{stall:14.2f} s{stall / usual:11.1%}{slower:+19.2f} s{stall + slower:12.2f} s")
    return found


def run(asked: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    try:
        recipe: Recipe = load_recipe(asked.recipe, [*asked.overrides, f"train.global_batch={asked.batch}"])
        plain = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": asked.batch}
        ds_config = read_ds_config(asked.deepspeed_config) if asked.deepspeed_config else plain
        ranks = start_ranks()
        split = split_batch(ds_config, asked.batch, ranks.world_size, asked.batch)
        config = reconcile(ds_config, recipe, split, ranks.device.type == "cuda")
        engine = Engine(
            lambda: build_objective(recipe), lambda module: decay_groups(module, recipe), recipe, config, ranks
        )
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            bench(recipe, engine, Path(folder), asked.steps)
        engine.close()
        stop_ranks()
    except (RecipeError, DeepSpeedConfigError, CheckpointError, OSError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    return 0
