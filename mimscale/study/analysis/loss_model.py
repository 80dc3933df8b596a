"""Validation loss of a pre-training that was not run: what size and length give, and what too little data costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from mimscale.study.results.cells import Cell, family
from mimscale.study.results.result import ResultsError

# Prior means and spreads of what is fitted; x, t and d are centred logs of parameters, images processed and images held.
# They are wide where data speak, and keep intervals honest where they do not.
NAMES = ("level", "x", "t", "x x", "x t", "t t", "ceiling", "onset", "onset x", "onset t", "onset d")
MEANS = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0, -3.0, 1.0, 2.0, 3.0])
SPREADS = np.array([2.0, 0.3, 0.3, np.nan, np.nan, np.nan, 1.0, 3.0, 1.5, 1.5, 2.25])
KIND = 0.1  # spread of the log of the factor by which another kind of images changes the loss
CURVATURE = 0.25  # of a power law, as a share of its slope
NOISE, SHARE = 0.002, 0.15  # error of log loss before any data: where data suffices; of what too little data costs
BELIEF = 3  # cells that such a first value of an error counts for
MINIMUM = 6
DRAWS = 2000


@dataclass(frozen=True)
class Condition:
    """What a pre-training's loss depends on.

    Attributes:
        parameters: of the encoder.
        samples: images processed: updates times global batch.
        images: in the dataset.
        kind: family of the dataset.
    """

    parameters: float
    samples: float
    images: float
    kind: str

    @classmethod
    def of(cls, cell: Cell) -> Condition | None:
        """A cell's; ``None`` where one of them is unknown."""
        first = cell.first
        if not (first.parameters and first.images and cell.samples):
            return None
        return cls(first.parameters, cell.samples, first.images, family(first.dataset))


@dataclass(frozen=True)
class Prediction:
    """A predicted validation loss with its 95 % interval for one run, and the share of it that too little data costs."""

    loss: float
    low: float
    high: float
    data_cost: float


class LossModel:
    """Log loss as a power law of parameters and images processed, and above it what too little data costs.

    ``log loss = level + b x + c t + curvature + kind + ceiling * sigmoid(onset + k x + l t - m d)``. The first terms are the
    frontier of Figure 1 (a power law that may bend a little); the last is overfitting: nothing while data suffices, growing
    with model size and length and falling with data, up to a ceiling, as Figures 1, 2 and 5 show. Fitted by least squares with
    weak priors; errors are larger where data binds. Intervals: draws from the normal approximation of the posterior, and the
    error of one cell.

    Raises:
        ResultsError: fewer than six cells with a loss and known parameters, batch and images, or all of one size or length.
    """

    def __init__(self, cells: Sequence[Cell]):
        known = [(c, condition) for c in cells if c.val_loss and (condition := Condition.of(c))]
        sizes, lengths = ({getattr(condition, name) for _, condition in known} for name in ("parameters", "samples"))
        if len(known) < MINIMUM or len(sizes) < 2 or len(lengths) < 2:
            raise ResultsError(
                f"a prediction needs {MINIMUM} cells that are done, of two sizes and two lengths, with known parameters, images "
                f"and batch; there are {len(known)}, of {len(sizes)} sizes and {len(lengths)} lengths"
            )
        self.cells = [cell for cell, _ in known]
        conditions = [condition for _, condition in known]
        kinds = Counter(condition.kind for condition in conditions)
        self.kinds = [kind for kind, _ in kinds.most_common()]
        self.centre = np.log([[c.parameters, c.samples, c.images] for c in conditions]).mean(axis=0)
        self.losses = np.log([cell.val_loss for cell in self.cells if cell.val_loss])
        self._fit(self._inputs(conditions))

    def _inputs(self, conditions: Sequence[Condition]) -> np.ndarray:
        """Columns x, t, d and the number of the kind (-1: seen nowhere)."""
        logs = np.log([[c.parameters, c.samples, c.images] for c in conditions]) - self.centre
        kinds = [self.kinds.index(c.kind) if c.kind in self.kinds else len(self.kinds) for c in conditions]
        return np.column_stack([logs, kinds])

    def _parts(self, values: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The frontier and the cost of too little data, of log loss, each (cells,) or (draws, cells)."""
        x, t, d, kind = inputs.T
        # The first kind is what the level is of; the last is one that was not seen.
        offsets = np.concatenate([np.zeros_like(values[..., :1]), values[..., len(NAMES) :]], axis=-1)
        a = np.moveaxis(values[..., : len(NAMES)], -1, 0)[..., None]
        frontier = (
            a[0] + a[1] * x + a[2] * t + a[3] * x * x + a[4] * x * t + a[5] * t * t + offsets[..., kind.astype(int)]
        )
        onset = np.clip(a[7] + a[8] * x + a[9] * t - a[10] * d, -40, 40)
        return frontier, np.exp(np.clip(a[6], -10, 3)) / (1 + np.exp(-onset))

    def _fit(self, inputs: np.ndarray) -> None:
        means = np.concatenate([MEANS, np.zeros(len(self.kinds))])
        means[0] = np.median(self.losses)
        spreads = np.concatenate([SPREADS, np.full(len(self.kinds), KIND)])
        spreads[3:6] = 0.004
        self.noise, self.share = NOISE, SHARE
        found: np.ndarray | None = None
        for _ in range(8):  # errors and values settle each other
            early, late = means.copy(), means.copy()
            early[7], late[7] = 0.0, -6.0
            starts = [means, early, late] if found is None else [found]
            cost = np.zeros(len(self.losses)) if found is None else self._parts(found, inputs)[1]
            error = np.hypot(self.noise, self.share * cost)

            def misfit(values: np.ndarray, error: np.ndarray = error) -> np.ndarray:
                predicted = sum(self._parts(values, inputs))
                return np.concatenate([(self.losses - predicted) / error, (values - means) / spreads])

            best = min((least_squares(misfit, start) for start in starts), key=lambda fit: fit.cost)
            found = best.x
            spreads[3:6] = max(0.004, CURVATURE * max(abs(found[1]), abs(found[2])))
            rest, cost = self.losses - sum(self._parts(found, inputs)), self._parts(found, inputs)[1]
            binds = cost > 0.01
            self.noise = _error(rest[~binds], NOISE)
            self.share = _error(rest[binds] / cost[binds], SHARE)
        assert found is not None
        self.values = found
        covariance = np.linalg.inv(best.jac.T @ best.jac)
        random = np.random.default_rng(0)
        self.draws = random.multivariate_normal(found, covariance, DRAWS)

    def sample(self, conditions: Sequence[Condition]) -> tuple[np.ndarray, np.ndarray]:
        """Losses that runs might have, and losses expected of them, each (draws, conditions)."""
        frontier, cost = self._parts(self.draws, self._inputs(conditions))
        random = np.random.default_rng(1)
        freedom = max(5, len(self.losses) - len(NAMES))
        error = random.standard_t(freedom, frontier.shape) * np.hypot(self.noise, self.share * cost)
        return np.exp(frontier + cost + error), np.exp(frontier + cost)

    def predict(self, conditions: Sequence[Condition]) -> list[Prediction]:
        """Predict each of the conditions."""
        runs, expected = self.sample(conditions)
        low, high = np.percentile(runs, [2.5, 97.5], axis=0)
        middle = np.median(expected, axis=0)
        cost = np.expm1(np.median(self._parts(self.draws, self._inputs(conditions))[1], axis=0))
        return [Prediction(*map(float, row)) for row in zip(middle, low, high, cost, strict=True)]


def _error(rest: np.ndarray, first: float) -> float:
    """Root mean square of what is left, with a first value that counts for a few cells, and those that the fit used up."""
    return float(np.sqrt(((rest**2).sum() + BELIEF * first**2) / (max(len(rest) - BELIEF, 0) + BELIEF)))
