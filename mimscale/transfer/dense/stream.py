"""Images with dense targets (boxes and masks, or a class for each pixel), from folders: which comes when, and how it is drawn.

As in :mod:`mimscale.data`, the order is a permutation keyed to (seed, epoch) and everything that is drawn for a training
sample is keyed to its position in the run, ``step * global_batch + i``: neither ranks, nor workers, nor a restart change a
pixel. What one image is, and what is drawn for it, is defined by a subclass of :class:`DenseImages`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from mimscale.data import DamagedSample, SampleOrder, ShardError, draws
from mimscale.data.stream.order import evenly_spread
from mimscale.data.stream.workers import batches, watched


class DenseImages(ABC):
    """One split of a data set in folders.

    Attributes:
        root: what errors name.
        keys: the name of each image; image ``number`` is always the same one.
        build: tells this data from other data: a digest of all that the order and the targets follow from.
        numbers_drawn: uniform numbers that :meth:`sample` takes.
    """

    root: Path
    keys: Sequence[str]
    build: str
    numbers_drawn: ClassVar[int]

    @abstractmethod
    def sample(self, number: int, drawn: np.ndarray, draw_key: int) -> tuple[Tensor, ...]:
        """Image ``number`` augmented for training, with its targets.

        Args:
            number: which image.
            drawn: (numbers_drawn,) uniform in [0, 1); the same for the same position of the run.
            draw_key: non-negative int64 of the position, for code that needs a generator of its own
                (:func:`mimscale.data.stream.labelled.drawing_from`).

        Raises:
            DamagedSample: it cannot be read, or does not go with its targets; another image stands in for it.
        """

    @abstractmethod
    def whole(self, number: int) -> tuple[Tensor, ...]:
        """Image ``number`` for evaluation, with what its evaluation needs; nothing is drawn.

        Raises:
            DamagedSample: it cannot be read, or does not go with its targets.
        """

    def collate(self, samples: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Samples as one tensor each, with the samples as first dimension; targets of varying length get padded here."""
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True))

    # What SampleOrder asks of a data set.

    def samples(self, fraction: str) -> np.ndarray:
        """The numbers of all images."""
        return np.arange(len(self.keys), dtype=np.int64)

    def or_next(self, number: int, make: Any, skipped: list[tuple[str, str]], most: int) -> tuple[int, Any]:
        """``make(number)``, or that of the next image that is not damaged.

        Which one stands in depends on nothing but the image, so every rank, worker and restart finds the same one.

        Args:
            number: which image.
            make: makes something of an image's number.
            skipped: damaged images are added to it, with the reason.
            most: damaged images in a row before giving up.

        Returns:
            The number of the image that was used, and what was made.

        Raises:
            ShardError: too many are damaged.
        """
        for _ in range(min(len(self.keys), most + 1)):
            try:
                return number, make(number)
            except DamagedSample as damage:
                skipped.append((self.keys[number], damage.reason))
            number = (number + 1) % len(self.keys)
        raise self.too_many(dict(skipped), most)

    def too_many(self, damaged: dict[str, str], limit: int) -> ShardError:
        """The error for a data set that is more damaged than it may be."""
        some = "; ".join(f"{key}: {reason}" for key, reason in list(damaged.items())[:5])
        return ShardError(
            f"{self.root}: {len(damaged)} damaged images, over the limit of data.max_damaged={limit}: {some}"
        )


@dataclass
class DenseBatch:
    """One rank's share of one global batch.

    ``tensors`` are the collated samples and, last, int64 ``draw_keys`` (b,) for drop path; ``skipped`` damaged images that
    others stand in for.
    """

    step: int
    tensors: tuple[Tensor, ...]
    keys: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)


class DenseStream:
    """A rank's share of every global batch from ``start_step`` on.

    Args:
        images: the training split.
        seed: of the order and of all draws.
        global_batch: images of a step, over all ranks.
        rank: whose share.
        world_size: how many ranks.
        start_step: the first step.
        stop_step: the step to end before; ``None`` never ends.
        workers: processes that read ahead; 0 reads in this one.
        max_damaged: how many damaged images to pass over before giving up.

    Raises:
        ShardError: while iterating, more damaged images than ``max_damaged``.
    """

    def __init__(
        self,
        images: DenseImages,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
        workers: int = 0,
        max_damaged: int = 100,
    ):
        self.images, self.seed, self.global_batch = images, seed, global_batch
        self.rank, self.world_size = rank, world_size
        self.start_step, self.stop_step = start_step, stop_step
        self.workers, self.max_damaged = workers, max_damaged
        self.order = SampleOrder(cast(Any, images), "100", seed)

    def __getitem__(self, step: int) -> DenseBatch:
        """The rank's share of global batch ``step``: a pure function."""
        share = self.global_batch // self.world_size
        first = step * self.global_batch + self.rank * share
        positions = np.arange(first, first + share, dtype=np.int64)
        drawn = draws.uniforms(self.seed, draws.CROP, positions, self.images.numbers_drawn)
        draw_keys = draws.draw_keys(self.seed, positions)
        samples: list[tuple[Tensor, ...]] = []
        keys: list[str] = []
        skipped: list[tuple[str, str]] = []
        for row, wanted in enumerate(self.order.at(positions).tolist()):

            def make(number: int, row: int = row) -> tuple[Tensor, ...]:
                return self.images.sample(number, drawn[row], int(draw_keys[row]))

            number, sample = self.images.or_next(wanted, make, skipped, self.max_damaged)
            samples.append(sample)
            keys.append(self.images.keys[number])
        tensors = (*self.images.collate(samples), torch.from_numpy(draw_keys))
        return DenseBatch(step, tensors, keys, skipped)

    def __iter__(self) -> Iterator[DenseBatch]:
        made = batches(self, self.start_step, self.stop_step, self.workers)
        return watched(made, self.max_damaged, self.images.too_many)


@dataclass
class HeldOutImage:
    """One image to evaluate on: ``tensors`` as :meth:`DenseImages.whole` gives them.

    ``valid`` is False where it only fills up a rank's turn, because all ranks have to take equally many.
    """

    number: int
    tensors: tuple[Tensor, ...]
    valid: bool
    skipped: list[tuple[str, str]] = field(default_factory=list)


class HeldOutStream:
    """One pass over a split, image by image, since each has a size of its own; every rank takes equally many.

    Args:
        images: the held-out split.
        rank: whose share.
        world_size: how many ranks.
        workers: processes that read ahead; 0 reads in this one.
        limit: take so many images, evenly spread over all; ``None`` takes all.
        max_damaged: how many damaged images to pass over before giving up.

    Raises:
        ShardError: while iterating, more damaged images than ``max_damaged``.
    """

    def __init__(
        self,
        images: DenseImages,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        limit: int | None = None,
        max_damaged: int = 100,
    ):
        self.images, self.rank, self.world_size = images, rank, world_size
        self.workers, self.max_damaged = workers, max_damaged
        self.numbers = evenly_spread(len(images.keys), limit)

    def __len__(self) -> int:
        """Images that each rank takes."""
        return -(-len(self.numbers) // self.world_size)

    def __getitem__(self, turn: int) -> HeldOutImage:
        """The rank's image of a turn."""
        place = turn * self.world_size + self.rank
        wanted = int(self.numbers[min(place, len(self.numbers) - 1)])
        skipped: list[tuple[str, str]] = []
        number, tensors = self.images.or_next(wanted, self.images.whole, skipped, self.max_damaged)
        return HeldOutImage(number, tensors, place < len(self.numbers) and number == wanted, skipped)

    def __iter__(self) -> Iterator[HeldOutImage]:
        return watched(batches(self, 0, len(self), self.workers), self.max_damaged, self.images.too_many)
