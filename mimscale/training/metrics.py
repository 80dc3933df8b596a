"""What a run writes while it trains: metrics.jsonl, TensorBoard, and the progress line with throughput, MFU and ETA."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 10.0
BAR = "{n_fmt}/{total_fmt} {bar:12} {postfix} | {elapsed} < {remaining}"


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


class Progress:
    """A moving bar on a terminal; elsewhere one plain line every ten seconds."""

    def __init__(self, done: int, total: int, shown: bool):
        self.total, self.shown = total, shown
        self.start_step, self.start_time = done, time.monotonic()
        self.last_line = 0.0
        self.bar = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, dynamic_ncols=True, smoothing=0.1, bar_format=BAR)

    def step(self, step: int, text: str) -> None:
        """Say that ``step`` updates are done; ``text`` holds the figures to show."""
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if now - self.last_line >= LOG_SECONDS or step == self.total:
            self.last_line = now
            pace = (now - self.start_time) / max(1, step - self.start_step)
            self._print(f"step {step}/{self.total} | {text} | ETA {duration(pace * (self.total - step))}")

    def say(self, message: str) -> None:
        """A line of its own, above the bar."""
        if self.shown:
            self._print(message)

    def _print(self, message: str) -> None:
        if self.bar is not None:
            self.bar.write(message)
        else:
            print(message, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self.bar is not None:
            self.bar.close()
