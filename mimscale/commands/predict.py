"""``mimscale predict``: what a fine-tuned model says of any images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mimscale.data.decode import read_rgb
from mimscale.training.pictures import save_png
from mimscale.transfer.load import load_run


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="mimscale predict", description=__doc__, allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--run", required=True, metavar="RUN[@STEP]", help="fine-tuning run")
    parser.add_argument("--output", type=Path, help="folder for pictures, where the task draws some (default: .)")
    args = parser.parse_args(argv)
    try:
        run = load_run(args.run)
        task, module, data = run.task, run.module(), run.checkpoint.manifest["data"]
        for path in args.images:
            text, picture = task.say(run.recipe, data, module, read_rgb(path))
            print(f"{path}: {text}")
            if picture is not None:
                target = (args.output or Path()) / f"{path.stem}_{run.recipe.task}.png"
                save_png(picture, target)
                print(f"  {target}")
    except (ValueError, OSError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    return 0
