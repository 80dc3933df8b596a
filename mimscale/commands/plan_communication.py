"""``mimscale plan-communication``: bytes that every GPU sends in a step and what share of it is left for computing."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from mimscale.models.sizes import encoder_names
from mimscale.training.ds_config import DeepSpeedConfigError
from mimscale.training.metrics import flops_per_image
from mimscale.training.planning.communication import Network, predict, step_time
from mimscale.training.planning.counting import encoder_blocks
from mimscale.training.planning.gpus import GPU_PEAKS
from mimscale.training.planning.zero import GB, Load, plan_way
from mimscale.training.recipe import Recipe, RecipeError, resolve

# What a way is called: (ZeRO stage, changes to its configuration).
WAYS: dict[str, tuple[int, dict[str, int]]] = {
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "3, small whole": (3, {"stage3_param_persistence_threshold": 100_000}),
    "3, hpZ": (3, {"zero_hpz_partition_size": 8}),
}
GPUS = (8, 16, 32, 64, 128, 256, 512)
# Nodes of 8 GPUs with NVLink, and what joins them: 8 adapters of 400 Gbit/s; one of 100 Gbit/s. Four fifths are reached.
NETWORKS = {"8x400": Network(8, 0.8 * 450e9, 0.8 * 400e9), "1x100": Network(8, 0.8 * 450e9, 0.8 * 12.5e9)}


def rows(
    model: str,
    network: Network,
    gpus: tuple[int, ...],
    batch: int,
    peak: float,
    mfu: float,
    gpu_bytes: float,
    accumulate: int | None = None,
) -> list[dict[str, Any]]:
    """One row for each number of GPUs and each of WAYS; ``accumulate`` micro-batches, or as few as fit.

    Raises:
        RecipeError, DeepSpeedConfigError: no such model, or the batch does not divide over the GPUs.
    """
    checkpointing = model in ("swinv2_h", "swinv2_g")
    values = {
        "model": {"name": model},
        "mim": {"objective": "mae" if model.startswith("vit") else "simmim"},
        "data": {"image_size": 224 if model.startswith("vit") else 192},
        "train": {"global_batch": batch, "activation_checkpointing": checkpointing},
    }
    recipe = resolve(values, "--model", Recipe)
    flops = flops_per_image(recipe)
    counted = Load.of(recipe, gpus[0], gpu_bytes)
    blocks = encoder_blocks(recipe) if checkpointing else []
    found = []
    for count in gpus:
        load = replace(counted, gpus=count)
        compute = flops * (4 / 3 if checkpointing else 1) * batch / (count * peak * mfu)
        for name, (stage, changes) in WAYS.items():
            if changes.get("zero_hpz_partition_size", 0) >= count:
                continue
            micro = max(1, batch // count // accumulate) if accumulate else None
            way = plan_way(load, stage, (), micro, changes)
            config = way.config | {"gradient_accumulation_steps": batch // count // way.micro}
            traffic = predict(load.sizes, config, count, blocks)
            took = step_time(traffic, network, compute)
            found.append(
                {
                    "gpus": count,
                    "way": name,
                    "fits": way.fits,
                    "micro": way.micro,
                    "sent": traffic.sent,
                    "compute": took.compute,
                    "communication": took.communication,
                    "efficiency": took.efficiency,
                }
            )
    return found


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if not row["fits"]:
        return "does not fit"
    return f"{row['sent'] / 1e6:,.0f}{1e3 * row['communication']:8.1f}{row['efficiency']:6.0%}"


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="mimscale plan-communication", description=__doc__)
    parser.add_argument("--model", nargs="+", choices=encoder_names(), default=["swinv2_b"])
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS))
    parser.add_argument("--gpu", default="H100", choices=sorted(GPU_PEAKS))
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GB")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak that computing reaches (0.4)")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="8x400", help="adapters of a node, Gbit/s each")
    parser.add_argument("--batch", type=int, default=2048, help="global")
    parser.add_argument(
        "--micro-batches", type=int, metavar="N", help="that make up a GPU's share; by default few, as fit"
    )
    asked = parser.parse_args(argv)
    network, peak = NETWORKS[asked.network], GPU_PEAKS[asked.gpu][0] * 1e12
    for model in asked.model:
        try:
            scale = tuple(asked.gpus), asked.batch, peak, asked.mfu, asked.gpu_memory * GB, asked.micro_batches
            found = rows(model, network, *scale)
        except (RecipeError, DeepSpeedConfigError) as error:
            print(f"mimscale: error: {error}", file=sys.stderr)
            return 1
        print(
            f"{model}, batch {asked.batch}, {asked.gpu} at {asked.mfu:.0%} MFU, nodes joined by {asked.network} Gbit/s:"
        )
        print("MB that a GPU sends in a step, ms that this takes, and what share of the step is computing\n")
        print(f"{'GPUs':>5}{'computing, ms':>15}" + "".join(f"{f'ZeRO {way}':>22}" for way in WAYS))
        for count in asked.gpus:
            cells = {row["way"]: row for row in found if row["gpus"] == count}
            line = f"{count:>5}{1e3 * cells['1']['compute']:>15.1f}"
            print(line + "".join(f"{_cell(cells.get(way)):>22}" for way in WAYS))
        print()
    return 0
