"""One self-contained HTML page: tables that scroll inside themselves, pictures as inline SVG, no script, no network."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path

from mimscale.files import write_bytes

# What a cell of a table begins with where spreadsheets compute it.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Entry:
    """A table's entry: what is read, what the CSV holds (``text`` where ``None``), and where it leads."""

    text: str
    raw: str | float | None = None
    href: str | None = None
    mark: str = ""

    def html(self) -> str:
        """The entry's HTML."""
        inner = escape(typeset(self.text))
        if self.href is not None:
            inner = f'<a href="{escape(self.href)}">{inner}</a>'
        return f'<span class="{self.mark}">{inner}</span>' if self.mark else inner


Value = Entry | str | None


def typeset(text: str) -> str:
    """Text with true minus signs before numbers."""
    return re.sub(r"(?<![\w.)-])-(?=\d)", "\N{MINUS SIGN}", text)


@dataclass(frozen=True)
class Table:
    """A table with a caption; ``name`` is its anchor and its CSV's stem. ``None`` is an entry that is missing."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: list[list[Value]] = field(default_factory=list)
    note: str = ""

    def html(self) -> str:
        """The table in a frame of its own that scrolls sideways and can be reached with the keyboard."""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        body = "\n".join(f"<tr>{_row(row)}</tr>" for row in self.rows)
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return (
            f'<section class="table" id="{self.name}">'
            f'<div class="frame" tabindex="0" role="region" aria-label="{escape(self.caption)}">'
            f"<table><caption>{escape(self.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            f'</div>{note}<p class="files"><a href="{self.name}.csv">{self.name}.csv</a></p></section>'
        )

    def csv(self) -> str:
        """The table as CSV; missing entries are empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            writer.writerow([_raw(value) for value in row])
        return text.getvalue()


def _row(row: list[Value]) -> str:
    cells = []
    for number, value in enumerate(row):
        inner = '<span class="missing">missing</span>' if value is None else _entry(value).html()
        if number == 0:
            cells.append(f'<th scope="row">{inner}</th>')
        else:
            numeric = value is not None and isinstance(_raw(value), float | int)
            cells.append(f"<td{' class=number' if numeric or value is None else ''}>{inner}</td>")
    return "".join(cells)


def _entry(value: Entry | str) -> Entry:
    return Entry(value) if isinstance(value, str) else value


def _raw(value: Value) -> str | float:
    if value is None:
        return ""
    entry = _entry(value)
    raw = entry.text if entry.raw is None else entry.raw
    # A spreadsheet would take such a text for a formula.
    return f"'{raw}" if isinstance(raw, str) and raw[:1] in FORMULA and not _reads_as_number(raw) else raw


def _reads_as_number(text: str) -> bool:
    """Whether it is a number, a per cent, a range of numbers or a dash."""
    try:
        for part in text.split(" to ", 1):
            float(part.rstrip("%"))
    except ValueError:
        return text == "-"
    return True


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

    name: str
    heading: str
    body: str
    menu: str = ""

    def html(self) -> str:
        """The section's HTML."""
        return (
            f'<section id="{self.name}" aria-labelledby="{self.name}-heading">'
            f'<h2 id="{self.name}-heading">{escape(self.heading)}</h2>\n{self.body}</section>'
        )


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: of the page.
        lead: HTML under the title.
        sections: in order; the menu leads to each.
    """
    css = resources.files("mimscale.study").joinpath("data", "report.css").read_text()
    menu = "".join(f'<li><a href="#{s.name}">{escape(s.menu or s.heading)}</a></li>' for s in sections)
    body = "\n".join(section.html() for section in sections)
    # An empty icon of its own, so that no browser asks for one.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<h1>{escape(title)}</h1>
{lead}
<nav aria-label="Contents"><ul>{menu}</ul></nav>
</header>
<main id="content" tabindex="-1">
{body}
</main>
</body>
</html>
"""


def write(path: Path, content: str | bytes) -> Path:
    """Write a file beside its place, then rename, so that a reader never meets half of it."""
    write_bytes(path, content.encode() if isinstance(content, str) else content)
    return path
