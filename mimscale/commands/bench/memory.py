"""``mimscale bench memory``: what a forward pass keeps, and what a few training steps really allocate on a rank.

With ``--allocated`` it starts ranks, and this module again in each; every cell is one model in one DeepSpeed configuration,
trained for a few steps on noise.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from mimscale.commands.bench.step import TimmSimMIM
from mimscale.files import write_text
from mimscale.mim import SimMIM
from mimscale.models import create_encoder
from mimscale.torch_private import allocation, storage_key
from mimscale.training.ds_config import reconcile, split_batch
from mimscale.training.engine import Engine, start_ranks, stop_ranks
from mimscale.training.optimizer import decay_groups
from mimscale.training.planning.counting import rank_memory
from mimscale.training.pretraining.module import build_objective
from mimscale.training.ranks import Ranks
from mimscale.training.recipe import Recipe, load_recipe

STEP = "mimscale: one step"


def activation_bytes(model: nn.Module, images: torch.Tensor, mask: torch.Tensor) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, each storage once, parameters left out."""
    kept: dict[int, int] = {}
    parameters = {storage_key(p) for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = storage_key(tensor)
        if key not in parameters:
            kept[key] = tensor.untyped_storage().nbytes()
            held.append(tensor)  # or its storage's place could be taken by another
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images, mask)
    del output
    return sum(kept.values())


def bench_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Print the bytes an image that a forward pass keeps, for every kind of activation checkpointing.

    Returns:
        MB an image for each kind.
    """
    device = torch.device("meta")
    with device:
        encoder: Any = create_encoder(arguments.model, img_size=arguments.image, window_size=arguments.window)
        model = SimMIM(encoder)
        rival = TimmSimMIM(arguments.model, True, arguments.image, arguments.window)
        images = torch.empty(arguments.batch, 3, arguments.image, arguments.image)
        mask = torch.empty(arguments.batch, arguments.image // 32, arguments.image // 32, dtype=torch.bool)
    kinds: dict[str, dict] = {
        "nothing recomputed": {"enable": False},
        "attention": {"attention_only": True},
        "every second block": {"every": 2},
        "every block": {},
    }
    results = {"timm": activation_bytes(rival, images, mask) / arguments.batch}
    for label, options in kinds.items():
        model.set_grad_checkpointing(**{"enable": True, **options})
        results[label] = activation_bytes(model, images, mask) / arguments.batch
    print(f"{arguments.model}, {arguments.image} px, fp32: activations kept for the backward pass")
    for label, size in results.items():
        print(f"{label:20}{size / 1e6:10.1f} MB an image{results['nothing recomputed'] / size:8.1f}x less")
    return results


def bench_allocated(arguments: argparse.Namespace) -> dict[str, float]:
    """Train a few steps at every ZeRO stage and print what was allocated beside what the plan says.

    Returns:
        Planned over allocated bytes for each stage.
    """
    cells = [
        {
            "recipe": arguments.model,
            "overrides": [f"train.global_batch={arguments.batch * arguments.ranks}", *arguments.overrides],
            "config": {"zero_optimization": {"stage": stage}},
        }
        for stage in arguments.zero
    ]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
        module = ["-m", "mimscale.commands.bench.memory", json.dumps(cells), str(output)]
        done = subprocess.run([sys.executable, *launcher, *module], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        figures = json.loads(output.read_text())
    print(
        f"{arguments.model}, {arguments.ranks} ranks, {arguments.batch} images a rank: GB a rank at the fullest moment"
    )
    print(f"{'ZeRO stage':12}{'allocated':>12}{'planned':>12}{'off by':>9}")
    results = {}
    for stage, figure in zip(arguments.zero, figures, strict=True):
        ratio = figure["planned"] / figure["allocated"]
        results[f"stage {stage}"] = ratio
        print(f"{stage:<12}{figure['allocated'] / 1e9:12.3f}{figure['planned'] / 1e9:12.3f}{ratio - 1:9.1%}")
    return results


def _train(recipe: Recipe, config: dict[str, Any], ranks: Ranks, steps: int, began: Callable[[], None]) -> None:
    engine = Engine(lambda: build_objective(recipe), lambda module: decay_groups(module, recipe), recipe, config, ranks)
    local = recipe.train.global_batch // ranks.world_size
    generator = torch.Generator().manual_seed(ranks.rank)
    side, grid = recipe.data.image_size, recipe.mask.grid[0]
    images = torch.randint(0, 256, (local, 3, side, side), dtype=torch.uint8, generator=generator)
    order = torch.rand(local, grid**2, generator=generator).argsort(1)
    mask = (order < recipe.mask.masked).view(local, grid, grid)
    for _ in range(steps):
        began()
        with record_function(STEP):
            engine.forward_backward((images, mask, torch.arange(local)))
            engine.apply(lambda scale: recipe.learning_rate * scale)
    engine.close()


def peak_allocated(recipe: Recipe, config: dict[str, Any], ranks: Ranks, steps: int = 5) -> int:
    """Bytes that torch's allocator held at most on this rank, while the model was built or in a step.

    Of the steps after the first, which can hold less, the one with the lowest peak counts: gloo's threads let go of a
    bucket a moment after the ranks have moved on, and on a busy machine that moment can last until the next bucket is full.
    """
    gc.collect()
    if ranks.device.type == "cuda":
        return _peak_on_gpu(recipe, config, ranks, steps)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train(recipe, config, ranks, steps, began=lambda: None)
        gc.collect()
    events = profiler.profiler.kineto_results.experimental_event_tree()
    totals = sorted(_totals(events))
    _, first_size, first_total = totals[0]
    spans = sorted((event.start_time_ns, event.end_time_ns) for event in events if event.name == STEP)
    built = max(total for at, _, total in totals if at < spans[0][0])
    peaks = [max(total for at, _, total in totals if start <= at <= end) for start, end in spans[1:]]
    return max(built, min(peaks)) - (first_total - first_size)


def _peak_on_gpu(recipe: Recipe, config: dict[str, Any], ranks: Ranks, steps: int) -> int:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    peaks: list[int] = []

    def began() -> None:
        peaks.append(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    _train(recipe, config, ranks, steps, began)
    built, _, *later = [*peaks, torch.cuda.max_memory_allocated()]
    return max(built, min(later)) - before


def _totals(events: list[Any]) -> Iterator[tuple[int, int, int]]:
    """Give time, change and the allocator's own total of every change.

    The total, not a sum of changes: gloo's threads free tensors too, and only the allocator sees those.
    """
    for event in events:
        if (sizes := allocation(event)) is not None:
            yield event.start_time_ns, *sizes
        yield from _totals(event.children)


def run(arguments: argparse.Namespace) -> int:
    """Run ``mimscale bench memory``; returns the exit status."""
    (bench_allocated if arguments.allocated else bench_memory)(arguments)
    return 0


def main(argv: list[str]) -> None:
    """Measure every cell of a JSON list, ``{"recipe", "overrides", "config"}`` each, and write the figures as JSON.

    Args:
        argv: the JSON list, and the file that the first rank writes: ``{"allocated", "planned"}`` bytes for each cell, the
            rank that took the most.
    """
    cells, output = json.loads(argv[0]), argv[1]
    ranks = start_ranks()
    figures = []
    for cell in cells:
        recipe: Recipe = load_recipe(cell["recipe"], cell["overrides"])
        split = split_batch(cell["config"], recipe.train.global_batch, ranks.world_size, None)
        config = reconcile(cell["config"], recipe, split, ranks.device.type == "cuda")
        peaks: list[int] = [0] * ranks.world_size
        dist.all_gather_object(peaks, peak_allocated(recipe, config, ranks))
        planned = rank_memory(recipe, config, ranks.world_size, split.micro)
        figures.append({"allocated": max(peaks), "planned": planned.total})
    if ranks.is_first:
        write_text(Path(output), json.dumps(figures))
    stop_ranks()


if __name__ == "__main__":
    main(sys.argv[1:])
