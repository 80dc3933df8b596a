"""What a model says of whole images, window by window, and mean intersection over union."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mimscale.transfer.dense.scaling import filled
from mimscale.transfer.segmentation.images import windows


def slide(
    model: Callable[[Tensor], tuple[Tensor, ...]],
    image: Tensor,
    window: int,
    stride: int,
    fill: tuple[int, int, int],
    size: tuple[int, int],
) -> Tensor:
    """The class of each pixel: windows' logits, averaged where they overlap. One call of the model an image.

    Args:
        model: gives logits (B, classes, S / 4, S / 4) of windows (B, 3, S, S) uint8, in a tuple.
        image: uint8 (3, H, W) at test size; smaller than a window is filled up.
        window: side S, pixels.
        stride: between windows, pixels.
        fill: 8-bit colour to fill with.
        size: height and width of the answer.

    Returns:
        int64 (height, width) on the CPU.
    """
    height, width = image.shape[1:]
    whole = filled(image, max(window, image.shape[1]), max(window, image.shape[2]), fill)
    places = list(windows(whole, window, stride))
    crops = torch.stack([whole[:, top : top + window, left : left + window] for top, left in places])
    (logits,) = model(crops)
    total = logits.new_zeros(logits.shape[1], *whole.shape[1:])
    times = logits.new_zeros(whole.shape[1:])
    for part, (top, left) in zip(logits, places, strict=True):
        there = (slice(top, top + window), slice(left, left + window))
        total[:, *there] += F.interpolate(part[None], (window, window), mode="bilinear")[0]
        times[there] += 1
    mean = (total / times)[:, :height, :width]
    return F.interpolate(mean[None], size, mode="bilinear")[0].argmax(0).cpu()


@dataclass(frozen=True)
class Confusion:
    """How many pixels of each class (rows) were taken for which (columns), int64 (classes, classes)."""

    pixels: np.ndarray

    @classmethod
    def none(cls, classes: int) -> Confusion:
        """Before the first image."""
        return cls(np.zeros((classes, classes), np.int64))

    def and_image(self, labels: Tensor, said: Tensor) -> Confusion:
        """With one more image: labels (H, W), -1 where nothing is labelled and nothing counts, and what was predicted (H, W)."""
        classes = len(self.pixels)
        counts = labels >= 0
        pairs = labels[counts].long() * classes + said[counts].long()
        found = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
        return Confusion(self.pixels + found.numpy())

    def ious(self) -> np.ndarray:
        """Intersection over union of each class, percent; not a number for one that is neither there nor said to be."""
        hits = np.diag(self.pixels).astype(float)
        union = self.pixels.sum(0) + self.pixels.sum(1) - hits
        return 100 * np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)

    def figures(self) -> dict[str, float]:
        """mIoU, the share of pixels that are right, and its mean over the classes that are there; percent."""
        hits, there = np.diag(self.pixels).astype(float), self.pixels.sum(1)
        if not there.sum():
            return {"val_miou": 0.0, "val_pixel_accuracy": 0.0, "val_class_accuracy": 0.0}
        return {
            "val_miou": float(np.nanmean(self.ious())),
            "val_pixel_accuracy": 100 * float(hits.sum() / there.sum()),
            "val_class_accuracy": 100 * float((hits[there > 0] / there[there > 0]).mean()),
        }
