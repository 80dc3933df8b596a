"""``mimscale finetune`` and ``launchers/finetune.py``."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mimscale.commands.pretrain import parse_start, start_parser
from mimscale.training.launch.start import start_ranks_here
from mimscale.transfer.launch import launch_finetuning

PURPOSE = "Fine-tune an encoder on a task."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return start_parser("mimscale finetune", PURPOSE)


def main(argv: list[str]) -> NoReturn:
    """Fine-tune with the ranks that this machine has, as the arguments say."""
    start = parse_start(parser(), argv)
    start_ranks_here("finetune", start)
    launch_finetuning(start)


def launcher() -> NoReturn:
    """``launchers/finetune.py``: one rank, or as many as --ranks says."""
    start = parse_start(start_parser("finetune.py", PURPOSE), None)
    start_ranks_here("finetune", start, by_default=1)
    launch_finetuning(start)
