"""``mimscale pretrain`` and ``launchers/pretrain.py``."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mimscale.training.launch.start import Start, launch_pretraining


def parse_start(program: str, purpose: str, argv: list[str] | None = None) -> Start:
    """A launcher's command line."""
    parser = argparse.ArgumentParser(prog=program, description=purpose, allow_abbrev=False)
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="DeepSpeed configuration (JSON)")
    parser.add_argument("--recipe", required=True, metavar="FILE", help="recipe (YAML)")
    parser.add_argument("--output", required=True, metavar="RUN", help="run folder; one that exists is resumed")
    parser.add_argument(
        "--check", action="store_true", help="look at the recipe and the configuration, and train nothing"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="with --check: how many there will be")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as train.iterations=1000")
    found = parser.parse_intermixed_args(argv)
    return Start(found.recipe, found.deepspeed_config, found.output, tuple(found.overrides), found.check, found.ranks)


def main(argv: list[str] | None = None) -> NoReturn:
    """Pre-train, as the arguments say."""
    launch_pretraining(parse_start("pretrain.py", "Pre-train an encoder by masked image modelling.", argv))
