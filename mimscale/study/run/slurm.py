"""``study.py submit``: what is missing or failed, as Slurm jobs that wait for what they start from."""

from __future__ import annotations

from pathlib import Path

from mimscale.files import write_text
from mimscale.study.folder import Record, StudyFolder
from mimscale.study.jobs import Job
from mimscale.study.run.early_stopping import Judge
from mimscale.study.spec import Study
from mimscale.training.launch.slurm import SlurmJob, submit, write_script
from mimscale.training.launch.slurm_queue import cancel
from mimscale.training.run_folder import MANIFEST


def submit_study(study: Study, jobs: dict[str, Job]) -> int:
    """Queue every job that is neither done, nor queued, nor stopped by a verdict; returns 0.

    A job waits (``afterok``) for the one it starts from, unless the checkpoint that it leaves is there already. Where that
    one fails, Slurm removes it, and submitting again queues both anew. With ``stop_overfitting`` this also takes jobs out of the
    queue that are bound to overfit by now.

    Raises:
        StudyError: folders that do not belong to the study, or shards that are not set; nothing is queued then.
        SlurmError: a text that no job file may hold, and nothing is queued; or Slurm refuses a job: those before it stay
            queued, and submitting again continues behind them.
    """
    folder = StudyFolder(study)
    folder.check(jobs)
    scripts = {job.id: _script(folder, job) for job in jobs.values()}
    with folder.alone():
        queued = folder.queued(jobs)
        _stop_overfitting(folder, jobs, queued)
        counts = {"done": 0, "queued": 0, "stopped": 0, "submitted": 0}
        numbers: dict[str, str] = {}
        for job in jobs.values():
            record = folder.record(job)
            if folder.done(job):
                counts["done"] += 1
            elif record.slurm in queued:
                numbers[job.id] = record.slurm
                counts["queued"] += 1
            elif record.state == "stopped" and study.stop_overfitting:
                counts["stopped"] += 1
            else:
                numbers[job.id] = _submit(folder, job, jobs, numbers, record, scripts[job.id])
                counts["submitted"] += 1
    words = {"submitted": "submitted", "queued": "queued before", "done": "done", "stopped": "stopped by verdicts"}
    print(", ".join(f"{counts[key]} {word}" for key, word in words.items() if counts[key] or key == "submitted"))
    return 0


def _stop_overfitting(folder: StudyFolder, jobs: dict[str, Job], queued: dict[str, str]) -> None:
    judge = Judge(folder, jobs)
    running = [job for job in jobs.values() if queued.get(folder.record(job).slurm) == "running"]
    for ruling in (*judge.by_curves(running), *judge.by_end_points()):
        print(ruling)
        for name in ruling.stopped:
            number = folder.record(jobs[name]).slurm
            if queued.pop(number, None):
                cancel(number)


def _script(folder: StudyFolder, job: Job) -> str:
    wanted, cluster = job.resources, folder.study.slurm
    return write_script(
        SlurmJob(
            recipe=Path(job.recipe_file),
            config=Path(wanted.deepspeed or ""),
            output=folder.run(job).path,
            overrides=tuple(job.arguments(folder.study)),
            launcher=job.launcher,
            name=job.id,
            nodes=wanted.nodes or 1,
            gpus_per_node=wanted.gpus or 0,
            time=wanted.time or "24:00:00",
            cluster=tuple((key, value) for key, value in cluster.model_dump().items() if value is not None),
        )
    )


def _submit(
    folder: StudyFolder, job: Job, jobs: dict[str, Job], numbers: dict[str, str], record: Record, script: str
) -> str:
    run = folder.run(job).path
    path = folder.path / "jobs" / f"{job.id}.sbatch"
    write_text(path, script)
    run.mkdir(parents=True, exist_ok=True)  # Slurm opens the log in it before the job begins
    after = []
    if job.start is not None and job.start.job in numbers:
        before = jobs[job.start.job]
        left = job.start.step and (before.checkpoint(folder.path, job.start.step) / MANIFEST).is_file()
        after = [] if left else [numbers[before.id]]
    number = submit(path, after)
    # Written after each job, so that a refusal half-way leaves no job that nobody knows of.
    start = jobs[job.start.job].digest if job.start else ""
    folder.write(job, Record(job.digest, start, folder.build(job), verdict=record.verdict, slurm=number))
    return number
