"""Held-out images, always with the same pixels and masks, so that validation losses of any two runs can be compared."""

from __future__ import annotations

import torch

from mimscale.data import draws
from mimscale.data.shards.index import ShardIndex
from mimscale.data.stream.labelled import EvaluationStream
from mimscale.data.stream.mim import MIMBatch, mask_shape

VALIDATION_SEED = 20_220_609


class ValidationStream(EvaluationStream):
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
        masked: masked cells of each image; default 60 %, rounded up.
        workers: processes that read ahead; 0 reads in this one.
        max_damaged: how many damaged images to pass over before giving up.
        limit: take so many images, evenly spread over all; ``None`` takes all. Each keeps its mask.

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
        masked: int | None = None,
        workers: int = 0,
        max_damaged: int = 100,
        limit: int | None = None,
    ):
        super().__init__(
            index,
            "val",
            image_size,
            batch_size,
            rank,
            world_size,
            resize_shorter=image_size,
            workers=workers,
            interpolation="bilinear",
            max_damaged=max_damaged,
            seed=seed,
            limit=limit,
        )
        self.mask_grid, self.masked = mask_shape(image_size, mask_grid, masked)

    def __getitem__(self, step: int) -> MIMBatch:  # type: ignore[override]
        """The rank's share of batch ``step``."""
        plain = super().__getitem__(step)
        masks = draws.random_masks(self.seed, plain.positions.numpy(), self.mask_grid, self.masked)
        return MIMBatch(
            step,
            plain.images,
            torch.from_numpy(masks),
            plain.keys,
            plain.positions,
            plain.draw_keys,
            plain.valid,
            plain.skipped,
        )
