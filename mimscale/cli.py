"""The ``mimscale`` command: one word, and the module that does it."""

from __future__ import annotations

import sys
from importlib import import_module

# word -> (module with main(argv) -> exit status, what it does)
COMMANDS = {
    "reconstruct": ("mimscale.training.reconstruct", "fill in hidden parts of images with a run's model, as a PNG"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first word names."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print("usage: mimscale COMMAND ...  (mimscale COMMAND --help says more)\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<14} {text}")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"mimscale: there is no command '{words[0]}'; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return import_module(COMMANDS[words[0]][0]).main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
