"""What a run writes while it trains: metrics.jsonl, TensorBoard, and the progress line with throughput, MFU and ETA."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimscale.files import write_text
from mimscale.training.run_folder import RunFolder, step_name

if TYPE_CHECKING:
    from mimscale.training.ranks import Ranks
    from mimscale.training.task import ValidationResult

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
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

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
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, dynamic_ncols=True, smoothing=0.1, bar_format=BAR)

    def step(self, step: int, text: str) -> None:
        """Report that ``step`` updates are done; ``text`` holds the figures to show."""
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

    def report(self, message: str) -> None:
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


class RunLog:
    """Where a run's figures go: the progress line, ``metrics.jsonl``, TensorBoard and DeepSpeed's monitors.

    Only the first rank writes; the others may call it all the same.

    Args:
        folder: the run folder.
        ranks: of the run.
        progress: the line.
        step: updates so far; TensorBoard drops what was logged after them.
        write_events: of the engine, for DeepSpeed's monitors.
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: Ranks,
        progress: Progress,
        step: int,
        write_events: Callable[[list[tuple[str, float, int]]], None],
    ):
        self.folder, self.ranks, self.progress, self.write_events = folder, ranks, progress, write_events
        self.metrics = MetricsLog(folder.metrics)
        self.board = None
        self.skipped: dict[str, str] = {}
        self.started = time.time()
        if ranks.is_first:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)

    def losses(self) -> list[float]:
        """The training losses logged so far; on the first rank."""
        return [record["loss"] for record in self.metrics.read() if "loss" in record] if self.ranks.is_first else []

    def step(self, step: int, record: dict[str, float], samples: int) -> None:
        """Log an update: ``loss``, ``lr``, ``grad_norm``, ``images_per_s`` and ``mfu``, after ``samples`` images in all."""
        if self.ranks.is_first:
            self.metrics.append({"step": step, **record})
            self._scalars(record, step, samples)
            text = "loss {loss:.4f} | lr {lr:.2e} | grad {grad_norm:.2f} | {images_per_s:.1f} images/s | MFU {mfu:.0%}"
            self.progress.step(step, text.format(**record))

    def left_out(self, step: int, reason: str) -> None:
        """Log that the update of a batch was left out."""
        if self.ranks.is_first:
            self.metrics.append({"step": step, "left_out": reason})

    def skipped_samples(self, skipped: list[tuple[str, str]]) -> None:
        """Report each damaged sample of this rank once."""
        for key, reason in skipped:
            if key not in self.skipped:
                self.skipped[key] = reason
                print(f"rank {self.ranks.rank}: skipped the damaged image {key}: {reason}", flush=True)

    def validation(self, step: int, found: ValidationResult, samples: int) -> None:
        """Log figures and pictures of a validation."""
        if not self.ranks.is_first:
            return
        from mimscale.training.pictures import save_png

        self.metrics.append({"step": step, **found.record})
        self._scalars(found.record, step, samples)
        self.progress.report(f"step {step}: {found.text}")
        for name, picture in found.pictures.items():
            save_png(picture, self.folder.path / name / f"{step_name(step)}.png")
            if self.board is not None:
                from torchvision.transforms.functional import pil_to_tensor

                self.board.add_image(name, pil_to_tensor(picture), step)

    def _scalars(self, values: dict[str, float], step: int, samples: int) -> None:
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(f"{'validation' if key.startswith('val_') else 'train'}/{key}", value, step)
        self.write_events([(f"mimscale/{key}", value, samples) for key, value in values.items()])

    def close(self) -> None:
        """End the line and the files."""
        if self.board is not None:
            self.board.close()
        self.progress.close()
