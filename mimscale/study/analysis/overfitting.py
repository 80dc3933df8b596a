"""Which cells overfit, and how much data a model needs (Sections 4.1 and 4.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mimscale.study.results.cells import Cell, family, length, title

# A dataset suffices a model where more data would lower the validation loss by less than this share of it: about what
# training twice as long gains on the published runs, so below it the other way to spend compute is the better one.
SUFFICIENT = 0.01


@dataclass(frozen=True)
class Overfit:
    """Why a cell counts as overfitting: the cheaper cell on the same data that did better, and by how much."""

    better: Cell
    rise: float
    reason: str


def overfitting(
    found: Iterable[Cell], tolerance: float | None = None, shorter_alone: bool = False
) -> dict[Cell, Overfit | None]:
    """Judge every cell that has a validation loss.

    A cell overfits where spending more on the same data made it worse: a shorter training of the same model, or a
    smaller model trained as long, on the same data has a lower validation loss. This is the paper's own description
    (Sections 1 and 4.1: validation loss rises as the training cost increases; small datasets make large models overfit)
    without a threshold to tune. With several seeds, a rise must exceed twice the standard error of the difference. Where both
    training losses are known, this one must be the lower: a cell that is worse on both has trained badly, not overfitted.

    Args:
        found: cells; only those of the same objective, decoder, sampling and batch are compared.
        tolerance: the rise of loss that still counts as none; by default from the spread of the seeds, 0 with one seed.
        shorter_alone: a smaller model that did better is no evidence; a shorter training is.

    Returns:
        For each cell with a validation loss, the evidence, or ``None`` where there is none.
    """
    known = [cell for cell in found if cell.val_loss is not None]
    of_seeds = noise(known)
    verdicts: dict[Cell, Overfit | None] = {}
    for cell in known:
        worst: Overfit | None = None
        for other in known:
            why = "" if _trained_worse(cell, other) else _cheaper(other, cell, shorter_alone)
            rise = cell.val_loss - other.val_loss  # type: ignore[operator]
            allowed = of_seeds * math.sqrt((1 / cell.seeds + 1 / other.seeds) / 2) if tolerance is None else tolerance
            if why and rise > allowed and (worst is None or rise > worst.rise):
                worst = Overfit(other, rise, f"{why} reached {other.val_loss:.4f} on the same data")
        verdicts[cell] = worst
    return verdicts


def _trained_worse(cell: Cell, other: Cell) -> bool:
    return cell.train_loss is not None and other.train_loss is not None and cell.train_loss >= other.train_loss


def _cheaper(other: Cell, cell: Cell, shorter_alone: bool) -> str:
    """How ``other`` is a cheaper cell on the same data; empty where it is not."""
    a, b = other.first, cell.first
    same = (a.objective, a.decoder, a.sampling, a.dataset, a.global_batch)
    if same != (b.objective, b.decoder, b.sampling, b.dataset, b.global_batch):
        return ""
    if a.model == b.model and a.iterations < b.iterations:
        return f"the shorter training of {length(a.iterations)}"
    if shorter_alone:
        return ""
    if a.iterations == b.iterations and a.parameters and b.parameters and a.parameters < b.parameters:
        return f"the smaller {title(a.model)}"
    return ""


def noise(known: list[Cell]) -> float:
    """Twice the standard error of the difference of two runs, from the pooled spread of the seeds; 0 where all have one seed."""
    spreads = [(cell.spread**2, cell.seeds - 1) for cell in known if cell.spread is not None]
    if not spreads:
        return 0.0
    return 2 * math.sqrt(2 * sum(v * freedom for v, freedom in spreads) / sum(freedom for _, freedom in spreads))


@dataclass(frozen=True)
class DataNeed:
    """The smallest dataset that suffices one model at one length (Figure 5), and how far each dataset is off."""

    model: str
    iterations: int
    smallest: Cell | None
    gaps: dict[str, float]
    datasets: tuple[str, ...]

    @property
    def certain(self) -> bool:
        """Whether a larger dataset was tried too, so that enough was seen to be enough."""
        return self.smallest is not None and self.smallest.first.dataset != self.datasets[-1]


def data_needs(found: Iterable[Cell], tolerance: float = SUFFICIENT) -> list[DataNeed]:
    """For each model and length, the smallest dataset that does not overfit and that more data would not improve.

    Args:
        found: cells of one objective, decoder and sampling.
        tolerance: relative loss that counts as no improvement.
    """
    found = [cell for cell in found if cell.val_loss is not None and cell.first.images]
    verdicts = overfitting(found)
    needs = []
    for model, iterations in sorted({_size(cell) for cell in found}):
        row = sorted((c for c in found if _size(c) == (model, iterations)), key=lambda c: c.first.images or 0)
        best = min(cell.val_loss for cell in row if cell.val_loss is not None)
        gaps = {c.first.dataset: c.val_loss / best - 1 for c in row if c.val_loss is not None}
        enough = [c for c in row if verdicts[c] is None and gaps[c.first.dataset] <= tolerance]
        # Another family's images differ in kind, not only in number, so they say nothing about how many suffice.
        names = tuple(c.first.dataset for c in row if family(c.first.dataset) == family(row[0].first.dataset))
        needs.append(DataNeed(model[1], iterations, enough[0] if enough else None, gaps, names))
    return needs


def _size(cell: Cell) -> tuple[tuple[int, str], int]:
    return (cell.first.parameters or 0, cell.first.model), cell.first.iterations
