"""Which images are in the 10 %, the 20 %, the 50 %: nested, per class, seeded (section 3.3 and Table 2 of the paper).

Inside each class a seeded permutation ranks the images. A fraction takes the first k of every class, where k is
within 1 of the fraction of the class and all k together are exactly the rounded fraction of the whole. A larger
fraction never takes fewer of any class, so 10 lies inside 20 inside 50 inside 100.
"""

from __future__ import annotations

import numpy as np

from mimscale.data import draws

# Percent, ascending. The last is everything.
FRACTIONS = (10, 20, 50, 100)


def class_counts(sizes: np.ndarray, percents: tuple[int, ...] = FRACTIONS, seed: int = 0) -> np.ndarray:
    """How many images of each class each fraction takes.

    Args:
        sizes: (classes,) images in each class.
        percents: fractions in percent, ascending.
        seed: decides which classes round up.

    Returns:
        int64 (len(percents), classes): rows never decrease from one to the next; row r sums to round(percents[r] /
        100 * total).
    """
    sizes = np.asarray(sizes, np.int64)
    # Class c's image of rank j stands at (j + start_c) / size_c. With the starts spread evenly over (0, 1), cutting
    # all classes at the same place takes nearly the right total; the rest of the work is to make it exactly right.
    start = (draws.permutation(len(sizes), seed, draws.CLASSES).astype(np.float64) + 0.5) / max(len(sizes), 1)
    taken = np.zeros(len(sizes), np.int64)
    rows = []
    for percent in percents:
        # Integers throughout: 0.1 has no exact float, and floor(0.1 * 30) must be 3.
        low, high = percent * sizes // 100, -(-percent * sizes // 100)
        total = round(percent * int(sizes.sum()) / 100)
        lower, upper = np.maximum(low, taken), high
        wanted = np.clip(np.ceil(percent / 100 * sizes - start).astype(np.int64), lower, upper)
        missing = total - int(wanted.sum())
        # Whose next (or last) image stands nearest to the cut gives way first. A class whose earlier fraction rounded
        # up may hold more than this fraction's share; only if no class is left with room inside its bounds are those
        # bounds let go.
        for floor, ceiling in ((lower, upper), (taken, sizes)):
            if missing > 0:
                room = np.flatnonzero(wanted < ceiling)
                nearest = room[np.argsort((wanted[room] + start[room]) / sizes[room], kind="stable")]
                wanted[nearest[:missing]] += 1
            elif missing < 0:
                room = np.flatnonzero(wanted > floor)
                nearest = room[np.argsort(-(wanted[room] - 1 + start[room]) / sizes[room], kind="stable")]
                wanted[nearest[:-missing]] -= 1
            missing = total - int(wanted.sum())
        rows.append(wanted)
        taken = wanted
    return np.stack(rows)


def assign(labels: np.ndarray, percents: tuple[int, ...] = FRACTIONS, seed: int = 0) -> np.ndarray:
    """The stratum of every image: s if it is in fraction ``percents[s]`` and in none before it.

    Args:
        labels: (N,) class of each image, 0 and up.
        percents: fractions in percent, ascending.
        seed: the same seed and labels give the same strata.

    Returns:
        int8 (N,); images beyond the last fraction (when that is not 100) get ``len(percents)``.
    """
    labels = np.asarray(labels)
    sizes = np.bincount(labels, minlength=int(labels.max(initial=-1)) + 1)
    counts = class_counts(sizes, percents, seed)
    strata = np.empty(len(labels), np.int8)
    by_class = np.argsort(labels, kind="stable")
    ends = np.cumsum(sizes)
    for label in np.flatnonzero(sizes):
        members = by_class[ends[label] - sizes[label] : ends[label]]
        shuffled = members[draws.permutation(len(members), seed, draws.SAMPLING, int(label))]
        strata[shuffled] = np.searchsorted(counts[:, label], np.arange(len(members)), side="right")
    return strata


def hold_out(labels: np.ndarray, percent: int, seed: int = 0) -> np.ndarray:
    """Which images are kept from training: ``percent`` of each class, as near as whole images allow, and never all of one.

    Args:
        labels: (N,) class of each image, 0 and up.
        percent: 1 to 99.
        seed: the same seed and labels give the same images.

    Returns:
        bool (N,), True = held out.
    """
    labels = np.asarray(labels)
    sizes = np.bincount(labels, minlength=int(labels.max(initial=-1)) + 1)
    counts = np.minimum(class_counts(sizes, (percent,), seed)[0], np.maximum(sizes - 1, 0))
    held = np.zeros(len(labels), bool)
    by_class = np.argsort(labels, kind="stable")
    ends = np.cumsum(sizes)
    for label in np.flatnonzero(counts):
        members = by_class[ends[label] - sizes[label] : ends[label]]
        held[members[draws.permutation(len(members), seed, draws.HELD_OUT, int(label))[: counts[label]]]] = True
    return held


def pick_classes(count: int, of: int, seed: int) -> np.ndarray:
    """``count`` of ``of`` classes, drawn by seed, ascending (ImageNet-100 is 100 of 1,000)."""
    return np.sort(draws.permutation(of, seed, draws.CLASSES, count)[:count].astype(np.int64))
