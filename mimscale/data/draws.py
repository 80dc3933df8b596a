"""Randomness that belongs to a place, not to a process.

Every draw is a hash of (seed, purpose, position, number of the draw), where the position is that of the sample in the
whole run: ``step * global_batch + i``. Rank, worker, micro-batch and restart do not enter, so none of them can change
a pixel. The hash is SplitMix64's finaliser, applied to whole arrays: a batch of draws costs microseconds, and the
numbers do not depend on the release of any library.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# One constant a purpose, so that no two purposes ever share numbers.
ORDER, CROP, FLIP, MASK, DRAW_KEY, SAMPLING, SHUFFLE, CLASSES, WINDOW, HELD_OUT = range(1, 11)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def _finalise(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function over an uint64 array (wrapping arithmetic)."""
    x = (x ^ (x >> _SHIFT_1)) * _MIX_1
    x = (x ^ (x >> _SHIFT_2)) * _MIX_2
    return x ^ (x >> _SHIFT_3)


@lru_cache(maxsize=256)
def _key(seed: int, purpose: int, *more: int) -> np.ndarray:
    """An array of one uint64 that stands for a seed, a purpose and whatever else separates two streams.

    A run asks for the same few again and again, and for a small batch they would cost as much as its draws.
    """
    key = np.zeros(1, np.uint64)
    for part in (seed, purpose, *more):
        key = _finalise(key * _GOLDEN + np.asarray([part & 0xFFFFFFFFFFFFFFFF], np.uint64) + _GOLDEN)
    key.flags.writeable = False
    return key


def bits(seed: int, purpose: int, count: int, *more: int) -> np.ndarray:
    """``count`` hashed uint64, numbers 0 to count-1 of the stream (seed, purpose, *more)."""
    return _finalise((np.arange(count, dtype=np.uint64) + np.uint64(1)) * _GOLDEN ^ _key(seed, purpose, *more))


def uniforms(seed: int, purpose: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, shape (len(positions), count): row r belongs to ``positions[r]`` alone."""
    rows = _finalise((np.asarray(positions).astype(np.uint64) + np.uint64(1)) * _GOLDEN ^ _key(seed, purpose))
    numbers = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
    return (_finalise(rows[:, None] + numbers[None, :]) >> np.uint64(11)) * (1.0 / (1 << 53))


def draw_keys(seed: int, positions: np.ndarray) -> np.ndarray:
    """Non-negative int64, one a position: what the model keys its own draws (drop path) to. Shape (len(positions),)."""
    rows = _finalise((np.asarray(positions).astype(np.uint64) + np.uint64(1)) * _GOLDEN ^ _key(seed, DRAW_KEY))
    return (rows >> np.uint64(1)).astype(np.int64)


def permutation(count: int, seed: int, purpose: int, *more: int) -> np.ndarray:
    """A seeded permutation of range(count): uint32 below 2^32 elements, to halve what 14 million samples cost."""
    order = np.argsort(bits(seed, purpose, count, *more), kind="stable")
    return order.astype(np.uint32 if count < 1 << 32 else np.int64)


def random_masks(seed: int, positions: np.ndarray, grid: int, masked: int) -> np.ndarray:
    """Masks of exactly ``masked`` masked cells each, drawn without replacement.

    Returns:
        bool (len(positions), grid, grid), True = masked.
    """
    cells = uniforms(seed, MASK, positions, grid * grid)
    chosen = np.argsort(cells, axis=1, kind="stable")[:, :masked]
    masks = np.zeros(cells.shape, bool)
    np.put_along_axis(masks, chosen, True, axis=1)
    return masks.reshape(len(positions), grid, grid)
