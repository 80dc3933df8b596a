"""Verdicts in force: the jobs that the overfitting detector marks, and those that are given up with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from mimscale.study.analysis.verdict import forecast_cells, judge_curve
from mimscale.study.folder import Record, StudyFolder
from mimscale.study.jobs import Job, descendants
from mimscale.study.plan import job_flops
from mimscale.study.results.cells import cells
from mimscale.study.results.collect import curve, result_of
from mimscale.training.metrics import MetricsLog
from mimscale.training.schedule import decay_step


@dataclass(frozen=True)
class Ruling:
    """Jobs found to overfit, why, and which were given up (they and what starts from them) with the FLOPs that this saves."""

    marked: tuple[str, ...]
    reason: str
    stopped: tuple[str, ...]
    saved: float
    share: float

    def __str__(self) -> str:
        said = f"{', '.join(self.marked)}: will overfit: {self.reason}"
        if not self.stopped:
            return said
        return f"{said}; {len(self.stopped)} jobs are stopped, which saves {self.share:.1%} of the study's compute"


class Judge:
    """Marks bound to overfit jobs in their records, and with ``stop_overfitting`` gives them up."""

    def __init__(self, folder: StudyFolder, jobs: dict[str, Job]):
        self.folder, self.jobs = folder, jobs
        self.stop = folder.study.stop_overfitting

    @cached_property
    def flops(self) -> dict[str, float]:
        """Of every job; counting them takes a second for each large model."""
        return {name: job_flops(job) for name, job in self.jobs.items()}

    def by_curves(self, running: Iterable[Job]) -> list[Ruling]:
        """Judge pre-trainings by their curves so far; with one, the longer ones of its trunk are given up."""
        rulings = []
        for job in running:
            if job.launcher != "pretrain" or self._record(job.id).verdict:
                continue
            until = decay_step(job.recipe.schedule, job.recipe.train.iterations)
            forecast = judge_curve(curve(job, self.jobs, self.folder), until)
            if forecast is not None:
                longer = [n for n in descendants(self.jobs, job.id) if self.jobs[n].launcher == "pretrain"]
                rulings += self._rule([job.id, *longer], forecast.reason)
        return rulings

    def by_end_points(self) -> list[Ruling]:
        """Judge what has not ended by the results of cheaper cells on the same data."""
        if not any(self.folder.done(job) for job in self.jobs.values()):
            return []
        results = [result_of(job, self.jobs, self.folder, with_curve=False) for job in self.jobs.values()]
        rulings = []
        for cell, forecast in forecast_cells(cells(results)).items():
            rulings += self._rule([run.cell for run in cell.runs], forecast.reason)
        return rulings

    def _rule(self, names: Iterable[str], reason: str) -> list[Ruling]:
        marked = [n for n in names if not self._record(n).verdict and not self.folder.done(self.jobs[n])]
        if not marked:
            return []
        for name in marked:
            record = self._record(name)
            record.verdict = f"will overfit: {reason}"
            self.folder.write(self.jobs[name], record)
        stopped: list[str] = []
        saved = 0.0
        if self.stop:
            for name in dict.fromkeys(n for m in marked for n in (m, *descendants(self.jobs, m))):
                job, record = self.jobs[name], self._record(name)
                if record.state or self.folder.done(job):
                    continue
                record.state, record.saved = "stopped", self.left(job)
                record.note = record.verdict or f"starts from a run that was stopped: {reason}"
                self.folder.write(job, record)
                stopped.append(name)
                saved += record.saved
        return [Ruling(tuple(marked), reason, tuple(stopped), saved, saved / sum(self.flops.values()))]

    def _record(self, name: str) -> Record:
        return self.folder.record(self.jobs[name])

    def step(self, job: Job) -> int:
        """The last step that a job has logged."""
        records = MetricsLog(self.folder.run(job).metrics).read()
        return records[-1]["step"] if records else 0

    def left(self, job: Job) -> float:
        """FLOPs that a job has still to do."""
        if self.folder.done(job):
            return 0.0
        total = job.recipe.train.iterations
        return self.flops[job.id] * (total - max(job.first, self.step(job))) / max(1, job.steps)
