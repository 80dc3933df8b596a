"""``mimscale finetune`` and ``launchers/finetune.py``."""

from __future__ import annotations

from typing import NoReturn

from mimscale.commands.pretrain import parse_start
from mimscale.transfer.launch import launch_finetuning


def main(argv: list[str] | None = None) -> NoReturn:
    """Fine-tune, as the arguments say."""
    launch_finetuning(parse_start("finetune.py", "Fine-tune an encoder on a task.", argv))
