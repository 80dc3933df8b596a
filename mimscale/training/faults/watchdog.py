"""Who is where: every rank leaves a heartbeat in the run folder, and ends the run when nobody makes progress.

A stuck collective tells nothing of the rank that it waits for. The heartbeats do: each holds the rank's step, what it is
doing and on which samples. Ranks write them from a thread, so that a rank whose main thread is stuck still shows that it is
alive, and one that is stopped or gone shows that it is not. Where all are well and wait for each other, each asks the other
hosts for an answer over the network.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from mimscale.files import UnfitFile, is_number, is_whole, read_json, set_aside, write_text
from mimscale.training.launch.rendezvous import own_address
from mimscale.wording import printable

if TYPE_CHECKING:
    from mimscale.training.ranks import Ranks

BEAT_SECONDS = 5.0
LARGEST_HEARTBEAT = 2**20
MISSED_BEATS = 3  # make a rank one without a sign of life
# Until the first step is done, compiling and tracing may take this long.
START_MINUTES = 30.0
# A host that answers at all does so in far less.
ANSWER_SECONDS = 3.0
# In the messages of gloo and NCCL.
BROKEN_LINK = ("closed by peer", "reset by peer", "Broken pipe", "gloo", "NCCL", "imed out")


@dataclass
class Heartbeat:
    """Where one rank is.

    ``since`` (of its last progress) and ``beat`` (of this file) are seconds since 1970, for people: nothing ends a run by them,
    since clocks are set. It writes ``every`` so many seconds. ``keys`` are the first samples of its batch. At ``address`` (IP,
    port) the rank's host answers as long as the rank is there.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since: float
    beat: float
    every: float
    keys: list[str]
    address: tuple[str, int]

    @property
    def place(self) -> str:
        """Rank, host, step, phase and samples, in words."""
        samples = (
            f", samples {', '.join(printable(key, 200) for key in self.keys[:4])}"
            if self.keys and self.phase == "step"
            else ""
        )
        return f"rank {self.rank} on {printable(self.host, 100)} (pid {self.pid}, {PHASES[self.phase]} {self.step}{samples})"

    def is_silent(self, now: float) -> bool:
        """Whether the rank shows no life: its process is not there, or has missed its beats."""
        if self.host == socket.gethostname():
            try:
                if psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE:
                    return True  # dead, and not yet reaped
            except psutil.NoSuchProcess:
                return True
        return now - self.beat > MISSED_BEATS * self.every


PHASES = {
    "start": "starting at step",
    "data": "waiting for the data of step",
    "step": "in step",
    "validate": "validating after step",
    "save": "saving after step",
}


def read_heartbeats(folder: Path, damaged: list[str] | None = None) -> list[Heartbeat]:
    """The newest heartbeat of every rank, in the order of the ranks; unreadable ones are left out.

    Args:
        folder: of the heartbeats.
        damaged: takes what is wrong with those that are left out.
    """
    found = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            found.append(_heartbeat(path))
        except FileNotFoundError:  # renewed meanwhile, or taken away
            continue
        except OSError as error:
            if damaged is not None:
                damaged.append(str(error))
    return found


def _heartbeat(path: Path) -> Heartbeat:
    """Read one heartbeat.

    Raises:
        UnfitFile: it is none.
        OSError: it cannot be read.
    """
    values = read_json(path, LARGEST_HEARTBEAT)
    if not isinstance(values, dict) or values.keys() != {each.name for each in fields(Heartbeat)}:
        raise UnfitFile(path, "is no heartbeat of a rank")
    beat = Heartbeat(**values)
    whole = is_whole(beat.rank) and is_whole(beat.step) and is_whole(beat.pid) and 0 < beat.pid < 2**31
    times = all(is_number(time) and math.isfinite(time) for time in (beat.since, beat.beat, beat.every))
    texts = [beat.host, beat.phase, *beat.keys] if isinstance(beat.keys, list) else [None]
    host, port = beat.address if isinstance(beat.address, list) and len(beat.address) == 2 else (None, None)
    fits = whole and times and all(isinstance(text, str) for text in (*texts, host)) and beat.phase in PHASES
    if not fits or type(port) is not int or not 0 <= port < 2**16:
        raise UnfitFile(path, "is no heartbeat of a rank: a value is of another type")
    return beat


def laggards(beats: list[Heartbeat], now: float) -> list[tuple[Heartbeat, str]]:
    """The ranks that the others wait for, each with what is wrong with it.

    Ranks without a sign of life come first; else those at the lowest step, and among them those that do not compute.
    """
    silent = [(beat, "shows no life") for beat in beats if beat.is_silent(now)]
    if silent or not beats:
        return silent
    lowest = min(beat.step for beat in beats)
    behind = [beat for beat in beats if beat.step == lowest]
    elsewhere = [beat for beat in behind if beat.phase == "data"]
    if len(behind) == len(beats) and not elsewhere:
        return [(beat, "waits in the same collective as all others") for beat in beats]
    return [(beat, "is making no progress") for beat in (elsewhere or behind)]


def unreachable(beats: list[Heartbeat], host: str) -> list[tuple[Heartbeat, str]]:
    """The hosts that do not answer ``host`` over the network, each by its first rank."""
    others = list({beat.host: beat for beat in reversed(beats) if beat.host != host}.values())[::-1]

    def problem(beat: Heartbeat) -> str | None:
        try:
            socket.create_connection((beat.address[0], beat.address[1]), timeout=ANSWER_SECONDS).close()
            return None
        except OSError as error:
            return f"does not answer {host} at {beat.address[0]} ({error.strerror or 'timed out'})"

    with ThreadPoolExecutor(64) as pool:
        return [(beat, what) for beat, what in zip(others, pool.map(problem, others), strict=True) if what]


class Watchdog:
    """One rank's heartbeat and its eye on the others, while the ``with`` block lasts.

    Args:
        folder: where heartbeats lie, on a file system that all ranks share.
        ranks: of this run.
        step: updates made so far.
        hang_minutes: no progress for this long ends the run.
        end: called with the message when it does; by default the process reports it and exits with status 1.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, step: int, hang_minutes: float, end: Callable[[str], None] | None = None
    ):
        self.folder, self.hang = folder, hang_minutes * 60
        self.end = end or self._end
        now, every = time.time(), min(BEAT_SECONDS, self.hang / 6)
        self._since = time.monotonic()  # of the last progress, less what this process was stopped
        # Never accepted from: the kernel answers, however stuck this process is.
        self.door = socket.create_server((_address(), 0), backlog=1024)
        where = self.door.getsockname()[:2]
        self.beat = Heartbeat(ranks.rank, socket.gethostname(), os.getpid(), step, "start", now, now, every, [], where)
        self.started_at = step
        self._silent: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.door.close()
        self._write()

    def note(self, phase: str, step: int, keys: list[str] | None = None) -> None:
        """Progress: this rank now does ``phase`` (see PHASES) at ``step``."""
        self.beat.phase, self.beat.step, self._since = phase, step, time.monotonic()
        if keys is not None:
            self.beat.keys = keys[:8]

    def touch(self) -> None:
        """Progress within a phase."""
        self._since = time.monotonic()

    def _write(self) -> None:
        self.beat.beat = time.time()
        self.beat.since = self.beat.beat - (time.monotonic() - self._since)  # by the clock as it is now
        with contextlib.suppress(OSError):  # a full disk must not end what saves report
            write_text(self.folder / f"rank_{self.beat.rank:05d}.json", json.dumps(asdict(self.beat)))

    def _bound(self) -> float:
        return self.hang if self.beat.step > self.started_at else max(self.hang, START_MINUTES * 60)

    def _pause(self) -> bool:
        """Wait until the next heartbeat is due and write it; whether the watch has ended meanwhile.

        What it takes longer than that, the whole process was stopped (SIGSTOP, a machine that sleeps), and the others, as a
        rule, with it: no time in which anything could have gone on.
        """
        slept = time.monotonic()
        if self._stop.wait(self.beat.every):
            return True
        overslept = time.monotonic() - slept - self.beat.every
        if overslept > self.beat.every:
            self._since += overslept
        self._write()
        return False

    def _watch(self) -> None:
        while not self._pause():
            if time.monotonic() - self._since > self._bound():
                beats = self._observed()
                still = time.monotonic() - self._since
                if self._stop.is_set() or still <= self._bound():
                    continue  # it has gone on after all
                self.end(self.verdict(still, beats))
                return

    def _observed(self) -> list[Heartbeat]:
        """The heartbeats, after a while of watching: who has renewed its own is alive, whatever its host's clock says."""
        before = {beat.rank: beat.beat for beat in read_heartbeats(self.folder)}
        for _ in range(MISSED_BEATS):
            self._pause()
        now = time.time()
        found = read_heartbeats(self.folder)
        for beat in found:
            renewed = beat.rank == self.beat.rank or beat.beat != before.get(beat.rank)
            beat.beat = now if renewed else -math.inf
        return found

    def verdict(self, still: float, beats: list[Heartbeat]) -> str:
        """One message on a run that has made no progress for ``still`` seconds."""
        self._silent = {beat.rank for beat in beats if beat.is_silent(time.time())}
        found = laggards(beats, time.time())
        if not self._silent:
            found = unreachable(beats, self.beat.host) or found
        named = "; ".join(f"{beat.place} {what}" for beat, what in found[:4])
        more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
        return (
            f"no progress for {still:.0f} s (train.hang_minutes={self.hang / 60:g}): {named or 'no heartbeat is readable'}"
            f"{more}. Look at that host; the same command resumes from the last checkpoint"
        )

    def _end(self, message: str) -> None:
        # The lowest rank that is well reports it; the others give it time to.
        beats = read_heartbeats(self.folder)
        reporter = min((beat.rank for beat in beats if beat.rank not in self._silent), default=self.beat.rank)
        if self.beat.rank == reporter:
            note_end(self.folder, "failed", message)
            print(f"mimscale: error: {message}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)
        os._exit(1)


def _address() -> str:
    try:
        return own_address(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    except OSError:
        return "127.0.0.1"


def lost_rank(folder: Path, error: RuntimeError) -> str | None:
    """What to report when a collective broke: which ranks are gone. ``None`` where ``error`` is about something else."""
    text = str(error)
    if not any(sign in text for sign in BROKEN_LINK):
        return None
    time.sleep(1)  # a process that is being killed may be there still
    gone = [beat.place for beat in read_heartbeats(folder) if beat.is_silent(time.time())]
    lost = f"lost {'; '.join(gone[:4])}" if gone else "the link to another rank broke"
    return (
        f"{lost}; the log of that rank or its host says why. The same command resumes from the last checkpoint ({text})"
    )


@dataclass(frozen=True)
class Ending:
    """How a start of a run ended: in which ``state``, with which ``message``, and when (seconds since 1970)."""

    state: str
    message: str
    time: float


def read_end(folder: Path) -> Ending | None:
    """How the last start ended; ``None`` where it has not.

    Raises:
        UnfitFile: the file is damaged.
        OSError: it cannot be read.
    """
    path = folder / "end.json"
    try:
        said = read_json(path, LARGEST_HEARTBEAT)
    except FileNotFoundError:
        return None
    said = said if isinstance(said, dict) else {}
    state, message, when = said.get("state"), said.get("message"), said.get("time", "")
    if not isinstance(state, str) or not isinstance(message, str) or not is_number(when):
        raise UnfitFile(path, "does not say how a run ended")
    return Ending(state, message, float(when))


def forget_end(folder: Path) -> str:
    """Remove how the last start ended, since another has begun; what is damaged is kept by another name.

    Returns:
        What is damaged and where it is kept; empty where nothing is.
    """
    path = folder / "end.json"
    try:
        read_end(folder)
    except OSError as error:
        return f"{error}; kept as {printable(set_aside(path))}"
    path.unlink(missing_ok=True)
    return ""


def note_end(folder: Path, state: str, message: str) -> None:
    """Record how a start of the run ended, for ``mimscale status``."""
    record = {"state": state, "message": message, "time": time.time(), "pid": os.getpid()}
    with contextlib.suppress(OSError):
        write_text(folder / "end.json", json.dumps(record))
