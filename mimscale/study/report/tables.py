"""Tables 1 to 5 of the paper from a study's own runs, and the tables that every number can be traced through."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from mimscale.study.analysis.laws import Correlation, PowerLaw
from mimscale.study.analysis.summary import Analysis
from mimscale.study.report.page import Entry, Table, Value
from mimscale.study.report.plots import images_name
from mimscale.study.results.cells import Cell, Score, title
from mimscale.study.results.published import paper_tables, published
from mimscale.study.results.result import TOP1, Result, score_name


def number(value: float | None, form: str = ".4f") -> Value:
    """A number as shown, with all its digits in the CSV."""
    return None if value is None else Entry(format(value, form), value)


def _paper(study: Analysis, name: str) -> list[dict[str, Any]]:
    return paper_tables()[name] if study.beside_paper else []


def _beside(study: Analysis, *columns: str) -> tuple[str, ...]:
    """Names of columns, each followed by the paper's where that is set beside."""
    return tuple(
        name for column in columns for name in ((column, f"{column}, paper") if study.beside_paper else (column,))
    )


def _with_score(study: Analysis, *columns: str) -> tuple[str, ...]:
    """The same, and the score that stands for fine-tuning beside the paper's."""
    paper = (f"{score_name(TOP1)}, paper",) if study.beside_paper else ()
    return (*_beside(study, *columns), score_name(study.main_score), *paper)


def _pair(study: Analysis, here: Value, paper: Any, form: str = "") -> list[Value]:
    if not study.beside_paper:
        return [here]
    if isinstance(paper, int | float):
        return [here, Entry(format(paper, form), paper)]
    return [here, paper or ""]  # what the paper does not print is not missing


def _distinct(
    runs: Iterable[Result], name: Callable[[Result], str], order: Callable[[Result], Any]
) -> dict[str, Result]:
    found: dict[str, Result] = {}
    for run in sorted(runs, key=order):
        found.setdefault(name(run), run)
    return found


def architectures(study: Analysis) -> Table:
    """Table 1."""
    paper = {row["model"]: row for row in _paper(study, "table1")}
    here = _distinct((c.first for c in study.cells), lambda r: r.model, lambda r: (r.parameters or 0, r.model))
    names = ("base_channels", "depth", "heads", "window", "finetune_window")
    rows: list[list[Value]] = []
    for model in [*here, *(m for m in paper if m not in here)]:
        run, printed = here.get(model), paper.get(model, {})
        row: list[Value] = [title(model)]
        for name in names:
            value = run.architecture.get(name) if run else None
            other = "" if run else None  # a quantity that this architecture does not have
            shown = other if value is None else Entry(str(value), value if isinstance(value, int) else None)
            row += _pair(study, shown, printed.get(name))
        count = run.parameters if run else None
        row += _pair(study, Entry(images_name(count), count) if count else None, printed.get("parameters"))
        rows.append(row)
    columns = _beside(study, "Base channels", "Depth", "Heads", "Window", "Window fine-tuning", "Parameters")
    return Table("table1", "Table 1. Architectures", ("Model", *columns), rows)


def datasets(study: Analysis) -> Table:
    """Table 2."""
    paper = {row["dataset"]: row for row in _paper(study, "table2")}
    here = _distinct((c.first for c in study.cells), lambda r: r.dataset, lambda r: (r.images or 0, r.dataset))
    rows: list[list[Value]] = []
    for name in [*here, *(d for d in paper if d not in here)]:
        run, printed = here.get(name), paper.get(name, {})
        rows.append(
            [
                title(name),
                *_pair(study, number(run.images if run else None, ",.0f"), printed.get("images"), ",d"),
                *_pair(study, number(run.classes if run else None, ",.0f"), printed.get("classes"), ",d"),
            ]
        )
    return Table("table2", "Table 2. Pre-training datasets", ("Dataset", *_beside(study, "Images", "Classes")), rows)


# How Table 3 tells cells that overfit from the others, and whether by a shorter training alone.
SPLITS = {"shorter training or smaller model": False, "shorter training": True}


def _correlation(found: Correlation | None) -> Value:
    if found is None:
        return None
    return Entry(f"{found.r:+.2f} [{found.low:+.2f}, {found.high:+.2f}] of {len(found.cells)}", found.r)


def correlation_table(study: Analysis) -> Table:
    """Table 3."""
    paper = {(row["task"], row["score"]): row for row in _paper(study, "table3")}
    columns = _beside(
        study,
        "Overfitting, training loss",
        "Overfitting, validation loss",
        "Others, training loss",
        "Others, validation loss",
    )
    rows: list[list[Value]] = []
    for score, (split, alone) in product(study.scores, SPLITS.items()):
        row: list[Value] = [score_name(score), split]
        groups = {loss: study.simmim.correlations(score, loss, alone) for loss in ("train_loss", "val_loss")}
        for group, name in enumerate(("overfit", "other")):
            for loss in ("train_loss", "val_loss"):
                printed = paper.get(score, {}).get(f"{name}_{loss.removesuffix('_loss')}")
                shown = "" if printed is None else Entry(f"{printed:+.2f}", printed)
                row += (
                    [_correlation(groups[loss][group]), shown]
                    if study.beside_paper
                    else [_correlation(groups[loss][group])]
                )
        rows.append(row)
    note = (
        "r [95 % interval by Fisher's z] of how many cells. A cell overfits where a shorter training of the same model, or a "
        "smaller model trained as long, on the same data has a lower validation loss, and not a lower training loss: this split "
        "is that of all other figures and tables. The second rows count a shorter training alone. The paper's own split is "
        "unpublished; on the published runs the second one gives its figures."
    )
    return Table(
        "table3",
        "Table 3. Pearson correlation of pre-training losses with fine-tuning scores",
        ("Task", "Split by", *columns),
        rows,
        note,
    )


def _loss(cell: Cell | None, name: str) -> Value:
    value = getattr(cell, name) if cell else None
    if value is None or cell is None:
        return None
    spread = f" ± {cell.spread:.4f}" if name == "val_loss" and cell.spread is not None else ""
    return Entry(f"{value:.4f}{spread}", value)


def _score(score: Score | None) -> Value:
    if score is None:
        return None
    return Entry(f"{score.mean:.2f}" + (f" ± {score.spread:.2f}" if score.spread is not None else ""), score.mean)


def decoders(study: Analysis) -> Table:
    """Table 4."""
    paper = {row["decoder"]: row for row in _paper(study, "table4")}
    others = [c for c in study.cells if c.first.decoder != "linear"]
    bases = {(c.first.objective, c.first.model, c.first.dataset, c.first.iterations) for c in others}
    found = [c for c in study.cells if (c.first.objective, c.first.model, c.first.dataset, c.first.iterations) in bases]
    keys: list[tuple[str, Cell | None]] = [(c.first.decoder, c) for c in found]
    keys += [(name, None) for name in paper if name not in {decoder for decoder, _ in keys}]
    rows: list[list[Value]] = []
    for decoder, cell in keys:
        printed = paper.get(decoder, {})
        total = cell.first.total_parameters if cell else None
        rows.append(
            [
                decoder,
                str(cell) if cell else None,
                *_pair(study, Entry(f"{total / 1e6:.1f}M", total) if total else None, printed.get("total_parameters")),
                *_pair(study, _loss(cell, "train_loss"), printed.get("train_loss"), ".2f"),
                *_pair(study, _loss(cell, "val_loss"), printed.get("val_loss"), ".2f"),
                *_pair(study, _score(cell.scores.get(study.main_score)) if cell else None, printed.get("top1"), ".1f"),
            ]
        )
    columns = _with_score(study, "Parameters", "Training loss", "Validation loss")
    return Table(
        "table4",
        "Table 4. Decoders",
        ("Decoder", "Cell", *columns),
        rows,
        "The paper's: SwinV2-B on IN1K (20%)." if study.beside_paper else "",
    )


def sampling(study: Analysis) -> Table:
    """Table 5."""
    paper = {row["dataset"]: row for row in _paper(study, "table5")}
    found: list[Cell] = []
    for subset, peer in study.sampling_pairs():
        found += [c for c in (peer, subset) if c is not None and c not in found]
    keys: list[tuple[str, Cell | None]] = [(c.first.dataset, c) for c in found]
    keys += [(name, None) for name in paper if name not in {dataset for dataset, _ in keys}]
    rows: list[list[Value]] = []
    for dataset, cell in keys:
        printed = paper.get(dataset, {})
        rows.append(
            [
                title(dataset),
                str(cell) if cell else None,
                *_pair(study, number(cell.first.classes if cell else None, ",.0f"), printed.get("classes"), ",d"),
                *_pair(study, _loss(cell, "train_loss"), printed.get("train_loss"), ".3f"),
                *_pair(study, _loss(cell, "val_loss"), printed.get("val_loss"), ".3f"),
                *_pair(study, _score(cell.scores.get(study.main_score)) if cell else None, printed.get("top1"), ".1f"),
            ]
        )
    columns = _with_score(study, "Classes", "Training loss", "Validation loss")
    note = "The paper's: SwinV2-L, 500K iterations." if study.beside_paper else ""
    return Table("table5", "Table 5. Sampling strategies", ("Dataset", "Cell", *columns), rows, note)


def laws(study: Analysis) -> Table:
    """The fitted power laws of every grid, and those of the published runs."""
    rows: list[list[Value]] = []
    sources = [("SimMIM", study.simmim), ("MAE", study.mae), ("published SimMIM", study.released)]
    for source, grid in sources:
        rows += [_law(source, law) for law in grid.laws]
    return Table(
        "laws",
        "Power laws of validation loss",
        ("Runs", "Law", "Slope", "95 % interval", "R²", "Cells"),
        rows,
        "Slope: of log loss with the logarithm of parameters, relative compute or images, by least squares; intervals by "
        "Student's t. A law needs three different values.",
    )


def _law(source: str, law: PowerLaw) -> list[Value]:
    reach = f"{law.low:.4f} to {law.high:.4f}"
    return [source, law.name, number(law.slope), reach, number(law.r2, ".3f"), number(len(law.cells), "d")]


def needs(study: Analysis) -> Table:
    """Figure 5 as a table: the smallest dataset that suffices each model at each length."""
    rows: list[list[Value]] = []
    keys = {(need.model, need.iterations) for need in study.simmim.needs}
    released = {key: n for n in study.released.needs if (key := (n.model, n.iterations)) in keys}
    for need in study.simmim.needs:
        name = title(need.smallest.first.dataset) if need.smallest else "more than any tried"
        short = Entry(name if need.certain or not need.smallest else f"{name}, the largest tried", name)
        gaps = "; ".join(f"{title(d)} {gap:+.1%}" for d, gap in need.gaps.items())
        row: list[Value] = [title(need.model), number(need.iterations, ",d"), short, Entry(gaps, mark="long")]
        if released:
            other = released.get((need.model, need.iterations))
            row.append(title(other.smallest.first.dataset) if other and other.smallest else None)
        rows.append(row)
    columns = ("Model", "Iterations", "Smallest sufficient dataset", "Validation loss above the best dataset's")
    return Table(
        "needs",
        "The smallest dataset that suffices",
        (*columns, "Published runs") if released else columns,
        rows,
        "A dataset suffices where the cell does not overfit and no dataset lowers its validation loss by more than 1 %.",
    )


def efficiency(study: Analysis) -> Table:
    """Figure 6 as a table: images that each model needs."""
    rows: list[list[Value]] = []
    for row in study.simmim.efficiency:
        most, least = ("at most ", "at least ") if row.bound else ("", "")
        samples = Entry(f"{most}{images_name(row.samples)}", row.samples) if row.samples else "never reached it"
        saving = Entry(f"{least}{row.saving:.2f}", row.saving) if row.saving else None
        rows.append([title(row.model), number(row.target), samples, saving])
    return Table(
        "efficiency",
        "Images processed until the smallest model's best validation loss",
        ("Model", "Loss to reach", "Images processed", "Times fewer than the smallest model"),
        rows,
        "Between the lengths that were run, log loss is interpolated linearly in log images.",
    )


def _verdict(study: Analysis, cell: Cell) -> Value:
    grid = study.grid(cell)
    if cell not in grid.verdicts:
        return None
    why = grid.verdicts[cell]
    return Entry("overfits: " + why.reason if why else "no", mark="long" if why else "")


def all_cells(study: Analysis) -> Table:
    """Every cell of the grid over its seeds, with what was published of it."""
    scores = [score for score in study.scores if any(score in cell.scores for cell in study.cells)]
    released = any(map(study.simmim.counterpart, study.simmim.cells))
    columns = ["Cell", "Objective", "Decoder", "Status", "Seeds", "Validation loss"]
    columns += ["Published", "Difference"] if released else []
    columns += ["Training loss"]
    for score in scores:
        columns += [score_name(score)]
        columns += ["Published top-1"] if released and score == TOP1 else []
    columns += ["Epochs", "Relative compute", "Overfits"]
    rows: list[list[Value]] = []
    for cell in study.cells:
        other = study.simmim.counterpart(cell) if cell in study.simmim.cells else None
        row: list[Value] = [str(cell), cell.first.objective, cell.first.decoder, cell.status]
        done = sum(run.status == "done" for run in cell.runs)
        row += [Entry(f"{done} of {len(cell.runs)}", done), _loss(cell, "val_loss")]
        if released:
            both = other and other.val_loss is not None and cell.val_loss is not None
            row += [_loss(other, "val_loss"), number(cell.val_loss - other.val_loss, "+.4f") if both else None]  # type: ignore
        row.append(_loss(cell, "train_loss"))
        for score in scores:
            row.append(_score(cell.scores.get(score)))
            if released and score == TOP1:
                row.append(_score(other.scores.get(TOP1)) if other else None)
        grid = study.mae if cell.first.objective == "mae" else study.simmim
        row += [number(cell.first.epochs, ".1f"), number(grid.compute(cell), ".2f"), _verdict(study, cell)]
        rows.append(row)
    note = "Means over the seeds that are done, ± their standard deviation where there are two or more."
    return Table("cells", "Every cell of the study", columns, rows, note)


def all_runs(study: Analysis, out: Path, output: Path | None) -> Table:
    """Every run, and the folder that its numbers came from; see :func:`mimscale.study.report.report.write_report`."""
    released = published()
    # A report that lies elsewhere is handed on without the run folders, so that links to them would lead nowhere.
    beside = output is not None and out.resolve().is_relative_to(output.resolve())
    rows: list[list[Value]] = []
    for run in study.results:
        start = f" from {run.start}" if run.start else ""
        kind = f"{run.task or 'fine-tuning'}{start}" if run.kind == "finetune" else "pre-training"
        scores = ", ".join(f"{name} {value:.2f}" for name, value in run.scores.items())
        folder: Value = "released by the authors" if run in released else None
        if run.run is not None:
            base = out if beside or output is None else output
            where = os.path.relpath(Path(run.run).resolve(), base.resolve())
            folder = Entry(where, href=where if beside else None)
        rows.append(
            [
                run.cell,
                Entry(kind, mark="long" if start else ""),
                number(run.seed, "d"),
                Entry(run.status, mark="bad" if run.status in ("failed", "stopped") else ""),
                *_losses(run),
                scores,
                folder,
                (run.recipe or "")[:12],
                Entry(run.note, mark="long") if run.note else "",
            ]
        )
    columns: Sequence[str] = (
        "Run",
        "Kind",
        "Seed",
        "Status",
        "Validation loss",
        "l1",
        "l2",
        "Training loss",
        "Scores",
        "Folder",
        "Recipe",
        "Note",
    )
    note = (
        "" if beside or output is None else "Folders are those in the study's output, from which this report was taken."
    )
    return Table("runs", "Where every number comes from", columns, rows, note)


def _losses(run: Result) -> list[Value]:
    """Losses of a pre-training; a fine-tuning has none of these, so it lacks none."""
    if run.kind == "finetune":
        return ["", "", "", ""]
    return [number(loss) for loss in (run.val_loss, run.val_loss_l1, run.val_loss_l2, run.train_loss)]
