"""``mimscale plan-memory``: what fits on which GPUs, how long it takes and what it costs, before anything is queued."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale.files import write_text
from mimscale.models import encoder_names
from mimscale.training.ds_config import DeepSpeedConfigError, read_ds_config, reconcile, split_batch, zero_stage
from mimscale.training.metrics import MetricsLog
from mimscale.training.planning.memory import (
    RankMemory,
    activation_bytes,
    micro_batch_that_fits,
    parameter_sizes,
    plan_rank,
)
from mimscale.training.planning.throughput import GPU_PEAKS, flops_per_image
from mimscale.training.recipe import Recipe, RecipeError, load_recipe, paper_recipe

# (ZeRO stage, what is offloaded), in the order of what they cost in communication.
WAYS = ((0, ()), (1, ()), (2, ()), (3, ()), (2, ("optimizer",)), (3, ("optimizer",)), (3, ("optimizer", "param")))
LENGTHS = (125_000, 250_000, 500_000)
DEFAULT_MFU = 0.4
# Of a GPU's memory; CUDA, NCCL and fragmentation take the rest.
GPU_SHARE = 0.9
GB = 1e9


@dataclass(frozen=True)
class Way:
    """One ZeRO stage and offloading for one model: what a rank holds at the largest micro-batch that fits."""

    stage: int
    offload: tuple[str, ...]
    config: dict[str, Any]
    micro: int
    memory: RankMemory
    fits: bool

    @property
    def name(self) -> str:
        """As the table calls it."""
        if not self.stage:
            return "0 (as 1 in bf16)"
        return f"{self.stage}" + (f" + {' and '.join(self.offload)} offloaded" if self.offload else "")


def ds_config(stage: int, offload: tuple[str, ...], checkpointing: bool) -> dict[str, Any]:
    """A DeepSpeed configuration for GPUs in bf16; ``"auto"`` where the recipe or the plan decides."""
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 50_000_000}
    if stage == 3:
        # Weights that stay from the forward to the backward pass save half of the gathers; where they are offloaded, memory
        # is what counts.
        live = 300_000_000 if "param" in offload else 2_000_000_000
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000 if "param" in offload else 0,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
        }
    zero |= {f"offload_{what}": {"device": "cpu", "pin_memory": True} for what in offload}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }
    if checkpointing:
        config["activation_checkpointing"] = {"partition_activations": False, "cpu_checkpointing": False}
    return config


@dataclass(frozen=True)
class Load:
    """What is to be trained where: the elements of every parameter, activations in bytes an image, a GPU's budget in bytes."""

    recipe: Recipe
    sizes: list[int]
    activations: int
    gpus: int
    budget: float

    @classmethod
    def of(cls, recipe: Recipe, gpus: int, gpu_bytes: float) -> Load:
        """Count the recipe's model on the meta device."""
        return cls(recipe, parameter_sizes(recipe), activation_bytes(recipe, bf16=True), gpus, gpu_bytes * GPU_SHARE)


def plan_way(
    load: Load, stage: int, offload: tuple[str, ...], micro: int | None = None, changes: Mapping[str, int] | None = None
) -> Way:
    """Plan one ZeRO stage.

    Args:
        load: what is to be trained where.
        stage: ZeRO stage.
        offload: of "optimizer" and "param".
        micro: a fixed micro-batch, or ``None`` for the largest that fits.
        changes: to the configuration's ``zero_optimization``.

    Raises:
        DeepSpeedConfigError: the batch does not divide over the GPUs, or the micro-batch does not divide a GPU's share.
    """
    recipe, gpus = load.recipe, load.gpus
    config = ds_config(stage, offload, recipe.train.activation_checkpointing is True)
    config["zero_optimization"] |= changes or {}
    # Stage 0 in bf16 is computed at stage 1, so that is what has to fit.
    computed = config if stage else ds_config(1, offload, checkpointing=False)
    bound = micro_batch_that_fits(load.sizes, load.activations, computed, gpus, load.budget)
    config["train_micro_batch_size_per_gpu"] = micro or "auto"
    split = split_batch(config, recipe.train.global_batch, gpus, bound)
    resolved = reconcile(config, recipe, split, on_gpu=True)
    memory = plan_rank(load.sizes, split.micro * load.activations, resolved, gpus)
    written = copy.deepcopy(config) | {"train_micro_batch_size_per_gpu": split.micro}
    return Way(stage, offload, written, split.micro, memory, memory.total <= load.budget)


def measured_mfu(run: Path) -> float:
    """The median MFU of a run's steps, its first tenth left out.

    Raises:
        RecipeError: the run has logged no step.
    """
    found = [record["mfu"] for record in MetricsLog(run / "metrics.jsonl").read() if "mfu" in record]
    if not found:
        raise RecipeError(f"--measured {run}: there are no steps in its metrics.jsonl")
    return statistics.median(found[len(found) // 10 :])


def _recipe(arguments: argparse.Namespace) -> Recipe:
    if arguments.recipe:
        return load_recipe(arguments.recipe, arguments.overrides)
    if not arguments.model:
        raise RecipeError("give --model NAME or --recipe FILE")
    if arguments.overrides:
        raise RecipeError("key=value needs --recipe FILE")
    return paper_recipe(arguments.model)


def _with_checkpointing(recipe: Recipe, wanted: str) -> Recipe:
    if wanted == "recipe":
        return recipe
    train = recipe.train.model_copy(update={"activation_checkpointing": wanted == "on"})
    return recipe.model_copy(update={"train": train})


def _table(ways: list[Way], gpu_bytes: float) -> str:
    head = (
        "ZeRO stage",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "buffers",
        "in all",
        "in host",
        "micro-batch",
    )
    rows: list[tuple[str, ...]] = [head]
    for way in ways:
        m = way.memory
        sizes = (m.parameters, m.gradients, m.optimizer, m.activations, m.buffers, m.total, m.host)
        fits = str(way.micro) if way.fits else f"needs {m.total / GPU_SHARE / GB:.0f} GB"
        rows.append((way.name, *(f"{size / GB:.2f}" for size in sizes), fits))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    share = f"{GPU_SHARE:.0%} of {gpu_bytes / GB:.0f} GB are planned with; the rest is CUDA's, NCCL's and fragmentation"
    return "\n".join([*lines, f"GB a rank, at the fullest moment of a step; {share}."])


def _times(recipe: Recipe, gpus: int, peak: float, mfu: float, price: float | None, lengths: list[int]) -> str:
    step_flops = flops_per_image(recipe) * recipe.train.global_batch
    seconds = step_flops / (gpus * peak * mfu)
    lines = [
        f"{86400 / seconds:,.0f} iterations a day ({recipe.train.global_batch / seconds:,.0f} images/s) at an MFU of "
        f"{mfu:.0%} of {peak / 1e12:.0f} TFLOP/s a GPU:"
    ]
    for length in lengths:
        hours = length * seconds / 3600
        cost = f", {hours * gpus * price:,.0f} at {price:g} a GPU-hour" if price else ""
        lines.append(f"  {length:>9,} iterations: {hours / 24:6.1f} days, {hours * gpus:10,.0f} GPU-hours{cost}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mimscale plan-memory", description=__doc__)
    parser.add_argument("--model", choices=encoder_names(), help="an encoder with the paper's settings")
    parser.add_argument("--recipe", help="a recipe instead of --model")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="ZeRO stage; by default the first that fits")
    parser.add_argument("--offload", nargs="*", choices=("optimizer", "param"), default=[], help="to host memory")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GB", help="memory of one GPU")
    parser.add_argument("--gpu", default="H100", choices=sorted(GPU_PEAKS), help="whose peak the MFU is a share of")
    parser.add_argument("--micro-batch", type=int, help="images a GPU at a time; by default the most that fit")
    parser.add_argument("--checkpointing", choices=("on", "off", "recipe"), default="recipe")
    parser.add_argument("--mfu", type=float, default=DEFAULT_MFU, help="share of the GPU's peak that is reached")
    parser.add_argument("--measured", type=Path, metavar="RUN", help="take the MFU that a run has logged")
    parser.add_argument("--price", type=float, help="of one GPU-hour")
    parser.add_argument("--iterations", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the DeepSpeed configuration here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, with --recipe")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    gpu_bytes = arguments.gpu_memory * GB
    try:
        recipe = _with_checkpointing(_recipe(arguments), arguments.checkpointing)
        load = Load.of(recipe, arguments.gpus, gpu_bytes)
        ways = [plan_way(load, stage, offload, arguments.micro_batch) for stage, offload in WAYS]
        asked = arguments.zero, tuple(sorted(set(arguments.offload)))
        if arguments.zero is not None and asked not in WAYS:
            ways.append(plan_way(load, arguments.zero, asked[1], arguments.micro_batch))
        mfu = measured_mfu(arguments.measured) if arguments.measured else arguments.mfu
    except (RecipeError, DeepSpeedConfigError) as error:
        parser.exit(1, f"mimscale: error: {error}\n")
    fitting = [way for way in ways if way.fits]
    if arguments.zero is not None:
        chosen = next(way for way in ways if (way.stage, way.offload) == asked)
    else:
        chosen = fitting[0] if fitting else ways[-1]
    recomputed = "every block recomputed" if recipe.train.activation_checkpointing else "nothing recomputed"
    print(
        f"{recipe.model.name} with {recipe.mim.objective}: {sum(load.sizes) / 1e6:,.1f} M parameters on {arguments.gpus} "
        f"GPUs in bf16, {recomputed}, batch {recipe.train.global_batch}\n"
    )
    print(_table(ways, gpu_bytes) + "\n")
    if not chosen.fits:
        other = f"; ZeRO stage {fitting[0].name} fits" if fitting else "; more GPUs or --checkpointing on may help"
        parser.exit(1, f"mimscale: ZeRO stage {chosen.name} does not fit into {arguments.gpu_memory:g} GB{other}\n")
    peak = GPU_PEAKS[arguments.gpu][0] * 1e12
    print(_times(recipe, arguments.gpus, peak, mfu, arguments.price, arguments.iterations) + "\n")
    text = json.dumps(chosen.config, indent=2) + "\n"
    if arguments.write:
        write_text(arguments.write, text)
        zero_stage(read_ds_config(arguments.write))
        print(f"ZeRO stage {chosen.name}, {chosen.micro} images at a time: {arguments.write}")
    else:
        print(f"ZeRO stage {chosen.name}, {chosen.micro} images at a time:\n{text}", end="")
    return 0
