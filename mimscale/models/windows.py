"""Where every token sits: windows, shifts, patch merging and relative positions, as integer arrays.

Tokens stay in window order from block to block. A change of shift, a patch merging and the final feature map are each
one gather; within a block nothing moves. Everything here is integers worked out from sizes alone: nothing is a
parameter, and nothing loses precision when a model is cast to bf16.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

PADDING = -1
# What the released code adds to the logits of pairs that the shift must keep apart.
REGION_PENALTY = -100.0
# Large enough to vanish from any softmax, finite so that a window of nothing but padding gives no NaN.
PADDING_PENALTY = -1e4


@dataclass(frozen=True)
class Window:
    """One way of cutting an H x W map of tokens into windows.

    Attributes:
        height: of the map, in tokens.
        width: of the map.
        size: (rows, columns) of a window, clipped to the map.
        shift: (rows, columns) of the cyclic shift; 0 along an axis where one window covers the map.
    """

    height: int
    width: int
    size: tuple[int, int]
    shift: tuple[int, int]

    @property
    def count(self) -> int:
        """Windows in the map, which is padded up to whole windows."""
        return -(-self.height // self.size[0]) * -(-self.width // self.size[1])

    @property
    def area(self) -> int:
        """Tokens in a window."""
        return self.size[0] * self.size[1]


def clip_window(height: int, width: int, window: int, shifted: bool) -> Window:
    """Clip a window to the map: along an axis that fits into one window nothing is cut and nothing shifts."""
    size = (min(window, height), min(window, width))
    shift = (window // 2 if shifted and height > window else 0, window // 2 if shifted and width > window else 0)
    return Window(height, width, size, shift)


def _partition(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut (H, W) into windows: (windows, tokens of a window)."""
    (height, width), (wh, ww) = cells.shape, size
    return cells.reshape(height // wh, wh, width // ww, ww).transpose(0, 2, 1, 3).reshape(-1, wh * ww)


@lru_cache(maxsize=256)
def window_order(window: Window) -> np.ndarray:
    """Map position of each token in window order, (windows * area,); PADDING where the window leaves the map."""
    wh, ww = window.size
    cells = np.arange(window.height * window.width).reshape(window.height, window.width)
    padding = ((0, -window.height % wh), (0, -window.width % ww))
    cells = np.pad(cells, padding, constant_values=PADDING)
    cells = np.roll(cells, (-window.shift[0], -window.shift[1]), axis=(0, 1))
    return _partition(cells, window.size).reshape(-1)


@lru_cache(maxsize=256)
def window_regions(window: Window) -> np.ndarray | None:
    """Label tokens so that only equal labels may attend to each other, (windows, area); PADDING attends to nothing.

    A cyclic shift brings together tokens from opposite edges of the map; the labels keep them apart.

    Returns:
        None where every window holds one region: no shift and no padding.
    """
    order = window_order(window).reshape(window.count, window.area)
    if not any(window.shift) and (order != PADDING).all():
        return None
    rows = -(-window.height // window.size[0]) * window.size[0]
    columns = -(-window.width // window.size[1]) * window.size[1]

    def bands(length: int, size: int, shift: int) -> np.ndarray:
        position = np.arange(length)
        return (position >= length - size).astype(int) + (position >= length - shift) if shift else 0 * position

    cells = 3 * bands(rows, window.size[0], window.shift[0])[:, None] + bands(columns, window.size[1], window.shift[1])
    return np.where(order == PADDING, PADDING, _partition(cells, window.size))


@lru_cache(maxsize=256)
def merged_order(before: tuple[int, int], after: Window) -> np.ndarray:
    """Map positions of the 2 x 2 tokens that become each token of the next stage, (4 * tokens,), four by four.

    The four run down the columns, as the released weights expect: (0, 0), (1, 0), (0, 1), (1, 1). Odd edges are padded.
    """
    height, width = before
    order = window_order(after)
    row, column = np.divmod(np.maximum(order, 0), after.width)
    rows = 2 * row[:, None] + np.array([0, 1, 0, 1])
    columns = 2 * column[:, None] + np.array([0, 0, 1, 1])
    inside = (rows < height) & (columns < width) & (order != PADDING)[:, None]
    return np.where(inside, rows * width + columns, PADDING).reshape(-1)


def relative_positions(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """List the relative positions within a window.

    Args:
        size: (rows, columns) of the window.

    Returns:
        Offsets ((2 * rows - 1) * (2 * columns - 1), 2) and, for every pair of tokens, the row of its offset in that
        table, (area * area,).
    """
    wh, ww = size
    offsets = np.stack(np.meshgrid(np.arange(1 - wh, wh), np.arange(1 - ww, ww), indexing="ij"), axis=-1)
    row, column = np.divmod(np.arange(wh * ww), ww)
    index = (row[:, None] - row[None] + wh - 1) * (2 * ww - 1) + (column[:, None] - column[None] + ww - 1)
    return offsets.reshape(-1, 2), index.reshape(-1)


class Move:
    """Carry tokens (B, L, C) from one order to another.

    Args:
        source: map positions in the present order, PADDING for tokens outside the map.
        target: map positions in the wanted order.
        device: of the tokens.
    """

    def __init__(self, source: np.ndarray, target: np.ndarray, device: torch.device):
        place = np.zeros(max(source.max(), target.max()) + 1, dtype=np.int64)
        inside = source != PADDING
        place[source[inside]] = np.flatnonzero(inside)
        index = np.where(target == PADDING, 0, place[np.maximum(target, 0)])
        self.identity = len(source) == len(target) and bool((source == target).all())
        self.permutes = bool(inside.all() and (target != PADDING).all() and len(source) == len(target))
        self.index = torch.as_tensor(index, device=device)
        self.inverse = torch.as_tensor(np.argsort(index, kind="stable"), device=device) if self.permutes else None
        self.inside = None if self.permutes else torch.as_tensor(target != PADDING, device=device)[None, :, None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Gather (B, L, C) into the wanted order; tokens outside the map become 0."""
        if self.identity:
            return x
        if self.inverse is not None:
            return _Permute.apply(x, self.index, self.inverse)
        # Padding starts at 0 and whatever it becomes is masked as a key and cut off as an output.
        return x.index_select(1, self.index) * self.inside.to(x.dtype)  # type: ignore[union-attr]


class _Permute(torch.autograd.Function):
    """A permutation of tokens, whose gradient is the inverse gather rather than a scatter."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(1, inverse), None, None
