"""Figures 1 to 8 of the paper, drawn from a study's own runs."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from mimscale.study.analysis.laws import Correlation, frontier, full_dataset, pareto
from mimscale.study.analysis.summary import Analysis, Grid
from mimscale.study.report.drawing import INK, SOFT, Panel, Picture, Style, ticks
from mimscale.study.report.plots import (
    Measure,
    compute_axis,
    heading_of,
    images_name,
    joined,
    keys,
    law_line,
    loss_of,
    marks,
    no_error,
    points_of,
    published_marks,
    said_range,
    score_of,
    score_spread_of,
    size_axis,
    spread_of,
    train_loss_of,
)
from mimscale.study.results.cells import Cell, length, title
from mimscale.study.results.result import SCORES, Score, score_name

LOSS = {"val_loss": "validation loss", "train_loss": "training loss"}
OTHER_TASKS = (("coco", "box_ap"), ("coco", "mask_ap"), ("inat18", "top1"), ("ade20k", "miou"))  # as in Figure 3
LINES = ("-", "--", ":", "-.")


def figures(study: Analysis) -> list[Picture]:
    """All eight, in order; what a study has no runs for says so."""
    style = Style.of(study.cells)
    return [
        scaling(study, style),
        against_compute(
            study.simmim,
            style,
            "figure2",
            "Figure 2. Losses and fine-tuning accuracy against compute",
            "SimMIM on SwinV2. Relative compute is that of pre-training; the smallest model's shortest length is 1.",
            study.main_score,
        ),
        other_tasks(study, style),
        against_compute(
            study.mae,
            style,
            "figure4",
            "Figure 4. The same with MAE and ViT",
            "MAE on ViT. The smallest ViT's shortest length is 1.",
            study.main_score,
        ),
        data_need(study, style),
        efficiency(study, style),
        correlations(study, style),
        sampling(study, style),
    ]


def scaling(study: Analysis, style: Style) -> Picture:
    """Figure 1: validation loss with compute, data and model size, and the laws of the non-overfitting frontier."""
    grid = study.simmim
    cells = [cell for cell in grid.cells if cell.val_loss is not None]
    laws = {law.x: [other for other in grid.laws if other.x == law.x] for law in grid.laws}
    best = frontier(grid.cells)
    panels = []

    def compute(axes: Axes) -> None:
        points = points_of(cells, grid.compute, loss_of)
        marks(axes, grid, style, points, spread_of)
        published_marks(axes, grid, grid.cells, grid.compute, loss_of)
        for law in laws.get("relative compute", ()):
            law_line(axes, law, [value for c in pareto(best) if (value := grid.compute(c))])
        compute_axis(axes, [a for a, _, _ in points])
        axes.set_ylabel("validation loss")

    points = points_of(cells, grid.compute, loss_of)
    slope = "".join(f"; the law's slope is {law.slope:.4f}" for law in laws.get("relative compute", ()))
    panels.append(
        Panel(
            "With relative compute", f"Validation loss against relative compute: {said_range(points)}{slope}.", compute
        )
        if points
        else Panel("With relative compute", "", absent="no cell has both a validation loss and a known compute")
    )

    longest = {m: max(c.first.iterations for c in cells if c.first.model == m) for m in {c.first.model for c in cells}}
    long_cells = [c for c in cells if c.first.iterations == longest[c.first.model]]

    def data(axes: Axes) -> None:
        joined(axes, grid, style, long_cells, lambda c: c.first.images, loss_of, lambda c: c.first.model, spread_of)
        ticks(axes, [c.first.images for c in long_cells if c.first.images], images_name)
        axes.set_xlabel("training images")
        axes.set_ylabel("validation loss")

    points = points_of(long_cells, lambda c: c.first.images, loss_of)
    panels.append(
        Panel(
            "With data size, at each model's longest length",
            f"Validation loss against training images, one line a model: {said_range(points)}.",
            data,
        )
        if points
        else Panel("With data size", "", absent="no cell has both a validation loss and a known number of images")
    )

    def model(axes: Axes) -> None:
        for number, law in enumerate(laws.get("parameters", ())):
            sizes = [c.first.parameters for c in law.cells if c.first.parameters]
            law_line(axes, law, sizes, LINES[number % len(LINES)])
            here = law.cells[-1]
            axes.annotate(
                length(here.first.iterations),
                (max(sizes), float(law(np.array(max(sizes))))),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=SOFT,
            )
        marks(axes, grid, style, points_of(best, lambda c: c.first.parameters, loss_of), spread_of)
        size_axis(axes, best)
        axes.margins(x=0.14)
        axes.set_ylabel("validation loss")

    points = points_of(best, lambda c: c.first.parameters, loss_of)
    slopes = ", ".join(
        f"{law.name.removeprefix('model size at ')}: {law.slope:.4f}" for law in laws.get("parameters", ())
    )
    panels.append(
        Panel(
            "With model size, best cell of each length",
            f"Validation loss of the best non-overfitting cells against parameters: {said_range(points)}; "
            f"slopes {slopes or 'unknown'}.",
            model,
        )
        if points
        else Panel("With model size", "", absent="no cell has a validation loss and does not overfit")
    )
    return Picture(
        "figure1",
        "Figure 1. Validation loss with compute, data and model size",
        "Lines and bands: power laws, with 95 % confidence intervals, fitted on the non-overfitting frontier. Left, on the "
        "cells there that no cheaper one matches; right, for each training length. Hollow circles are cells that overfit.",
        panels,
        keys(style, grid, cells),
    )


def against_compute(grid: Grid, style: Style, name: str, heading: str, caption: str, score: Score) -> Picture:
    """Figures 2 and 4: training loss, validation loss and fine-tuning accuracy with relative compute."""
    measures: list[tuple[str, Measure, Measure]] = [
        ("training loss", train_loss_of, no_error),
        ("validation loss", loss_of, spread_of),
        (score_name(score), score_of(score), score_spread_of(score)),
    ]
    panels = [_compute_panel(grid, style, *measure) for measure in measures]
    text = f"{caption} Lines join a model's lengths on one dataset; hollow circles are cells that overfit."
    return Picture(name, heading, text, panels, keys(style, grid, grid.cells))


def _compute_panel(grid: Grid, style: Style, what: str, measure: Measure, error: Measure) -> Panel:
    points = points_of(grid.cells, grid.compute, measure)
    heading = heading_of(what)
    if not points:
        return Panel(heading, "", absent="no run of this grid has it, with a known compute")

    def draw(axes: Axes) -> None:
        of = lambda cell: (cell.first.model, cell.first.dataset)  # noqa: E731
        joined(axes, grid, style, grid.cells, grid.compute, measure, of, error)
        compute_axis(axes, [a for a, _, _ in points])
        axes.set_ylabel(what)

    return Panel(heading, f"{heading} against relative compute: {said_range(points)}.", draw)


def other_tasks(study: Analysis, style: Style) -> Picture:
    """Figure 3: scores on the other tasks with relative compute."""
    grid = study.simmim
    tasks = [*OTHER_TASKS, *(s for s in study.scores if s not in SCORES and s != study.main_score)]
    panels = [_compute_panel(grid, style, score_name(s), score_of(s), score_spread_of(s)) for s in tasks]
    used = [cell for cell in grid.cells if any(score in cell.scores for score in tasks)]
    return Picture(
        "figure3",
        "Figure 3. Other tasks against compute",
        "Fine-tuning on COCO, iNaturalist-18 and ADE20K, with relative compute of pre-training.",
        panels,
        keys(style, Grid(grid.cells), used),
    )


def example_model(grid: Grid) -> str | None:
    """The model of Figure 5's right: the largest whose need of data changes with length, if it saw as many datasets as most."""
    datasets: dict[str, set[str]] = {}
    parameters: dict[str, int] = {}
    for cell in grid.verdicts:
        datasets.setdefault(cell.first.model, set()).add(cell.first.dataset)
        parameters[cell.first.model] = cell.first.parameters or 0
    if not datasets:
        return None
    usual = sorted(map(len, datasets.values()))[len(datasets) // 2]
    changes = {m for m in datasets if len({_name(n.smallest) for n in grid.needs if n.model == m}) > 1}
    pool = [m for m in datasets if len(datasets[m]) >= usual]
    return max([m for m in pool if m in changes] or pool, key=lambda m: parameters[m])


def _name(cell: Cell | None) -> str | None:
    return cell.first.dataset if cell else None


def data_need(study: Analysis, style: Style) -> Picture:
    """Figure 5: how much data keeps each model, and each length, from overfitting."""
    grid = study.simmim
    known = list(grid.verdicts)
    longest = max((c.first.iterations for c in known), default=0)
    here = [c for c in grid.cells if c.first.iterations == longest]
    model = example_model(grid)
    lengths = [c for c in grid.cells if c.first.model == model]
    panels = []

    def left(axes: Axes) -> None:
        joined(axes, grid, style, here, lambda c: c.first.parameters, loss_of, lambda c: c.first.dataset, spread_of)
        size_axis(axes, here)
        axes.set_ylabel("validation loss")

    def right(axes: Axes) -> None:
        joined(axes, grid, style, lengths, lambda c: c.first.iterations, loss_of, lambda c: c.first.dataset, spread_of)
        ticks(axes, [c.first.iterations for c in lengths], lambda value: length(int(value)), 1.2)
        axes.set_xlabel("iterations")
        axes.set_ylabel("validation loss")

    if points_of(here, lambda c: c.first.parameters, loss_of):
        points = points_of(here, lambda c: c.first.parameters, loss_of)
        panels.append(
            Panel(
                f"With model size, {length(longest)} iterations",
                f"Validation loss against model size, one line a dataset: {said_range(points)}.",
                left,
            )
        )
    if model is not None:
        points = points_of(lengths, lambda c: c.first.iterations, loss_of)
        panels.append(
            Panel(
                f"With length, {title(model)}",
                f"Validation loss against iterations, one line a dataset: {said_range(points)}.",
                right,
            )
        )
    return Picture(
        "figure5",
        "Figure 5. How much data a model needs",
        "One line a dataset; where it rises, the data no longer suffice. "
        "The table below says which dataset is the smallest that does.",
        panels or [Panel("Data need", "", absent="no cell has a validation loss")],
        keys(style, grid, [*here, *lengths]),
    )


def efficiency(study: Analysis, style: Style) -> Picture:
    """Figure 6: validation loss and error rate with images processed, on the largest dataset that holds no model back."""
    grid = study.simmim
    dataset = full_dataset(grid.cells)
    cells = [c for c in grid.cells if c.first.dataset == dataset]
    score = study.main_score
    accuracy = score_of(score)
    panels = []
    measures: list[tuple[str, Measure, Measure]] = [
        ("validation loss", loss_of, spread_of),
        (
            f"{score_name(score).removesuffix(' top-1')} error rate",
            lambda c: None if (top1 := accuracy(c)) is None else 100 - top1,
            score_spread_of(score),
        ),
    ]
    for what, measure, error in measures:
        points = points_of(cells, lambda c: c.samples, measure)
        heading = heading_of(what)
        if not points:
            panels.append(Panel(heading, "", absent="no run has it, with a known batch"))
            continue

        def draw(axes: Axes, measure: Measure = measure, error: Measure = error, what: str = what) -> None:
            joined(axes, grid, style, cells, lambda c: c.samples, measure, lambda c: c.first.model, error)
            last = {c.first.model: (a, b) for a, b, c in points_of(cells, lambda c: c.samples, measure)}
            for model, (a, b) in last.items():
                axes.annotate(
                    title(model).rsplit("-", 1)[-1],
                    (a, b),
                    xytext=(9, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=SOFT,
                )
            ticks(axes, [c.samples for c in cells if c.samples], images_name, 1.3)
            axes.margins(x=0.12)
            axes.set_xlabel("images processed")
            axes.set_ylabel(what)

        panels.append(
            Panel(heading, f"{heading} against images processed, one line a model: {said_range(points)}.", draw)
        )
    where = f" on {title(dataset)}" if dataset else ""
    return Picture(
        "figure6",
        "Figure 6. Sample efficiency",
        f"Batch size times updates{where}, one line a model.",
        panels,
        keys(style, grid, cells),
    )


def correlations(study: Analysis, style: Style) -> Picture:
    """Figure 7: scores with pre-training losses, apart for cells that overfit and those that do not."""
    grid = study.simmim
    panels = []
    for score in study.scores:
        if not any(score in cell.scores for cell in grid.verdicts):
            panels.append(Panel(score_name(score), "", absent="no run of this grid has it"))
            continue
        for loss, measure in (("train_loss", train_loss_of), ("val_loss", loss_of)):
            points = points_of(grid.verdicts, measure, score_of(score))
            heading = f"{score_name(score)} with {LOSS[loss]}"
            if not points:
                panels.append(Panel(heading, "", absent="no cell has both"))
                continue
            lines = grid.correlations(score, loss)

            def draw(
                axes: Axes,
                measure: Measure = measure,
                score: Score = score,
                loss: str = loss,
                lines: tuple[Correlation | None, Correlation | None] = lines,
            ) -> None:
                marks(axes, grid, style, points_of(grid.verdicts, measure, score_of(score)))
                for line, kind in zip(lines, ("--", "-"), strict=True):
                    if line:
                        ends = np.array([f(getattr(c, loss) for c in line.cells) for f in (min, max)])
                        axes.plot(ends, line.intercept + line.slope * ends, kind, color=INK, zorder=4)
                axes.locator_params(axis="x", nbins=5)
                axes.set_xlabel(LOSS[loss])
                axes.set_ylabel(score_name(score))

            said = [f"{n}: r = {c.r:+.2f}" for n, c in zip(("overfitting", "others"), lines, strict=True) if c]
            panels.append(
                Panel(heading, f"{heading}: {len(points)} cells; {'; '.join(said) or 'too few to correlate'}.", draw)
            )
    return Picture(
        "figure7",
        "Figure 7. Pre-training losses and fine-tuning scores",
        "Lines of least squares: dashed for cells that overfit (hollow), solid for those that do not. "
        "Table 3 holds the correlations, and those of cells told apart by a shorter training alone.",
        panels,
        keys(style, Grid(grid.cells), [c for c in grid.verdicts if c.scores]),
    )


def sampling(study: Analysis, style: Style) -> Picture:
    """Figure 8: training and validation losses while training, by sampling strategy."""
    pairs = study.sampling_pairs()
    runs = [(cell, run) for pair in pairs for cell in pair if cell for run in cell.runs if run.curve]
    panels = []
    for index, what in ((1, "training loss"), (2, "validation loss")):
        curves = [
            (cell, line)
            for cell, run in runs
            if len(line := [(p[0], p[index]) for p in run.curve if p[index] is not None]) > 1
        ]
        heading = heading_of(what)
        if not curves:
            panels.append(Panel(heading, "", absent="no run on a subset of classes has its curve"))
            continue

        def draw(axes: Axes, curves: list = curves, what: str = what) -> None:
            for cell, line in curves:
                kind = "--" if cell.first.sampling == "classes" else "-"
                colour = style.colours[cell.first.dataset]
                axes.plot([step for step, _ in line], [loss for _, loss in line], kind, color=colour, linewidth=1.4)
            axes.xaxis.set_major_formatter(lambda step, _: length(round(step)))
            axes.set_xlabel("iterations")
            axes.set_ylabel(what)

        names = ", ".join(dict.fromkeys(str(cell) for cell, _ in curves))
        panels.append(Panel(heading, f"{heading} while training: {names}.", draw))
    return Picture(
        "figure8",
        "Figure 8. Sampling strategies",
        "Losses while training: solid for images of all classes, dashed for all images of a few classes.",
        panels,
        style.keys([cell.first.dataset for cell, _ in runs], [], False),
    )
