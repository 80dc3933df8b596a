"""Jobs for Slurm: a submission file from a recipe, and its submission.

The file is ``launchers/slurm/pretrain.sbatch`` (or ``finetune.sbatch``) with a head of its own; what the job does, and how it
is requeued, is written there alone.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mimscale.resources import DS_CONFIGS, FINETUNE_RECIPES, LAUNCHERS, RECIPES

MARK = "# ---- nothing below needs an edit"


class SlurmError(RuntimeError):
    """A job that cannot be written or submitted; the message says what to do."""


@dataclass(frozen=True)
class SlurmJob:
    """One training job.

    Relative paths count from the working directory. ``gpus_per_node=0`` trains on CPUs, with ``tasks_per_node`` ranks on
    each node (else there is one rank a GPU). ``options`` are further options of sbatch, such as ``--partition=long``. The
    job is asked to save and stop ``signal_seconds`` before its time limit; Slurm may do so up to a minute earlier.
    """

    recipe: Path
    config: Path
    output: Path
    overrides: tuple[str, ...] = ()
    launcher: Literal["pretrain", "finetune"] = "pretrain"
    name: str = "mimscale"
    nodes: int = 1
    gpus_per_node: int = 8
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str = "24:00:00"
    signal_seconds: int = 180
    options: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.nodes * (self.tasks_per_node or self.gpus_per_node or 1)

    @property
    def log(self) -> Path:
        """What all starts of the job print."""
        return self.output.resolve() / "slurm.log"


def write_script(job: SlurmJob) -> str:
    """The text of the job's submission file. Its log lies in the run folder, which must be there when the job is submitted."""
    body = (LAUNCHERS / "slurm" / f"{job.launcher}.sbatch").read_text()
    asked = [f"--job-name={job.name}", f"--nodes={job.nodes}", f"--time={job.time}"]
    asked.append(f"--ntasks-per-node={job.ranks // job.nodes}")
    asked += [f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []
    asked += [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []
    log = str(job.log).replace("%", "%%")  # sbatch replaces %j and the like
    kept = [f"--output={log}", "--open-mode=append", "--requeue", f"--signal=USR1@{job.signal_seconds}"]
    kind = RECIPES if job.launcher == "pretrain" else FINETUNE_RECIPES
    settings: dict[str, str | tuple[str, ...]] = {
        "COMMAND": (sys.executable, str(LAUNCHERS / f"{job.launcher}.py")),
        "CONFIG": str(DS_CONFIGS.find(job.config).resolve()),
        "RECIPE": str(kind.find(job.recipe).resolve()),
        "OUTPUT": str(job.output.resolve()),
        "OVERRIDES": job.overrides,
    }
    lines = ["#!/bin/bash", *(f"#SBATCH {_sbatch_quoted(option)}" for option in (*asked, *kept, *job.options))]
    lines += [f"{name}={_shell(value)}" for name, value in settings.items()]
    return "\n".join(lines) + "\n" + body[body.index(MARK) :]


def submission(script: Path, after: Sequence[str] = ()) -> list[str]:
    """The command that queues a submission file, behind the jobs ``after``."""
    # A chain whose first link has failed would otherwise wait for ever.
    behind = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", *behind, str(script)]


def submit(script: Path, after: Sequence[str] = ()) -> str:
    """Queue a submission file.

    Args:
        script: the file.
        after: ids of jobs that must have ended well before it starts.

    Returns:
        The job's id.

    Raises:
        SlurmError: there is no Slurm here, or it refuses the job.
    """
    command = submission(script, after)
    if shutil.which("sbatch") is None:
        raise SlurmError(
            f"there is no sbatch here: run '{shlex.join(command)}' where Slurm's commands are, or train with deepspeed or "
            f"torchrun"
        )
    done = subprocess.run([command[0], "--parsable", *command[1:]], capture_output=True, text=True)
    if done.returncode:
        raise SlurmError(f"Slurm refuses {script}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip().partition(";")[0]  # the cluster's name may stand behind it


def _shell(value: str | tuple[str, ...]) -> str:
    return shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"


def _sbatch_quoted(option: str) -> str:
    """An option as sbatch reads it from a file: it splits at blanks, and a # begins a comment."""
    return f'"{option}"' if any(sign in option for sign in " #\t") else option
