"""The study's folder: one run folder a cell, a record of what was tried, and whether all of it belongs to this study.

OUTPUT/runs/CELL/        the run folder, as the launchers make it
OUTPUT/jobs/CELL.json    tries, failures, verdicts, and Slurm's number of the job
OUTPUT/logs/CELL.log     what the launcher printed
OUTPUT/results.json      all results, as the report was made from
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mimscale.files import UnfitFile, is_number, is_whole, read_json, write_text
from mimscale.schema import differences
from mimscale.study.jobs import Job, recipe_digest
from mimscale.study.spec import Study, StudyError
from mimscale.training.faults.lock import RunInUseError, only_start
from mimscale.training.launch.slurm_queue import queued_jobs
from mimscale.training.recipe import RecipeError
from mimscale.training.run_folder import MANIFEST, RunFolder
from mimscale.wording import printable


@dataclass
class Record:
    """What the study knows of a job besides its run folder.

    Attributes:
        digest: of the recipe it was started with; of the start's too, since a fine-tuning is its start's result.
        start_digest: of the recipe of what it starts from.
        build: of the shards it reads.
        state: "failed" or "stopped" where it was given up, "" else.
        note: why, for people.
        tries: starts since it was last given up.
        verdict: what the overfitting detector said of it.
        saved: FLOPs that stopping it saved.
        slurm: Slurm's number of its job.
        pid: of the process on this machine that trains it.
        pid_since: when that process began, by which it is known again.
    """

    digest: str = ""
    start_digest: str = ""
    build: str = ""
    state: str = ""
    note: str = ""
    tries: int = 0
    verdict: str = ""
    saved: float = 0.0
    slurm: str = ""
    pid: int = 0
    pid_since: float = 0.0


def _record(path: Path) -> Record:
    """Read a job's record.

    Raises:
        UnfitFile: it is none.
        OSError: it cannot be read.
    """
    values = read_json(path)
    if not isinstance(values, dict) or not values.keys() <= _KINDS.keys():
        raise UnfitFile(path, "is something else")
    for key, value in values.items():
        if not _KINDS[key](value):
            raise UnfitFile(path, f"its {key} is {printable(value, 60)}")
    return Record(**values)


_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("digest", "start_digest", "build", "note", "verdict", "slurm"), lambda value: isinstance(value, str)
    ),
    "state": lambda value: value in ("", "failed", "stopped"),
    "tries": is_whole,
    "saved": is_number,
    "pid": lambda value: is_whole(value) and value < 2**31,
    "pid_since": is_number,
}


class StudyFolder:
    """Reads and writes a study's output."""

    def __init__(self, study: Study):
        self.study = study
        self.path = Path(study.output)
        self.results = self.path / "results.json"
        self._builds: dict[str, str] = {}

    def run(self, job: Job) -> RunFolder:
        """A job's run folder."""
        return RunFolder(job.run(self.path))

    def log(self, job: Job) -> Path:
        """Where a job's output goes on this machine."""
        return self.path / "logs" / f"{job.id}.log"

    def record(self, job: Job) -> Record:
        """What is known of a job.

        Raises:
            StudyError: the record was damaged.
        """
        path = self._record(job)
        try:
            return _record(path)
        except FileNotFoundError:
            return Record()
        except OSError as error:
            raise StudyError(
                f"{printable(path)} is no record of a job ({printable(error.strerror)}); remove it, and {job.id} counts as "
                "not tried"
            ) from None

    def readable_record(self, job: Job) -> Record:
        """As :meth:`record`; a damaged one counts as none, with a note that says so."""
        try:
            return self.record(job)
        except StudyError as error:
            return Record(note=str(error))

    def write(self, job: Job, record: Record) -> None:
        """Replace a job's record."""
        write_text(self._record(job), json.dumps(asdict(record), indent=1) + "\n")

    def _record(self, job: Job) -> Path:
        return self.path / "jobs" / f"{job.id}.json"

    def result(self, job: Job) -> dict[str, Any] | None:
        """The result of a run that has ended, else ``None``.

        Raises:
            StudyError: ``result.json`` is half-written or is something else.
        """
        path = self.run(job).result
        try:
            found = read_json(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StudyError(_half_written(path, str(error.strerror))) from None
        if not isinstance(found, dict) or not {"steps", "train_loss", "validation"} <= found.keys():
            raise StudyError(_half_written(path, "it lacks steps, train_loss or validation"))
        if found["steps"] != job.recipe.train.iterations:
            raise StudyError(
                _half_written(
                    path, f"it ends at step {printable(found['steps'], 40)}, not {job.recipe.train.iterations}"
                )
            )
        if found["train_loss"] is not None and not is_number(found["train_loss"]):
            raise StudyError(_half_written(path, "its train_loss is no number"))
        if found["validation"] is not None and not isinstance(found["validation"], dict):
            raise StudyError(_half_written(path, "its validation holds no figures"))
        return found

    def done(self, job: Job) -> bool:
        """Whether a job has its result."""
        return self.result(job) is not None

    def may_start(self, job: Job, jobs: dict[str, Job]) -> bool:
        """Whether what a job starts from is there: the checkpoint that it leaves, or a finished run."""
        if job.start is None:
            return True
        before = jobs[job.start.job]
        if job.start.step and (before.checkpoint(self.path, job.start.step) / MANIFEST).is_file():
            return True
        return self.done(before)

    def queued(self, jobs: dict[str, Job]) -> dict[str, str]:
        """What Slurm's queue holds, "queued" or "running" by number; empty where the study never submitted anything.

        Raises:
            SlurmError: Slurm does not answer.
        """
        return queued_jobs() if any(self.readable_record(job).slurm for job in jobs.values()) else {}

    def build(self, job: Job) -> str:
        """The build of the shards that a job reads, ``""`` where the study does not name them.

        Raises:
            StudyError: they are not set, or cannot be read.
        """
        if job.shards is None:
            return ""
        if job.shards not in self._builds:
            place = self.study.shards[job.shards]
            if place is None:
                raise StudyError(
                    f"shards.{job.shards} is not set: give shards.{job.shards}=OUT, made by mimscale shards build"
                )
            from mimscale.data import ShardError, ShardIndex

            try:
                self._builds[job.shards] = ShardIndex.load(place).content.build
            except ShardError as error:
                raise StudyError(f"shards.{job.shards}: {error}") from None
        return self._builds[job.shards]

    def check(self, jobs: dict[str, Job], shards: bool = True) -> None:
        """Raise unless everything that is there belongs to the study as it is now. Nothing is written.

        Args:
            jobs: the study's.
            shards: look at the shards too.

        Raises:
            StudyError: listing all run folders of another recipe, start or build, half-written results, and shards
                that are not set.
        """
        problems = [problem for job in jobs.values() for problem in self.problems(job, jobs, shards)]
        if problems:
            raise StudyError("\n".join(dict.fromkeys(problems)))

    def problems(self, job: Job, jobs: dict[str, Job], shards: bool) -> list[str]:
        """What keeps one job's folder from being used; see :meth:`check`."""
        found: list[str] = []
        try:
            self.result(job)
            # To start something, the records must be known; to look at it, a damaged one is none.
            record = self.record(job) if shards else self.readable_record(job)
            found += self._other_recipe(job, jobs, record)
            if shards:
                found += _unset(job)
                build, before = self.build(job), record.build
                if build and before and build != before:
                    found.append(
                        f"{self.run(job).path} was trained on shards of build {before}, but shards.{job.shards} is build "
                        f"{build}; point it at the same build, or choose another output"
                    )
        except StudyError as error:
            found.append(str(error))
        return found

    def _other_recipe(self, job: Job, jobs: dict[str, Job], record: Record) -> list[str]:
        folder = self.run(job)
        hint = f"remove {folder.path} to run {job.id} anew, or choose another output"
        problems = []
        if os.path.lexists(folder.recipe):
            if damage := self.recipe_damage(job):
                # The record knows whose run it is; a resume writes the recipe anew.
                return [] if record.digest == job.digest else [f"{damage}; {hint}"]
            saved = folder.saved_recipe(type(job.recipe))
            if saved is not None and recipe_digest(saved) != job.digest:
                differing = differences(saved, job.recipe, saved.free_keys | {"finetune.from"})
                problems.append(
                    f"{folder.path} holds a run of another recipe ({'; '.join(differing)}: there against here); {hint}"
                )
        elif record.digest and record.digest != job.digest and folder.path.exists():
            problems.append(f"{folder.path} was started with another recipe; {hint}")
        if job.start and record.start_digest and record.start_digest != jobs[job.start.job].digest:
            problems.append(f"{folder.path} started from another {job.start.job} than the study's; {hint}")
        return problems

    def recipe_damage(self, job: Job) -> str:
        """What is wrong with the ``recipe.yaml`` of a job's run; empty where it is a recipe, or is not there."""
        run = self.run(job)
        try:
            run.saved_recipe(type(job.recipe))
        except RecipeError as error:
            why = printable(" ".join(str(error).split()), 600)
            return f"{printable(run.recipe)} is no recipe of {job.id} ({why})"
        return ""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the study, so that no second one starts its jobs.

        Raises:
            StudyError: another process does; the message says which, on which host and since when.
        """
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(only_start(self.path, wait=0))
            except RunInUseError as error:
                raise StudyError(str(error)) from None
            yield


def _unset(job: Job) -> list[str]:
    """Keys of the data that the study leaves to whoever runs it."""
    keys = [text.removesuffix("=null") for text in job.overrides if text.startswith("data.") and text.endswith("=null")]
    return [f"finetune.{job.task}.overrides.{key} is not set: say where that data is" for key in keys if job.task]


def _half_written(path: Path, why: str) -> str:
    return (
        f"{path} is half-written or damaged ({printable(why)}); remove it and run the study again: the run ends anew from "
        "its last checkpoint"
    )
