"""Power laws of validation loss, correlation with transfer, and sample efficiency (Figures 1, 6, 7 and Table 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mimscale.study.analysis.overfitting import overfitting
from mimscale.study.results.cells import Cell, length, title

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
        centre: mean of log x.
        errors: standard errors of log loss at the centre, and of the slope.
    """

    name: str
    x: str
    slope: float
    low: float
    high: float
    scale: float
    r2: float
    cells: tuple[Cell, ...]
    centre: float
    errors: tuple[float, float]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The law's loss at ``x``."""
        return self.scale * np.asarray(x, dtype=float) ** self.slope

    def interval(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the 95 % confidence interval of the law's loss at ``x`` (not of a single run's)."""
        at_centre, of_slope = self.errors
        error = np.hypot(at_centre, of_slope * (np.log(np.asarray(x, dtype=float)) - self.centre))
        factor = np.exp(stats.t.ppf((1 + CONFIDENCE) / 2, len(self.cells) - 2) * error)
        return self(x) / factor, self(x) * factor


def fit_power_law(name: str, x: str, found: Sequence[Cell], measure: Callable[[Cell], float | None]) -> PowerLaw | None:
    """Fit one law; ``None`` for fewer than three different values of x, of which no interval could be had."""
    points = [(value, cell.val_loss, cell) for cell in found if (value := measure(cell)) and cell.val_loss]
    if len({value for value, _, _ in points}) < 3:
        return None
    x_log, loss_log = np.log([value for value, _, _ in points]), np.log([loss for _, loss, _ in points])
    centre, count = x_log.mean(), len(points)
    width = ((x_log - centre) ** 2).sum()
    slope = ((x_log - centre) * loss_log).sum() / width
    rest = loss_log - loss_log.mean() - slope * (x_log - centre)
    error = math.sqrt((rest**2).sum() / (count - 2))
    variance = loss_log.var()
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, count - 2) * error / math.sqrt(width)
    return PowerLaw(
        name=name,
        x=x,
        slope=float(slope),
        low=float(slope - reach),
        high=float(slope + reach),
        scale=float(np.exp(loss_log.mean() - slope * centre)),
        r2=float(1 - rest.var() / variance) if variance > 0 else 0.0,
        cells=tuple(cell for _, _, cell in points),
        centre=float(centre),
        errors=(error / math.sqrt(count), error / math.sqrt(width)),
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
    known = [c for c in found if c.first.compute and c.val_loss]
    for cell in sorted(known, key=lambda c: (c.first.compute, c.val_loss)):
        if not kept or cell.val_loss < kept[-1].val_loss:  # type: ignore[operator]
            kept.append(cell)
    return kept


def relative(cell: Cell, unit: float | None) -> float | None:
    """A cell's pre-training compute in units of ``compute_unit``; ``None`` where either is unknown."""
    return None if unit is None or cell.first.compute is None else cell.first.compute / unit


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % confidence interval (Student's t); of one value, the value itself."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - reach, mean + reach


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
    if len(used) > 3:
        reach = stats.norm.ppf((1 + CONFIDENCE) / 2) / math.sqrt(len(used) - 3)
        z = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
        low, high = math.tanh(z - reach), math.tanh(z + reach)
    line = stats.linregress(x, y)
    return Correlation(r, low, high, used, line.slope, line.intercept)


def full_dataset(found: Iterable[Cell]) -> str | None:
    """The dataset of Figure 6: the smallest share of its cells overfits, and it has the most cells, then the most images."""
    verdicts = overfitting(found)
    held: dict[str, list[Cell]] = {}
    for cell in verdicts:
        held.setdefault(cell.first.dataset, []).append(cell)

    def fitness(name: str) -> tuple[float, int, int]:
        group = held[name]
        share = sum(verdicts[cell] is not None for cell in group) / len(group)
        return -share, len(group), group[0].first.images or 0

    return max(held, key=fitness, default=None)


@dataclass(frozen=True)
class Efficiency:
    """Images that a model processes to reach a validation loss, and how many times fewer than the smallest model.

    ``samples`` and ``saving`` are ``None`` where the model never reached it. With ``bound`` the model had reached it by the
    shortest length measured: at most ``samples``, and at least ``saving``.
    """

    model: str
    target: float
    samples: float | None
    saving: float | None
    bound: bool
    cells: tuple[Cell, ...]


def sample_efficiency(found: Sequence[Cell]) -> list[Efficiency]:
    """Images processed until each model reaches the smallest model's best loss, on ``full_dataset`` (Section 4.2).

    Between measured lengths log loss is interpolated linearly in log images.
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
        rows.append(Efficiency(model, target, samples, saving, samples == group[0].samples, tuple(group)))
    return rows


def _reached(group: list[Cell], target: float) -> float | None:
    points = [(c.samples, c.val_loss) for c in group if c.samples and c.val_loss]
    if points[0][1] <= target:
        return points[0][0]
    for (samples0, loss0), (samples1, loss1) in itertools.pairwise(points):
        if loss1 <= target:
            share = math.log(target / loss0) / math.log(loss1 / loss0)
            return samples0 * (samples1 / samples0) ** share
    return None
