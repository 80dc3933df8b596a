"""Saving beside training: a step waits for the copy to host memory, not for the disk.

Each rank copies its share of the state and continues; a thread writes it. The first rank's thread renames the checkpoint into
place once every rank's share lies there whole, without using the network: a collective from a thread would meet those of the
training. At most one save is under way. What goes wrong is raised on all ranks at the next save or the end.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
from safetensors import SafetensorError
from torch import Tensor

from mimscale.files import write_text
from mimscale.training import checkpoint as checkpoints
from mimscale.training.ranks import Ranks, gather

POLL_SECONDS = 0.05
# Of the host memory that is free; a bigger copy is written straight from the state, as ``train.save: blocking`` does.
COPY_SHARE = 0.5

Shapes = dict[str, tuple[int, ...]]
State = Callable[[Callable[[str], bool]], Iterable[tuple[str, Tensor]]]


@dataclass
class _Save:
    """One save, until it is finished; ``thread`` is ``None`` where training waits for it."""

    step: int
    beside: Path
    shapes: Shapes
    about: dict[str, Any]
    thread: threading.Thread | None = None
    failure: str | None = None
    written: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)


class Saver:
    """Writes a run's checkpoints and removes old ones. All methods are collective, unless they say otherwise.

    Args:
        run: the run folder, on a file system that all ranks share.
        keep: newest whole checkpoints that stay (see :class:`~mimscale.training.checkpoint.Retention`).
        pinned: steps that always stay.
        mode: "async" or "blocking".
        ranks: that save together.
    """

    def __init__(self, run: Path, keep: int, pinned: tuple[int, ...], mode: Literal["async", "blocking"], ranks: Ranks):
        self.run, self.mode, self.ranks = run, mode, ranks
        self.retention = checkpoints.Retention(run, keep, pinned)
        self._save: _Save | None = None

    def save(self, step: int, shapes: Shapes, state: State, about: dict[str, Any]) -> None:
        """Save the state after ``step`` updates: written beside the checkpoints, and renamed into place when it is whole.

        Args:
            step: updates made.
            shapes: whole shape of every parameter.
            state: called with ``keep(name)``; yields this rank's tensors (see ``Engine.full_state``).
            about: further entries of the manifest: recipe, data position, versions.

        Raises:
            CheckpointError: this save, or the one before it, could not be written; earlier checkpoints are untouched.
        """
        self.finish()
        copied = 12 * sum(math.prod(shape) for shape in shapes.values()) / self.ranks.world_size
        fits = copied * self.ranks.local_world_size <= COPY_SHARE * psutil.virtual_memory().available
        beside = self.mode == "async" and all(gather(fits))
        save = self._save = _Save(step, checkpoints.begin(self.run, step), shapes, about)
        owner = checkpoints.owners(shapes, self.ranks.world_size)
        share = state(lambda name: owner[name] == self.ranks.rank)
        if beside:
            copy = list(share)
            save.thread = threading.Thread(target=self._write_and_commit, args=(save, copy), name="saver", daemon=True)
            save.thread.start()
        else:
            self._write(save, share)
            self.finish()

    def has_failed(self) -> bool:
        """Whether this rank's share could not be written; :meth:`finish` raises it. Not collective."""
        return self._save is not None and self._save.failure is not None

    def is_writing(self) -> bool:
        """Whether this rank's thread still writes. Not collective."""
        return self._save is not None and self._save.thread is not None and self._save.thread.is_alive()

    def finish(self) -> None:
        """Wait until nothing is being saved.

        Raises:
            CheckpointError: the save that was under way failed; earlier checkpoints are untouched.
        """
        if (save := self._save) is None:
            return
        save.written.wait()
        failures = [failure for failure in gather(save.failure) if failure]
        if failures:
            save.given_up.set()
        if save.thread is not None:
            save.thread.join()
        elif not failures:
            self._commit(save)
        self._save = None
        failures += [failure for failure in gather(save.failure) if failure and failure not in failures]
        if failures:
            raise checkpoints.cannot_save(self.run, save.step, failures)

    def _write_and_commit(self, save: _Save, copy: list[tuple[str, Tensor]]) -> None:
        self._write(save, copy)
        copy.clear()
        if save.failure is None:
            self._commit(save)

    def _write(self, save: _Save, share: Iterable[tuple[str, Tensor]]) -> None:
        try:
            files = checkpoints.write_chunks(save.beside, self.ranks.rank, share)
            write_text(save.beside / _share(self.ranks.rank), json.dumps(files))
        except (OSError, SafetensorError) as error:
            save.failure = f"rank {self.ranks.rank}: {error}"
        save.written.set()

    def _commit(self, save: _Save) -> None:
        if not self.ranks.is_first:
            return
        shares = [save.beside / _share(rank) for rank in range(self.ranks.world_size)]
        try:
            while not all(share.exists() for share in shares):
                if save.given_up.wait(POLL_SECONDS):
                    shutil.rmtree(save.beside, ignore_errors=True)
                    return
            files = {name: entry for share in shares for name, entry in json.loads(share.read_text()).items()}
            for share in shares:
                share.unlink()
            checkpoints.commit(self.run, save.step, checkpoints.manifest(save.step, save.shapes, files, save.about))
            self.retention.just_written(save.step, files)
            for line in self.retention.apply():
                print(f"damaged checkpoint: {line}", flush=True)
        except (OSError, ValueError) as error:
            save.failure = str(error)


def _share(rank: int) -> str:
    return f"share_{rank:05d}.json"
