"""Lay the photographs of the package ``elpv-dataset`` out as image folders, with a held-out part.

    python shards/solar_cells.py DEST

2,624 electroluminescence photographs of solar cells (300 x 300 PNG). A class is a module type and an expert's
probability of a defect. DEST/train and DEST/val hold links into the installed package; about a tenth of every class is
held out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from mimscale.data import draws
from mimscale.data.errors import ShardError
from mimscale.files import write_beside

_HELD_OUT = 0.1


def photographs() -> dict[str, list[Path]]:
    """Paths of the package's photographs by class, both sorted.

    Raises:
        ShardError: the package is not installed.
    """
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise ShardError("the photographs come with a package that is not installed: pip install elpv-dataset")
    data = Path(spec.origin).parent / "data"
    by_class: dict[str, list[Path]] = defaultdict(list)
    for line in (data / "labels.csv").read_text().splitlines():
        name, probability, module = line.split()
        by_class[f"{module}_{round(float(probability) * 100):03}"].append(data / name)
    return {name: sorted(by_class[name]) for name in sorted(by_class)}


def lay_out(destination: Path, seed: int = 0, copy: bool = False, limit: int | None = None) -> dict[str, int]:
    """Make ``destination/train/CLASS/`` and ``destination/val/CLASS/``.

    Args:
        destination: folder to make them in; images that are there already are left alone.
        seed: decides what is held out.
        copy: copy the files instead of linking to them.
        limit: at most this many of each class.

    Returns:
        How many images there are in "train" and "val".

    Raises:
        ShardError: the package is not installed.
    """
    counts = {"train": 0, "val": 0}
    for number, (name, paths) in enumerate(photographs().items()):
        order = draws.permutation(len(paths), seed, draws.SAMPLING, number)[:limit].tolist()
        held_out = round(_HELD_OUT * len(order))
        for place, index in enumerate(order):
            split = "val" if place < held_out else "train"
            target = destination / split / name / paths[index].name
            counts[split] += 1
            if target.exists():
                continue
            with write_beside(target) as beside:
                if copy:
                    shutil.copyfile(paths[index], beside)
                else:
                    beside.unlink()
                    beside.symlink_to(paths[index])
    return counts


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copy", action="store_true", help="copy the files instead of linking to them")
    options = parser.parse_args(arguments)
    try:
        counts = lay_out(options.destination, options.seed, options.copy)
    except (ShardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, use in (("train", "to train on"), ("val", "held out")):
        print(f"{counts[split]} photographs {use} in {options.destination / split}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
