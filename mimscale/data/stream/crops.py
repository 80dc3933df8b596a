"""Training crops in the order of a run: what every stream of augmented images shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch

from mimscale.data import decode, draws
from mimscale.data.errors import DamagedSample, ShardError
from mimscale.data.shards.index import ShardIndex
from mimscale.data.shards.remote import FetchAhead
from mimscale.data.shards.store import PIXELS
from mimscale.data.stream import augment
from mimscale.data.stream.nvimgcodec import CropDecoder
from mimscale.data.stream.order import SampleOrder
from mimscale.data.stream.workers import batches, watched
from mimscale.wording import printable

LIBJPEG_TURBO, NVIMGCODEC = "libjpeg-turbo", "nvimgcodec"


def empty_images(count: int, size: int) -> torch.Tensor:
    """uint8 (count, 3, size, size) with channels innermost in memory, as decoders and resizes leave them."""
    # numpy's memory is that of the batch before last, where torch's aligned one would be new pages each time.
    return torch.from_numpy(np.empty((count, size, size, 3), np.uint8)).permute(0, 3, 1, 2)


def stored_bytes(index: ShardIndex, sample: int) -> memoryview:
    """The bytes of a sample's image, held against the CRC-32 that the build stored.

    So a JPEG that libjpeg-turbo complains of was like that in its source: ImageNet has some, with stray bytes before the
    end, and Pillow's reading of them stands.

    Raises:
        DamagedSample: the bytes are not the ones stored.
        ShardError: the tar cannot be opened.
    """
    # Stored pixels are mapped: most of them are read once, by the resize.
    data = index.view(sample).data if index.content.store == PIXELS else index.read_view(sample)
    if not index.intact(sample, data):
        raise DamagedSample(f"{index.shard_of(sample)}: its bytes are not those that were stored")
    return data


def decode_sample(index: ShardIndex, sample: int, memory: decode.PixelMemory | None = None) -> np.ndarray:
    """A sample's pixels, uint8 (height, width, 3).

    Args:
        index: the shard folder.
        sample: its id.
        memory: to decode into; then the pixels are good until it is used again.

    Raises:
        DamagedSample: the bytes are not the ones stored, or are no image.
        ShardError: the tar cannot be opened.
    """
    data = stored_bytes(index, sample)
    return decode.decode_pixels(data) if index.content.store == PIXELS else decode.decode_rgb(data, memory)


class Batch:
    """What the batches of all streams can do."""

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory, for copies that do not wait."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.pin_memory())
        return self


@dataclass(frozen=True)
class CropSpec:
    """What a training crop is, and who decodes it.

    Attributes:
        image_size: side of the crops, pixels.
        crop_scale: area of a crop as a share of the image, least and most.
        crop_ratio: width / height of a crop, least and most.
        flip: chance of a mirror image.
        interpolation: "bilinear" or "bicubic", antialiased.
        decoder: "libjpeg-turbo", or "nvimgcodec" for a GPU's JPEG engine.
        device: where nvimgcodec decodes and the images are to lie; other than "cpu" only with no worker processes.

    Raises:
        ValueError: another kind of interpolation or decoder, or a device that goes with neither.
    """

    image_size: int = 192
    crop_scale: tuple[float, float] = (0.67, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bilinear"
    decoder: str = LIBJPEG_TURBO
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.interpolation not in augment.RESIZES:
            raise ValueError(f"interpolation={self.interpolation!r} must be {' or '.join(map(repr, augment.RESIZES))}")
        if self.decoder not in (LIBJPEG_TURBO, NVIMGCODEC):
            raise ValueError(f"decoder={self.decoder!r} must be {LIBJPEG_TURBO!r} or {NVIMGCODEC!r}")
        if self.device != "cpu" and self.decoder != NVIMGCODEC:
            raise ValueError(_device_error(self.device))

    @classmethod
    def of(cls, settings: Any, **changes: Any) -> CropSpec:
        """The spec whose values are attributes of ``settings``, such as a recipe's data section; defaults for the others."""
        found = {key.name: getattr(settings, key.name) for key in fields(cls) if hasattr(settings, key.name)}
        return cls(**{**found, **changes})


def _device_error(device: str) -> str:
    return f"device={device!r} goes with decoder={NVIMGCODEC!r} and workers=0: the rank itself decodes there"


@dataclass(eq=False, repr=False)
class CropStream(ABC):
    """Random crops of one fraction: a rank's share of one global batch a step, for ever or up to ``stop_step``.

    The crop and flip of a sample are keyed to its position in the run. So the pixels at a position do not depend on
    rank, world size, worker count or where the run was resumed. A kind of stream defines :meth:`batch`.

    Attributes:
        index: the shard folder.
        fraction: which of its fractions.
        seed: keys the order and every draw.
        image_size: side of the crops, pixels; ``None`` for that of ``crops``.
        global_batch: samples a step over all ranks.
        rank: whose share.
        world_size: how many ranks.
        start_step: first step to give.
        workers: processes that read ahead; 0 reads in this one. Does not change the batches.
        crops: what a crop is.
        stop_step: end before this step.
        max_damaged: how many distinct damaged samples to pass over before giving up.
        shuffle: "full" or "window", see :class:`SampleOrder`.
        window: shards that a window shuffle mixes.

    Raises:
        ValueError: a batch that does not divide, or a rank outside the world.
        ShardError: no such fraction; while iterating, more damaged samples than ``max_damaged``.
    """

    index: ShardIndex
    fraction: str = "100"
    seed: int = 0
    image_size: int | None = None
    global_batch: int = 64
    rank: int = 0
    world_size: int = 1
    start_step: int = 0
    workers: int = 0
    _: KW_ONLY
    crops: CropSpec = CropSpec()
    stop_step: int | None = None
    max_damaged: int = 100
    shuffle: str = "full"
    window: int = 16

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} is not one of world_size={self.world_size} ranks")
        if self.global_batch < 1 or self.global_batch % self.world_size:
            raise ValueError(
                f"global_batch={self.global_batch} does not divide over world_size={self.world_size} ranks"
            )
        if self.image_size is not None:
            self.crops = replace(self.crops, image_size=self.image_size)
        if self.crops.device != "cpu" and self.workers:
            raise ValueError(_device_error(self.crops.device))
        self._on_device: CropDecoder | None = None
        self._memory = decode.PixelMemory()
        self.order = SampleOrder(self.index, self.fraction, self.seed, shuffle=self.shuffle, window=self.window)

    @abstractmethod
    def batch(self, step: int) -> Any:
        """The rank's share of global batch ``step``: a pure function."""

    def __getitem__(self, step: int) -> Any:
        return self.batch(step)

    def cut(self, positions: np.ndarray) -> tuple[torch.Tensor, np.ndarray, list[tuple[str, str]]]:
        """The augmented images at positions of the run.

        Returns:
            Images, uint8 (b, 3, S, S); the ids of the samples they are of; (key, reason) of damaged ones passed over.

        Raises:
            ShardError: a sample is damaged and so are the ``max_damaged`` after it, or a tar cannot be opened.
        """
        spec = self.crops
        samples = self.order.at(positions)
        numbers = draws.uniforms(self.seed, draws.CROP, positions, augment.DRAWS_PER_CROP)
        flips = draws.uniforms(self.seed, draws.FLIP, positions, 1)[:, 0] < spec.flip
        images = empty_images(len(positions), spec.image_size).to(spec.device)
        skipped: list[tuple[str, str]] = []
        done = self._decode_on_device(samples, numbers, flips, images) if spec.decoder == NVIMGCODEC else set()
        # One image at a time, each still a batch of one: that is what the resize takes.
        for row, place in enumerate(images.split(1)):
            if row in done:
                continue
            samples[row], pixels = self._decode_or_next(int(samples[row]), skipped)
            height, width, _ = pixels.shape
            top, left, h, w = augment.crop_box(numbers[row], height, width, spec.crop_scale, spec.crop_ratio)
            image = place if spec.device == "cpu" else empty_images(1, spec.image_size)
            augment.resize_into(image, pixels[top : top + h, left : left + w], spec.interpolation)
            if flips[row] or image is not place:
                place.copy_(image.flip(-1) if flips[row] else image)
        return images, samples, skipped

    def _decode_on_device(
        self, samples: np.ndarray, numbers: np.ndarray, flips: np.ndarray, images: torch.Tensor
    ) -> set[int]:
        """Fill the rows of ``images`` whose samples nvImageCodec decodes; returns these rows. The rest goes the usual way."""
        spec = self.crops
        if self._on_device is None:
            self._on_device = CropDecoder(spec.device)
        rows, files, boxes = [], [], []
        for row, sample in enumerate(samples.tolist()):
            try:
                data = bytes(stored_bytes(self.index, sample))
                height, width = decode.jpeg_size(data)
            except (DamagedSample, ValueError):
                continue
            rows.append(row)
            files.append(data)
            boxes.append(augment.crop_box(numbers[row], height, width, spec.crop_scale, spec.crop_ratio))
        decoded = self._on_device.crops(files, boxes, spec.image_size, spec.interpolation)
        for row, image in zip(rows, decoded, strict=True):
            if image is not None:
                images[row] = image.flip(-1) if flips[row] else image
        return {row for row, image in zip(rows, decoded, strict=True) if image is not None}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": None, "_memory": decode.PixelMemory()}

    def positions(self, step: int) -> np.ndarray:
        """Positions in the run of the rank's share of a step, int64."""
        share = self.global_batch // self.world_size
        first = step * self.global_batch + self.rank * share
        return np.arange(first, first + share, dtype=np.int64)

    def _decode_or_next(self, sample: int, skipped: list[tuple[str, str]]) -> tuple[int, np.ndarray]:
        """A sample and its pixels, or those of the next in the fraction's own order that decodes.

        The replacement depends on nothing but the sample, so every rank, worker and restart finds the same one.
        """
        everyone = self.order.samples
        place = -1
        for _ in range(min(len(everyone), self.max_damaged + 1)):
            try:
                return sample, decode_sample(self.index, sample, self._memory)
            except DamagedSample as damage:
                skipped.append((self.index.key(sample), damage.reason))
            if place < 0:
                place = int(np.searchsorted(everyone, sample))
            place = (place + 1) % len(everyone)
            sample = int(everyone[place])
        raise too_many(dict(skipped), self.max_damaged)

    def _shards_of(self, step: int) -> list[int]:
        return np.unique(self.index.shard_numbers(self.order.at(self.positions(step)))).tolist()

    def __iter__(self) -> Iterator[Any]:
        ahead = FetchAhead(self.index.fetch, self._shards_of, self.start_step, self.stop_step)
        try:
            made = batches(self, self.start_step, self.stop_step, self.workers)
            for batch in watched(made, self.max_damaged, too_many):
                if self.index.cache is not None:
                    # Not before the first batch: by then the workers are forked, and no thread of ours holds a lock.
                    ahead.reached(batch.step)
                yield batch
        finally:
            ahead.end()


def too_many(damaged: dict[str, str], limit: int) -> ShardError:
    """The error for a data set that is more damaged than it may be."""
    some = "; ".join(f"{printable(key)}: {printable(reason)}" for key, reason in list(damaged.items())[:5])
    return ShardError(
        f"{len(damaged)} damaged samples, over the limit of {limit} (mimscale shards verify names all). "
        f"Some of them: {some}"
    )
