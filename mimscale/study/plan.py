"""``study.py plan``: what a study takes before anything is queued: jobs, GPU-hours, cost, and what sharing trunks saves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimscale.files import write_text
from mimscale.schema import nearest
from mimscale.study.counts import load, sizes
from mimscale.study.jobs import Job, decoder_of, trained_alone
from mimscale.study.spec import Speed, Study, StudyError
from mimscale.training.ds_config import DeepSpeedConfigError, read_ds_config, zero_stage
from mimscale.training.metrics import duration
from mimscale.training.planning.throughput import GPU_PEAKS
from mimscale.training.planning.zero import GB, GPU_SHARE, Way, plan_way
from mimscale.training.recipe import Recipe
from mimscale.wording import counted


def job_flops(job: Job) -> float:
    """Floating-point operations of the updates that a job computes itself (of a fine-tuning: its encoder's)."""
    return float(sizes(job.recipe)[2]) * job.recipe.train.global_batch * job.steps


def gpu_seconds(job: Job, speed: Speed) -> float:
    """Seconds of one GPU that a job takes at the study's share of its peak.

    Raises:
        StudyError: the study names a GPU that is not known.
    """
    if speed.gpu not in GPU_PEAKS:
        near = nearest(speed.gpu, list(GPU_PEAKS))
        raise StudyError(
            f"speed.gpu: no '{speed.gpu}'; "
            + (f"did you mean '{near}'?" if near else f"there are {', '.join(GPU_PEAKS)}")
        )
    return job_flops(job) / (GPU_PEAKS[speed.gpu][0] * 1e12 * speed.mfu)


@dataclass(frozen=True)
class Sum:
    """Jobs of one kind together."""

    name: str
    jobs: int
    iterations: int
    seconds: float


def plan_text(study: Study, jobs: dict[str, Job]) -> str:
    """The plan for people: every job, sums by model and task, memory, and the whole."""
    speed = study.speed
    on_gpus = any(job.resources.gpus for job in jobs.values())
    seconds = {name: gpu_seconds(job, speed) for name, job in jobs.items()}
    pretraining = [job for job in jobs.values() if job.launcher == "pretrain"]
    computed = sum(job.steps for job in pretraining)
    alone = trained_alone(pretraining)
    alone_seconds = sum(seconds[job.id] * job.length / job.steps for job in pretraining)
    shared_seconds = sum(seconds[job.id] for job in pretraining)
    total = sum(seconds.values())
    parts = [
        _jobs_table(jobs, seconds, speed),
        _sums_table(_sums(jobs, seconds), speed),
        _memory_table(study, pretraining),
        f"{counted(len(jobs), 'job')}: {len(pretraining)} pre-trainings and {len(jobs) - len(pretraining)} fine-tunings, "
        + (
            f"{_hours(total)} GPU-hours{_cost(total, speed)} at {speed.mfu:.0%} of {speed.gpu}'s peak in bf16."
            if on_gpus
            else f"{sum(map(job_flops, jobs.values())) / 1e12:,.1f} TFLOP. The study asks for no GPUs; hours are those of one."
        ),
        f"Shared trunks: {computed:,} pre-training iterations instead of {alone:,}, which saves "
        f"{_hours(alone_seconds - shared_seconds)} GPU-hours{_cost(alone_seconds - shared_seconds, speed)}, "
        f"{1 - shared_seconds / alone_seconds:.1%} of pre-training.",
        f"Every job at once, the longest chain takes {duration(_longest_chain(jobs, seconds))}." if on_gpus else "",
    ]
    return "\n\n".join(part for part in parts if part)


def write_plan(study: Study, jobs: dict[str, Job], path: Path) -> None:
    """The plan as JSON: every job with what it starts from, its iterations, GPU-hours and digest."""
    rows = [
        {
            "job": job.id,
            "kind": job.launcher,
            "model": job.model,
            "dataset": job.dataset,
            "length": job.length,
            "seed": job.seed,
            "task": job.task,
            "starts_from": job.start.job if job.start else None,
            "starts_at": job.start.step if job.start else None,
            "iterations": job.steps,
            "gpu_hours": gpu_seconds(job, study.speed) / 3600,
            "recipe": job.digest,
        }
        for job in jobs.values()
    ]
    write_text(path, json.dumps(rows, indent=1) + "\n")


def _jobs_table(jobs: dict[str, Job], seconds: dict[str, float], speed: Speed) -> str:
    rows: list[tuple[str, ...]] = [("job", "starts from", "iterations", "GPU-hours", "cost" if speed.price else "")]
    for job in jobs.values():
        start = ""
        if job.start is not None:
            start = job.start.job + (f" at {job.start.step:,}" if job.start.step else "")
        rows.append((job.id, start, f"{job.steps:,}", _hours(seconds[job.id]), _price(seconds[job.id], speed)))
    return table(rows, left=2)


def _sums(jobs: dict[str, Job], seconds: dict[str, float]) -> list[Sum]:
    groups: dict[str, list[Job]] = {}
    for job in jobs.values():
        groups.setdefault(f"fine-tuning {job.task}" if job.task else f"pre-training {job.model}", []).append(job)
    return [
        Sum(name, len(held), sum(job.steps for job in held), sum(seconds[job.id] for job in held))
        for name, held in groups.items()
    ]


def _sums_table(sums: Iterable[Sum], speed: Speed) -> str:
    rows: list[tuple[str, ...]] = [("together", "jobs", "iterations", "GPU-hours", "cost" if speed.price else "")]
    rows += [(s.name, str(s.jobs), f"{s.iterations:,}", _hours(s.seconds), _price(s.seconds, speed)) for s in sums]
    return table(rows, left=1)


def _memory_table(study: Study, pretraining: Sequence[Job]) -> str:
    """What each model's ranks hold, by the memory model; empty where the study asks for no GPUs."""
    rows: list[tuple[str, ...]] = [("memory", "GPUs", "ZeRO stage", "GB a rank", "micro-batch", "125K take")]
    budget = study.speed.gpu_memory * GB
    seen: dict[str, Job] = {}
    for job in pretraining:
        assert isinstance(job.recipe, Recipe)
        decoder = decoder_of(job.recipe)
        heavier = "" if decoder == "linear" else f", {decoder} decoder"
        seen.setdefault(job.model + heavier, job)
    for name, job in seen.items():
        gpus = (job.resources.nodes or 1) * (job.resources.gpus or 0)
        if not gpus:
            continue
        assert isinstance(job.recipe, Recipe)
        way = _way(job, job.recipe, gpus, budget)
        fits = f"{way.micro}" if way.fits else f"does not fit: needs {way.memory.total / GPU_SHARE / GB:.0f} GB"
        hours = gpu_seconds(job, study.speed) / job.steps * 125_000 / gpus
        rows.append((name, str(gpus), way.name, f"{way.memory.total / GB:.1f}", fits, duration(hours)))
    return table(rows, left=1) if len(rows) > 1 else ""


def _way(job: Job, recipe: Recipe, gpus: int, budget: float) -> Way:
    try:
        config = read_ds_config(Path(job.resources.deepspeed or ""))
        stage = zero_stage(config)
        zero = config.get("zero_optimization", {})
        offload = tuple(
            w for w in ("optimizer", "param") if (zero.get(f"offload_{w}") or {}).get("device") not in (None, "none")
        )
        return plan_way(load(recipe, gpus, budget), stage, offload)
    except DeepSpeedConfigError as error:
        raise StudyError(f"{job.id} with {job.resources.deepspeed} on {gpus} GPUs: {error}") from None


def _longest_chain(jobs: dict[str, Job], seconds: dict[str, float]) -> float:
    """Seconds until the last job has ended, each on the GPUs it asks for and begun as soon as what it starts from is there."""
    left: dict[str, float] = {}
    latest = 0.0
    for job in jobs.values():
        gpus = max(1, (job.resources.nodes or 1) * (job.resources.gpus or 0))
        begin = 0.0
        if job.start is not None:
            before = jobs[job.start.job]
            begin = left[before.id]
            if job.start.step:  # it need not wait for the last eighth
                begin -= (
                    seconds[before.id]
                    / max(1, (before.resources.nodes or 1) * (before.resources.gpus or 0))
                    * (before.recipe.train.iterations - job.start.step)
                    / before.steps
                )
        left[job.id] = begin + seconds[job.id] / gpus
        latest = max(latest, left[job.id])
    return latest


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _price(seconds: float, speed: Speed) -> str:
    return f"{seconds / 3600 * speed.price:,.0f}" if speed.price else ""


def _cost(seconds: float, speed: Speed) -> str:
    return f", {_price(seconds, speed)} at {speed.price:g} a GPU-hour" if speed.price else ""


def table(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows as aligned columns: the first ``left`` to the left, the others to the right; empty columns go."""
    columns = [i for i in range(len(rows[0])) if any(row[i] for row in rows)]
    widths = {i: max(len(row[i]) for row in rows) for i in columns}
    lines = [
        "  ".join(row[i].ljust(widths[i]) if i < left else row[i].rjust(widths[i]) for i in columns) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
