"""Images with a class for each pixel, as semantic segmentation trains and evaluates on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2 import functional as tv
from typing_extensions import override

from mimscale.data.stream.augment import resize
from mimscale.transfer.dense.scaling import filled, scale_to, scaled_size
from mimscale.transfer.dense.stream import DenseImages
from mimscale.transfer.segmentation.label_maps import LabelPictures
from mimscale.transfer.segmentation.upernet import IGNORED

TRIES = 10
# Factor, flip, two a try for the place, nine of the distortion.
FACTOR, FLIP, PLACE, DISTORTION = 0, 1, 2, 2 + 2 * TRIES
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 0.1


def distort(image: Tensor, drawn: np.ndarray) -> Tensor:
    """Photometric distortion, as the reference recipe has it: each of four changes with a chance of one half.

    Brightness by up to 32 of 255; contrast (a factor of all values) by 0.5 to 1.5, before or after saturation by 0.5 to 1.5
    and hue by up to a tenth of the circle. Saturation and hue are torchvision's.

    Args:
        image: uint8 (3, H, W).
        drawn: (9,) uniform in [0, 1).
    """

    def between(number: float, least: float, most: float) -> float:
        return float(least + (most - least) * number)

    def contrast(image: Tensor) -> Tensor:
        return (image.float() * between(drawn[3], *CONTRAST)).round().clamp(0, 255).to(torch.uint8)

    if drawn[0] < 0.5:
        shift = round(between(drawn[1], -BRIGHTNESS, BRIGHTNESS))
        image = (image.to(torch.int16) + shift).clamp(0, 255).to(torch.uint8)
    contrasts, first = drawn[2] < 0.5, drawn[4] < 0.5
    if contrasts and first:
        image = contrast(image)
    if drawn[5] < 0.5:
        image = tv.adjust_saturation(image, between(drawn[6], *SATURATION))
    if drawn[7] < 0.5:
        image = tv.adjust_hue(image, between(drawn[8], -HUE, HUE))
    return contrast(image) if contrasts and not first else image


class SegmentationImages(DenseImages):
    """One split.

    Training: the image at test size times a factor, a crop, a flip, distortion of colours. Where one class would fill more
    than ``one_class`` of what a crop says, another place is tried, up to ten times.

    Args:
        pictures: the split.
        size: side of the crops, pixels.
        jitter: least and largest factor.
        flip: chance of a flip.
        distorts: whether colours are distorted.
        one_class: see above.
        test_size: for evaluation: the shorter side becomes the first, or the longer one the second, whichever is smaller.
        fill: 8-bit colour of the padding.
    """

    numbers_drawn: ClassVar[int] = DISTORTION + 9

    def __init__(
        self,
        pictures: LabelPictures,
        size: int,
        jitter: tuple[float, float],
        flip: float,
        distorts: bool,
        one_class: float,
        test_size: tuple[int, int],
        fill: tuple[int, int, int],
    ):
        self.pictures, self.size, self.jitter, self.flip = pictures, size, jitter, flip
        self.distorts, self.one_class, self.test_size, self.fill = distorts, one_class, test_size, fill
        self.root, self.keys, self.build = pictures.images, pictures.names, pictures.build

    @override
    def sample(self, number: int, drawn: np.ndarray, draw_key: int) -> tuple[Tensor, ...]:
        """A training crop: the image, uint8 (3, S, S), and its labels, int16 (S, S), -1 where nothing is labelled."""
        pixels, labels = self.pictures.read(number)
        before = pixels.shape[:2]
        least, most = self.jitter
        to = scaled_size(before, scale_to(before, self.test_size) * (least + (most - least) * float(drawn[FACTOR])))
        classes = interpolate(torch.from_numpy(labels)[None, None].float(), to, mode="nearest-exact")[0, 0].to(
            torch.int16
        )
        top, left = self._place(classes, drawn[PLACE:DISTORTION])
        there = (slice(top, top + self.size), slice(left, left + self.size))
        image = resize(pixels, to, "bilinear")[:, *there]
        classes = classes[there]
        if drawn[FLIP] < self.flip:
            image, classes = image.flip(-1), classes.flip(-1)
        if self.distorts:
            image = distort(image, drawn[DISTORTION:])
        below, right = self.size - classes.shape[0], self.size - classes.shape[1]
        image = filled(image, self.size, self.size, self.fill)
        return image.contiguous(), pad(classes, (0, right, 0, below), value=IGNORED).contiguous()

    def _place(self, classes: Tensor, drawn: np.ndarray) -> tuple[int, int]:
        """Top and left of a crop."""
        room = [max(0, side - self.size) + 1 for side in classes.shape]
        for attempt in range(TRIES):
            top, left = (int(u * r) for u, r in zip(drawn[2 * attempt : 2 * attempt + 2], room, strict=True))
            said = classes[top : top + self.size, left : left + self.size].flatten() - IGNORED
            counts = torch.bincount(said.int(), minlength=2)[1:]
            if (counts > 0).sum() > 1 and counts.max() < self.one_class * counts.sum():
                break
        return top, left

    @override
    def whole(self, number: int) -> tuple[Tensor, ...]:
        """An image at test size, uint8 (3, H, W), and its labels at its own, int16 (height, width)."""
        pixels, labels = self.pictures.read(number)
        return at_test_size(pixels, self.test_size), torch.from_numpy(labels)


def at_test_size(pixels: np.ndarray, bounds: tuple[int, int]) -> Tensor:
    """Pixels, uint8 (height, width, 3), scaled for evaluation: uint8 (3, H, W)."""
    size = (pixels.shape[0], pixels.shape[1])
    return resize(pixels, scaled_size(size, scale_to(size, bounds)), "bilinear").contiguous()


def places(length: int, window: int, stride: int) -> list[int]:
    """Where windows along one side begin, so that they cover it; the last one ends with it."""
    if length <= window:
        return [0]
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def windows(image: Tensor, window: int, stride: int) -> Iterator[tuple[int, int]]:
    """Top and left of the windows of an image (3, H, W), no smaller than a window."""
    for top in places(image.shape[1], window, stride):
        for left in places(image.shape[2], window, stride):
            yield top, left
