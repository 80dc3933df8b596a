"""The graph as a picture: a row for each trunk, its lengths leaving it, and the fine-tunings that hang on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from mimscale.files import write_beside
from mimscale.study.jobs import Job, decoder_of
from mimscale.study.results.cells import length, title
from mimscale.study.spec import Study
from mimscale.training.schedule import decay_step

# Okabe and Ito's colours, which readers of all kinds of sight tell apart.
TASK_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
TRUNK, TAIL = "#222222", "#888888"
ROW_INCHES, WIDTH_INCHES = 0.34, 11.0


@dataclass
class Row:
    """One trunk: what it trains, how many seeds share the picture, and its jobs by length."""

    model: str
    label: str
    seeds: set[int] = field(default_factory=set)
    jobs: dict[int, Job] = field(default_factory=dict)
    tasks: dict[int, list[str]] = field(default_factory=dict)


def rows(jobs: dict[str, Job]) -> list[Row]:
    """The trunks of a graph in its order; seeds of one cell make one row."""
    found: dict[tuple[str, str, str], Row] = {}
    for job in jobs.values():
        if job.launcher != "pretrain":
            continue
        decoder = decoder_of(job.recipe)  # type: ignore[arg-type]
        heavier = "" if decoder == "linear" else f", {decoder}"
        row = found.setdefault(
            (job.model, job.dataset, decoder), Row(job.model, f"{title(job.model)}, {title(job.dataset)}{heavier}")
        )
        row.seeds.add(job.seed)
        row.jobs.setdefault(job.length, job)
        tuned = [other.task for other in jobs.values() if other.task and _origin(other, jobs) == job.id]
        held = row.tasks.setdefault(job.length, [])
        held += [task for task in tuned if task not in held]
    return list(found.values())


def _origin(job: Job, jobs: dict[str, Job]) -> str:
    while job.launcher == "finetune" and job.start is not None:
        job = jobs[job.start.job]
    return job.id


def draw_graph(study: Study, jobs: dict[str, Job], folder: Path) -> list[Path]:
    """Draw the graph into ``folder`` as graph.svg and graph.png; returns both."""
    lines = rows(jobs)
    tasks = list(study.finetune)
    colours = {task: TASK_COLOURS[number % len(TASK_COLOURS)] for number, task in enumerate(tasks)}
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 1.9 + ROW_INCHES * len(lines)), layout="constrained")
    longest = max(max(row.jobs) for row in lines)
    for number, row in enumerate(lines):
        _draw_row(axes, row, -number, longest, colours)
        if number and row.model != lines[number - 1].model:
            axes.axhline(-number + 0.5, color="#dddddd", linewidth=0.8, zorder=0)
    labels = [row.label + (f" ({len(row.seeds)} seeds)" if len(row.seeds) > 1 else "") for row in lines]
    axes.set_yticks([-number for number in range(len(lines))], labels)
    axes.set_ylim(-len(lines) + 0.4, 0.9)
    axes.set_xlim(-0.01 * longest, longest * (1.03 + 0.016 * max(1, len(tasks))))
    axes.set_xticks(_ticks(lines, longest), [length(tick) for tick in _ticks(lines, longest)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length(int(x))))
    axes.set_xlabel("iterations")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=TRUNK, linewidth=2.2, label="trunk"),
        Line2D(
            [], [], color=TAIL, linewidth=1.6, marker="o", markersize=4, label="a length: learning rate stepped down"
        ),
        *(
            Line2D([], [], color=colours[t], marker="s", linestyle="", markersize=5, label=f"fine-tuning {t}")
            for t in tasks
        ),
    ]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, fontsize=9)
    count = sum(job.launcher == "pretrain" for job in jobs.values())
    axes.set_title(f"{study.name}: {count} pre-trainings, {len(jobs) - count} fine-tunings", loc="left", pad=46)
    written = []
    for suffix in ("svg", "png"):
        written.append(folder / f"graph.{suffix}")
        with write_beside(written[-1]) as beside, beside.open("wb") as file:
            figure.savefig(file, format=suffix, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)
    return written


def _draw_row(axes: Axes, row: Row, y: float, longest: int, colours: dict[str, str]) -> None:
    """A trunk on its line; each length leaves it downwards and ends in a dot with its fine-tunings behind."""
    drop = 0.26
    for job in row.jobs.values():
        leaves = next((p for p in job.pinned), None)
        first = job.first
        if leaves is None:
            leaves = _last_on_trunk(job)
        axes.plot([first, leaves], [y, y], color=TRUNK, linewidth=2.2, solid_capstyle="butt")
        end = job.recipe.train.iterations
        axes.plot([leaves, leaves + 0.006 * longest, end], [y, y - drop, y - drop], color=TAIL, linewidth=1.6)
        axes.plot([end], [y - drop], marker="o", markersize=4, color=TAIL)
        for place, task in enumerate(row.tasks[job.length]):
            x = end + longest * (0.014 + 0.013 * place)
            axes.plot([x], [y - drop], marker="s", markersize=4, color=colours[task], linestyle="")


def _last_on_trunk(job: Job) -> int:
    recipe = job.recipe
    return decay_step(recipe.schedule, recipe.train.iterations) if recipe.schedule.kind == "step" else job.steps


def _ticks(lines: Iterable[Row], longest: int) -> list[int]:
    return sorted({0} | {size for row in lines for size in row.jobs})
