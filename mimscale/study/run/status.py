"""``study.py status``: where every job is, read from the study's folder by anyone who can see it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping

from mimscale.study.folder import StudyFolder
from mimscale.study.jobs import Job
from mimscale.study.plan import table
from mimscale.study.spec import Study, StudyError
from mimscale.training.status import status
from mimscale.wording import counted, printable

REFRESH_SECONDS = 5


def job_state(job: Job, jobs: Mapping[str, Job], folder: StudyFolder, queued: Mapping[str, str]) -> str:
    """One word: done, stopped, failed, running, queued, ready, waiting, or what ended the run's last start."""
    if folder.done(job):
        return "done"
    record = folder.readable_record(job)
    if record.state:
        return record.state
    if record.slurm in queued:
        return queued[record.slurm]
    if os.path.lexists(folder.run(job).recipe):
        said = status(folder.run(job).path).state
        if said != "not started":
            return said
    try:
        return "ready" if folder.may_start(job, dict(jobs)) else "waiting"
    except StudyError:  # what it starts from is damaged, and its own line says so
        return "waiting"


def status_text(study: Study, jobs: dict[str, Job]) -> str:
    """The table, a line for each job, and the sums. Runs of another recipe are marked, not refused."""
    folder = StudyFolder(study)
    queued = folder.queued(jobs)
    rows: list[tuple[str, ...]] = [("job", "state", "step", "figures", "note")]
    states: Counter[str] = Counter()
    for job in jobs.values():
        step, figures, note = "", "", ""
        if problems := folder.problems(job, jobs, shards=False):
            state, note = "unusable", problems[0]
        else:
            state, record = job_state(job, jobs, folder, queued), folder.readable_record(job)
            notes = [record.note or record.verdict]
            if os.path.lexists(folder.run(job).recipe):
                seen = status(folder.run(job).path)
                step, figures = f"{seen.step:,}/{job.recipe.train.iterations:,}", seen.figures
                damage = [
                    folder.recipe_damage(job),
                    *(text for text in seen.damage if str(folder.run(job).recipe) not in text),
                ]
                notes += damage if any(damage) else [] if notes[0] else [seen.health]
            note = "; ".join(printable(text, 1000) for text in notes if text)
        states[state] += 1
        rows.append((job.id, state, step, figures, note))
    sums = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return f"{table(rows, left=5)}\n\n{counted(len(jobs), 'job')}: {sums}"


def show_status(study: Study, jobs: dict[str, Job], watch: bool) -> int:
    """Print the table, again and again where asked; returns the exit status."""
    while watch:
        print(f"\x1b[2J\x1b[H{status_text(study, jobs)}", flush=True)
        time.sleep(REFRESH_SECONDS)
    print(status_text(study, jobs))
    return 0
