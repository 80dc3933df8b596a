"""Which sample comes when: a pure function of (seed, epoch, position). No I/O, no state that matters."""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np

from mimscale.data import draws
from mimscale.data.errors import ShardError
from mimscale.data.shards.index import ShardIndex


class SampleOrder:
    """The order of the samples of one fraction.

    Position p of the run (``step * global_batch + i``) is element ``p % N`` of epoch ``p // N``, and each epoch is a
    permutation of all N samples keyed by (seed, epoch). A batch may end one epoch and begin the next. Nothing else
    enters, so the global batches are the same at any world size, worker count and accumulation, and a restart needs
    only the step.

    Args:
        index: the shard folder.
        fraction: which of its fractions.
        seed: the order's seed.
        shuffle: "full", or "window" for storage that is slow to open many shards.
        window: shards in a group.

    Raises:
        ShardError: no such fraction, or it is empty.
        ValueError: another kind of shuffle, or a window below 1.
    """

    def __init__(
        self, index: ShardIndex, fraction: str = "10", seed: int = 0, *, shuffle: str = "full", window: int = 16
    ):
        if shuffle not in ("full", "window") or window < 1:
            raise ValueError(
                f"shuffle={shuffle!r} with window={window}: must be 'full', or 'window' with at least 1 shard"
            )
        self.index, self.fraction, self.seed = index, str(fraction), seed
        self.shuffle, self.window = shuffle, window
        self.samples = index.samples(self.fraction)
        if not len(self.samples):
            raise ShardError(f"{index.root}: fraction {fraction} has no samples")
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.samples)

    def __reduce__(self) -> tuple:
        again = partial(SampleOrder, shuffle=self.shuffle, window=self.window)
        return again, (self.index, self.fraction, self.seed)

    def _permutation(self, epoch: int) -> np.ndarray:
        order = draws.permutation(len(self.samples), self.seed, draws.ORDER, epoch)
        if self.shuffle == "full":
            return order
        # Each shard's turn in this epoch, then the fully shuffled samples sorted by the window of their shard's turn.
        shards, of_sample = np.unique(self.index.shard_numbers(self.samples), return_inverse=True)
        turns = draws.permutation(len(shards), self.seed, draws.WINDOW, epoch)
        return order[np.argsort(turns[of_sample][order] // self.window, kind="stable")]

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The sample ids at global positions, int64."""
        positions = np.asarray(positions, np.int64)
        epochs, places = np.divmod(positions, len(self.samples))
        result = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self.samples[self._epoch(int(epoch))[places[here]]]
        return result

    def indices(self, step: int, global_batch: int) -> np.ndarray:
        """The sample ids of a global batch, int64 (global_batch,)."""
        return self.at(np.arange(step * global_batch, (step + 1) * global_batch))

    def batch(self, step: int, global_batch: int) -> list[str]:
        """The sample keys of a global batch."""
        return self.index.keys(self.indices(step, global_batch))


def evenly_spread(total: int, limit: int | None) -> np.ndarray:
    """Which of ``total`` things to take for ``limit`` of them, evenly spread; all for ``None``. int64, ascending."""
    count = total if limit is None else min(limit, total)
    return np.arange(count, dtype=np.int64) * total // max(count, 1)
