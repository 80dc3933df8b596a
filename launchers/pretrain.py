"""Pre-train an encoder: ``deepspeed launchers/pretrain.py --recipe FILE|NAME --output RUN [key=value ...]``.

The same script runs under ``deepspeed``, ``torchrun``, ``srun`` (one task a GPU) and plain ``python`` (one process). A second
start on the same RUN resumes it.
"""

import sys

from mimscale.entry import enter


def program() -> None:
    """The command, which is imported when an interrupt of its imports would end well."""
    from mimscale.commands.pretrain import launcher

    launcher()


if __name__ == "__main__":
    sys.exit(enter(program))
