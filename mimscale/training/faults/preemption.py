"""Stopping in time: signals and time limits end a run after a step, saved; a second signal ends it at once.

Signals are heard by a thread, since the main thread may be in a collective or an import for a long time, in which Python
calls no handler. Before the first step there is nothing to save, and a run ends where it stands. At any time that is safe: what
is written becomes a file, or a checkpoint, only when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

from mimscale.data.pool import die_with_parent
from mimscale.entry import CLOSED_EXIT, INTERRUPTED_EXIT, when_output_closes

# EX_TEMPFAIL of sysexits.h: failed for now, try again. The Slurm files requeue a job that ends so.
REQUEUE_EXIT = 75
HUNG_UP_EXIT = 128 + signal.SIGHUP
# SIGUSR1 is Slurm's notice ahead of a time limit: there is time for a step, wherever the run is. SIGHUP: the terminal is closed.
NOTICE = signal.SIGUSR1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, NOTICE)
OUTPUT = "the end of its output"
# Terminals, launchers and Slurm tell every process of one wish, some of them twice.
SAME_WISH_SECONDS = 1.0
# The first rank reports why the run ends; a launcher may end all of them when one goes.
REPORT_SECONDS = 0.5
_LOOK_SECONDS = 1.0


class Preempted(Exception):
    """The run was asked to stop by ``reason`` (a signal's name, ...), has saved, and resumes when it is started again."""

    def __init__(self, message: str, reason: str = "SIGTERM"):
        super().__init__(message)
        self.reason = reason

    @property
    def status(self) -> int:
        """What the process exits with."""
        return exit_status(self.reason)


def exit_status(reason: str) -> int:
    """What a process exits with that was asked to stop: REQUEUE_EXIT where a scheduler did, else as shells have it."""
    by_people = {"SIGINT": INTERRUPTED_EXIT, "SIGHUP": HUNG_UP_EXIT, OUTPUT: CLOSED_EXIT}
    return by_people.get(reason, REQUEUE_EXIT)


# -- what this process has heard ---------------------------------------------------------------------------------------

_received: list[str] = []
_mouth: socket.socket | None = None  # Python writes the numbers of signals to it
_first: float | None = None  # when it was first asked to stop, by the monotonic clock
_listening = False  # the process is a training's own (listen)
_has_stepped = False
_pass_on: Callable[[int], None] | None = None
_record: Callable[[str], None] | None = None


def listen(record: Callable[[str], None] | None = None) -> None:
    """From now on the signals of SIGNALS ask the training that is this process's purpose to stop.

    Before its first step they end the process, with one line and the status of :func:`exit_status`; SIGUSR1, which comes ahead
    of time, waits for that step. After it they are heard by :class:`StopRequests`; a second one that is not of the same wish
    ends the process at once. One that was ignored when the process was started (``nohup``) stays so.

    Args:
        record: called with a message when the process ends at once after its first step.
    """
    global _listening, _record, _mouth
    _record = record or _record
    if _listening:
        return
    _listening = True
    ear, _mouth = socket.socketpair()
    _mouth.setblocking(False)
    signal.set_wakeup_fd(_mouth.fileno(), warn_on_full_buffer=False)
    # Only now, or one that came in between would be heard by nobody.
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)
    # What is forked hears for itself, and not into this process's ear.
    os.register_at_fork(after_in_child=_forget)
    when_output_closes(lambda: _ask(OUTPUT))
    launcher = _Launcher()
    ear.settimeout(_LOOK_SECONDS if launcher.above is not None else None)
    threading.Thread(target=_attend, args=(ear, launcher), name="signals", daemon=True).start()


def passed_to(action: Callable[[int], None]) -> None:
    """From now on ``action(number)`` is called, in a thread, for each signal that this process hears; see :func:`listen`."""
    global _pass_on
    _pass_on = action


def deafen() -> None:
    """From now on the signals do nothing: all is done, and one that came while the program ends would make it a failure."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def heard() -> str | None:
    """What has asked this process to stop."""
    return _received[0] if _received else None


def _forget() -> None:
    signal.set_wakeup_fd(-1)


def _note(number: int, frame: FrameType | None) -> None:
    """The handler in the main thread."""
    if _listening:
        return  # the thread has heard it already
    if number == signal.SIGINT and "SIGINT" in _received:
        raise KeyboardInterrupt  # the caller's program, which may have more to do than the run
    _received.append(signal.Signals(number).name)


def _attend(ear: socket.socket, launcher: _Launcher) -> None:
    while True:
        numbers = b""
        with contextlib.suppress(TimeoutError):
            numbers = ear.recv(64)
        if launcher.has_gone():
            numbers += bytes([signal.SIGTERM])
        for number in numbers:
            if number not in SIGNALS:
                continue
            if _pass_on is not None:
                _pass_on(number)
            else:
                _ask(signal.Signals(number).name)


def _ask(reason: str) -> None:
    global _first
    now = time.monotonic()
    if reason == NOTICE.name:
        _received.append(reason)
    elif not _has_stepped:
        end_now(reason, f"stopped by {reason} before its first step; the same command starts it again")
    elif _first is not None and now - _first > SAME_WISH_SECONDS:
        message = f"ended by a second {reason}, without saving; the same command resumes from the last checkpoint"
        end_now(reason, message, _record)
    elif _first is None:
        _first = now
        _received[:] = [reason]
        if _rank() == 0 and reason != OUTPUT:
            _say(f"{reason}: saving after this step, and ending; a second one ends it at once")


def end_now(reason: str, message: str, record: Callable[[str], None] | None = None) -> None:
    """End this process and those that it has started, whatever they are in; the first rank says why."""
    if _rank() == 0:
        if reason != OUTPUT:
            _say(f"stopped: {message}")
        if record is not None:
            record(message)
    else:
        time.sleep(REPORT_SECONDS)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(exit_status(reason))


def _say(text: str) -> None:
    # Not print: the main thread may hold the stream's lock for as long as a pipe is full.
    with contextlib.suppress(OSError):
        os.write(2, f"mimscale: {text}\n".encode())


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


class _Launcher:
    """Who has started this rank: a rank does not outlive it, or nobody could end the run or start it again.

    ``torchrun``, ``deepspeed`` and mimscale itself are known by what they leave in the environment; any other parent (a shell
    that puts ranks into the background) may go. Slurm ends its tasks itself.
    """

    def __init__(self) -> None:
        self.parent = os.getppid()
        self.above: int | None = None
        own = os.environ.pop("MIMSCALE_PARENT", None)  # of this process, and not of what it starts
        if own is None and not ("TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ):
            return
        die_with_parent(signal.SIGTERM)
        if own is not None and int(own) != os.getppid():
            os.kill(os.getpid(), signal.SIGTERM)  # it went before
        if "CROSS_RANK" in os.environ:
            # deepspeed starts another process that starts the ranks, and tells it nothing of its own end.
            above = _parent_of(self.parent)
            with contextlib.suppress(OSError):
                if above is not None and b"deepspeed" in Path(f"/proc/{above}/cmdline").read_bytes():
                    self.above = above

    def has_gone(self) -> bool:
        """Whether the process above the parent has ended; says so once."""
        if self.above is None or _parent_of(self.parent) == self.above:
            return False
        self.above = None
        return True


def _parent_of(pid: int) -> int | None:
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return None


class StopRequests:
    """What asks this process to stop, while the ``with`` block lasts; also what was heard before (:func:`listen`).

    In a process that does not :func:`listen`, the block hears signals, and a second SIGINT raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        # Once and for all by the monotonic clock: the other one may be set.
        self.job_end = time.monotonic() + float(end) - time.time() if end.isdigit() else None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        if (
            not _listening and threading.current_thread() is threading.main_thread()
        ):  # else whoever runs us handles signals
            heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, _note) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Preempted):
            _received.clear()  # it has been heard
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def has_stepped(self) -> None:
        """From now on there is something to save."""
        global _has_stepped
        _has_stepped = True

    def wanted(self, margin_seconds: float) -> str | None:
        """Why this rank should stop now, or ``None``; a Slurm job stops by itself that long before its end."""
        if _received:
            self.reason = _received[0]
        if self.reason is None and self.job_end is not None and time.monotonic() >= self.job_end - margin_seconds:
            self.reason = "the job's time limit"
        return self.reason
