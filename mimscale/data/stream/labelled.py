"""Images with their classes: fine-tuning's augmentations and evaluation's crops, on the same reader and the same order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from mimscale.data import draws
from mimscale.data.decode import PixelMemory
from mimscale.data.errors import DamagedSample
from mimscale.data.shards.index import ShardIndex
from mimscale.data.stream import augment
from mimscale.data.stream.crops import Batch, CropSpec, CropStream, decode_sample, empty_images, too_many
from mimscale.data.stream.order import evenly_spread
from mimscale.data.stream.workers import batches, watched


@dataclass
class LabelledBatch(Batch):
    """One rank's share of one global batch.

    Attributes:
        step: which global batch.
        images: uint8 (b, 3, S, S), channels innermost in memory.
        labels: int64 (b,); -1 for an image without one.
        keys: the samples' keys.
        positions: int64 (b,), ``step * global_batch + i``; in evaluation, the image's place in its fraction.
        draw_keys: int64 (b,), non-negative; what erasing, mixing and drop path key their draws to.
        valid: bool (b,); False where an evaluation batch was filled up, or the image is damaged.
        skipped: (key, reason) of the damaged samples met on the way.
    """

    step: int
    images: torch.Tensor
    labels: torch.Tensor
    keys: list[str]
    positions: torch.Tensor
    draw_keys: torch.Tensor
    valid: torch.Tensor
    skipped: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def drawing_from(key: int) -> Iterator[None]:
    """Let code that uses the generators of ``random``, numpy and torch (CPU) draw from ``key``; then put them back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        torch.manual_seed(key)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@dataclass(eq=False, repr=False)
class LabelledStream(CropStream):
    """Random-resized crops, flips and timm's rand-augment, with labels, for ever or up to ``stop_step``.

    Everything is keyed to the sample's position in the run, rand-augment's draws included, so batches are the same at
    any world size and worker count. Attributes not listed are those of :class:`CropStream`; crops are of 224 pixels, of 8
    to 100 % of the image and bicubic unless told otherwise.

    Attributes:
        rand_augment: timm's description, such as "rand-m9-mstd0.5-inc1"; None for none.

    Raises:
        ValueError: a batch that does not divide, or a rank outside the world.
        ShardError: no such fraction; while iterating, more damaged samples than ``max_damaged``.
    """

    crops: CropSpec = field(default=CropSpec(224, (0.08, 1.0), interpolation="bicubic"), kw_only=True)
    rand_augment: str | None = field(default="rand-m9-mstd0.5-inc1", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._augment = timm_rand_augment(self.rand_augment, self.crops.image_size) if self.rand_augment else None

    def batch(self, step: int) -> LabelledBatch:
        """The rank's share of global batch ``step``: a pure function.

        Raises:
            ShardError: a sample is damaged and so are the ``max_damaged`` after it, or a tar cannot be opened.
        """
        positions = self.positions(step)
        images, samples, skipped = self.cut(positions)
        keys = draws.draw_keys(self.seed, positions)
        if self._augment is not None:
            for row, key in enumerate(keys.tolist()):
                with drawing_from(key):
                    changed = self._augment(Image.fromarray(images[row].permute(1, 2, 0).numpy()))
                images[row] = torch.from_numpy(np.array(changed)).permute(2, 0, 1)
        return LabelledBatch(
            step,
            images,
            torch.from_numpy(self.index.labels(samples)),
            self.index.keys(samples),
            torch.from_numpy(positions),
            torch.from_numpy(keys),
            torch.ones(len(positions), dtype=torch.bool),
            skipped,
        )


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's posterize on every Pillow: black where no bit is kept, which Pillow before 13 gave and 13 refuses."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


def timm_rand_augment(description: str, image_size: int) -> Any:
    """timm's transform by ``description``, with the parameters of its own training recipes for images of ``image_size`` pixels.

    No bits kept in posterizing are black on every Pillow. It takes and gives pictures of Pillow and draws from the
    generators of ``random`` and numpy, see :func:`drawing_from`.
    """
    from timm.data import auto_augment

    grey = tuple(round(255 * value) for value in (0.485, 0.456, 0.406))
    transform = auto_augment.rand_augment_transform(
        description,
        {"translate_const": int(image_size * 0.45), "img_mean": grey, "interpolation": Image.Resampling.BICUBIC},
    )
    # In this transform's operations only: timm's table of operations stays as it is for others.
    for operation in transform.ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return transform


class Erasing:
    """timm's random erasing on normalised images, each image's draws keyed to its own ``draw_keys`` entry.

    Args:
        probability: of erasing a box of an image.
        mode: "pixel" (noise), "rand" (one colour) or "const" (the mean).
    """

    def __init__(self, probability: float = 0.25, mode: str = "pixel"):
        from timm.data.random_erasing import RandomErasing

        # The noise is drawn on the CPU, so that it is the same on every device.
        self._erase = RandomErasing(probability, mode=mode, device="cpu")

    def __call__(self, images: torch.Tensor, draw_keys: torch.Tensor) -> torch.Tensor:
        """Erase boxes of ``images`` (b, 3, S, S), normalised, in place; returns them."""
        for row, key in enumerate(draw_keys.tolist()):
            # Another stream than rand-augment's for the same image.
            with drawing_from(key ^ 0x5DEECE66D):
                images[row] = self._erase(images[row])
        return images


class EvaluationStream:
    """One pass over a fraction without augmentation: resize the shorter side, cut the centre.

    Every rank gives the same number of batches of the same size; what fills them up, and a damaged image, has
    ``valid`` False.

    Args:
        index: the shard folder.
        fraction: which of its fractions.
        image_size: side of the centre crop, pixels.
        resize_shorter: shorter side before it, pixels; default ``image_size / 0.875`` (256 for 224).
        batch_size: images of one rank's batch.
        rank: whose share.
        world_size: how many ranks.
        workers: processes that read ahead; 0 reads in this one.
        interpolation: "bilinear" or "bicubic", antialiased.
        max_damaged: how many damaged images to pass over before giving up.
        seed: keys the ``draw_keys``.
        limit: take so many images, evenly spread over all; ``None`` takes all. An image keeps its position among all.

    Raises:
        ShardError: no such fraction; while iterating, more damaged images than ``max_damaged``.
        ValueError: a rank or batch size that does not fit.
    """

    def __init__(
        self,
        index: ShardIndex,
        fraction: str = "val",
        image_size: int = 224,
        batch_size: int = 64,
        rank: int = 0,
        world_size: int = 1,
        *,
        resize_shorter: int | None = None,
        workers: int = 0,
        interpolation: str = "bicubic",
        max_damaged: int = 100,
        seed: int = 0,
        limit: int | None = None,
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
        self.resize_shorter = augment.shorter_side(image_size, resize_shorter)
        self.workers, self.interpolation, self.max_damaged, self.seed = workers, interpolation, max_damaged, seed
        samples = index.samples(fraction)
        self.places = evenly_spread(len(samples), limit)
        self.samples = samples[self.places]
        self._memory = PixelMemory()

    def __len__(self) -> int:
        """Batches of each rank."""
        return -(-len(self.samples) // (self.batch_size * self.world_size))

    def __getitem__(self, step: int) -> LabelledBatch:
        """The rank's share of batch ``step``."""
        first = (step * self.world_size + self.rank) * self.batch_size
        turns = np.arange(first, first + self.batch_size, dtype=np.int64)
        images = empty_images(self.batch_size, self.image_size).zero_()
        valid = turns < len(self.samples)
        last = np.minimum(turns, len(self.samples) - 1)
        samples, positions = self.samples[last], np.where(valid, self.places[last], turns)
        skipped = []
        for row in np.flatnonzero(valid):
            try:
                pixels = decode_sample(self.index, int(samples[row]), self._memory)
            except DamagedSample as damage:
                skipped.append((self.index.key(int(samples[row])), damage.reason))
                valid[row] = False
                continue
            images[row] = augment.resize_and_centre_crop(
                pixels, self.resize_shorter, self.image_size, self.interpolation
            )
        return LabelledBatch(
            step,
            images,
            torch.from_numpy(self.index.labels(samples)),
            self.index.keys(samples),
            torch.from_numpy(positions),
            torch.from_numpy(draws.draw_keys(self.seed, positions)),
            torch.from_numpy(valid),
            skipped,
        )

    def __iter__(self) -> Iterator[Any]:
        return watched(batches(self, 0, len(self), self.workers), self.max_damaged, too_many)
