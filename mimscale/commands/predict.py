"""``mimscale predict``: what a fine-tuned model says of any images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mimscale.commands import Parser
from mimscale.wording import counted, printable


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="mimscale predict", description=__doc__, allow_abbrev=False)
    made.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    made.add_argument("--run", required=True, metavar="RUN[@STEP]", help="fine-tuning run")
    made.add_argument("--output", type=Path, help="folder for pictures, where the task draws some (default: .)")
    return made


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    from mimscale.data import DamagedSample
    from mimscale.data.decode import read_rgb
    from mimscale.training.pictures import save_png
    from mimscale.transfer.load import load_run

    try:
        run = load_run(args.run)
        task, module, data = run.task, run.module(), run.checkpoint.manifest["data"]
        damaged = 0
        for path in args.images:
            try:
                pixels = read_rgb(path)
            except DamagedSample as error:
                print(f"mimscale: skipped {error.reason}", file=sys.stderr)
                damaged += 1
                continue
            text, picture = task.say(run.recipe, data, module, pixels)
            print(f"{printable(path)}: {printable(text, 10_000)}")
            if picture is not None:
                target = (args.output or Path()) / f"{path.stem}_{run.recipe.task}.png"
                save_png(picture, target)
                print(f"  {printable(target)}")
        if damaged:
            raise ValueError(f"{damaged} of {counted(len(args.images), 'image')} cannot be read; the others are above")
    except (ValueError, OSError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    return 0
