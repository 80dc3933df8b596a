"""What a SwinV2 needs to know of an image size: the moves between token orders and the positions within windows.

Worked out once for each size and device, from sizes alone.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from mimscale.models.attention import Positions, log_spaced
from mimscale.models.encoder import spread_mask
from mimscale.models.windows import (
    PADDING,
    PADDING_PENALTY,
    REGION_PENALTY,
    Move,
    Window,
    clip_window,
    merged_order,
    relative_positions,
    window_order,
    window_regions,
)
from mimscale.torch_private import is_fake

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class StagePlan:
    """One stage: index 0 is the unshifted way of cutting windows, which even blocks use, index 1 the shifted.

    Attributes:
        size: of the map, in tokens.
        positions: within the windows.
        moves: to each order, from the other.
        enter: from row by row to the unshifted order.
        leave: from each order to row by row.
        merge: from each order to the tokens that patch merging joins; empty at the last stage.
    """

    size: tuple[int, int]
    positions: tuple[Positions, Positions]
    moves: tuple[Move, Move]
    enter: Move
    leave: tuple[Move, Move]
    merge: tuple[Move, ...]


@dataclass(frozen=True)
class MapPlan:
    """All stages, and for each token of the first the token of the last stage that it becomes part of.

    Attributes:
        merged: of each token of the first stage, in its order, the number of that token of the last one.
        merged_grid: rows and columns of the last stage.
        stages: one after the other.
    """

    merged: torch.Tensor
    merged_grid: tuple[int, int]
    stages: list[StagePlan]

    def spread_mask(self, mask: torch.Tensor, images: torch.Size) -> torch.Tensor:
        """Give every token of the first stage the mask of its cell.

        Args:
            mask: (B, h, w), True = masked: a cell is what becomes one token of the last stage, or any whole number of patches.
            images: shape of the images, for the error.

        Returns:
            (B, L, 1) bool, in the order of the first stage.

        Raises:
            ValueError: a mask of another shape.
        """
        if mask.shape == (images[0], *self.merged_grid):
            return mask.flatten(1).bool().index_select(1, self.merged).unsqueeze(-1)
        return self.stages[0].enter(spread_mask(mask, self.stages[0].size, images).flatten(1).unsqueeze(-1))


def _positions(window: Window, reference: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Positions:
    offsets, index = relative_positions(window.size)
    regions = window_regions(window)
    penalty = numbers = None
    if regions is not None:
        apart = regions[:, :, None] != regions[:, None, :]
        values = np.where(apart, REGION_PENALTY, 0.0)
        values = np.where((regions == PADDING)[:, None, :], PADDING_PENALTY, values)
        penalty = torch.as_tensor(values[:, None], dtype=dtype, device=device)
        numbers = torch.as_tensor(regions, dtype=torch.int32, device=device)
    spaced = log_spaced(torch.as_tensor(offsets, dtype=dtype, device=device), reference)
    return Positions(spaced, torch.as_tensor(index, device=device), penalty, window.area, numbers)


def build_stage(
    size: tuple[int, int],
    window: int,
    reference: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    next_order: Window | None = None,
) -> StagePlan:
    """Work out one stage.

    Args:
        size: of its map, in tokens.
        window: of the attention, before clipping.
        reference: window that the position bias was trained in.
        device: of the tokens.
        dtype: of the position tables.
        next_order: unshifted windows of the stage that follows, if one does.
    """
    windows = [clip_window(*size, window, shifted) for shifted in (False, True)]
    plain, shifted = (window_order(cut) for cut in windows)
    rows = np.arange(size[0] * size[1])
    merge: tuple[Move, ...] = ()
    if next_order is not None:
        target = merged_order(size, next_order)
        merge = (Move(plain, target, device), Move(shifted, target, device))
    return StagePlan(
        size,
        (_positions(windows[0], reference, device, dtype), _positions(windows[1], reference, device, dtype)),
        (Move(shifted, plain, device), Move(plain, shifted, device)),
        Move(rows, plain, device),
        (Move(plain, rows, device), Move(shifted, rows, device)),
        merge,
    )


def build_plan(
    grid: tuple[int, int],
    window: int,
    references: Sequence[tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
) -> MapPlan:
    """Work out the plan of a map of ``grid`` tokens and one stage for each of ``references`` (see ``build_stage``)."""
    count = len(references)
    sizes = [(-(-grid[0] // 2**i), -(-grid[1] // 2**i)) for i in range(count)]
    cuts = [clip_window(*size, window, shifted=False) for size in sizes]
    stages = [
        build_stage(size, window, reference, device, dtype, following)
        for size, reference, following in zip(sizes, references, [*cuts[1:], None], strict=True)
    ]
    order = window_order(cuts[0])
    row, column = np.divmod(np.maximum(order, 0), grid[1])
    shrink = 2 ** (count - 1)
    merged_grid = (-(-grid[0] // shrink), -(-grid[1] // shrink))
    merged = (row // shrink) * merged_grid[1] + column // shrink
    return MapPlan(torch.as_tensor(merged, device=device), merged_grid, stages)


class PlanCache:
    """Plans of the sizes last seen; a copied or pickled model starts with none."""

    def __init__(self, limit: int = 8):
        self._limit = limit
        self._plans: dict[Hashable, Any] = {}

    def get(self, key: Hashable, build: Callable[[], Plan]) -> Plan:
        """Return the plan for ``key``, worked out at the first call."""
        if key not in self._plans:
            # A plan made in inference mode could not serve a later training step.
            with torch.inference_mode(False), torch.no_grad():
                plan = build()
            if is_fake(torch.empty(0)):
                return plan  # made under a tracing mode, of no use outside it
            if len(self._plans) >= self._limit:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plan
        return self._plans[key]

    def __deepcopy__(self, memo: dict) -> "PlanCache":
        return PlanCache(self._limit)

    def __reduce__(self) -> tuple:
        return PlanCache, (self._limit,)
