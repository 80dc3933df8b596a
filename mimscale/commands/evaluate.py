"""``mimscale evaluate``: a fine-tuned model's figures on held-out data, once more or on other data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mimscale.commands import Parser
from mimscale.commands.numbers import whole


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="mimscale evaluate", description=__doc__, allow_abbrev=False)
    made.add_argument("source", metavar="RUN|FILE", help="fine-tuning run (RUN@STEP for an earlier one), or weights")
    made.add_argument("--shards", help="another shard folder to evaluate on")
    made.add_argument("--recipe", type=Path, help="for a FILE: a fine-tuning recipe that describes its model")
    made.add_argument("--batch", type=whole(1, 65_536), default=32, help="images at a time (default: 32)")
    made.add_argument("--output", type=Path, help="folder for result.json and pictures (default: RUN/evaluation)")
    made.add_argument("overrides", nargs="*", metavar="data.KEY=VALUE", help="such as data.validation=100")
    return made


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_intermixed_args(argv)
    from mimscale.data import ShardError
    from mimscale.training.errors import RankLocalError
    from mimscale.transfer.evaluation import evaluate
    from mimscale.transfer.load import folder_of

    output = args.output or folder_of(args.source) / "evaluation"
    overrides = [*args.overrides, *([f"data.shards={args.shards}"] if args.shards else [])]
    try:
        evaluate(args.source, overrides, args.recipe, args.batch, output)
    except (ValueError, OSError, ShardError, RankLocalError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    return 0
