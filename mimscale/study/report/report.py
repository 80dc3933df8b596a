"""The report of a study: the paper's figures and tables from its own runs, beside what was published, on one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mimscale.study.analysis.summary import Analysis, analyse
from mimscale.study.report import tables
from mimscale.study.report.drawing import Picture
from mimscale.study.report.figures import figures
from mimscale.study.report.findings import findings
from mimscale.study.report.page import Section, Table, page, write
from mimscale.study.results.result import Result

PAGE = "report.html"


def write_report(
    results: Sequence[Result], out: Path, title: str, published: bool = True, output: Path | None = None
) -> Path:
    """Write ``report.html`` with its PNGs and CSVs.

    The page needs neither network nor script. Each file is written beside its place and renamed, the page last.

    Args:
        results: of every run of the study; runs that are not done too, so that the report shows them as missing.
        out: folder, made where it is not there.
        title: of the page.
        published: set the paper's numbers and the 63 published runs beside the study's own.
        output: the study's. Run folders are linked where ``out`` lies in it, and named from there where it does not.

    Returns:
        The page's path.

    Raises:
        ResultsError: results that contradict each other; nothing is written.
    """
    study = analyse(results, published)
    pictures = figures(study)
    printed: dict[str, Table] = {
        table.name: table
        for table in (
            tables.architectures(study),
            tables.datasets(study),
            tables.correlation_table(study),
            tables.decoders(study),
            tables.sampling(study),
            tables.laws(study),
            tables.needs(study),
            tables.efficiency(study),
            tables.all_cells(study),
            tables.all_runs(study, out, output),
        )
    }
    html = page(title, _lead(study), _sections(study, pictures, printed))
    out.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        if picture.drawn:
            picture.png(out / f"{picture.name}.png")
        else:
            (out / f"{picture.name}.png").unlink(missing_ok=True)
    for name, table in printed.items():
        write(out / f"{name}.csv", table.csv())
    return write(out / PAGE, html)


def _lead(study: Analysis) -> str:
    status = Counter(cell.status for cell in study.cells)
    tuned = Counter(run.status for run in study.results if run.kind == "finetune")
    facts = [
        ("pre-trainings done", f"{status['done']} of {len(study.cells)}"),
        ("fine-tunings done", f"{tuned['done']} of {tuned.total()}"),
    ]
    facts += [(name, str(status[name])) for name in ("stopped", "running", "failed", "missing") if status[name]]
    known = [grid for grid in (study.simmim, study.mae) if grid.verdicts]
    facts.append(("overfit", f"{sum(len(g.overfit) for g in known)} of {sum(len(g.verdicts) for g in known)}"))
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    text = (
        "The paper's figures and tables, made anew from the 63 runs whose validation losses and ImageNet-1K accuracies its "
        "authors released"
        if study.of_published
        else "The paper's figures and tables, from the runs of this study"
    )
    if study.beside_paper:
        text += ", beside what the paper “On Data Scaling in Masked Image Modeling” (arXiv 2206.04664) prints"
        text += " and its 63 released runs" if study.released.cells else ""
    return (
        f"<p>{text}. What was not run is shown as missing; the run behind every number is in "
        f'<a href="#runs">the last table</a>.</p><dl class="facts">{shown}</dl>'
    )


def _sections(study: Analysis, pictures: Sequence[Picture], printed: dict[str, Table]) -> list[Section]:
    said = "".join(finding.html() for finding in findings(study))
    parts = [
        Section(
            "findings",
            "What these runs show",
            f"<p>Each claim is the paper's; the verdict and its figures are computed from these runs.</p>"
            f'<div class="findings">{said}</div>',
            "Findings",
        )
    ]
    under = {"figure1": ["laws"], "figure5": ["needs"], "figure6": ["efficiency"]}
    for picture in pictures:
        body = picture.html() + "".join(printed[name].html() for name in under.get(picture.name, ()))
        parts.append(Section(picture.name, picture.heading, body, picture.heading.partition(".")[0]))
    parts.append(
        Section(
            "tables", "Tables 1 to 5", "".join(printed[f"table{number}"].html() for number in range(1, 6)), "Tables"
        )
    )
    parts.append(Section("results", "All results", printed["cells"].html() + printed["runs"].html(), "All results"))
    return parts
