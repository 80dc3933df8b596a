"""Where every command starts and ends: what an interrupt, an output that nobody reads, and an unknown fault come to.

Nothing that takes time is imported here: an interrupt may come while everything else still is.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

# What shells say of a process that SIGINT, or SIGPIPE, has ended.
INTERRUPTED_EXIT = 128 + signal.SIGINT
CLOSED_EXIT = 128 + signal.SIGPIPE
# Nobody reads a pipe any more; the terminal is gone.
_CLOSED = (errno.EPIPE, errno.EIO)
_NAMES = {1: "standard output", 2: "standard error"}
_IMPORTING = "<frozen importlib._bootstrap>"


class OutputClosed(BaseException):
    """Nobody reads what this process prints. Not an OSError: whoever handles those has a file or a network in mind."""


_interrupts = 0
_ending = False


def enter(program: Callable[[], int | None]) -> int:
    """Run a program; returns its exit status.

    An interrupt (Ctrl-C) ends in one line and status 130, a second one at once; an output that nobody reads any more
    (``| head -1``) ends it without a word, and one that is closed from the start is as /dev/null. An exception that no command
    expects keeps its traceback, and a line asks to report it. A training has its own way with the first two
    (:mod:`mimscale.training.faults.preemption`).
    """
    global _ending
    _fill_closed()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # it is in what a shell runs in the background
        signal.signal(signal.SIGINT, _interrupt)
    sys.stdout, sys.stderr = _watched(sys.stdout, 1), _watched(sys.stderr, 2)
    try:
        try:
            status = program() or 0
        finally:
            _ending = True
            sys.stdout.flush()
    except KeyboardInterrupt:
        end_interrupted()
    except OutputClosed:
        os._exit(CLOSED_EXIT)
    except Exception as error:
        if isinstance(error, OSError) and error.filename in _NAMES.values():
            os.write(2, f"mimscale: error: {error.filename}: {error.strerror}\n".encode())
            os._exit(1)  # what could not be printed would be tried again
        _ask_to_report()
        return 1
    return status


def end_interrupted() -> None:
    """Say that the process was interrupted, and end it as it is: what it writes becomes a file only when it is whole."""
    os.write(2, b"mimscale: interrupted\n")
    os._exit(INTERRUPTED_EXIT)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """First raise, so that what is open is closed; where that would be lost or takes too long, end."""
    global _interrupts
    _interrupts += 1
    if _interrupts > 1 or _ending or _is_importing(frame):
        end_interrupted()
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: libraries turn an interrupt in their imports into errors of their own."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


def _ask_to_report() -> None:
    import traceback

    from mimscale import __version__

    traceback.print_exc()
    print(
        f"mimscale: this is a fault of mimscale {__version__} itself: please report it, with the lines above and the command",
        file=sys.stderr,
        flush=True,
    )


# -- output ------------------------------------------------------------------------------------------------------------

_when_closed: Callable[[], None] | None = None


def when_output_closes(action: Callable[[], None]) -> None:
    """From now on, call ``action`` when nobody reads an output any more, in place of ending; what is printed then is lost."""
    global _when_closed
    _when_closed = action


def _fill_closed() -> None:
    """Open /dev/null where standard input, output or error is closed: the next file would get its number, and what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one


class _Output(io.FileIO):
    """Standard output or error, which knows what it is called and what it means that nobody reads it."""

    def __init__(self, number: int):
        super().__init__(number, "w", closefd=False)

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno not in _CLOSED:
                raise OSError(error.errno, error.strerror, _NAMES[self.fileno()]) from None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if _when_closed is None:
            raise OutputClosed
        _when_closed()
        return len(data)  # type: ignore[arg-type]


def _watched(stream: object, number: int) -> io.TextIOWrapper:
    raw = _Output(number)
    if not isinstance(stream, io.TextIOWrapper):  # it was closed
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    buffer = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
