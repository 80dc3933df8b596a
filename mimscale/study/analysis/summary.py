"""What a study's results come to, computed once for the report's figures, tables and findings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from mimscale.study.analysis.laws import (
    Correlation,
    Efficiency,
    PowerLaw,
    compute_unit,
    correlation,
    power_laws,
    relative,
    sample_efficiency,
)
from mimscale.study.analysis.overfitting import DataNeed, Overfit, data_needs, overfitting
from mimscale.study.results.cells import Cell, cells, plain
from mimscale.study.results.published import published
from mimscale.study.results.result import SCORES, TOP1, Result, Score


@dataclass(frozen=True)
class Grid:
    """The plain cells of one objective, with their verdicts, and the published ones to set beside them."""

    cells: tuple[Cell, ...]
    released: tuple[Cell, ...] = ()

    @cached_property
    def verdicts(self) -> dict[Cell, Overfit | None]:
        """For each cell with a validation loss, why it overfits, or ``None``."""
        return overfitting(self.cells)

    @cached_property
    def unit(self) -> float | None:
        """Training FLOPs that count as 1."""
        return compute_unit(self.cells)

    @cached_property
    def laws(self) -> list[PowerLaw]:
        """Power laws of validation loss (Figure 1)."""
        return power_laws(self.cells)

    @cached_property
    def needs(self) -> list[DataNeed]:
        """The smallest sufficient dataset of each model and length (Figure 5)."""
        return data_needs(self.cells)

    @cached_property
    def efficiency(self) -> list[Efficiency]:
        """Images that each model needs for the smallest model's best loss (Figure 6)."""
        return sample_efficiency(self.cells)

    @property
    def overfit(self) -> list[Cell]:
        """Cells that overfit."""
        return [cell for cell, why in self.verdicts.items() if why]

    @property
    def healthy(self) -> list[Cell]:
        """Cells that do not."""
        return [cell for cell, why in self.verdicts.items() if not why]

    def overfits(self, cell: Cell) -> bool:
        """Whether a cell was found to overfit; not, where it has no validation loss."""
        return self.verdicts.get(cell) is not None

    def compute(self, cell: Cell) -> float | None:
        """A cell's pre-training compute, relative to the smallest model's shortest length."""
        return relative(cell, self.unit)

    def counterpart(self, cell: Cell) -> Cell | None:
        """The published run of the same model, data and length, or ``None``."""
        a = cell.first
        for other in self.released:
            if (other.first.model, other.first.dataset, other.first.iterations) == (a.model, a.dataset, a.iterations):
                return other
        return None

    @cached_property
    def verdicts_of_length(self) -> dict[Cell, Overfit | None]:
        """As ``verdicts``, but by a shorter training that did better alone."""
        return overfitting(self.cells, shorter_alone=True)

    def correlations(
        self, score: tuple[str, str], loss: str, shorter_alone: bool = False
    ) -> tuple[Correlation | None, Correlation | None]:
        """A loss with a score, over the cells that overfit and over those that do not (Table 3).

        Args:
            score: task and score.
            loss: "val_loss" or "train_loss".
            shorter_alone: split the cells by ``verdicts_of_length``, not by ``verdicts``.
        """
        verdicts = self.verdicts_of_length if shorter_alone else self.verdicts
        overfit = [cell for cell, why in verdicts.items() if why]
        healthy = [cell for cell, why in verdicts.items() if not why]
        return correlation(overfit, score, loss), correlation(healthy, score, loss)


@dataclass(frozen=True)
class Analysis:
    """A study's cells, its grids by objective, and the published runs to set beside them.

    Attributes:
        results: of every run.
        cells: of every pre-training, whatever its objective, decoder and sampling.
        simmim: the grid of Figures 1, 2, 5, 6 and 7.
        mae: the grid of Figure 4.
        released: the 63 published runs as a grid; empty where the report is of them, or stands alone.
        beside_paper: whether what the paper prints is set beside the study's own values.
        of_published: whether the results are the published runs themselves.
    """

    results: tuple[Result, ...]
    cells: tuple[Cell, ...]
    simmim: Grid
    mae: Grid
    released: Grid
    beside_paper: bool
    of_published: bool

    @cached_property
    def scores(self) -> tuple[Score, ...]:
        """The paper's scores, then those of tasks that are the study's own."""
        found = dict.fromkeys(score for cell in self.cells for score in cell.scores)
        return (*SCORES, *sorted(found.keys() - set(SCORES)))

    @cached_property
    def main_score(self) -> Score:
        """What Figures 2, 4 and 6 and Tables 4 and 5 show: ImageNet-1K's accuracy, or else the first score there is."""
        found = [score for score in (TOP1, *self.scores) if any(score in cell.scores for cell in self.cells)]
        return found[0] if found else TOP1

    def grid(self, cell: Cell) -> Grid:
        """The grid that a cell is compared within: its own peers, where it is not of a plain grid."""
        for grid in (self.simmim, self.mae):
            if cell in grid.cells:
                return grid
        a = cell.first
        peers = [c for c in self.cells if (c.first.objective, c.first.decoder) == (a.objective, a.decoder)]
        return Grid(tuple(c for c in peers if c.first.sampling == a.sampling))

    def sampling_pairs(self) -> list[tuple[Cell, Cell | None]]:
        """Cells pre-trained on all images of a few classes, each with its peer of about as many images of all classes."""
        pairs = []
        for cell in self.cells:
            if cell.first.sampling != "classes":
                continue
            a = cell.first
            peers = [
                c
                for c in self.cells
                if c.first.sampling == "uniform"
                and (c.first.model, c.first.iterations, c.first.objective, c.first.decoder)
                == (a.model, a.iterations, a.objective, a.decoder)
            ]
            pairs.append((cell, min(peers, key=lambda c: abs((c.first.images or 0) - (a.images or 0)), default=None)))
        return pairs


def analyse(results: Iterable[Result], beside_paper: bool = True) -> Analysis:
    """Join results into cells and grids.

    Raises:
        ResultsError: results that contradict each other.
    """
    results = tuple(results)
    found = cells(results)
    of_published = results == tuple(published())
    released = tuple(cells(published())) if beside_paper and not of_published else ()
    return Analysis(
        results,
        tuple(found),
        Grid(tuple(plain(found)), released),
        Grid(tuple(plain(found, "mae"))),
        Grid(released),
        beside_paper,
        of_published,
    )
