"""Cells of the grid: the runs that differ only by seed, joined with the fine-tunings that start from them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mimscale.study.results.result import Result, Status, check

STATUS_ORDER: tuple[Status, ...] = ("done", "stopped", "running", "failed", "missing")


@dataclass(frozen=True)
class Score:
    """A fine-tuning's score over the seeds that have one: mean and standard deviation, in percent."""

    mean: float
    spread: float | None
    runs: tuple[Result, ...]


@dataclass(frozen=True)
class Cell:
    """One pre-training of the grid, over its seeds.

    Losses are means over the seeds that are done (``None`` where there are none); ``spread`` is their standard
    deviation (``None`` below two seeds). A stopped run's loss is that of an unfinished schedule, so it does not count, and
    neither does one that diverged (no finite loss).
    Cells are equal where their keys are, so that a cell can be looked up whatever its results.
    """

    key: tuple[Any, ...]
    runs: tuple[Result, ...] = field(compare=False)
    val_loss: float | None = field(compare=False)
    spread: float | None = field(compare=False)
    train_loss: float | None = field(compare=False)
    scores: dict[tuple[str, str], Score] = field(compare=False)

    @property
    def first(self) -> Result:
        """A run that stands for what all seeds share: model, dataset, length, objective, decoder, compute."""
        return self.runs[0]

    @property
    def status(self) -> Status:
        """The best status among the seeds."""
        return min((run.status for run in self.runs), key=STATUS_ORDER.index)

    @property
    def seeds(self) -> int:
        """How many runs ``val_loss`` is the mean of."""
        return sum(
            run.status == "done" and run.val_loss is not None and math.isfinite(run.val_loss) for run in self.runs
        )

    @property
    def samples(self) -> float | None:
        """Images processed: updates times global batch (Figure 6)."""
        return None if self.first.global_batch is None else self.first.iterations * self.first.global_batch

    def __str__(self) -> str:
        return f"{title(self.first.model)} on {title(self.first.dataset)}, {length(self.first.iterations)}"


def cells(results: Iterable[Result]) -> list[Cell]:
    """Join runs into cells, ordered by objective, decoder, model size, data size and length.

    Raises:
        ResultsError: results that contradict each other (``check``).
    """
    results = check(results)
    tuned: dict[str, list[Result]] = {}
    for result in results:
        if result.kind == "finetune" and result.start is not None:
            tuned.setdefault(result.start, []).append(result)
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        if result.kind == "pretrain":
            groups.setdefault(_key(result), []).append(result)
    joined = [_join(key, runs, tuned) for key, runs in groups.items()]
    return sorted(joined, key=lambda cell: _order(cell.first))


def plain(found: Iterable[Cell], objective: str = "simmim") -> list[Cell]:
    """The grid proper: cells of one objective with its plain decoder and uniform sampling."""
    return [
        c
        for c in found
        if c.first.objective == objective and c.first.decoder == "linear" and c.first.sampling == "uniform"
    ]


def family(dataset: str) -> str:
    """What a dataset is a fraction of: "in1k" for "in1k_10"."""
    return re.sub(r"_\d+$", "", dataset)


def title(name: str) -> str:
    """A model's or dataset's name as the paper prints it: SwinV2-B, ViT-B, IN1K (10%), IN22K."""
    if match := re.fullmatch(r"(swinv2|vit)_(.+)", name):
        size = match[2] if match[2] == "g" else match[2].capitalize()
        return f"{'SwinV2' if match[1] == 'swinv2' else 'ViT'}-{size}"
    if match := re.fullmatch(r"(.+?)_(\d+)", name):
        return f"{title(match[1])} ({match[2]}%)"
    return name.upper() if re.fullmatch(r"in\d+k?", name) else name


def length(iterations: int) -> str:
    """Updates as the paper writes them: 125K."""
    return f"{iterations / 1000:g}K" if iterations >= 10_000 else f"{iterations:,}"


def _key(result: Result) -> tuple[Any, ...]:
    return (
        result.objective,
        result.decoder,
        result.sampling,
        result.model,
        result.dataset,
        result.iterations,
        result.global_batch,
    )


def _order(result: Result) -> tuple[Any, ...]:
    return (
        result.objective != "simmim",
        result.objective,
        result.decoder != "linear",
        result.decoder,
        result.sampling != "uniform",
        result.parameters or 0,
        result.model,
        result.images or 0,
        result.dataset,
        result.iterations,
    )


def _join(key: tuple[Any, ...], runs: list[Result], tuned: dict[str, list[Result]]) -> Cell:
    done = [run for run in runs if run.status == "done"]
    mean, spread = _mean([run.val_loss for run in done])
    by_score: dict[tuple[str, str], list[tuple[float, Result]]] = {}
    for result in (tune for run in runs for tune in tuned.get(run.cell, ())):
        for name, value in result.scores.items():
            if result.status == "done" and result.task is not None:
                by_score.setdefault((result.task, name), []).append((value, result))
    scores = {}
    for key_of_score, pairs in by_score.items():
        mean_score, deviation = _mean([value for value, _ in pairs])
        if mean_score is not None:
            scores[key_of_score] = Score(mean_score, deviation, tuple(result for _, result in pairs))
    return Cell(key, tuple(runs), mean, spread, _mean([run.train_loss for run in done])[0], scores)


def _mean(values: list[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None
