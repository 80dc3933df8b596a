"""Pictures of a report: one look for all of them, as SVG that takes the page's colours and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image

from mimscale.study.report.page import write
from mimscale.study.results.cells import Cell, title

# Datasets from the fewest images to the most. The first six are told apart with any kind of colour vision; in the page they
# are variables, so that a dark page has lighter ones (report.css).
PALETTE = ("#cb7507", "#c74240", "#167571", "#3090ff", "#2f29b0", "#371527", "#8a6d5b", "#6b7280")
INK, SOFT, GRID, PAPER = "#1c2430", "#556070", "#e6e9ee", "#ffffff"
VARIABLES = {INK: "--ink", SOFT: "--soft", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--d{number}" for number, colour in enumerate(PALETTE)
}
SMALLEST, LARGEST, CROSS = 4.0, 10.5, 5.0  # diameters of the circles, and of a published run's cross, in points
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
LONG_NUMBER = re.compile(r"(\d\.\d\d)\d+")
LOOK: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.3,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": True,
}

Shape = Literal["full", "hollow", "cross"]
Key = tuple[str, str, float, Shape]  # of a legend: text, colour, diameter in points, shape
Mark = tuple[float, float, Cell, bool, float | None]


@dataclass(frozen=True)
class Style:
    """The colour of each dataset and the size of each model, the same in every figure."""

    colours: dict[str, str]
    sizes: dict[str, float]

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Style:
        """The style of a study: datasets in order of images, subsets of classes last; models in order of parameters."""
        runs = [cell.first for cell in cells]
        by_images = sorted(runs, key=lambda r: (r.sampling != "uniform", r.images or 0, r.dataset))
        datasets = dict.fromkeys(r.dataset for r in by_images)
        models = dict.fromkeys(r.model for r in sorted(runs, key=lambda r: (r.parameters or 0, r.model)))
        step = (LARGEST - SMALLEST) / max(1, len(models) - 1)
        return cls(
            {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(datasets)},
            {name: SMALLEST + step * number for number, name in enumerate(models)},
        )

    def marks(self, axes: Axes, points: Iterable[Mark]) -> None:
        """Draw cells: filled circles, hollow where they overfit, with the seeds' spread where there is one.

        Args:
            axes: to draw on.
            points: (x, y, cell, whether it overfits, spread of y).
        """
        groups: dict[tuple[str, str, bool], list[Mark]] = {}
        for point in points:
            groups.setdefault((point[2].first.model, point[2].first.dataset, point[3]), []).append(point)
        # Large circles first, so that none hides a smaller one.
        for (model, dataset, hollow), group in sorted(groups.items(), key=lambda item: -self.sizes[item[0][0]]):
            colour = self.colours[dataset]
            spread = [(x, y, error) for x, y, _, _, error in group if error]
            if spread:
                x, y, error = zip(*spread, strict=True)
                axes.errorbar(x, y, yerr=error, fmt="none", ecolor=colour, elinewidth=1, capsize=2, zorder=2)
            axes.plot(
                [point[0] for point in group],
                [point[1] for point in group],
                "o",
                markersize=self.sizes[model],
                markerfacecolor=PAPER if hollow else colour,
                markeredgecolor=colour,
                markeredgewidth=1.4,
                zorder=3,
            )

    def keys(self, datasets: Sequence[str], models: Sequence[str], hollow: bool, crosses: bool = False) -> list[Key]:
        """Entries of a legend for these datasets and models."""
        entries: list[Key] = [
            (title(name), self.colours[name], 7.0, "full") for name in self.colours if name in datasets
        ]
        entries += [(title(name), SOFT, self.sizes[name], "full") for name in self.sizes if name in models]
        entries += [("overfitting", SOFT, 7.0, "hollow")] if hollow else []
        return [*entries, ("published", SOFT, CROSS, "cross")] if crosses else entries


@dataclass(frozen=True)
class Panel:
    """One plot of a figure. ``draw`` is ``None`` where there is nothing to draw, and ``absent`` says why."""

    heading: str
    alt: str
    draw: Callable[[Axes], None] | None = None
    absent: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure of the report: panels under one legend."""

    name: str
    heading: str
    caption: str
    panels: Sequence[Panel]
    keys: Sequence[Key] = ()

    @property
    def drawn(self) -> list[Panel]:
        """The panels that show something."""
        return [panel for panel in self.panels if panel.draw]

    @property
    def columns(self) -> int:
        """How many panels stand side by side where there is room: two where they come in pairs."""
        return 3 if len(self.drawn) % 2 else 2

    def html(self) -> str:
        """The figure's HTML, with its panels as inline SVG."""
        parts = []
        for number, panel in enumerate(self.drawn):
            drawn = svg(panel, f"{self.name}-{number}")
            parts.append(f'<div class="panel"><h3>{escape(panel.heading)}</h3>{drawn}</div>')
        absent = [
            f"<li>{escape(panel.heading)}: {escape(panel.absent)}</li>" for panel in self.panels if not panel.draw
        ]
        missing = f'<div class="absent"><p>Missing</p><ul>{"".join(absent)}</ul></div>' if absent else ""
        legend = "".join(f"<li>{_swatch(*key[1:])}{escape(key[0])}</li>" for key in self.keys) if self.drawn else ""
        legend = f'<ul class="legend" aria-label="Legend">{legend}</ul>' if legend else ""
        pairs = " pairs" if self.columns == 2 else ""
        link = f' <a href="{self.name}.png">{self.name}.png</a>' if self.drawn else ""
        return (
            f'<figure>{legend}<div class="panels{pairs}">{"".join(parts)}</div>{missing}'
            f"<figcaption>{escape(self.caption)}{link}</figcaption></figure>"
        )

    def png(self, path: Path) -> None:
        """Write the figure, with its legend, as a PNG (beside, then renamed)."""
        with matplotlib.rc_context(LOOK):
            columns = min(self.columns, len(self.drawn))
            rows = -(-len(self.drawn) // columns)
            canvas = Canvas(figsize=(max(4.6 * columns, 5.5), 3.7 * rows + 0.8), layout="constrained", facecolor=PAPER)
            FigureCanvasAgg(canvas)
            grid = canvas.subplots(rows, columns, squeeze=False)
            for axes in grid.flat[len(self.drawn) :]:
                axes.set_axis_off()
            for axes, panel in zip(grid.flat, self.drawn, strict=False):
                assert panel.draw is not None
                panel.draw(axes)
                axes.set_title(panel.heading, fontsize=10)
            self._legend(canvas)
            drawn = io.BytesIO()
            canvas.savefig(drawn, format="png", dpi=110, facecolor=PAPER)
        small = io.BytesIO()
        Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
        write(path, small.getvalue())

    def _legend(self, canvas: Canvas) -> None:
        """The legend under the panels, in as few lines as its entries need."""
        handles = [_handle(*key) for key in self.keys]
        for lines in range(1, len(handles) + 1):
            columns = -(-len(handles) // lines)
            legend = canvas.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
            if columns == 1 or legend.get_window_extent().width <= canvas.bbox.width:
                return
            legend.remove()


def svg(panel: Panel, name: str) -> str:
    """A panel as inline SVG: text stays text, colours are the page's variables, ids are the panel's own."""
    assert panel.draw is not None
    with matplotlib.rc_context(LOOK | {"svg.hashsalt": name}):
        canvas = Canvas(figsize=(3.9, 3.0), layout="constrained")
        panel.draw(canvas.subplots())
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = ElementTree.fromstring(text.getvalue())
    for metadata in drawn.findall(f"{SVG}metadata"):
        drawn.remove(metadata)
    _rename(drawn, name)
    drawn.attrib = {"viewBox": drawn.attrib["viewBox"], "role": "img", "aria-labelledby": f"{name}-alt"}
    title = ElementTree.Element("title", {"id": f"{name}-alt"})
    title.text = panel.alt
    drawn.insert(0, title)
    lines = ElementTree.tostring(drawn, encoding="unicode").splitlines()
    return "\n".join(line for line in map(str.lstrip, lines) if line)


def _rename(drawn: ElementTree.Element, name: str) -> None:
    """Fit matplotlib's SVG into a page: ids under ``name``, the page's colours and font, short numbers, no namespaces."""
    elements = list(drawn.iter())
    used = {
        value[value.index("#") + 1 :].rstrip(")") for e in elements for value in e.attrib.values() if _refers(value)
    }
    for element in elements:
        element.tag = element.tag.removeprefix(SVG)
        kept = {key.removeprefix(XLINK): value for key, value in element.attrib.items()}
        if kept.get("id") not in used:
            kept.pop("id", None)
        if kept.get("transform", "").startswith("rotate(-0 "):
            del kept["transform"]
        for key, value in kept.items():
            if key == "id":
                value = f"{name}-{value}"
            elif _refers(value):
                value = value.replace("#", f"#{name}-")
            elif key == "style":
                value = value.replace(" font-family: 'DejaVu Sans';", "")
                # Named by the style attribute alone, as variables mean nothing in a presentation attribute.
                for colour, variable in VARIABLES.items():
                    value = value.replace(colour, f"var({variable})")
            kept[key] = LONG_NUMBER.sub(r"\1", value)
        element.attrib = kept


def _refers(value: str) -> bool:
    return value.startswith(("#", "url(#"))


def _swatch(colour: str, diameter: float, shape: Shape) -> str:
    variable = f"var({VARIABLES[colour]})"
    fill = variable if shape == "full" else "none"
    half = f"{diameter / 2:.2f}"
    drawn = (
        f'<circle r="{half}"'
        if shape != "cross"
        else f'<path d="M-{half}-{half}L{half} {half}M-{half} {half}L{half}-{half}"'
    )
    return (
        f'<svg width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">{drawn} '
        f'style="fill: {fill}; stroke: {variable}; stroke-width: 1.4"/></svg>'
    )


def _handle(text: str, colour: str, diameter: float, shape: Shape) -> Line2D:
    marker, fill = ("x", colour) if shape == "cross" else ("o", PAPER if shape == "hollow" else colour)
    return Line2D(
        [], [], linestyle="none", marker=marker, markersize=diameter, color=colour, markerfacecolor=fill, label=text
    )


def ticks(axes: Axes, values: Iterable[float], name: Callable[[float], str], apart: float = 1.5) -> None:
    """A logarithmic x axis with ticks at the values that stand ``apart`` times from the one before."""
    kept: list[float] = []
    for value in sorted(set(values)):
        if not kept or value / kept[-1] >= apart:
            kept.append(value)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([name(value) for value in kept])
