"""Jobs for Slurm: a submission file from a recipe, and its submission.

The file is ``launchers/slurm/pretrain.sbatch`` (or ``finetune.sbatch``) with a head of its own; what the job does, and how it
is requeued, is written there alone.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mimscale.resources import DS_CONFIGS, FINETUNE_RECIPES, LAUNCHERS, RECIPES
from mimscale.training.launch.job_file import NUMBER, TIME, TITLE, JobFile, SlurmError, checked, unfit_character
from mimscale.wording import printable

MARK = "# ---- nothing below needs an edit"


@dataclass(frozen=True)
class SlurmJob:
    """One training job.

    Relative paths count from the working directory. ``gpus_per_node=0`` trains on CPUs, with ``tasks_per_node`` ranks on
    each node (else there is one rank a GPU). ``options`` are further options of sbatch as a user writes them, such as
    ``--partition=long``, and ``cluster`` those that a study has values for, such as ("partition", "long"). The job is asked to
    save and stop ``signal_seconds`` before its time limit; Slurm may do so up to a minute earlier.
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
    cluster: tuple[tuple[str, str], ...] = ()

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.nodes * (self.tasks_per_node or self.gpus_per_node or 1)

    @property
    def log(self) -> Path:
        """What all starts of the job print."""
        return Path(os.path.realpath(self.output)) / "slurm.log"


def write_script(job: SlurmJob) -> str:
    """The text of the job's submission file. Its log lies in the run folder, which must be there when the job is submitted.

    Raises:
        SlurmError: a text of the job is not what its kind has to be, or is no path.
    """
    kind = RECIPES if job.launcher == "pretrain" else FINETUNE_RECIPES
    file = JobFile()
    file.ask("job-name", job.name, TITLE)
    file.ask("nodes", job.nodes)
    file.ask("time", job.time, TIME)
    file.ask("ntasks-per-node", job.ranks // job.nodes)
    if job.gpus_per_node:
        file.ask("gpus-per-node", job.gpus_per_node)
    if job.cpus_per_task:
        file.ask("cpus-per-task", job.cpus_per_task)
    check_path("--output", job.output)  # before it is resolved, which a NUL in it would not survive
    file.ask_for_file("output", job.log)
    file.ask("open-mode", "append")
    file.ask("requeue")
    file.ask("signal", f"USR1@{job.signal_seconds}")
    for name, value in job.cluster:
        file.ask(name, value, source=f"slurm.{name}")
    file.ask_as_given(job.options, "--sbatch")
    file.set(
        "COMMAND", (sys.executable, str(LAUNCHERS / f"{job.launcher}.py")), "the Python interpreter and the launcher"
    )
    file.set("CONFIG", _absolute(DS_CONFIGS.find(job.config), "--deepspeed_config"), "--deepspeed_config")
    file.set("RECIPE", _absolute(kind.find(job.recipe), "the recipe's file"), "the recipe's file")
    file.set("OUTPUT", _absolute(job.output, "--output"), "--output")
    for override in job.overrides:
        if override.startswith("-") or "=" not in override:
            raise SlurmError(f"'{printable(override)}' is not key=value, such as train.iterations=1000")
    file.set("OVERRIDES", job.overrides, "key=value")
    body = (LAUNCHERS / "slurm" / f"{job.launcher}.sbatch").read_text(encoding="utf-8")
    return file.text(body[body.index(MARK) :])


def check_path(source: str, path: Path) -> None:
    """Raise where a path holds a character that cannot be seen.

    Raises:
        SlurmError: naming it and ``source``, what the user calls the path.
    """
    if (unfit := unfit_character(str(path))) is not None:
        raise SlurmError(f"{source}: '{printable(path)}' holds {unfit}, which no job file may hold")


def _absolute(path: Path, source: str) -> str:
    check_path(source, path)
    return os.path.realpath(path)  # of a loop of links it is as it stands, and cannot be read


def submission(script: Path, after: Sequence[str] = ()) -> list[str]:
    """The command that queues a submission file, behind the jobs ``after``.

    Raises:
        SlurmError: one of them is no number of a job.
    """
    for number in after:
        checked("--after", number, NUMBER)
    # A chain whose first link has failed would otherwise wait for ever.
    behind = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    place = str(script)
    return ["sbatch", *behind, f"./{place}" if place.startswith("-") else place]


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
    done = subprocess.run([command[0], "--parsable", *command[1:]], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SlurmError(f"Slurm refuses {script}: {printable((done.stderr or done.stdout).strip(), 2000)}")
    # The cluster's name may stand behind it.
    return checked("sbatch has queued the job, and its answer", done.stdout.strip().partition(";")[0], NUMBER)
