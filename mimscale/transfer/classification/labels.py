"""Classes of a data set: which images have which, and how many each class has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mimscale.data import ShardError, ShardIndex

# Classes with more than 100 training images are many-shot, with fewer than 20 few-shot, as usual for long-tailed data.
MANY, FEW = 100, 20


def check_labels(index: ShardIndex, fraction: str) -> np.ndarray:
    """The classes of a fraction's images, int64.

    Raises:
        ShardError: there is no such fraction, or images in it have no class, or one that is not in the list of classes.
    """
    samples = index.samples(fraction)
    labels = index.labels(samples)
    wrong = samples[(labels < 0) | (labels >= len(index.classes))]
    if len(wrong):
        some = ", ".join(f"{index.key(int(sample))} ({index.label(int(sample))})" for sample in wrong[:5])
        raise ShardError(
            f"{len(wrong)} of {len(samples)} images in fraction '{fraction}' have no class among the "
            f"{len(index.classes)} (-1 is unlabelled): {some}; build the shards with labelled images"
        )
    return labels


@dataclass(frozen=True)
class ClassCounts:
    """Training images of each class."""

    images: np.ndarray

    @classmethod
    def of(cls, index: ShardIndex, fraction: str) -> ClassCounts:
        """Count a fraction; raises as :func:`check_labels`."""
        return cls(np.bincount(check_labels(index, fraction), minlength=len(index.classes)))

    @property
    def empty(self) -> list[int]:
        """Classes without a training image."""
        return np.flatnonzero(self.images == 0).tolist()

    def shots(self) -> dict[str, np.ndarray]:
        """Classes that are "many"-, "medium"- and "few"-shot, as bool arrays over the classes; empty ones are in none."""
        many, few = self.images > MANY, (self.images < FEW) & (self.images > 0)
        return {"many": many, "medium": (self.images > 0) & ~many & ~few, "few": few}
