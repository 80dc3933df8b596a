"""Erasing, mixup and cutmix whose draws belong to the images' places in the run."""

from __future__ import annotations

import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from mimscale.data import Erasing
from mimscale.data.stream.labelled import drawing_from

# Another stream than those of rand-augment and erasing for the same image.
_MIXING = 0x2545F4914F6CDD1D


class Mixing:
    """timm's erasing, mixup and cutmix, on a rank's share of a global batch.

    An image's partner is its neighbour: images 2k and 2k + 1 of the global batch are mixed with each other, each by
    amounts of its own (timm's mode "elem"), drawn from the pair's key. A pair is never split over ranks, so a batch is
    the same at any world size, micro-batch, and after every resume; the order of a run is a permutation, so neighbours are
    as random as any other partner.

    Args:
        classes: how many there are.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        label_smoothing: mass that is spread over all classes.
        erasing: probability of erasing a box of an image, before it is mixed.
    """

    def __init__(self, classes: int, mixup: float, cutmix: float, label_smoothing: float, erasing: float):
        self.classes, self.label_smoothing = classes, label_smoothing
        self.erase = Erasing(erasing) if erasing else None
        self.mix = None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, mode="elem", label_smoothing=label_smoothing, num_classes=classes)

    def __call__(self, images: Tensor, labels: Tensor, draw_keys: Tensor) -> tuple[Tensor, Tensor]:
        """Erase and mix.

        Args:
            images: (b, 3, S, S) fp32, normalised; changed in place. b is even where images are mixed.
            labels: (b,) int64, on the same device.
            draw_keys: (b,) int64, on the CPU.

        Returns:
            Images, and targets (b, classes) fp32 whose rows sum to 1.
        """
        if self.erase is not None:
            images = self.erase(images, draw_keys)
        if self.mix is None:
            return images, mixup_target(labels, self.classes, 1.0, self.label_smoothing)
        targets = []
        for pair in range(0, len(images), 2):
            with drawing_from(int(draw_keys[pair]) ^ _MIXING):
                targets.append(self.mix(images[pair : pair + 2], labels[pair : pair + 2])[1])
        return images, torch.cat(targets)
