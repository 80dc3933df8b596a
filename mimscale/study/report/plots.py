"""What the figures are made of: cells' quantities, circles, laws and axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes

from mimscale.study.analysis.laws import PowerLaw
from mimscale.study.analysis.summary import Grid
from mimscale.study.report.drawing import CROSS, INK, SOFT, Key, Style, ticks
from mimscale.study.results.cells import Cell, title
from mimscale.study.results.result import Score

Measure = Callable[[Cell], float | None]


def loss_of(cell: Cell) -> float | None:
    """A cell's validation loss."""
    return cell.val_loss


def train_loss_of(cell: Cell) -> float | None:
    """A cell's training loss."""
    return cell.train_loss


def score_of(score: Score) -> Measure:
    """How a cell's score is had."""
    return lambda cell: cell.scores[score].mean if score in cell.scores else None


def score_spread_of(score: Score) -> Measure:
    """How the spread of a cell's score over its seeds is had."""
    return lambda cell: cell.scores[score].spread if score in cell.scores else None


def spread_of(cell: Cell) -> float | None:
    """The spread of a cell's validation loss over its seeds."""
    return cell.spread


def no_error(_: Cell) -> float | None:
    """No spread."""
    return None


def keys(style: Style, grid: Grid, cells: Iterable[Cell]) -> list[Key]:
    """A legend for these cells of a grid."""
    cells = list(cells)
    hollow, crosses = any(map(grid.overfits, cells)), any(map(grid.counterpart, cells))
    return style.keys([c.first.dataset for c in cells], [c.first.model for c in cells], hollow, crosses)


def published_marks(axes: Axes, grid: Grid, cells: Iterable[Cell], x: Measure, y: Measure) -> None:
    """Crosses where the published runs of the same model, data and length lie."""
    beside = [(x(cell), y(other)) for cell in cells if (other := grid.counterpart(cell))]
    points = [(a, b) for a, b in beside if a is not None and b is not None]
    axes.plot([a for a, _ in points], [b for _, b in points], "x", color=SOFT, markersize=CROSS, zorder=4)


def points_of(cells: Iterable[Cell], x: Measure, y: Measure) -> list[tuple[float, float, Cell]]:
    """Points (x, y, cell) of the cells that have both, in order of x."""
    points = [(x(cell), y(cell), cell) for cell in cells]
    return sorted(((a, b, cell) for a, b, cell in points if a is not None and b is not None), key=lambda p: p[0])


def marks(
    axes: Axes,
    grid: Grid,
    style: Style,
    points: Iterable[tuple[float, float, Cell]],
    error: Measure = no_error,
) -> None:
    """Circles, hollow for cells that overfit."""
    style.marks(axes, [(a, b, cell, grid.overfits(cell), error(cell)) for a, b, cell in points])


def joined(
    axes: Axes,
    grid: Grid,
    style: Style,
    cells: Sequence[Cell],
    x: Measure,
    y: Measure,
    group: Callable[[Cell], object],
    error: Measure = no_error,
) -> None:
    """Circles, joined where ``group`` is the same."""
    points = points_of(cells, x, y)
    for key in dict.fromkeys(group(cell) for _, _, cell in points):
        line = [(a, b, cell) for a, b, cell in points if group(cell) == key]
        colours = {style.colours[cell.first.dataset] for _, _, cell in line}
        colour = colours.pop() if len(colours) == 1 else SOFT
        axes.plot([a for a, _, _ in line], [b for _, b, _ in line], color=colour, linewidth=1, alpha=0.7, zorder=2)
    marks(axes, grid, style, points, error)
    published_marks(axes, grid, cells, x, y)


def law_line(axes: Axes, law: PowerLaw, values: Sequence[float], line: str = "-") -> None:
    """A power law over the range of values, with its confidence band."""
    x = np.geomspace(min(values), max(values), 40)
    low, high = law.interval(x)
    axes.fill_between(x, low, high, color=SOFT, alpha=0.18, linewidth=0)
    axes.plot(x, law(x), line, color=INK, linewidth=1.3)


def said_range(points: Sequence[tuple[float, float, Cell]]) -> str:
    """How many points there are, and from where to where y goes, in words."""
    if not points:
        return "no cells"
    values = [y for _, y, _ in points]
    return f"{len(points)} cells, from {min(values):.4g} to {max(values):.4g}"


def compute_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis of relative compute."""
    least, most = math.log2(min(values)), math.log2(max(values))
    powers = range(round(least), round(most) + 1)
    ticks(axes, [2.0**power for power in powers[:: 1 + len(powers) // 8]], lambda value: f"{value:g}")
    axes.set_xlabel("relative compute")


def images_name(images: float) -> str:
    """A number of images or parameters as people write it: 128K, 14.2M, 1.06B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if images >= size:
            return f"{images / size:.3g}{unit}"
    return f"{images:g}"


def size_axis(axes: Axes, cells: Iterable[Cell]) -> None:
    """A logarithmic axis of model size."""
    names = {c.first.parameters: title(c.first.model).rsplit("-", 1)[-1] for c in cells if c.first.parameters}
    ticks(axes, names, lambda value: f"{names[int(value)]}\n{images_name(value)}", 1.25)
    axes.set_xlabel("encoder and its parameters")


def heading_of(what: str) -> str:
    """A quantity's name as a heading."""
    return what[0].upper() + what[1:] if what.endswith("loss") else what
