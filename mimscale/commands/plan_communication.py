"""``mimscale plan-communication``: bytes that every GPU sends in a step and what share of it is left for computing."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mimscale.commands import Parser
from mimscale.commands.numbers import real, whole
from mimscale.models import encoder_names
from mimscale.training.planning.throughput import GPU_PEAKS

GPUS = (8, 16, 32, 64, 128, 256, 512)
NETWORKS = ("1x100", "8x400")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="mimscale plan-communication", description=__doc__, allow_abbrev=False)
    made.add_argument("--model", nargs="+", choices=encoder_names(), default=["swinv2_b"])
    made.add_argument("--gpus", nargs="+", type=whole(1, 2**20), default=list(GPUS))
    made.add_argument("--gpu", default="H100", choices=sorted(GPU_PEAKS))
    made.add_argument("--gpu-memory", type=real(most=1e6), default=80, metavar="GB")
    made.add_argument(
        "--mfu", type=real(most=1), default=0.4, help="share of the GPU's peak that computing reaches (0.4)"
    )
    made.add_argument("--network", choices=NETWORKS, default="8x400", help="adapters of a node, Gbit/s each")
    made.add_argument("--batch", type=whole(1, 2**24), default=2048, help="global")
    made.add_argument(
        "--micro-batches", type=whole(1, 2**24), metavar="N", help="that make up a GPU's share; by default few, as fit"
    )
    return made


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if not row["fits"]:
        return "does not fit"
    return f"{row['sent'] / 1e6:,.0f}{1e3 * row['communication']:8.1f}{row['efficiency']:6.0%}"


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    asked = parser().parse_args(argv)
    from mimscale.training.ds_config import DeepSpeedConfigError
    from mimscale.training.planning.scaling import NETWORKS, WAYS, rows
    from mimscale.training.planning.zero import GB
    from mimscale.training.recipe import RecipeError

    network, peak = NETWORKS[asked.network], GPU_PEAKS[asked.gpu][0] * 1e12
    for model in asked.model:
        try:
            scale = tuple(asked.gpus), asked.batch, peak, asked.mfu, asked.gpu_memory * GB, asked.micro_batches
            found = rows(model, network, *scale)
        except (RecipeError, DeepSpeedConfigError) as error:
            print("\n".join(f"mimscale: error: {line}" for line in str(error).splitlines()), file=sys.stderr)
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
