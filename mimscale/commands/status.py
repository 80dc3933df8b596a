"""``mimscale status``: progress, rate and health of runs, read from their folders."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from mimscale.commands import Parser

REFRESH_SECONDS = 5


def _runs(paths: list[Path]) -> list[Path]:
    """Run folders among ``paths``, and those directly inside the others."""
    found = []
    for path in paths:
        inside = sorted(child.parent for child in path.glob("*/recipe.yaml"))
        found += [path] if os.path.lexists(path / "recipe.yaml") or not inside else inside
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="mimscale status", description=__doc__, allow_abbrev=False)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of them")
    made.add_argument("--watch", action="store_true", help=f"look again every {REFRESH_SECONDS} seconds")
    return made


def main(argv: list[str]) -> int:
    """Run the command: status 0 when every run is finished or running, else 1."""
    arguments = parser().parse_args(argv)
    from mimscale.training.status import status

    while True:
        try:
            found = [status(run) for run in _runs(arguments.runs)]
        except OSError as error:
            print(f"mimscale: error: {error}", file=sys.stderr)
            return 1
        text = "\n".join(map(str, found))
        if not arguments.watch:
            print(text)
            return 0 if all(one.state in ("finished", "running") for one in found) else 1
        print(f"\x1b[2J\x1b[H{text}", flush=True)
        time.sleep(REFRESH_SECONDS)
