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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimscale.training.communication import KINDS, Traffic, predict
from mimscale.training.ds_config import reconcile, split_batch
from mimscale.training.engine import Engine, start_ranks, stop_ranks
from mimscale.training.memory import parameter_sizes
from mimscale.training.objective import build_objective
from mimscale.training.param_groups import decay_groups
from mimscale.training.recipe import Recipe, RecipeError, load_recipe

# The first steps of ZeRO-3 trace the order of the modules.
WARM_UP, STEPS = 2, 2
RECIPES = Path(__file__).resolve().parents[2] / "launchers/recipes"
# Parts of the operators' names, in this order: a scattering reduction is a reduction, too.
_PARTS = (("allgather", "all_gather"), ("reduce_scatter", "reduce_scatter"), ("reduce", "all_reduce"))


class CollectiveCounter(TorchDispatchMode):
    """Bytes by kind of collective while the ``with`` block lasts: of the whole tensor that is gathered or reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            kind = next((kind for part, kind in _PARTS if part in name), name)
            # Of a gather the output is the whole, of a scattering reduction the input.
            size = max(_bytes(argument) for argument in args[:2])
            self.bytes[kind] += size
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))


def count_steps(recipe: Recipe, ds_config: dict[str, Any]) -> dict[str, Any]:
    """Traffic of one step, counted on this rank and predicted, on noise. Collective."""
    ranks = start_ranks()
    split = split_batch(ds_config, recipe.train.global_batch, ranks.world_size, None)
    config = reconcile(ds_config, recipe, split, ranks.device.type == "cuda")
    engine = Engine(lambda: build_objective(recipe), lambda module: decay_groups(module, recipe), recipe, config, ranks)
    side, grid = recipe.data.image_size, recipe.mask_grid
    images = torch.randint(0, 256, (split.local, 3, side, side), dtype=torch.uint8)
    mask = (torch.rand(split.local, grid**2).argsort(1) < recipe.hidden).view(split.local, grid, grid)
    for _ in range(WARM_UP):
        engine.train_step((images, mask, torch.arange(split.local)), 1e-4)
    with CollectiveCounter() as counter:
        for _ in range(STEPS):
            engine.train_step((images, mask, torch.arange(split.local)), 1e-4)
    engine.close()
    counted = {kind: number / STEPS for kind, number in counter.bytes.items()}
    other = {kind: number for kind, number in counted.items() if kind not in KINDS}
    calls = {kind: counter.calls[kind] // STEPS for kind in KINDS}
    reductions, gathers = calls["all_reduce"] + calls["reduce_scatter"], calls["all_gather"]
    volumes = {kind: counted.get(kind, 0.0) for kind in KINDS}
    measured = Traffic(ranks.world_size, **volumes, reductions=reductions, gathers=gathers)
    predicted = predict(parameter_sizes(recipe), config, ranks.world_size)
    return {"measured": asdict(measured), "predicted": asdict(predicted), "other": other, "zero": engine.stage}


def _worker(argv: list[str]) -> None:
    cells, output = json.loads(argv[0]), argv[1]
    ranks = start_ranks()
    found = [count_steps(load_recipe(cell["recipe"], cell["overrides"]), cell["config"]) for cell in cells]
    if ranks.is_first:
        Path(output).write_text(json.dumps(found))
    stop_ranks()


def measure(cells: list[dict[str, Any]], ranks: int) -> list[tuple[Traffic, Traffic]]:
    """Traffic (measured, predicted) of every cell ``{"recipe", "overrides", "config"}``, on ``ranks`` processes of this host.

    Raises:
        RecipeError: the ranks failed; with what they said.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        module = ["-m", "mimscale.training.traffic", json.dumps(cells), str(output)]
        done = subprocess.run([sys.executable, *launcher, *module], capture_output=True, text=True)
        if done.returncode:
            raise RecipeError(done.stderr[-2000:])
        return [(Traffic(**f["measured"]), Traffic(**f["predicted"])) for f in json.loads(output.read_text())]


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="mimscale bench communication", description=__doc__)
    parser.add_argument("--recipe", type=Path, default=RECIPES / "demo.yaml", metavar="FILE", help="(demo)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="processes on this host")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 1, 2, 3], help="stages")
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 2], help="micro-batches a step")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys")
    asked = parser.parse_intermixed_args(argv)
    print("MB a step; sent: by each rank, in rings")
    print(f"{'ranks':>5}{'stage':>14}{'micro-batches':>15}{'all-reduced':>13}{'scattered':>11}{'gathered':>10}"
          f"{'sent':>9}{'predicted':>11}{'off by':>9}")  # fmt: skip
    for ranks in asked.ranks:
        # Stage 3 as it comes, which keeps a small model whole from the forward to the backward pass, and keeping nothing.
        nothing_kept = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        names: list[tuple[int, str, dict[str, int]]] = [(stage, str(stage), {}) for stage in asked.zero]
        names += [(3, "3, none kept", nothing_kept)] if 3 in asked.zero else []
        ways = [(*way, accumulate) for way in names for accumulate in asked.accumulate]
        cells = [
            {
                "recipe": str(asked.recipe),
                "overrides": [f"train.global_batch={2 * ranks * accumulate}", *asked.overrides],
                "config": {
                    "train_micro_batch_size_per_gpu": 2,
                    "zero_optimization": {"stage": stage, **more},
                    "bf16": {"enabled": asked.bf16},
                },
            }
            for stage, _, more, accumulate in ways
        ]
        try:
            found = measure(cells, ranks)
        except RecipeError as error:
            print(f"mimscale: error: {error}", file=sys.stderr)
            return 1
        for (_, stage, _, accumulate), (measured, predicted) in zip(ways, found, strict=True):
            volumes = measured.all_reduce, measured.reduce_scatter, measured.all_gather, measured.sent, predicted.sent
            a, s, g, sent, said = (volume / 1e6 for volume in volumes)
            print(f"{ranks:>5}{stage:>14}{accumulate:>15}{a:>13.2f}{s:>11.2f}{g:>10.2f}{sent:>9.2f}{said:>11.2f}"
                  f"{said / sent - 1:>9.1%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    _worker(sys.argv[1:])
