"""Run many independent tasks over processes, in order, and outlive the processes that get killed."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mimscale.data.errors import ShardError

Task = TypeVar("Task")
Result = TypeVar("Result")

_MAX_DEATHS_IN_A_ROW = 3
_PR_SET_PDEATHSIG = 1


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that has started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _begin() -> None:
    """Workers left behind by a killed build would keep writing beside the build that follows it."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGHUP):  # of the terminal, for the build, which ends them
        signal.signal(number, signal.SIG_IGN)


def run(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """``function(task)`` for every task, results in the order of the tasks.

    A killed worker costs nothing but time: whatever it and its siblings had not returned runs again in a new set of
    processes.

    Args:
        function: a module-level function; it may run more than once for a task.
        tasks: what to run it on.
        workers: processes; 1 runs everything in this one.

    Raises:
        ShardError: processes died three times in a row with nothing finished in between.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("fork")
    waiting: deque[tuple[Any, Future]] = deque()
    source = iter(tasks)
    deaths = 0
    pool = ProcessPoolExecutor(workers, context, _begin)
    try:
        while True:
            try:
                while len(waiting) < 4 * workers:
                    task: Any = next(source, _NOTHING)
                    if task is _NOTHING:
                        break
                    waiting.append((task, Future()))
                    waiting[-1] = (task, pool.submit(function, task))
                if not waiting:
                    return
                result: Result = waiting[0][1].result()
            except BrokenProcessPool:
                deaths += 1
                if deaths >= _MAX_DEATHS_IN_A_ROW:
                    raise ShardError(
                        f"worker processes were killed {deaths} times in a row (out of memory?); "
                        "run it again with fewer --workers"
                    ) from None
                pool.shutdown(wait=False)
                pool = ProcessPoolExecutor(workers, context, _begin)
                waiting = deque((task, _again(pool, function, task, future)) for task, future in waiting)
                continue
            deaths = 0
            waiting.popleft()
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_NOTHING: object = object()


def _again(pool: ProcessPoolExecutor, function: Callable, task: object, future: Future) -> Future:
    """The future itself if it has its result, else a new one for the same task."""
    if future.done() and not future.cancelled() and future.exception() is None:
        return future
    return pool.submit(function, task)
