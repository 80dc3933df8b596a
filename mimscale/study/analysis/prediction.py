"""What a cell not run would give, and which model and length a budget is best spent on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mimscale.schema import nearest, some
from mimscale.study.analysis.laws import compute_unit
from mimscale.study.analysis.loss_model import Condition, LossModel, Prediction
from mimscale.study.results.cells import Cell, family, length
from mimscale.study.results.result import Result, ResultsError
from mimscale.wording import printable

FARTHEST = 2  # times the longest training that was run: how far a choice of length may go
STEPS = 41


@dataclass(frozen=True)
class Choice:
    """A model's best length within a budget: its prediction, and how probably it is the best of all models."""

    model: str
    iterations: int
    compute: float
    prediction: Prediction
    probability: float
    farther: bool


class Predictor:
    """Predictions within one objective's plain grid.

    Args:
        grid: its cells; those that are not done say what models and datasets there are.
        unseen: a cell that the fit is not to know, though it was run.

    Raises:
        ResultsError: too few cells are done.
    """

    def __init__(self, grid: Sequence[Cell], unseen: Cell | None = None):
        self.grid = list(grid)
        self.model = LossModel([cell for cell in self.grid if cell != unseen])
        self.unit = compute_unit(self.grid)
        batches = [cell.first.global_batch for cell in self.model.cells if cell.first.global_batch]
        self.batch = statistics.mode(batches)

    def _about(self, what: str, name: str, of: Callable[[Result], str]) -> Result:
        """A run of that model or dataset, done or not."""
        known = {of(cell.first): cell.first for cell in self.grid}
        if name not in known:
            near = nearest(name, list(known))
            hint = f"; did you mean '{near}'" if near else ""
            raise ResultsError(f"the study has no {what} '{printable(name)}'{hint}. It has {some(list(known))}")
        return known[name]

    def condition(self, model: str, dataset: str, iterations: int) -> Condition:
        """What the loss of a cell depends on.

        Raises:
            ResultsError: the study has no such model or dataset, or does not know its size.
        """
        size = self._about("model", model, lambda r: r.model).parameters
        data = self._about("dataset", dataset, lambda r: r.dataset)
        if not size or not data.images:
            raise ResultsError(f"the size of {model if not size else dataset} is unknown, so nothing can be said of it")
        return Condition(size, iterations * self.batch, data.images, family(dataset))

    def predict(self, model: str, dataset: str, iterations: int) -> Prediction:
        """The validation loss of a cell.

        Raises:
            ResultsError: as ``condition``.
        """
        return self.model.predict([self.condition(model, dataset, iterations)])[0]

    def spend(self, budget: float, dataset: str) -> list[Choice]:
        """The best length of every model within a budget, the lowest predicted loss first.

        Lengths go from the shortest that was run to twice the longest. A shorter training than the budget allows is chosen
        where a longer one would overfit.

        Args:
            budget: relative compute; the smallest model's shortest length is 1.
            dataset: to pre-train on.

        Raises:
            ResultsError: no model's shortest length fits, or the compute of the runs is unknown.
        """
        if self.unit is None:
            raise ResultsError("the compute of the runs is unknown, so no budget can be spent")
        lengths = [cell.first.iterations for cell in self.model.cells]
        between = np.geomspace(min(lengths), FARTHEST * max(lengths), STEPS)[1:]
        tried = sorted({*lengths, *(int(float(f"{value:.2g}")) for value in between)})
        options: list[tuple[str, int, float]] = []
        for model, run in {cell.first.model: cell.first for cell in self.grid}.items():
            for iterations in tried:
                compute = (run.flops_per_image or math.inf) * iterations * self.batch / self.unit
                if compute <= budget * (1 + 1e-9):
                    options.append((model, iterations, compute))
        if not options:
            raise ResultsError(f"a budget of {budget:g} pays for no model's shortest length, {length(min(lengths))}")
        conditions = [self.condition(model, dataset, iterations) for model, iterations, _ in options]
        predictions = self.model.predict(conditions)
        best: dict[str, int] = {}
        for number, (model, _, _) in enumerate(options):
            if model not in best or predictions[number].loss < predictions[best[model]].loss:
                best[model] = number
        chosen = list(best.values())
        _, expected = self.model.sample([conditions[number] for number in chosen])
        wins = np.bincount(expected.argmin(axis=1), minlength=len(chosen)) / len(expected)
        choices = [
            Choice(*options[number], predictions[number], float(win), options[number][1] > max(lengths))
            for number, win in zip(chosen, wins, strict=True)
        ]
        return sorted(choices, key=lambda choice: choice.prediction.loss)
