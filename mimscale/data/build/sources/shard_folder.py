"""A shard folder as a source: one of its fractions, to be kept smaller or decoded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mimscale.data import decode
from mimscale.data.build.listing import NO_STRATUM, Found
from mimscale.data.build.source import ScanTask, Source
from mimscale.data.errors import DamagedSample, ShardError
from mimscale.data.shards import fractions
from mimscale.data.shards.format import INDEX_NAME
from mimscale.data.shards.index import ShardIndex


@dataclass(frozen=True)
class ShardPart(ScanTask):
    """The samples of one tar of a shard folder.

    Attributes:
        root: the folder.
        samples: ids of the samples to take, ascending, all in one tar.
        stratum: number of the stratum they keep.
        thorough: decode every image.
    """

    root: Path
    samples: np.ndarray
    stratum: int
    thorough: bool

    def run(self) -> Found:
        """List them."""
        index = ShardIndex.load_unchecked(self.root)
        labels: list[int] = []
        found = Found(str(index.shard_of(int(self.samples[0]))), -1, labels=labels, stratum=self.stratum)
        for sample in self.samples.tolist():
            try:
                data = index.read(sample)
                if not index.intact(sample, data):
                    raise DamagedSample("its bytes are not those that were stored")
                kind = decode.identify(partial(_slice, data), len(data), self.thorough)
            except DamagedSample as error:
                found.rejected.append((f"{found.container}: {index.key(sample)}", str(error)))
                continue
            found.keys.append(index.key(sample).encode())
            found.offsets.append(index.offset(sample))
            found.sizes.append(len(data))
            found.kinds.append(kind)
            labels.append(index.label(sample))
        return found


def _slice(data: bytes, start: int, length: int) -> bytes:
    return data[start : start + length]


class ShardFolder(Source):
    """A fraction of a shard folder. Strata and order are kept, so the fraction has the same name and the same batches.

    Args:
        root: the folder.
        fraction: which of its fractions; of a view, the strata are drawn anew.

    Raises:
        ShardError: it cannot be used, or has no such fraction.
    """

    options = frozenset({"fraction"})

    def __init__(self, root: Path, fraction: str = "100"):
        self.root = root
        self.index = ShardIndex.load(root)
        self.fraction = fraction
        self.samples = self.index.samples(fraction)
        known = [int(name) for name in self.index.content.fractions if name.isdigit()]
        if fraction == "val":
            self.percents: tuple[int, ...] = fractions.FRACTIONS
        elif fraction.isdigit():
            self.percents = tuple(percent for percent in sorted(known) if percent <= int(fraction))
        else:
            self.percents = fractions.FRACTIONS

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A folder with an index."""
        return (path / INDEX_NAME).exists()

    @classmethod
    def open(cls, path: Path, held_out: bool = False, **options: Any) -> ShardFolder:
        """All of it, or its held-out images; or its ``fraction``."""
        return cls(path, **{"fraction": "val" if held_out else "100", **options})

    @property
    def classes(self) -> list[str]:
        """Class names of the folder."""
        return self.index.classes

    def tasks(self, label_of: dict[str, int], thorough: bool = False) -> list[ScanTask]:
        """One task a tar.

        Raises:
            ShardError: other classes than those of ``label_of``.
        """
        if list(label_of) != self.classes:
            raise ShardError(f"{self.root}: its classes are not those of the training images")
        start, tasks = 0, []
        for shard in self.index.shards:
            first, last = np.searchsorted(self.samples, [start, start + shard.samples])
            start += shard.samples
            if last > first:
                keeps = shard.split == "train" and shard.stratum in self.percents and self.fraction.isdigit()
                stratum = self.percents.index(shard.stratum) if keeps else 0 if shard.split == "val" else NO_STRATUM
                tasks.append(ShardPart(self.root, self.samples[first:last], stratum, thorough))
        return list(tasks)
