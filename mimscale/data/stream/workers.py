"""Batches made ahead by other processes, in order, with the same result as making them here."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from torch.utils.data import DataLoader, Sampler

from mimscale.data.errors import ShardError
from mimscale.data.pool import die_with_parent
from mimscale.data.stream.hand_over import Piped, hand_over, notice, take_over
from mimscale.torch_private import end_workers, keep_signals_from, worker_processes

log = logging.getLogger(__name__)

_AHEAD = 4
# Seconds in which a killed process has been taken down by the kernel, its memory included.
_ENDING = 5.0


class Steps(Protocol):
    """Anything that makes the batch of a step."""

    def __getitem__(self, step: int) -> Any:
        """The batch of that step."""
        ...


class _Skips(Protocol):
    skipped: list[tuple[str, str]]


Made = TypeVar("Made", bound=_Skips)


class _StepNumbers(Sampler):
    def __init__(self, start: int, stop: int | None):
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(itertools.count(self.start) if self.stop is None else range(self.start, self.stop))


def batches(steps: Steps, start: int, stop: int | None, workers: int) -> Generator[Any, None, None]:
    """``steps[start]``, ``steps[start + 1]``, ... up to ``stop``, made by ``workers`` processes (0: by this one).

    The processes end when the iterator is closed or collected.

    Raises:
        ShardError: whatever the making of a batch raised as such, or a worker process was killed.
    """
    if workers == 0:
        for step in _StepNumbers(start, stop):
            yield steps[step]
        return
    loader: DataLoader[Any] = DataLoader(
        _Caught(steps),  # type: ignore[arg-type]
        batch_size=None,
        sampler=_StepNumbers(start, stop),
        num_workers=workers,
        prefetch_factor=_AHEAD,
        worker_init_fn=partial(_begin, cores_for(workers), _outlives_its_threads()),
    )
    iterator: Any = iter(loader)
    # A killed process is then noticed when its next batch is due, at the latest 5 seconds later.
    keep_signals_from(iterator)
    told = False
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as error:
                # What a killed process leaves behind is read as any of these, depending on where it was.
                if not _one_ended(worker_processes(iterator)):
                    raise
                raise ShardError(
                    f"a data worker process was killed (out of memory?): {str(error) or type(error).__name__}; "
                    "fewer data workers need less of it"
                ) from None
            if isinstance(batch, ShardError):
                raise batch
            if isinstance(batch, Piped):
                if not told and os.environ.get("LOCAL_RANK", "0") == "0":
                    log.warning("mimscale: %s", notice(batch))
                told = True
                batch = take_over(batch)
            yield batch
    finally:
        # Its processes end when the loader's iterator goes; leaving that to the garbage collector would leave them
        # running.
        end_workers(iterator)
        del iterator


def watched(
    made: Generator[Made, None, None], limit: int, error: Callable[[dict[str, str], int], ShardError]
) -> Generator[Made, None, None]:
    """Batches, each with the (key, reason) of what it ``skipped``, until more than ``limit`` samples were.

    Raises:
        ShardError: ``error(damaged, limit)``, ``damaged`` being the reason for each key.
    """
    damaged: dict[str, str] = {}
    with closing(made):  # a traceback would keep it, and its processes, for as long as it is looked at
        for batch in made:
            damaged.update(batch.skipped)
            if len(damaged) > limit:
                raise error(damaged, limit)
            yield batch


def _one_ended(workers: list[BaseProcess]) -> bool:
    """Whether a process has ended, or does within a moment: the sockets of a killed one close before it counts as ended."""
    return bool(wait([worker.sentinel for worker in workers], timeout=_ENDING))


def cores_for(workers: int) -> list[int]:
    """A core for each worker of this rank, none shared and one left for the rank itself; empty where there are too few.

    Ranks of one node share its cores in the order of LOCAL_RANK.
    """
    cores = sorted(os.sched_getaffinity(0))
    ranks, rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    share = len(cores) // max(ranks, 1)
    if share < workers + 1 or not 0 <= rank < ranks:
        return []
    return cores[rank * share + 1 : rank * share + 1 + workers]


def _outlives_its_threads() -> bool:
    # The kernel takes the end of the thread that has started a process for the end of its parent.
    return threading.current_thread() is threading.main_thread()


def _begin(cores: list[int], with_parent: bool, worker: int) -> None:
    # A job that is told to stop wants its last batches, so that the ranks stop after the same step; workers end with their
    # rank.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if with_parent:
        die_with_parent()
    if cores:
        os.sched_setaffinity(0, {cores[worker]})


class _Caught:
    """Hands batches over, and a ShardError as a value: DataLoader would wrap its message in a traceback."""

    def __init__(self, steps: Steps):
        self.steps = steps

    def __getitem__(self, step: int) -> Any:
        try:
            return hand_over(self.steps[step])
        except ShardError as error:
            return error
