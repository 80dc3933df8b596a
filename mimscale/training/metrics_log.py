"""``metrics.jsonl``: what a run logs of its steps, and how long things take, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """``metrics.jsonl``: one object a line, in the order of the steps."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a line that a kill cut short is left out."""
        records = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and "step" in record:
                    records.append(record)
        return records

    def rewind(self, step: int) -> None:
        """Drop what was logged after ``step``: the resumed run will log those steps again."""
        kept = [record for record in self.read() if record["step"] <= step]
        beside = self.path.with_name(f".{self.path.name}.part")
        beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        beside.replace(self.path)

    def append(self, record: dict[str, Any]) -> None:
        """Add one line; it is with the operating system when this returns, so a kill does not lose it."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def duration(seconds: float) -> str:
    """Seconds as people read them: 45 s, 3 min 20 s, 5 h 07 min, 2 d 03 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600:02d} h"
