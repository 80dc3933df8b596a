"""The ranks of one machine, where no launcher has started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from mimscale.data.pool import usable_cores
from mimscale.training.launch.rendezvous import free_port

POLL_SECONDS = 0.2
# A rank that fails says why and so do those that wait for it; after this long they are ended.
PATIENCE_SECONDS = 60.0


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
    where |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    for place in range(count):
        own = {"RANK": str(place), "LOCAL_RANK": str(place)}
        ranks.append(subprocess.Popen([sys.executable, *command], env={**os.environ, **where, **own}))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keyboard reaches the ranks by itself
    status, failed_at = 0, 0.0
    while any(rank.poll() is None for rank in ranks):
        failed = next((rank.returncode for rank in ranks if rank.returncode), 0)
        if failed and not status:
            status, failed_at = failed, time.monotonic()
        if status and time.monotonic() - failed_at > PATIENCE_SECONDS:
            for rank in ranks:
                rank.kill()
        time.sleep(POLL_SECONDS)
    status = status or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return status if status >= 0 else 128 - status
