"""Stopping in time: signals and time limits end a run after a step, saved, with a status that asks to be queued again."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

# EX_TEMPFAIL of sysexits.h: failed for now, try again. The Slurm files requeue a job that ends so.
REQUEUE_EXIT = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run was asked to stop, has saved, and goes on when it is started again."""


_asked: list[str] = []


def _note(number: int, frame: FrameType | None) -> None:
    _asked.append(signal.Signals(number).name)


def listen() -> None:
    """From now on a signal of SIGNALS does not end this process, but is heard by :class:`StopRequests`.

    For the start of a program: one that comes while it still starts would otherwise end it unsaid.
    """
    for number in SIGNALS:
        signal.signal(number, _note)


def deafen() -> None:
    """From now on the signals do nothing: all is done, and one that came while the program ends would make it a failure."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequests:
    """What asks this process to stop, while the ``with`` block lasts; also what was heard before (:func:`listen`).

    Args:
        margin_seconds: how long before the end of its Slurm job a run stops by itself.
    """

    def __init__(self, margin_seconds: float):
        self.reason: str | None = None
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self.stop_at = float(end) - margin_seconds if end.isdigit() else None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        try:
            self._before = {number: signal.signal(number, _note) for number in SIGNALS}
        except ValueError:
            self._before = {}  # not the main thread: whoever runs us there handles signals
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Preempted):
            _asked.clear()  # it has been heard
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wanted(self) -> str | None:
        """Why this rank should stop now, or ``None``."""
        if _asked:
            self.reason = _asked[0]
        if self.reason is None and self.stop_at is not None and time.time() >= self.stop_at:
            self.reason = "the job's time limit"
        return self.reason
