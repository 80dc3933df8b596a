"""Held-out images, always with the same pixels and masks, so that validation losses of any two runs can be compared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mimscale.data import augment, draws
from mimscale.data.errors import DamagedSample
from mimscale.data.index import ShardIndex
from mimscale.data.stream import MIMBatch, decode_sample, empty_images, mask_shape, too_many
from mimscale.data.workers import batches

VALIDATION_SEED = 20_220_609


class ValidationStream:
    """One pass over the split "val": centre crops, one fixed mask an image.

    Every rank gives the same number of batches of the same size, because a sharded model's forward pass needs all
    ranks; what fills them up has ``valid`` False, and so has a damaged image (replacing it would count another image
    twice).

    Args:
        index: the shard folder.
        image_size: side of the centre crop, pixels; the shorter side is resized to the same.
        batch_size: images of one rank's batch.
        rank: whose share.
        world_size: how many ranks.
        seed: keys the masks, together with the image's number; leave it to compare with others.
        mask_grid: cells a side; default image_size / 32.
        hidden: hidden cells of each image; default 60 %, rounded up.
        workers: processes that read ahead; 0 reads in this one.
        interpolation: "bilinear" or "bicubic", antialiased.
        max_damaged: how many damaged images to pass over before giving up.

    Raises:
        ShardError: no split "val"; while iterating, more damaged images than ``max_damaged``.
        ValueError: a mask or a rank that does not fit.
    """

    def __init__(
        self,
        index: ShardIndex,
        image_size: int = 192,
        batch_size: int = 64,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = VALIDATION_SEED,
        mask_grid: int | None = None,
        hidden: int | None = None,
        workers: int = 0,
        interpolation: str = "bilinear",
        max_damaged: int = 100,
    ):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size={batch_size}, rank={rank} and world_size={world_size} do not go together")
        self.index, self.image_size, self.batch_size, self.rank, self.world_size = (
            index,
            image_size,
            batch_size,
            rank,
            world_size,
        )
        self.seed, self.workers, self.interpolation, self.max_damaged = seed, workers, interpolation, max_damaged
        self.mask_grid, self.hidden = mask_shape(image_size, mask_grid, hidden)
        self.samples = index.samples("val")

    def __len__(self) -> int:
        """Batches of each rank."""
        return -(-len(self.samples) // (self.batch_size * self.world_size))

    def __getitem__(self, step: int) -> MIMBatch:
        """The rank's share of batch ``step``."""
        first = (step * self.world_size + self.rank) * self.batch_size
        positions = np.arange(first, first + self.batch_size, dtype=np.int64)
        images = empty_images(self.batch_size, self.image_size).zero_()
        valid = positions < len(self.samples)
        samples = self.samples[np.minimum(positions, len(self.samples) - 1)]
        skipped = []
        for row in np.flatnonzero(valid):
            try:
                pixels = decode_sample(self.index, int(samples[row]))
            except DamagedSample as damage:
                skipped.append((self.index.key(int(samples[row])), damage.reason))
                valid[row] = False
                continue
            images[row] = augment.resize_and_centre_crop(pixels, self.image_size, self.image_size, self.interpolation)
        return MIMBatch(
            step,
            images,
            torch.from_numpy(draws.hidden_masks(self.seed, positions, self.mask_grid, self.hidden)),
            self.index.keys(samples),
            torch.from_numpy(positions),
            torch.from_numpy(draws.draw_keys(self.seed, positions)),
            torch.from_numpy(valid),
            skipped,
        )

    def __iter__(self) -> Iterator[MIMBatch]:
        damaged: dict[str, str] = {}
        for batch in batches(self, 0, len(self), self.workers):
            damaged.update(batch.skipped)
            if len(damaged) > self.max_damaged:
                raise too_many(damaged, self.max_damaged)
            yield batch
