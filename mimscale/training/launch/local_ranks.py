"""The ranks of one machine, where no launcher has started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from mimscale.data.pool import usable_cores
from mimscale.training.faults.preemption import NOTICE, SAME_WISH_SECONDS, exit_status, listen, passed_to
from mimscale.training.launch.rendezvous import free_port

POLL_SECONDS = 0.2
# A rank that fails says why and so do those that wait for it; after this long they are ended.
PATIENCE_SECONDS = 60.0
# After a second wish to stop, which ranks follow at once, those that are left are ended.
HURRY_SECONDS = 5.0


def under_launcher() -> bool:
    """Whether this process was started as one of the ranks of a run."""
    return any(name in os.environ for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"))


def run_ranks(command: Sequence[str], count: int) -> int:
    """Run ``command`` as ``count`` ranks of this machine, and pass on what signals ask them to stop.

    Returns:
        The exit status: 0 where all ranks ended well, else that of the first that did not.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // count))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": threads}
    where |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MIMSCALE_PARENT": str(os.getpid())}
    ranks = _LocalRanks()
    listen()
    passed_to(ranks.pass_on)
    for place in range(count):
        own = {"RANK": str(place), "LOCAL_RANK": str(place)}
        ranks.start([sys.executable, *command], {**os.environ, **where, **own})
    return ranks.wait()


class _LocalRanks:
    """The processes, and what they were asked; signals come from another thread than all else."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.asked: list[tuple[int, float]] = []  # signals and when they came; not SIGUSR1
        self.early: list[subprocess.Popen[bytes]] = []  # SIGUSR1 came before they could hear it
        self.lock = threading.Lock()

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start one more, unless they were asked to stop."""
        with self.lock:
            if not self.asked:
                self.processes.append(subprocess.Popen(command, env=environment))

    def pass_on(self, number: int) -> None:
        """Send a signal to all."""
        with self.lock:
            if number != NOTICE:
                self.asked.append((number, time.monotonic()))
            for process in self.processes:
                if process.poll() is None:
                    self._send(process, number)

    def _send(self, process: subprocess.Popen[bytes], number: int) -> None:
        # SIGTERM ends one that is so young that it does not listen yet. SIGINT would be a traceback, and SIGUSR1 comes ahead
        # of time.
        if _handles(process.pid, signal.SIGTERM):
            process.send_signal(number)
        elif number == NOTICE:
            self.early.append(process)
        else:
            process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end of all, which is near when one has failed or they were asked twice; the status of the whole."""
        status, failed_at = 0, 0.0
        while any(process.poll() is None for process in self.processes):
            failed = next((process.returncode for process in self.processes if process.returncode), 0)
            if failed and not status:
                status, failed_at = failed, time.monotonic()
            if (status and time.monotonic() - failed_at > PATIENCE_SECONDS) or self._is_urgent():
                for process in self.processes:
                    process.kill()
            with self.lock:
                early, self.early = self.early, []
                for process in early:
                    self._send(process, NOTICE)
            time.sleep(POLL_SECONDS)
        status = status or next((process.returncode for process in self.processes if process.returncode), 0)
        if self.asked and (status < 0 or not self.processes):
            reason = signal.Signals(self.asked[0][0]).name
            text = f"mimscale: stopped: stopped by {reason} before its first step; the same command starts it again"
            print(text, file=sys.stderr, flush=True)
            return exit_status(reason)
        return status if status >= 0 else 128 - status

    def _is_urgent(self) -> bool:
        if not self.asked:
            return False
        first = self.asked[0][1]
        second = next((when for _, when in self.asked if when - first > SAME_WISH_SECONDS), None)
        return second is not None and time.monotonic() - second > HURRY_SECONDS


def _handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("SigCgt:") and int(line.split()[1], 16) >> (number - 1) & 1 for line in lines)
