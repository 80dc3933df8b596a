"""Batches for masked image modelling: the rank's share of every global batch, augmented and masked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from mimscale.data import augment, decode, draws
from mimscale.data.errors import DamagedSample, ShardError
from mimscale.data.index import ShardIndex
from mimscale.data.order import SampleOrder
from mimscale.data.remote import FetchAhead
from mimscale.data.store import PIXELS
from mimscale.data.workers import batches

PATCH = 32
MASK_RATIO = 0.6


@dataclass
class MIMBatch:
    """One rank's share of one global batch.

    Attributes:
        step: which global batch.
        images: uint8 (b, 3, S, S), channels innermost in memory (``torch.channels_last``).
        mask: bool (b, g, g), True = hidden.
        keys: the samples' keys; where a damaged sample was replaced, the replacement's.
        positions: int64 (b,), ``step * global_batch + i``.
        draw_keys: int64 (b,), non-negative; what the model keys its own draws to.
        valid: bool (b,); False where a validation batch was filled up.
        skipped: (key, reason) of the damaged samples met on the way.
    """

    step: int
    images: torch.Tensor
    mask: torch.Tensor
    keys: list[str]
    positions: torch.Tensor
    draw_keys: torch.Tensor
    valid: torch.Tensor
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def pin_memory(self) -> MIMBatch:
        """The same batch in page-locked memory, for copies that do not wait."""
        for name in ("images", "mask", "positions", "draw_keys", "valid"):
            setattr(self, name, getattr(self, name).pin_memory())
        return self


def empty_images(count: int, size: int) -> torch.Tensor:
    """uint8 (count, 3, size, size) with channels innermost in memory, as decoders and resizes leave them."""
    return torch.empty((count, 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)


def mask_shape(image_size: int, mask_grid: int | None, hidden: int | None) -> tuple[int, int]:
    """(cells a side, hidden cells), with SimMIM's defaults: cells of 32 pixels, 60 % rounded up.

    Raises:
        ValueError: the grid does not fit.
    """
    if image_size < 1:
        raise ValueError(f"image_size={image_size} must be at least 1")
    if mask_grid is None:
        if image_size % PATCH:
            raise ValueError(f"image_size={image_size} is no multiple of {PATCH}; give mask_grid")
        mask_grid = image_size // PATCH
    cells = mask_grid * mask_grid
    if hidden is None:
        # In hundredths: 0.6 has no exact float, and ceil(0.6 * 25) must be 15.
        hidden = -(-round(MASK_RATIO * 100) * cells // 100)
    if mask_grid < 1 or not 0 <= hidden <= cells:
        raise ValueError(f"hidden={hidden} of a {mask_grid} x {mask_grid} grid is not possible")
    return mask_grid, hidden


def decode_sample(index: ShardIndex, sample: int) -> np.ndarray:
    """A sample's pixels, uint8 (height, width, 3).

    A JPEG that libjpeg-turbo complains of is looked at again: if its bytes are those that were stored, the source was
    like that (ImageNet has some, with stray bytes before the end) and Pillow's reading of it stands; if not, the shard
    was damaged.

    Raises:
        DamagedSample: the bytes are not the ones stored, or are no image.
        ShardError: the tar cannot be opened.
    """
    if index.content.store == PIXELS:
        return decode.decode_pixels(index.view(sample))
    data = index.read_view(sample)
    if data[:2] == b"\xff\xd8":
        try:
            return decode.decode_jpeg_strictly(data)
        except DamagedSample:
            raise
        except ValueError:
            pass
    if not index.intact(sample, data):
        raise DamagedSample(f"{index.shard_of(sample)}: its bytes are not those that were stored")
    return decode.decode_leniently(data)


class _MIMSteps:
    """step -> MIMBatch; what a worker process holds."""

    def __init__(self, stream: MIMStream):
        self.stream = stream

    def __getitem__(self, step: int) -> MIMBatch:
        return self.stream.batch(step)


class MIMStream:
    """Iterates over a run's batches, one a step, for ever or up to ``stop_step``.

    The crop, flip and mask of a sample are keyed to its position in the run. So the pixels at a position do not depend
    on rank, world size, worker count or where the run was resumed.

    Args:
        index: the shard folder.
        fraction: which of its fractions.
        seed: keys the order and every draw.
        image_size: side of the crops, pixels.
        global_batch: samples a step over all ranks.
        rank: whose share.
        world_size: how many ranks.
        start_step: first step to give.
        workers: processes that read ahead; 0 reads in this one. Does not change the batches.
        crop_scale: area of a crop as a share of the image, least and most.
        crop_ratio: width / height of a crop, least and most.
        flip: chance of a mirror image.
        interpolation: "bilinear" or "bicubic", antialiased.
        mask_grid: cells a side; default image_size / 32.
        hidden: hidden cells of each image; default 60 %, rounded up.
        max_damaged: how many distinct damaged samples to pass over before giving up.
        stop_step: end before this step.
        shuffle: "full" or "window", see :class:`SampleOrder`.
        window: shards that a window shuffle mixes.

    Raises:
        ValueError: a batch that does not divide, a rank outside the world, or a mask that does not fit.
        ShardError: no such fraction; while iterating, more damaged samples than ``max_damaged``.
    """

    def __init__(
        self,
        index: ShardIndex,
        fraction: str = "10",
        seed: int = 0,
        image_size: int = 192,
        global_batch: int = 64,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        workers: int = 0,
        *,
        crop_scale: tuple[float, float] = (0.67, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: str = "bilinear",
        mask_grid: int | None = None,
        hidden: int | None = None,
        max_damaged: int = 100,
        stop_step: int | None = None,
        shuffle: str = "full",
        window: int = 16,
    ):
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not one of world_size={world_size} ranks")
        if global_batch < 1 or global_batch % world_size:
            raise ValueError(f"global_batch={global_batch} does not divide over world_size={world_size} ranks")
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation={interpolation!r} must be 'bilinear' or 'bicubic'")
        self.index, self.seed, self.image_size = index, seed, image_size
        self.global_batch, self.rank, self.world_size = global_batch, rank, world_size
        self.start_step, self.stop_step, self.workers = start_step, stop_step, workers
        self.crop_scale, self.crop_ratio, self.flip, self.interpolation = crop_scale, crop_ratio, flip, interpolation
        self.mask_grid, self.hidden = mask_shape(image_size, mask_grid, hidden)
        self.max_damaged = max_damaged
        self.order = SampleOrder(index, fraction, seed, shuffle=shuffle, window=window)

    def batch(self, step: int) -> MIMBatch:
        """The rank's share of global batch ``step``: a pure function.

        Raises:
            ShardError: a sample is damaged and so are the ``max_damaged`` after it, or a tar cannot be opened.
        """
        positions = self._positions(step)
        share = len(positions)
        samples = self.order.at(positions)
        crops = draws.uniforms(self.seed, draws.CROP, positions, augment.DRAWS_PER_CROP)
        flips = draws.uniforms(self.seed, draws.FLIP, positions, 1)[:, 0] < self.flip
        images = empty_images(share, self.image_size)
        skipped: list[tuple[str, str]] = []
        for row in range(share):
            samples[row], pixels = self._decode_or_next(int(samples[row]), skipped)
            height, width, _ = pixels.shape
            top, left, h, w = augment.crop_box(crops[row], height, width, self.crop_scale, self.crop_ratio)
            crop = pixels[top : top + h, left : left + w]
            image = augment.resize(crop, (self.image_size, self.image_size), self.interpolation)
            images[row] = image.flip(-1) if flips[row] else image
        return MIMBatch(
            step,
            images,
            torch.from_numpy(draws.hidden_masks(self.seed, positions, self.mask_grid, self.hidden)),
            self.index.keys(samples),
            torch.from_numpy(positions),
            torch.from_numpy(draws.draw_keys(self.seed, positions)),
            torch.ones(share, dtype=torch.bool),
            skipped,
        )

    def _decode_or_next(self, sample: int, skipped: list[tuple[str, str]]) -> tuple[int, np.ndarray]:
        """A sample and its pixels, or those of the next in the fraction's own order that decodes.

        The replacement depends on nothing but the sample, so every rank, worker and restart finds the same one.
        """
        everyone = self.order.samples
        place = -1
        for _ in range(min(len(everyone), self.max_damaged + 1)):
            try:
                return sample, decode_sample(self.index, sample)
            except DamagedSample as damage:
                skipped.append((self.index.key(sample), damage.reason))
            if place < 0:
                place = int(np.searchsorted(everyone, sample))
            place = (place + 1) % len(everyone)
            sample = int(everyone[place])
        raise too_many(dict(skipped), self.max_damaged)

    def _positions(self, step: int) -> np.ndarray:
        share = self.global_batch // self.world_size
        first = step * self.global_batch + self.rank * share
        return np.arange(first, first + share, dtype=np.int64)

    def _shards_of(self, step: int) -> list[int]:
        return np.unique(self.index.shard_numbers(self.order.at(self._positions(step)))).tolist()

    def __iter__(self) -> Iterator[MIMBatch]:
        damaged: dict[str, str] = {}
        ahead = FetchAhead(self.index.fetch, self._shards_of, self.start_step, self.stop_step)
        try:
            for batch in batches(_MIMSteps(self), self.start_step, self.stop_step, self.workers):
                if self.index.cache is not None:
                    # Not before the first batch: by then the workers are forked, and no thread of ours holds a lock.
                    ahead.reached(batch.step)
                damaged.update(batch.skipped)
                if len(damaged) > self.max_damaged:
                    raise too_many(damaged, self.max_damaged)
                yield batch
        finally:
            ahead.end()


def too_many(damaged: dict[str, str], limit: int) -> ShardError:
    """The error for a data set that is more damaged than it may be."""
    some = "; ".join(f"{key}: {reason}" for key, reason in list(damaged.items())[:5])
    return ShardError(
        f"{len(damaged)} damaged samples, over the limit of {limit} (python shards/build.py verify names all). "
        f"Some of them: {some}"
    )
