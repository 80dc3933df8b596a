"""Pre-train an encoder: ``deepspeed launchers/pretrain.py --recipe FILE|NAME --output RUN [key=value ...]``.

The same script runs under ``deepspeed``, ``torchrun``, ``srun`` (one task a GPU) and plain ``python`` (one process). A second
start on the same RUN resumes it.
"""

from mimscale.commands.pretrain import launcher

if __name__ == "__main__":
    launcher()
