"""What a run writes while it trains: metrics.jsonl, TensorBoard, and the progress line with throughput, MFU and ETA."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mimscale.files import (
    UnfitFile,
    append_text,
    free_name,
    is_number,
    is_whole,
    open_regular,
    parse_json,
    set_aside,
    write_beside,
)
from mimscale.training.errors import RankLocalError
from mimscale.training.run_folder import RunFolder, step_name
from mimscale.wording import counted, printable

if TYPE_CHECKING:
    from mimscale.training.ranks import Ranks
    from mimscale.training.task import ValidationResult

LOG_SECONDS = 10.0
# Bytes of a line of metrics.jsonl; the longest that are written have a few thousand.
LONGEST_LINE = 2**20
# Bytes of metrics.jsonl: some ten million steps.
LONGEST_LOG = 2**31
NUMBERS = ("loss", "lr", "grad_norm", "images_per_s", "mfu")
BAR = "{n_fmt}/{total_fmt} {bar:12} {postfix} | {elapsed} < {remaining}"


class LoggedLine(NamedTuple):
    """A line of ``metrics.jsonl``: its bytes, and either what it holds or what is wrong with it."""

    text: bytes
    record: dict[str, Any] | None
    problem: str


class MetricsLog:
    """``metrics.jsonl``: one object a line, in the order of the steps.

    A line that is cut, no JSON or of wrong types is passed over, and :attr:`damage` says so.
    """

    def __init__(self, path: Path):
        self.path = path
        self.damage = ""

    def read(self) -> list[dict[str, Any]]:
        """What all whole lines hold; sets :attr:`damage`, which is empty where nothing is wrong."""
        return list(self.records())

    def records(self, last: int | None = None) -> Iterator[dict[str, Any]]:
        """As :meth:`read`, one after the other; :attr:`damage` is set at the end.

        Args:
            last: bytes at the file's end to look at; by default all of it.
        """
        damaged, first = 0, ""
        try:
            for number, line in enumerate(self._lines(last), 1):
                if line.record is not None:
                    yield line.record
                else:
                    damaged += 1
                    first = first or f"{'a line' if last else f'line {number}'} {line.problem}"
        except OSError as error:
            first = printable(error.strerror) if isinstance(error, UnfitFile) else f"cannot be read ({error.strerror})"
        some = f"has {counted(damaged, 'damaged line')}: " if damaged else ""
        self.damage = f"{printable(self.path)} {some}{first}" if first else ""

    def _lines(self, last: int | None = None) -> Iterator[LoggedLine]:
        """The file's lines, or those that begin in its ``last`` bytes; one that is too long comes in pieces.

        Raises:
            OSError: it cannot be read, or is too long.
        """
        try:
            descriptor = open_regular(self.path)
        except FileNotFoundError:
            return
        with os.fdopen(descriptor, "rb") as file:
            if (
                last is None and os.fstat(descriptor).st_size > LONGEST_LOG
            ):  # a sparse one takes long to come to its bound
                raise UnfitFile(self.path, f"holds more than {counted(LONGEST_LOG, 'byte')}, the most that is read")
            if last is not None and (start := os.fstat(descriptor).st_size - last) > 0:
                file.seek(start - 1)
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass  # of a line that began before
            while text := file.readline(LONGEST_LINE):
                if last is None and file.tell() > LONGEST_LOG:
                    raise UnfitFile(self.path, f"holds more than {counted(LONGEST_LOG, 'byte')}, the most that is read")
                try:
                    yield LoggedLine(text, _logged(text), "")
                except ValueError as error:
                    yield LoggedLine(text, None, str(error))

    def rewind(self, step: int) -> str:
        """Drop what was logged after ``step``: the resumed run will log those steps again.

        Damaged lines, or something else in the file's place, are moved to a name of their own.

        Returns:
            What was moved and where to, for people; empty where nothing was.

        Raises:
            OSError: the file cannot be written.
        """
        aside = free_name(self.path)
        with write_beside(self.path) as beside, beside.open("w", encoding="utf-8") as kept:
            for record in self.records():
                if record["step"] <= step:
                    kept.write(json.dumps(record) + "\n")
            if self.damage:
                self._keep_damaged(aside)
        return f"{self.damage}; kept as {printable(aside)}" if self.damage else ""

    def _keep_damaged(self, aside: Path) -> None:
        try:
            with write_beside(aside) as beside, beside.open("wb") as file:
                file.writelines(line.text for line in self._lines() if line.record is None)
        except UnfitFile:
            set_aside(self.path)

    def append(self, record: dict[str, Any]) -> None:
        """Add one line; it is with the operating system when this returns, so a kill does not lose it.

        Raises:
            OSError: it cannot be written; the file is named, also where the disk is full.
        """
        append_text(self.path, json.dumps(record) + "\n")


def _logged(text: bytes) -> dict[str, Any]:
    """What a line of ``metrics.jsonl`` holds.

    Raises:
        ValueError: it is none.
    """
    if len(text) == LONGEST_LINE:
        raise ValueError(f"has more than {counted(LONGEST_LINE, 'byte')}")
    try:
        record = parse_json(text)
    except ValueError:
        raise ValueError("is no JSON" if text.endswith(b"\n") else "is cut") from None
    if not isinstance(record, dict) or not is_whole(record.get("step")):
        raise ValueError("has no step")
    for key, value in record.items():
        if (key in NUMBERS or key.startswith("val_")) and not is_number(value):
            raise ValueError(f"has a {printable(key, 60)} that is no number")
    return record


def duration(seconds: float) -> str:
    """Seconds as people read them: 45 s, 3 min 20 s, 5 h 07 min, 2 d 03 h. A clock that was set back counts as 0 s."""
    if not 0 <= seconds < 1e11:
        return "0 s" if seconds < 0 else "an unknown time"
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
        self.started = time.monotonic()
        if ranks.is_first:
            from torch.utils.tensorboard import SummaryWriter

            # A name that nobody can guess: no link can be waiting there, and it would be written through.
            mark = f".{secrets.token_hex(8)}"
            self.board = SummaryWriter(str(folder.tensorboard), purge_step=step + 1, filename_suffix=mark)

    def losses(self) -> list[float]:
        """The training losses logged so far; on the first rank."""
        return [record["loss"] for record in self.metrics.read() if "loss" in record] if self.ranks.is_first else []

    def step(self, step: int, record: dict[str, float], samples: int) -> None:
        """Log an update: ``loss``, ``lr``, ``grad_norm``, ``images_per_s`` and ``mfu``, after ``samples`` images in all."""
        if self.ranks.is_first:
            self._log({"step": step, **record})
            self._scalars(record, step, samples)
            text = "loss {loss:.4f} | lr {lr:.2e} | grad {grad_norm:.2f} | {images_per_s:.1f} images/s | MFU {mfu:.0%}"
            self.progress.step(step, text.format(**record))

    def left_out(self, step: int, reason: str) -> None:
        """Log that the update of a batch was left out."""
        if self.ranks.is_first:
            self._log({"step": step, "left_out": reason})

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

        self._log({"step": step, **found.record})
        self._scalars(found.record, step, samples)
        self.progress.report(f"step {step}: {found.text}")
        for name, picture in found.pictures.items():
            path = self.folder.path / name / f"{step_name(step)}.png"
            with self._writing(path):
                save_png(picture, path)
            if self.board is not None:
                from torchvision.transforms.functional import pil_to_tensor

                with self._writing(self.folder.tensorboard):
                    self.board.add_image(name, pil_to_tensor(picture), step)

    def _scalars(self, values: dict[str, float], step: int, samples: int) -> None:
        if self.board is not None:
            with self._writing(self.folder.tensorboard):
                for key, value in values.items():
                    self.board.add_scalar(f"{'validation' if key.startswith('val_') else 'train'}/{key}", value, step)
        self.write_events([(f"mimscale/{key}", value, samples) for key, value in values.items()])

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Have an error name what cannot be written: ``path``, where it does not name another file."""
        try:
            yield
        except OSError as error:
            raise RankLocalError(
                f"{printable(error.filename or path)} cannot be written ({error.strerror}). Make room (or mend the cause) and "
                "start the same command again: it resumes from the last checkpoint"
            ) from error

    def _log(self, record: dict[str, Any]) -> None:
        with self._writing(self.metrics.path):
            self.metrics.append(record)

    def close(self) -> None:
        """End the line and the files."""
        if self.board is not None:
            with self._writing(self.folder.tensorboard):
                self.board.close()
        self.progress.close()
