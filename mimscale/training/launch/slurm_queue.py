"""What Slurm's queue holds, and how a job is taken out of it."""

from __future__ import annotations

import os
import shutil
import subprocess

from mimscale.training.launch.job_file import NUMBER, SlurmError, checked

# Slurm's states of a job that will still do something, as the study calls them.
STATES = {
    "PENDING": "queued",
    "CONFIGURING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "SUSPENDED": "queued",
    "RUNNING": "running",
    "COMPLETING": "running",
    "STAGE_OUT": "running",
}


def queued_jobs() -> dict[str, str]:
    """The user's jobs that have not ended: number to "queued" or "running"; empty where there is no Slurm.

    Raises:
        SlurmError: Slurm is there and does not answer, so that nobody knows what runs.
    """
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--format=%i %T", f"--user={os.getuid()}", "--states=all"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SlurmError(f"squeue does not answer: {(done.stderr or done.stdout).strip()}")
    pairs = (line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    return {number: STATES[state] for number, state in pairs if state in STATES}


def cancel(number: str) -> None:
    """Take a job out of the queue, ending it where it runs.

    Raises:
        SlurmError: Slurm refuses.
    """
    command = ["scancel", checked("the number of a job to cancel", number, NUMBER)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SlurmError(f"scancel {number}: {(done.stderr or done.stdout).strip()}")
