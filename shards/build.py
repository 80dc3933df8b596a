"""Build, check and list shard folders: ``mimscale shards`` from a clone, without installing it."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from mimscale.entry import enter


def main(argv: list[str] | None = None) -> int:
    """The command, which is imported when an interrupt of its imports would end well."""
    from mimscale.commands.shards import main as shards

    return shards(argv, program="build.py")


if __name__ == "__main__":
    sys.exit(enter(main))
