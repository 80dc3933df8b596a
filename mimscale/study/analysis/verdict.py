"""Early verdicts: runs that will end as overfitting, told before they have ended.

Two kinds of evidence. A curve: validation loss has been rising while training loss fell. End points: on the same data a
longer training, or a larger model, has already done worse than a cheaper one, and this cell is longer or larger still.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mimscale.study.analysis.overfitting import noise
from mimscale.study.results.cells import Cell, length, title
from mimscale.study.results.result import Point

# So many validations in a row above the lowest level, by at least this share of it and this many times the noise.
IN_A_ROW = 3
RISE = 0.01
NOISES = 3.0


@dataclass(frozen=True)
class OverfitForecast:
    """Why a run that has not ended counts as overfitting, and from which step on (``None``: from end points)."""

    reason: str
    step: int | None = None


def judge_curve(curve: Sequence[Point], until: int | None = None) -> OverfitForecast | None:
    """Judge a run by its curve so far.

    A run is bound to overfit when its last three validations all lie above its lowest level (median of three in a row) by
    1 % of it and by three times the curve's own noise, while the training loss kept falling. Each longer training
    of the same model on the same data then ends worse than the one that stops near the lowest point.

    Args:
        curve: points (step, training loss, validation loss), ascending; ``None`` where a loss was not measured.
        until: judge only points up to this step: those before the learning rate steps down, where both losses drop.
    """
    points = [(s, t, v) for s, t, v in curve if v is not None and (until is None or s <= until)]
    if len(points) < 2 * IN_A_ROW:
        return None
    losses = [v for _, _, v in points]
    # Single lowest points are lucky ones; the median of three is where the curve was.
    levels = [statistics.median(losses[i : i + IN_A_ROW]) for i in range(len(losses) - IN_A_ROW + 1)]
    lowest = min(range(len(levels)), key=levels.__getitem__)
    needed = max(RISE * levels[lowest], NOISES * curve_noise(losses))
    if lowest + IN_A_ROW > len(losses) - IN_A_ROW or min(losses[-IN_A_ROW:]) <= levels[lowest] + needed:
        return None
    lowest += IN_A_ROW // 2
    trained = [t for _, t, _ in points]
    first, last = trained[lowest], trained[-1]
    if first is not None and last is not None and last >= first:
        return None  # both losses rise: that is divergence, not overfitting
    return OverfitForecast(
        f"validation loss rose from {min(levels):.4f} at step {points[lowest][0]} to {losses[-1]:.4f} at step "
        f"{points[-1][0]} while training loss fell",
        points[-1][0],
    )


def curve_noise(losses: Sequence[float]) -> float:
    """Standard deviation of a curve's points about their trend, from second differences; robust to single outliers."""
    if len(losses) < 4:
        return 0.0
    bends = [abs(a - 2 * b + c) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    return statistics.median(bends) / 0.6745 / math.sqrt(6)


def forecast_cells(found: Iterable[Cell]) -> dict[Cell, OverfitForecast]:
    """Cells without an end point that the end points of others show to overfit.

    A cell is bound to overfit where two cheaper cells on its data, in a row along length (same model) or along model size (same
    length), show a rise beyond the seeds' noise, and the second's training loss, where it is known, is the lower one: what
    made it worse on other data grows with cost.

    Args:
        found: cells of one objective; those with a validation loss are evidence, those without are judged.
    """
    found = list(found)
    known = [cell for cell in found if cell.val_loss is not None]
    tolerance = noise(known)
    return {
        cell: forecast
        for cell in found
        if cell.val_loss is None and (forecast := _forecast(cell, known, tolerance)) is not None
    }


def _forecast(cell: Cell, known: Sequence[Cell], tolerance: float) -> OverfitForecast | None:
    this = cell.first
    same = [c for c in known if _line(c) == _line(cell)]
    shorter = [c for c in same if c.first.model == this.model and c.first.iterations < this.iterations]
    smaller = [
        c for c in same if c.first.iterations == this.iterations and (c.first.parameters or 0) < (this.parameters or 0)
    ]
    for cheaper, name in (
        (sorted(shorter, key=lambda c: c.first.iterations), lambda c: length(c.first.iterations)),
        (sorted(smaller, key=lambda c: c.first.parameters or 0), lambda c: title(c.first.model)),
    ):
        for a, b in itertools.pairwise(cheaper):
            if a.train_loss is not None and b.train_loss is not None and b.train_loss >= a.train_loss:
                continue  # it fits its own data no better: it has learnt less, not too much
            rise = (b.val_loss or 0) - (a.val_loss or 0)
            if rise > tolerance * math.sqrt((1 / a.seeds + 1 / b.seeds) / 2):
                return OverfitForecast(
                    f"on the same data {name(b)} ended at {b.val_loss:.4f}, above the {a.val_loss:.4f} of {name(a)}"
                )
    return None


def _line(cell: Cell) -> tuple[object, ...]:
    first = cell.first
    return (first.objective, first.decoder, first.sampling, first.dataset, first.global_batch)
