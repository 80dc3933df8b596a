"""``mimscale plan-memory``: what fits on which GPUs, how long it takes and what it costs, before anything is queued."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mimscale.commands import Parser
from mimscale.commands.numbers import real, whole
from mimscale.files import write_text
from mimscale.models import encoder_names
from mimscale.training.ds_config import DeepSpeedConfigError, read_ds_config, zero_stage
from mimscale.training.planning.throughput import GPU_PEAKS
from mimscale.training.planning.zero import GB, GPU_SHARE, WAYS, Load, Way, measured_mfu, plan_way
from mimscale.training.recipe import Recipe, RecipeError, load_recipe, paper_recipe
from mimscale.wording import counted, printable

LENGTHS = (125_000, 250_000, 500_000)
DEFAULT_MFU = 0.4
# More than there are on Earth, nearly.
GPUS = 2**20


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
    from mimscale.training.planning.throughput import flops_per_image

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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="mimscale plan-memory", description=__doc__)
    made.add_argument("--model", choices=encoder_names(), help="an encoder with the paper's settings")
    made.add_argument("--recipe", help="a recipe (file or name) instead of --model")
    made.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="ZeRO stage; by default the first that fits")
    made.add_argument("--offload", nargs="*", choices=("optimizer", "param"), default=[], help="to host memory")
    made.add_argument("--gpus", type=whole(1, GPUS), default=8)
    made.add_argument("--gpu-memory", type=real(most=1e6), default=80, metavar="GB", help="memory of one GPU")
    made.add_argument("--gpu", default="H100", choices=sorted(GPU_PEAKS), help="whose peak the MFU is a share of")
    made.add_argument(
        "--micro-batch", type=whole(1, 2**24), help="images a GPU at a time; by default the most that fit"
    )
    made.add_argument("--checkpointing", choices=("on", "off", "recipe"), default="recipe")
    made.add_argument("--mfu", type=real(most=1), default=DEFAULT_MFU, help="share of the GPU's peak that is reached")
    made.add_argument("--measured", type=Path, metavar="RUN", help="take the MFU that a run has logged")
    made.add_argument("--price", type=real(at_least=0), help="of one GPU-hour")
    made.add_argument("--iterations", type=whole(1), nargs="+", default=list(LENGTHS))
    made.add_argument("--write", type=Path, metavar="FILE", help="write the DeepSpeed configuration here")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, with --recipe")
    return made


def main(argv: list[str]) -> int:
    """Run the command."""
    shown = parser()
    arguments = shown.parse_args(argv)
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
        shown.exit(1, "".join(f"mimscale: error: {line}\n" for line in str(error).splitlines()))
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
        shown.exit(1, f"mimscale: ZeRO stage {chosen.name} does not fit into {arguments.gpu_memory:g} GB{other}\n")
    peak = GPU_PEAKS[arguments.gpu][0] * 1e12
    print(_times(recipe, arguments.gpus, peak, mfu, arguments.price, arguments.iterations) + "\n")
    text = json.dumps(chosen.config, indent=2) + "\n"
    if arguments.write:
        try:
            write_text(arguments.write, text)
        except (OSError, ValueError) as error:
            shown.exit(1, f"mimscale: error: cannot write {printable(arguments.write)}: {printable(error)}\n")
        zero_stage(read_ds_config(arguments.write))
        print(f"ZeRO stage {chosen.name}, {counted(chosen.micro, 'image')} at a time: {arguments.write}")
    else:
        print(f"ZeRO stage {chosen.name}, {counted(chosen.micro, 'image')} at a time:\n{text}", end="")
    return 0
