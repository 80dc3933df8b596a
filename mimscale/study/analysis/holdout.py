"""How well predictions would have done: cells left out of the fit and predicted, budgets spent knowing only cheap cells."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mimscale.study.analysis.laws import compute_unit
from mimscale.study.analysis.loss_model import Condition, LossModel
from mimscale.study.results.cells import Cell, length, title
from mimscale.study.results.result import ResultsError


@dataclass(frozen=True)
class Check:
    """Cells left out of a fit, and how well it predicted them; errors and widths are shares of the loss."""

    left_out: str
    fitted: int
    cells: int
    error: float
    largest: float
    covered: float
    width: float


def checks(grid: Sequence[Cell]) -> list[Check]:
    """Leave out each model, length and dataset, and all but the cheap cells, and predict them from the rest."""
    known = [c for c in grid if c.val_loss and Condition.of(c)]
    groups: dict[str, set[Cell]] = {}
    for name_of in (
        lambda r: title(r.model),
        lambda r: f"{length(r.iterations)} iterations",
        lambda r: title(r.dataset),
    ):
        for cell in known:
            groups.setdefault(name_of(cell.first), set()).add(cell)
    models = {c.first.model: c.first.parameters or 0 for c in known}
    largest = sorted(models, key=lambda m: models[m])[-2:]
    longest = max((c.first.iterations for c in known), default=0)
    if len(models) > 3:
        name = " and ".join(title(model) for model in largest)
        groups[name] = {c for c in known if c.first.model in largest}
        both = {c for c in known if c.first.model in largest or c.first.iterations == longest}
        groups[f"{name}, and {length(longest)} iterations"] = both
    found = []
    for name, held in groups.items():
        rest = [cell for cell in known if cell not in held]
        try:
            found.append(_check(name, rest, [cell for cell in known if cell in held]))
        except ResultsError:
            continue  # too few are left to fit
    return found


def _check(name: str, rest: Sequence[Cell], held: Sequence[Cell]) -> Check:
    predictions = LossModel(rest).predict([c for cell in held if (c := Condition.of(cell))])
    errors, covered, widths = [], [], []
    for cell, prediction in zip(held, predictions, strict=True):
        assert cell.val_loss is not None
        errors.append(abs(prediction.loss / cell.val_loss - 1))
        covered.append(prediction.low <= cell.val_loss <= prediction.high)
        widths.append((prediction.high - prediction.low) / prediction.loss)
    return Check(
        name,
        len(rest),
        len(held),
        statistics.median(errors),
        max(errors),
        statistics.fmean(covered),
        statistics.median(widths),
    )


def regrets(grid: Sequence[Cell], share: float = 0.25) -> list[tuple[str, float, Cell, Cell]]:
    """Spend each budget that a cell of the grid costs, knowing only cells of at most ``share`` of it.

    Returns:
        For each dataset and budget: the dataset, the budget, the cell of lowest predicted loss among those that were run and
        fit the budget, and the cell that came out lowest.
    """
    unit = compute_unit(grid)
    known = [c for c in grid if c.val_loss and Condition.of(c) and c.first.compute and unit]
    found = []
    for budget in sorted({c.first.compute or 0 for c in known}):
        cheap = [c for c in known if (c.first.compute or 0) <= share * budget * (1 + 1e-9)]
        try:
            model = LossModel(cheap)
        except ResultsError:
            continue  # too few cells are that cheap
        for dataset, group in itertools.groupby(
            sorted(known, key=lambda c: c.first.dataset), lambda c: c.first.dataset
        ):
            fits = [c for c in group if (c.first.compute or 0) <= budget * (1 + 1e-9)]
            if not fits or max(c.first.compute or 0 for c in fits) < budget * (1 - 1e-9):
                continue  # the budget is no cell's of this dataset
            predictions = model.predict([c for cell in fits if (c := Condition.of(cell))])
            chosen = min(zip(predictions, fits, strict=True), key=lambda pair: pair[0].loss)[1]
            found.append((dataset, budget / (unit or 1), chosen, min(fits, key=lambda c: c.val_loss or 0)))
    return found
