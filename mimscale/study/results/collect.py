"""From run folders to results: every number that the report shows, and the folder it came from."""

from __future__ import annotations

import os
import statistics
from functools import lru_cache
from typing import Any

from mimscale.data import ShardError, ShardIndex
from mimscale.study.counts import sizes
from mimscale.study.folder import Record, StudyFolder
from mimscale.study.jobs import Job, decoder_of
from mimscale.study.results.result import SCORES, Point, Result, Status, write_json
from mimscale.study.spec import Study
from mimscale.training.metrics import MetricsLog
from mimscale.training.recipe import Recipe
from mimscale.wording import printable

CURVE_POINTS = 200


def collect(study: Study, jobs: dict[str, Job]) -> list[Result]:
    """Results of all jobs, those that have none among them, and ``results.json`` with the same.

    Raises:
        StudyError: run folders of another recipe, or half-written results; nothing is written then.
    """
    folder = StudyFolder(study)
    folder.check(jobs, shards=False)
    results = [result_of(job, jobs, folder) for job in jobs.values()]
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(results, folder.results)
    return results


def result_of(job: Job, jobs: dict[str, Job], folder: StudyFolder, with_curve: bool = True) -> Result:
    """What one job came to."""
    origin = job
    while origin.launcher == "finetune" and origin.start:
        origin = jobs[origin.start.job]
    recipe = origin.recipe
    assert isinstance(recipe, Recipe)
    found, record = folder.result(job), folder.readable_record(job)
    about: dict[str, Any] = {**_about(folder.study, origin, recipe), "task": job.task}
    if job.launcher == "finetune":
        about["start"] = origin.id
        about["scores"] = _scores(found or {})
    elif found:
        last = _figures(found["validation"])
        about |= {key: last.get(key) for key in ("val_loss", "val_loss_l1", "val_loss_l2")}
        about["train_loss"] = _figures(found).get("train_loss")
    if job.launcher == "pretrain" and with_curve:
        about["curve"] = tuple(curve(job, jobs, folder))
    there = os.path.lexists(folder.run(job).recipe)
    return Result(
        cell=job.id,
        kind=job.launcher,
        model=job.model,
        dataset=job.dataset,
        iterations=job.length,
        seed=job.seed,
        run=str(folder.run(job).path) if there else None,
        recipe=job.digest,
        status=_status(found, record, there),
        note="; ".join(filter(None, (record.note or record.verdict, folder.recipe_damage(job)))),
        **about,
    )


def _scores(found: dict[str, Any]) -> dict[str, float]:
    """Scores of a fine-tuning's ``result.json``: its task's own, and what else of the paper's scores it measured."""
    if not _is_number(found.get("value")) or not isinstance(found.get("metric"), str):
        return {}
    last = _figures(found.get("validation"))
    others = {name: last[f"val_{name}"] for _, name in SCORES if f"val_{name}" in last}
    return {printable(found["metric"], 60): found["value"], **others}


def _is_number(value: Any) -> bool:
    """Whether it is one, infinite ones and NaN (of a run that diverged) among them."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _figures(values: Any) -> dict[str, Any]:
    """What of a record are numbers."""
    return {key: value for key, value in values.items() if _is_number(value)} if isinstance(values, dict) else {}


def _status(found: dict[str, Any] | None, record: Record, there: bool) -> Status:
    if found:
        return "done"
    if record.state == "failed":
        return "failed"
    if record.state == "stopped":
        return "stopped"
    return "running" if there else "missing"


def _about(study: Study, job: Job, recipe: Recipe) -> dict[str, Any]:
    dataset = study.datasets[job.dataset]
    images, classes = _counted(study.shards[dataset.shards], dataset.fraction) or (dataset.images, dataset.classes)
    parameters, total, flops = sizes(recipe)
    return {
        "parameters": parameters,
        "total_parameters": total,
        "architecture": recipe.model.architecture,
        "flops_per_image": float(flops),
        "images": images,
        "classes": classes,
        "global_batch": recipe.train.global_batch,
        "objective": recipe.mim.objective,
        "decoder": decoder_of(recipe),
        "sampling": dataset.sampling,
    }


@lru_cache(maxsize=256)
def _counted(shards: str | None, fraction: str) -> tuple[int, int] | None:
    """(images, classes) of a fraction of shards; ``None`` where they are not at hand."""
    if shards is None:
        return None
    try:
        index = ShardIndex.load(shards)
        samples = index.samples(fraction)
    except ShardError:
        return None
    return len(samples), len(set(index.labels(samples).tolist()))


def curve(job: Job, jobs: dict[str, Job], folder: StudyFolder) -> list[Point]:
    """A pre-training's losses from its first step, over the trunk that it left.

    Returns:
        (step, mean training loss since the point before, validation loss): a point for each validation, or where there
        are none, at most 200 with training losses alone.
    """
    records: list[dict[str, Any]] = []
    end: int | None = None
    link: Job | None = job
    while link is not None:
        logged = [_figures(record) for record in MetricsLog(folder.run(link).metrics).read()]
        own = [r for r in logged if type(r.get("step")) is int and (end is None or r["step"] <= end)]
        records = own + records
        end = link.start.step if link.start else None
        link = jobs[link.start.job] if link.start else None
    return thin(records)


def thin(records: list[dict[str, Any]]) -> list[Point]:
    """The curve of ``metrics.jsonl``'s lines; see :func:`curve`."""
    # A line that something else wrote among them has no step, or a loss that is none.
    records = [figures for record in records if type((figures := _figures(record)).get("step")) is int]
    measured = any("val_loss" in record for record in records)
    trained = sum("loss" in record for record in records)
    stride = max(1, trained // CURVE_POINTS)
    points: list[Point] = []
    since: list[float] = []
    for record in records:
        if "loss" in record:
            since.append(record["loss"])
        if "val_loss" in record or (not measured and len(since) == stride):
            points.append((record["step"], statistics.fmean(since) if since else None, record.get("val_loss")))
            since = []
    return points
