"""``study.py predict``: predictions as a person reads them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mimscale.study.analysis.holdout import checks, regrets
from mimscale.study.analysis.loss_model import Prediction
from mimscale.study.analysis.prediction import Predictor
from mimscale.study.results.cells import Cell, cells, length, plain, title
from mimscale.study.results.result import Result, ResultsError


def answer(
    results: Sequence[Result],
    model: str | None = None,
    dataset: str | None = None,
    iterations: int | None = None,
    budget: float | None = None,
    objective: str = "simmim",
    check: bool = False,
) -> str:
    """The answer to a question about a study's results.

    Args:
        results: of every run.
        model: whose loss, with ``dataset`` and ``iterations``.
        dataset: to pre-train on.
        iterations: of the pre-training.
        budget: relative compute, with ``dataset``: which model and length?
        objective: whose cells.
        check: how well are cells that were run predicted from the others?

    Raises:
        ResultsError: too few cells are done; an unknown model or dataset; nothing is asked.
    """
    grid = plain(cells(results), objective)
    if check:
        return check_text(grid)
    if budget is not None and dataset:
        return budget_text(grid, budget, dataset)
    if model and dataset and iterations:
        return cell_text(grid, model, dataset, iterations)
    raise ResultsError("predict needs --model, --dataset and --length, or --budget and --dataset, or --check")


def cell_text(grid: Sequence[Cell], model: str, dataset: str, iterations: int) -> str:
    """What a cell is predicted to give, and what it gave where it was run; that is then unknown to the fit."""
    own = [c for c in grid if (c.first.model, c.first.dataset, c.first.iterations) == (model, dataset, iterations)]
    there = next((cell for cell in own if cell.val_loss is not None), None)
    predictor = Predictor(grid, there)
    found = predictor.predict(model, dataset, iterations)
    name = f"{title(model)} on {title(dataset)}, {length(iterations)}"
    lines = [f"{name}: validation loss {_interval(found)}, of which {found.data_cost:.1%} for too little data"]
    if there is not None:
        lines.append(f"It was run and came to {there.val_loss:.4f}; the prediction does not know of it.")
    lines.append(f"Fitted on {len(predictor.model.cells)} cells; the interval is to hold 95 % of runs.")
    return "\n".join(lines)


def budget_text(grid: Sequence[Cell], budget: float, dataset: str) -> str:
    """Which model and length to spend a budget on."""
    predictor = Predictor(grid)
    choices = predictor.spend(budget, dataset)
    best = choices[0]
    lines = [
        f"For {budget:g} times the compute of the smallest model's shortest length ({predictor.unit:.3g} FLOPs) on "
        f"{title(dataset)}: {title(best.model)} for {best.iterations:,} iterations",
        "",
        f"{'model':<12}{'iterations':>12}{'compute':>9}{'predicted loss':>26}{'data costs':>12}{'best with':>11}",
    ]
    for choice in choices:
        mark = " *" if choice.farther else ""
        lines.append(
            f"{title(choice.model):<12}{choice.iterations:>12,}{choice.compute:>9.2f}{_interval(choice.prediction):>26}"
            f"{choice.prediction.data_cost:>12.1%}{choice.probability:>11.0%}{mark}"
        )
    lines += [
        "",
        "Each model at its best length within the budget; “best with”: the probability that it is the best of these.",
    ]
    if any(choice.farther for choice in choices):
        lines.append("* longer than any training that was fitted")
    return "\n".join(lines)


def check_text(grid: Sequence[Cell]) -> str:
    """How well cells that were left out are predicted, as a table in Markdown."""
    found = checks(grid)
    if not found:
        raise ResultsError("too few cells are done to leave any out")
    lines = [
        "| left out | fitted on | predicted | median error | largest error | in the 95 % interval | median width |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {c.left_out} | {c.fitted} | {c.cells} | {c.error:.2%} | {c.largest:.2%} | {c.covered:.0%} | {c.width:.2%} |"
        for c in found
    ]
    count = sum(c.cells for c in found)
    covered = sum(c.covered * c.cells for c in found) / count
    lines += ["", f"{covered:.0%} of all {count} predicted losses are in their 95 % intervals."]
    if spent := regrets(grid):
        losses = [(chosen.val_loss or 0) / (best.val_loss or 1) - 1 for *_, chosen, best in spent]
        exact = sum(chosen == best for *_, chosen, best in spent)
        lines.append(
            f"Budgets spent knowing only cells of at most a quarter of them: the best cell was chosen in {exact} of "
            f"{len(spent)}; the chosen cell's loss is {statistics.fmean(losses):.2%} above the best cell's on average, at most "
            f"{max(losses):.2%}."
        )
    return "\n".join(lines)


def _interval(found: Prediction) -> str:
    return f"{found.loss:.4f} [{found.low:.4f}, {found.high:.4f}]"
