"""``mimscale pretrain`` and ``launchers/pretrain.py``."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mimscale.commands import Parser
from mimscale.commands.numbers import whole
from mimscale.training.launch.start import Start, launch_pretraining, start_ranks_here

RANKS_HERE = 1024
PURPOSE = "Pre-train an encoder by masked image modelling."


def start_parser(program: str, purpose: str) -> argparse.ArgumentParser:
    """The command line of whatever starts a training."""
    made = Parser(prog=program, description=purpose, allow_abbrev=False)
    made.add_argument(
        "--deepspeed_config",
        metavar="FILE|NAME",
        help="DeepSpeed configuration (JSON), or one of mimscale's own: zero1, zero2, zero3, zero3_offload, cpu, giant_cpu "
        "(default: zero2 on GPUs, else cpu)",
    )
    made.add_argument(
        "--recipe",
        required=True,
        metavar="FILE|NAME",
        help="recipe (YAML), or one of mimscale's own by name, such as demo; a wrong name lists them",
    )
    made.add_argument("--output", required=True, metavar="RUN", help="run folder; one that exists is resumed")
    made.add_argument(
        "--check", action="store_true", help="look at the recipe and the configuration, and train nothing"
    )
    made.add_argument(
        "--ranks",
        type=whole(1, 65_536),
        metavar="N",
        help="processes to start on this machine, where no launcher has started this one; with --check: how many there will be",
    )
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    made.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as train.iterations=1000")
    return made


def parse_start(made: argparse.ArgumentParser, argv: list[str] | None) -> Start:
    """What a command line asks for."""
    found = made.parse_intermixed_args(argv)
    if found.ranks is not None and found.ranks > RANKS_HERE and not found.check:
        made.error(f"argument --ranks: at most {RANKS_HERE:,} are started on one machine, not {found.ranks:,}")
    return Start(found.recipe, found.deepspeed_config, found.output, tuple(found.overrides), found.check, found.ranks)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return start_parser("mimscale pretrain", PURPOSE)


def main(argv: list[str]) -> NoReturn:
    """Pre-train with the ranks that this machine has, as the arguments say."""
    start = parse_start(parser(), argv)
    start_ranks_here("pretrain", start)
    launch_pretraining(start)


def launcher() -> NoReturn:
    """``launchers/pretrain.py``: one rank, or as many as --ranks says."""
    start = parse_start(start_parser("pretrain.py", PURPOSE), None)
    start_ranks_here("pretrain", start, by_default=1)
    launch_pretraining(start)
