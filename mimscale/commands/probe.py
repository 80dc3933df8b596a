"""``mimscale probe``: what frozen features are worth, in minutes: a linear classifier and nearest neighbours."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mimscale.commands import Parser
from mimscale.commands.numbers import whole
from mimscale.wording import counted, printable


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="mimscale probe", description=__doc__, allow_abbrev=False)
    made.add_argument("source", metavar="RUN|FILE", help="a run (RUN@STEP for an earlier checkpoint), or weights")
    made.add_argument("--shards", required=True, metavar="OUT", help="labelled shards")
    made.add_argument("--fraction", default="100", help="what to fit on (default: 100)")
    made.add_argument("--validation", default="val", help="what to test on (default: val)")
    made.add_argument("--knn", type=whole(), default=20, metavar="K", help="neighbours that vote (default: 20)")
    made.add_argument("--recipe", type=Path, help="for a FILE that does not say what it holds: a recipe of its model")
    made.add_argument("--batch", type=whole(1, 65_536), default=64, help="images at a time (default: 64)")
    made.add_argument("--workers", type=whole(0, 1024), default=0, help="processes that read ahead (default: 0)")
    return made


def table(result: dict[str, Any]) -> str:
    """A result for people to read."""
    figures = result["validation"]
    rows = [
        (f"linear (penalty {figures['penalty']:g})", figures["linear_top1"], figures["linear_top5"]),
        (f"{figures['k']} nearest neighbours", figures["knn_top1"], figures["knn_top5"]),
        ("always the commonest class", figures["commonest_class"], None),
    ]
    lines = [f"{'frozen features of ' + printable(result['from']):<44}  top-1   top-5"]
    for name, top, five in rows:
        lines.append(f"  {name:<42} {top:6.2f} {'' if five is None else f'{five:7.2f}'}")
    images = result["images"]
    lines.append(f"fitted on {counted(images['train'], 'image')}, tested on {images['val']}; {result['seconds']:.0f} s")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    from mimscale.data import ShardError
    from mimscale.files import write_text
    from mimscale.transfer.load import folder_of
    from mimscale.transfer.probe import probe

    try:
        if args.knn < 1:
            raise ValueError("--knn takes a number of neighbours above 0")
        result = probe(
            args.source,
            args.shards,
            args.fraction,
            args.validation,
            args.knn,
            args.recipe,
            args.batch,
            args.workers,
        )
        target = folder_of(args.source) / "probe" / "result.json"
        write_text(target, json.dumps(result, indent=2) + "\n")
    except (ValueError, OSError, ShardError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    print(table(result))
    print(printable(target))
    return 0
