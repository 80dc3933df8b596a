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
    """The run was asked to stop, has saved, and resumes when it is started again."""


_received: list[str] = []


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)


def listen() -> None:
    """From now on a signal of SIGNALS does not end this process, but is heard by :class:`StopRequests`.

    For the start of a program: one that comes while it still starts would otherwise end it without a message.
    """
    for number in SIGNALS:
        signal.signal(number, _note)


def deafen() -> None:
    """From now on the signals do nothing: all is done, and one that came while the program ends would make it a failure."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequests:
    """What asks this process to stop, while the ``with`` block lasts; also what was heard before (:func:`listen`)."""

    def __init__(self) -> None:
        self.reason: str | None = None
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self.job_end = float(end) if end.isdigit() else None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        try:
            self._before = {number: signal.signal(number, _note) for number in SIGNALS}
        except ValueError:
            self._before = {}  # not the main thread: whoever runs us there handles signals
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Preempted):
            _received.clear()  # it has been heard
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wanted(self, margin_seconds: float) -> str | None:
        """Why this rank should stop now, or ``None``; a Slurm job stops by itself that long before its end."""
        if _received:
            self.reason = _received[0]
        if self.reason is None and self.job_end is not None and time.time() >= self.job_end - margin_seconds:
            self.reason = "the job's time limit"
        return self.reason
