# PYTHON_ARGCOMPLETE_OK
"""The ``mimscale`` command: its first word names the module that does the rest, and nothing else is imported."""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from types import ModuleType

from mimscale.entry import enter

# word -> what it does; a module of mimscale.commands with ``parser()`` and ``main(argv)``, which returns the exit status
COMMANDS = {
    "shards": "build, index, verify and list shard folders",
    "pretrain": "pre-train an encoder, with the ranks that this machine has",
    "finetune": "fine-tune an encoder on classification, detection or segmentation",
    "study": "a grid of pre-trainings and fine-tunings: planned, run, judged and reported",
    "submit": "a recipe as a Slurm job: writes the file, shows it, and queues it",
    "keys": "every key of recipes and studies: what it does, its default, and where that comes from",
    "status": "progress, rate, ETA and health of runs, from another terminal",
    "reconstruct": "fill in masked parts of images with a run's model, as a PNG",
    "export": "write a run's weights for timm, transformers, the released code, or as safetensors",
    "evaluate": "a fine-tuned model's figures on held-out data",
    "predict": "what a fine-tuned model says of any images",
    "probe": "linear probe and nearest neighbours on frozen features, in minutes",
    "verify-checkpoint": "a released weight's validation loss, l1 and l2, beside the published one",
    "plan-memory": "what fits on which GPUs, how long it takes and what it costs",
    "plan-communication": "bytes between GPUs in a step, and the efficiency to expect, on 8 to 512 of them",
    "bench": "what this machine reaches: step, memory, data, communication, save",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first word names; returns its exit status.

    Without ``argv`` it is the program (see :func:`mimscale.entry.enter`), and takes the words that it was started with.
    """
    return enter(_program) if argv is None else _run(argv)


def _program() -> int:
    if "_ARGCOMPLETE" in os.environ:
        from mimscale.completion import complete

        complete(COMMANDS, command)
    return _run(sys.argv[1:])


def _run(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be characters that a terminal has
    word, *words = argv or [""]
    if word in COMMANDS:
        return command(word).main(words)
    if word == "--version":
        from mimscale import __version__

        print(f"mimscale {__version__}")
        return 0
    listing = "\n".join(f"  {name:<19} {text}" for name, text in COMMANDS.items())
    if word in ("", "-h", "--help"):
        print(f"usage: mimscale COMMAND ...  (mimscale COMMAND --help lists its options)\n\n{listing}")
        return 0 if word else 2
    import difflib

    from mimscale.wording import printable

    near = difflib.get_close_matches(word[:100], COMMANDS, n=1, cutoff=0.6)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    print(
        f"mimscale: error: there is no command '{printable(word, 200)}'{hint} There are\n\n{listing}", file=sys.stderr
    )
    return 2


def command(word: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"mimscale.commands.{word.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())
