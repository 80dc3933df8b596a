"""Saving beside training: a step waits for the copy to host memory, not for the disk.

Each rank copies its share of the state and goes on; a thread writes it. The first rank's thread renames the checkpoint into
place once every rank's share lies there whole, without a word over the network: a collective from a thread would meet those
of the training. At most one save is under way. What goes wrong is raised on all ranks at the next save or the end.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import psutil
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from mimscale.files import write_text
from mimscale.training import checkpoint as checkpoints
from mimscale.training.ranks import first_only, gather

POLL_SECONDS = 0.05
# Of the host memory that is free; a bigger copy is written straight from the state, as ``train.save: blocking`` does.
COPY_SHARE = 0.5

State = Callable[[Callable[[str], bool]], Iterable[tuple[str, Tensor]]]


class Saver:
    """Writes a run's checkpoints and removes old ones. All methods are collective.

    Args:
        run: the run folder.
        keep: newest checkpoints that stay.
        pinned: steps that always stay.
        mode: "async" or "blocking".
    """

    def __init__(self, run: Path, keep: int, pinned: tuple[int, ...], mode: Literal["async", "blocking"]):
        self.run, self.keep, self.pinned, self.mode = run, keep, pinned, mode
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._thread: threading.Thread | None = None
        self._written, self._given_up = threading.Event(), threading.Event()
        self._failure: str | None = None
        self._step = 0

    def save(self, step: int, shapes: dict[str, tuple[int, ...]], state: State, about: dict[str, Any]) -> None:
        """Save the state after ``step`` updates; arguments as in :func:`mimscale.training.checkpoint.save`.

        Raises:
            CheckpointError: this save, or the one before it, could not be written.
        """
        self.finish()
        copied = 12 * sum(_numel(shape) for shape in shapes.values()) / self.world_size
        local = int(about["trained_with"]["local_ranks"])
        fits = copied * local <= COPY_SHARE * psutil.virtual_memory().available
        if self.mode == "blocking" or not all(gather(fits)):
            checkpoints.save(self.run, step, shapes, state, about)
            first_only(lambda: checkpoints.rotate(self.run, self.keep, self.pinned))
            return
        beside = checkpoints.begin(self.run, step)
        owner = checkpoints.owners(shapes, self.world_size)
        copy = list(state(lambda name: owner[name] == self.rank))
        self._step, self._failure = step, None
        self._written, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._write, args=(beside, copy, shapes, about), name="saver", daemon=True
        )
        self._thread.start()

    def has_failed(self) -> bool:
        """Whether this rank's share could not be written; :meth:`finish` raises it. Not collective."""
        return self._thread is not None and self._failure is not None

    def is_writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait until nothing is being saved.

        Raises:
            CheckpointError: the save that was under way failed; earlier checkpoints are untouched.
        """
        if self._thread is None:
            return
        self._written.wait()
        failures = [failure for failure in gather(self._failure) if failure]
        if failures:
            self._given_up.set()
        self._thread.join()
        self._thread = None
        failures += [failure for failure in gather(self._failure) if failure and failure not in failures]
        if failures:
            raise checkpoints.cannot_save(self.run, self._step, failures)

    def _write(
        self, beside: Path, copy: list[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], about: dict[str, Any]
    ) -> None:
        try:
            files = checkpoints.write_chunks(beside, self.rank, copy)
            write_text(beside / _share(self.rank), json.dumps(files))
        except (OSError, SafetensorError) as error:
            self._failure = f"rank {self.rank}: {error}"
        copy.clear()
        self._written.set()
        if self.rank == 0 and self._failure is None:
            try:
                self._commit(beside, shapes, about)
            except (OSError, ValueError) as error:
                self._failure = str(error)

    def _commit(self, beside: Path, shapes: dict[str, tuple[int, ...]], about: dict[str, Any]) -> None:
        shares = [beside / _share(rank) for rank in range(self.world_size)]
        while not all(share.exists() for share in shares):
            if self._given_up.wait(POLL_SECONDS):
                shutil.rmtree(beside, ignore_errors=True)
                return
        files = {name: entry for share in shares for name, entry in json.loads(share.read_text()).items()}
        for share in shares:
            share.unlink()
        checkpoints.commit(self.run, self._step, checkpoints.manifest(self._step, shapes, files, about))
        checkpoints.rotate(self.run, self.keep, self.pinned)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _share(rank: int) -> str:
    return f"share_{rank:05d}.json"
