"""Power laws of validation loss, correlation with transfer, and sample efficiency (Figures 1, 6, 7 and Table 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mimscale.study.cells import Cell, length, title
from mimscale.study.overfitting import overfitting

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PowerLaw:
    """``loss = scale * x ** slope``, by least squares of the logarithms.

    Attributes:
        name: what was fitted, for people.
        x: "parameters", "relative compute" or "images".
        slope: of log loss with log x.
        low: lower end of the slope's 95 % confidence interval (Student's t).
        high: its upper end.
        scale: loss at x = 1.
        r2: share of the variance of log loss that the law explains.
        cells: what it was fitted on.
    """

    name: str
    x: str
    slope: float
    low: float
    high: float
    scale: float
    r2: float
    cells: tuple[Cell, ...]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The law's loss at ``x``."""
        return self.scale * np.asarray(x, dtype=float) ** self.slope


def fit_power_law(name: str, x: str, found: Sequence[Cell], measure: Callable[[Cell], float | None]) -> PowerLaw | None:
    """Fit one law; ``None`` for fewer than three different values of x, of which no interval could be had."""
    points = [(value, cell.val_loss, cell) for cell in found if (value := measure(cell)) and cell.val_loss]
    if len({value for value, _, _ in points}) < 3:
        return None
    fit = stats.linregress([math.log(value) for value, _, _ in points], [math.log(loss) for _, loss, _ in points])
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(points) - 2) * fit.stderr
    used = tuple(cell for _, _, cell in points)
    return PowerLaw(
        name, x, fit.slope, fit.slope - reach, fit.slope + reach, math.exp(fit.intercept), fit.rvalue**2, used
    )


def compute_unit(found: Iterable[Cell]) -> float | None:
    """Training FLOPs that count as 1: the smallest model's shortest length (SwinV2-S for 125K in the paper)."""
    known = [cell.first for cell in found if cell.first.compute is not None]
    if not known:
        return None
    return min(known, key=lambda r: (r.parameters or 0, r.iterations)).compute


def frontier(found: Iterable[Cell]) -> list[Cell]:
    """For each model and length, the cell of lowest loss that does not overfit: data is no bottleneck there."""
    best: dict[tuple[str, int], Cell] = {}
    for cell, evidence in overfitting(found).items():
        key = (cell.first.model, cell.first.iterations)
        if evidence is None and (key not in best or cell.val_loss < best[key].val_loss):  # type: ignore[operator]
            best[key] = cell
    return sorted(best.values(), key=lambda cell: (cell.first.parameters or 0, cell.first.iterations))


def power_laws(found: Sequence[Cell]) -> list[PowerLaw]:
    """Laws of one objective's plain grid: with model size at each length, with compute, with data.

    The laws with parameters and compute are fitted on the non-overfitting frontier. Those with data are fitted for each
    model at its longest length on the cells that do not overfit: a slope near zero says that more data did not help.
    """
    unit = compute_unit(found)
    best = frontier(found)
    laws: list[PowerLaw | None] = []
    for iterations in sorted({cell.first.iterations for cell in best}):
        here = [cell for cell in best if cell.first.iterations == iterations]
        laws.append(
            fit_power_law(f"model size at {length(iterations)}", "parameters", here, lambda c: c.first.parameters)
        )
    if unit:
        thrifty = pareto(best)
        laws.append(fit_power_law("compute, best cells", "relative compute", thrifty, lambda c: relative(c, unit)))
    verdicts = overfitting(found)
    for model in dict.fromkeys(cell.first.model for cell in best):
        longest = max(cell.first.iterations for cell in best if cell.first.model == model)
        here = [
            c for c, bad in verdicts.items() if bad is None and (c.first.model, c.first.iterations) == (model, longest)
        ]
        laws.append(
            fit_power_law(f"data, {title(model)} at {length(longest)}", "images", here, lambda c: c.first.images)
        )
    return [law for law in laws if law is not None]


def pareto(found: Iterable[Cell]) -> list[Cell]:
    """The cells that no cheaper cell matches in validation loss."""
    kept: list[Cell] = []
    for cell in sorted((c for c in found if c.first.compute and c.val_loss), key=lambda c: c.first.compute or 0):
        if not kept or cell.val_loss < kept[-1].val_loss:  # type: ignore[operator]
            kept.append(cell)
    return kept


def relative(cell: Cell, unit: float | None) -> float | None:
    """A cell's pre-training compute in units of ``compute_unit``; ``None`` where either is unknown."""
    return None if unit is None or cell.first.compute is None else cell.first.compute / unit


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation of a pre-training loss with a score, its 95 % interval (Fisher's z), and the line of best fit."""

    r: float
    low: float
    high: float
    cells: tuple[Cell, ...]
    slope: float
    intercept: float


def correlation(found: Iterable[Cell], score: tuple[str, str], loss: str) -> Correlation | None:
    """Correlate ``loss`` ("val_loss" or "train_loss") with a score; ``None`` below three cells or without variation."""
    used = tuple(c for c in found if getattr(c, loss) is not None and score in c.scores)
    x = [getattr(cell, loss) for cell in used]
    y = [cell.scores[score].mean for cell in used]
    if len(used) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    low, high = -1.0, 1.0
    if len(used) > 3 and abs(r) < 1:
        reach = stats.norm.ppf((1 + CONFIDENCE) / 2) / math.sqrt(len(used) - 3)
        low, high = math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach)
    line = stats.linregress(x, y)
    return Correlation(r, low, high, used, line.slope, line.intercept)


def split(found: Iterable[Cell]) -> tuple[list[Cell], list[Cell]]:
    """The cells that overfit and those that do not (Table 3)."""
    verdicts = overfitting(found)
    return [cell for cell, bad in verdicts.items() if bad], [cell for cell, bad in verdicts.items() if not bad]


def full_dataset(found: Iterable[Cell]) -> str | None:
    """The dataset of Figure 6: none of its cells overfit, and it has the most cells, then the most images."""
    verdicts = overfitting(found)
    held: dict[str, list[Cell]] = {}
    for cell in verdicts:
        held.setdefault(cell.first.dataset, []).append(cell)
    clean = {name: group for name, group in held.items() if not any(verdicts[cell] for cell in group)}
    if not clean:
        return None
    return max(clean, key=lambda name: (len(clean[name]), clean[name][0].first.images or 0))


@dataclass(frozen=True)
class Efficiency:
    """Images that a model processes to reach a validation loss, and how many times fewer than the smallest model."""

    model: str
    target: float
    samples: float | None
    saving: float | None
    cells: tuple[Cell, ...]


def sample_efficiency(found: Sequence[Cell]) -> list[Efficiency]:
    """Images processed until each model reaches the smallest model's best loss, on ``full_dataset`` (Section 4.2).

    Between measured lengths log loss is interpolated linearly in log images. A model that had reached the loss by its
    shortest length gets that length's images: an upper bound.
    """
    dataset = full_dataset(found)
    here = [c for c in found if c.first.dataset == dataset and c.val_loss is not None and c.samples]
    models = sorted({(c.first.parameters or 0, c.first.model) for c in here})
    if not models:
        return []
    groups = [(m, sorted((c for c in here if c.first.model == m), key=lambda c: c.samples or 0)) for _, m in models]
    target = min(c.val_loss for c in groups[0][1] if c.val_loss is not None)
    rows: list[Efficiency] = []
    for model, group in groups:
        samples = _reached(group, target)
        smallest = rows[0].samples if rows else samples
        saving = smallest / samples if smallest and samples else None
        rows.append(Efficiency(model, target, samples, saving, tuple(group)))
    return rows


def _reached(group: list[Cell], target: float) -> float | None:
    points = [(math.log(c.samples), math.log(c.val_loss)) for c in group if c.samples and c.val_loss]
    goal = math.log(target) + 1e-12
    if points[0][1] <= goal:
        return math.exp(points[0][0])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= goal:
            return math.exp(x0 + (goal - y0) / (y1 - y0) * (x1 - x0))
    return None
