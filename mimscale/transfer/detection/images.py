"""Training crops by large-scale jitter with their boxes and masks, and test images at their own proportions."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from typing_extensions import override

from mimscale.data import DamagedSample
from mimscale.data.decode import read_rgb
from mimscale.data.stream.augment import resize
from mimscale.transfer.dense.scaling import filled, scale_to, scaled_size
from mimscale.transfer.dense.stream import DenseImages
from mimscale.transfer.detection.coco import Instances
from mimscale.transfer.detection.recipe import STRIDE


class DetectionImages(DenseImages):
    """Images with boxes and masks.

    A training image is resized so that it fits into a square of ``size`` times a factor drawn from ``jitter`` (large-scale
    jitter), flipped by chance, cut out of at a place drawn at random where it is larger than ``size``, and padded on the right
    and below where it is smaller. Objects of which nothing is left are dropped; the boxes of the others are drawn tightly
    around what is left of their masks.

    Args:
        instances: the split.
        size: side of the crops, pixels.
        jitter: least and largest factor.
        flip: chance of a flip.
        test_size: for evaluation: the shorter side becomes the first, or the longer one the second, whichever is smaller.
        fill: 8-bit colour of the padding.
    """

    numbers_drawn: ClassVar[int] = 4

    def __init__(
        self,
        instances: Instances,
        size: int,
        jitter: tuple[float, float],
        flip: float,
        test_size: tuple[int, int],
        fill: tuple[int, int, int],
    ):
        self.instances, self.size, self.jitter, self.flip = instances, size, jitter, flip
        self.test_size, self.fill = test_size, fill
        self.root, self.keys, self.build = instances.file, instances.names, instances.build

    def pixels(self, number: int) -> np.ndarray:
        """An image, uint8 (height, width, 3).

        Raises:
            DamagedSample: it cannot be read, or has another size than the annotations say.
        """
        pixels = read_rgb(Path(self.instances.folder) / self.keys[number])
        height, width = self.instances.sizes[number]
        if pixels.shape[:2] != (height, width):
            raise DamagedSample(
                f"it has {pixels.shape[1]} x {pixels.shape[0]} pixels, but {self.instances.file.name} says {width} x {height}"
            )
        return pixels

    @override
    def sample(self, number: int, drawn: np.ndarray, draw_key: int) -> tuple[Tensor, ...]:
        """A training crop.

        Returns:
            The image, uint8 (3, S, S); boxes, fp32 (n, 4), left, top, right, bottom; labels, int64 (n,), from 1 on; masks,
            uint8 (n, S, ceil(S / 8)), eight pixels a byte, the first in the lowest bit.
        """
        pixels = self.pixels(number)
        height, width = pixels.shape[:2]
        least, most = self.jitter
        factor = self.size * (least + (most - least) * drawn[0]) / max(height, width)
        to = scaled_size((height, width), factor)
        top, left = (int(u * (max(0, side - self.size) + 1)) for u, side in zip(drawn[1:3], to, strict=True))
        flips = bool(drawn[3] < self.flip)
        image = resize(pixels, to, "bilinear")
        image = (image.flip(-1) if flips else image)[:, top : top + self.size, left : left + self.size]
        first, last = self.instances.first[number : number + 2].tolist()
        masks = np.zeros((last - first, self.size, self.size), np.uint8)

        def place(points: np.ndarray) -> np.ndarray:
            moved = points * (to[1] / width, to[0] / height)
            if flips:
                moved[:, 0] = to[1] - moved[:, 0]
            return moved - (left, top)

        for row, item in enumerate(range(first, last)):
            mask = self.instances.mask(item, place, (self.size, self.size))
            if mask is None:
                whole = torch.from_numpy(self.instances.runs(item, (height, width)))
                scaled = interpolate(whole[None, None].float(), to, mode="bilinear", antialias=True)[0, 0] >= 0.5
                mask = (scaled.flip(-1) if flips else scaled)[top : top + self.size, left : left + self.size].numpy()
            # Whatever an outline covers beyond the image is not there.
            within = mask[: to[0] - top, : to[1] - left]
            masks[row, : within.shape[0], : within.shape[1]] = within
        seen = masks.any((1, 2))
        masks, labels = masks[seen], self.instances.labels[first:last][seen]
        return (
            filled(image, self.size, self.size, self.fill),
            torch.from_numpy(tight_boxes(masks)),
            torch.from_numpy(labels),
            torch.from_numpy(np.packbits(masks, axis=-1, bitorder="little")),
        )

    def objects(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """An image's true objects at its own size: boxes (n, 4), labels (n,) and masks (n, height, width) uint8."""
        size = (int(self.instances.sizes[number][0]), int(self.instances.sizes[number][1]))
        items = range(*self.instances.first[number : number + 2].tolist())
        masks = np.zeros((len(items), *size), np.uint8)
        for row, item in enumerate(items):
            mask = self.instances.mask(item, lambda points: points, size)
            masks[row] = self.instances.runs(item, size) if mask is None else mask
        seen = masks.any((1, 2))
        labels = torch.from_numpy(self.instances.labels[items.start : items.stop][seen])
        return torch.from_numpy(tight_boxes(masks[seen])), labels, torch.from_numpy(masks[seen])

    @override
    def collate(self, samples: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """As :meth:`sample`, all images filled up to equally many objects, at least one; those that fill up have label 0."""
        images, *targets = zip(*samples, strict=True)
        most = max(1, *(len(labels) for labels in targets[1]))
        padded = [
            torch.stack([pad(part, (0, 0) * (part.ndim - 1) + (0, most - len(part))) for part in parts])
            for parts in targets
        ]
        return torch.stack(images), *padded

    @override
    def whole(self, number: int) -> tuple[Tensor, ...]:
        """An image at test size.

        Returns:
            As :func:`at_test_size`.
        """
        return at_test_size(self.pixels(number), self.test_size, self.fill)


def at_test_size(pixels: np.ndarray, test_size: tuple[int, int], fill: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Pixels, uint8 (height, width, 3), resized for evaluation and padded; see :class:`DetectionImages`.

    Returns:
        The image, uint8 (3, H, W), H and W multiples of 32; int64 (2,), its height and width without the padding.
    """
    size = (pixels.shape[0], pixels.shape[1])
    to = scaled_size(size, scale_to(size, test_size))
    padded = [-(-side // STRIDE) * STRIDE for side in to]
    return filled(resize(pixels, to, "bilinear"), padded[0], padded[1], fill), torch.tensor(to)


def tight_boxes(masks: np.ndarray) -> np.ndarray:
    """Boxes fp32 (n, 4), left, top, right, bottom, around masks (n, H, W), none of them empty."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for row, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes[row] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def unpack_masks(packed: Tensor, width: int) -> Tensor:
    """Masks (..., W / 8) uint8, eight pixels a byte, as (..., width) uint8 of 0 and 1."""
    bits = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> bits) & 1).flatten(-2)[..., :width]
