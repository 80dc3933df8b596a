"""``mimscale bench communication``: count what collectives carry in real steps, and hold the model of it against that.

Every collective of torch goes through a ``c10d`` operator; a dispatch mode sees the tensors of each, whoever called it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimscale.files import write_text
from mimscale.torch_private import operator_arguments
from mimscale.training.ds_config import reconcile, split_batch
from mimscale.training.engine import Engine, start_ranks, stop_ranks
from mimscale.training.optimizer import decay_groups
from mimscale.training.planning.communication import KINDS, Traffic, predict
from mimscale.training.planning.counting import parameter_sizes, recomputed_blocks
from mimscale.training.pretraining.module import build_objective
from mimscale.training.recipe import Recipe, RecipeError, load_recipe

# The first steps of ZeRO-3 trace the order of the modules.
WARM_UP, STEPS = 2, 2

# Parts of the operators' names, in this order: a scattering reduction is a reduction, too.
_PARTS = (("allgather", "all_gather"), ("reduce_scatter", "reduce_scatter"), ("reduce", "all_reduce"))


class CollectiveCounter(TorchDispatchMode):
    """Bytes by collective while the ``with`` block lasts: of the whole tensor that is gathered or reduced.

    ``bytes`` and ``calls`` are kept by kind of collective and number of ranks that take part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, int]] = Counter()
        self.calls: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            name, arguments = operator_arguments(func)
            kind = next((kind for part, kind in _PARTS if part in name), name)
            # Of a gather the output is the whole, of a scattering reduction the input.
            size = max(_bytes(argument) for argument in args[:2])
            group = args[arguments.index("process_group")]
            key = kind, dist.ProcessGroup.unbox(group).size()
            self.bytes[key] += size
            self.calls[key] += 1
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))


def count_steps(recipe: Recipe, ds_config: dict[str, Any]) -> dict[str, Any]:
    """Traffic of one step, counted on this rank and predicted, on noise. Collective."""
    ranks = start_ranks()
    split = split_batch(ds_config, recipe.train.global_batch, ranks.world_size, None)
    config = reconcile(ds_config, recipe, split, ranks.device.type == "cuda")
    engine = Engine(lambda: build_objective(recipe), lambda module: decay_groups(module, recipe), recipe, config, ranks)
    side, grid = recipe.data.image_size, recipe.mask.grid[0]
    images = torch.randint(0, 256, (split.local, 3, side, side), dtype=torch.uint8)
    mask = (torch.rand(split.local, grid**2).argsort(1) < recipe.mask.masked).view(split.local, grid, grid)

    def train(steps: int) -> None:
        for _ in range(steps):
            engine.forward_backward((images, mask, torch.arange(split.local)))
            engine.apply(lambda scale: 1e-4 * scale)

    train(WARM_UP)
    with CollectiveCounter() as counter:
        train(STEPS)
    engine.close()
    # ZeRO++'s second partition gathers in groups, and nothing else does.
    group = min(size for _, size in counter.calls)
    inside = ("all_gather", group) if group < ranks.world_size else None
    volumes = {kind: counter.bytes[kind, ranks.world_size] / STEPS for kind in KINDS}
    calls = {kind: counter.calls[kind, ranks.world_size] // STEPS for kind in KINDS}
    measured = Traffic(
        ranks.world_size,
        **volumes,
        gathered_within=counter.bytes[inside] / STEPS if inside else 0.0,
        group=group if inside else 1,
        reductions=calls["all_reduce"] + calls["reduce_scatter"],
        gathers=calls["all_gather"],
        gathers_within=counter.calls[inside] // STEPS if inside else 0,
    )
    again = recipe.train.activation_checkpointing or "activation_checkpointing" in config
    blocks = recomputed_blocks(recipe) if again else []
    predicted = predict(parameter_sizes(recipe), config, ranks.world_size, blocks)
    return {"measured": asdict(measured), "predicted": asdict(predicted)}


def _worker(argv: list[str]) -> None:
    cells, output = json.loads(argv[0]), argv[1]
    ranks = start_ranks()
    found = [count_steps(load_recipe(cell["recipe"], cell["overrides"]), cell["config"]) for cell in cells]
    if ranks.is_first:
        write_text(Path(output), json.dumps(found))
    stop_ranks()


def measure(cells: list[dict[str, Any]], ranks: int) -> list[tuple[Traffic, Traffic]]:
    """Traffic (measured, predicted) of every cell ``{"recipe", "overrides", "config"}``, on ``ranks`` processes of this host.

    Raises:
        RecipeError: a recipe cannot be used, or the ranks failed; with what they said.
    """
    for cell in cells:  # what is wrong with a recipe is told here, and not by every rank
        load_recipe(cell["recipe"], cell["overrides"])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        module = ["-m", "mimscale.commands.bench.communication", json.dumps(cells), str(output)]
        done = subprocess.run([sys.executable, *launcher, *module], capture_output=True, text=True)
        if done.returncode:
            raise RecipeError(done.stderr[-2000:])
        return [(Traffic(**f["measured"]), Traffic(**f["predicted"])) for f in json.loads(output.read_text())]


def run(asked: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    print("MB a step; within: gathered by half of the ranks among themselves; sent: by each rank, in rings")
    print(f"{'ranks':>5}{'stage':>26}{'micro-batches':>15}{'all-reduced':>13}{'scattered':>11}{'gathered':>10}{'within':>8}"
          f"{'sent':>8}{'predicted':>11}{'off by':>8}")  # fmt: skip
    for ranks in asked.ranks:
        ways = [(*way, accumulate) for way in _ways(asked.zero, ranks) for accumulate in asked.accumulate]
        cells = [
            {
                "recipe": asked.recipe,
                "overrides": [f"train.global_batch={2 * ranks * accumulate}", *more, *asked.overrides],
                "config": {
                    "train_micro_batch_size_per_gpu": 2,
                    "zero_optimization": zero,
                    "bf16": {"enabled": asked.bf16},
                },
            }
            for _, zero, more, accumulate in ways
        ]
        try:
            found = measure(cells, ranks)
        except RecipeError as error:
            print(f"mimscale: error: {error}", file=sys.stderr)
            return 1
        for (name, *_, accumulate), (measured, predicted) in zip(ways, found, strict=True):
            volumes = measured.all_reduce, measured.reduce_scatter, measured.all_gather, measured.gathered_within
            a, s, g, w, sent, said = (volume / 1e6 for volume in (*volumes, measured.sent, predicted.sent))
            print(f"{ranks:>5}{name:>26}{accumulate:>15}{a:>13.2f}{s:>11.2f}{g:>10.2f}{w:>8.2f}{sent:>8.2f}{said:>11.2f}"
                  f"{said / sent - 1:>8.1%}")  # fmt: skip
    return 0


def _ways(stages: list[int], ranks: int) -> list[tuple[str, dict[str, int], list[str]]]:
    """What is counted: name, ``zero_optimization`` and recipe keys."""
    found: list[tuple[str, dict[str, int], list[str]]] = [(str(stage), {"stage": stage}, []) for stage in stages]
    if 3 not in stages:
        return found
    # As it comes, stage 3 keeps a small model whole from the forward to the backward pass.
    none_kept = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    some_kept = {"stage": 3, "stage3_max_live_parameters": 700_000, "stage3_prefetch_bucket_size": 100_000}
    recomputed = ["train.activation_checkpointing=true"]
    found += [
        ("3, none kept", none_kept, []),
        ("3, none kept, recomputed", none_kept, recomputed),
        ("3, some kept, recomputed", some_kept | {"stage3_max_reuse_distance": 700_000}, recomputed),
    ]
    if ranks > 2:
        found.append(("3, none kept, hpZ", none_kept | {"zero_hpz_partition_size": ranks // 2}, []))
    return found


if __name__ == "__main__":
    _worker(sys.argv[1:])
