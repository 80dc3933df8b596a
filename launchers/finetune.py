"""Fine-tune an encoder: ``deepspeed launchers/finetune.py --recipe FILE|NAME --output RUN [key=value ...]``.

``finetune.from=RUN[@STEP]|FILE`` says where its weights come from. The same script runs under ``deepspeed``, ``torchrun``,
``srun`` (one task a GPU) and plain ``python`` (one process). A second start on the same RUN resumes it.
"""

from mimscale.commands.finetune import launcher

if __name__ == "__main__":
    launcher()
