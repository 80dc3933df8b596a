"""Build, check and list shard folders: ``mimscale shards`` from a clone, without installing it."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from mimscale.commands.shards import main

if __name__ == "__main__":
    sys.exit(main(program="build.py"))
