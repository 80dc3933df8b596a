"""What a SwinV2 needs to know of an image size: the moves between token orders and the positions within windows.

Worked out once for each size and device, from sizes alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from mimscale.models.attention import PADDING_PENALTY, REGION_PENALTY, Positions, log_spaced
from mimscale.models.windows import (
    PADDING,
    Move,
    Window,
    clip_window,
    merged_order,
    relative_positions,
    window_order,
    window_regions,
)

if TYPE_CHECKING:
    from mimscale.models.swin_v2 import SwinTransformerV2


@dataclass(frozen=True)
class StagePlan:
    """One stage: index 0 is the unshifted way of cutting windows, which even blocks use, index 1 the shifted.

    Attributes:
        size: of the map, in tokens.
        positions: within the windows.
        moves: to each order, from the other.
        leave: from each order to row by row.
        merge: from each order to the tokens that patch merging joins; empty at the last stage.
    """

    size: tuple[int, int]
    positions: tuple[Positions, Positions]
    moves: tuple[Move, Move]
    leave: tuple[Move, Move]
    merge: tuple[Move, ...]


@dataclass(frozen=True)
class MapPlan:
    """All stages, and the order in which tokens enter the first."""

    enter: Move
    patch_of_token: torch.Tensor
    mask_grid: tuple[int, int]
    stages: list[StagePlan]

    def spread_mask(self, mask: torch.Tensor, images: torch.Size) -> torch.Tensor:
        """Give every token of the first stage the mask of its patch.

        Args:
            mask: (B, H/32, W/32), True = hidden.
            images: shape of the images, for the error.

        Returns:
            (B, L, 1) bool, in the order of the first stage.

        Raises:
            ValueError: a mask of another shape.
        """
        if mask.shape != (images[0], *self.mask_grid):
            raise ValueError(
                f"mask must be {(images[0], *self.mask_grid)} for images {tuple(images)}, not {tuple(mask.shape)}"
            )
        return mask.flatten(1).bool().index_select(1, self.patch_of_token).unsqueeze(-1)


def _positions(window: Window, reference: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Positions:
    offsets, index = relative_positions(window.size)
    regions = window_regions(window)
    penalty = None
    if regions is not None:
        apart = regions[:, :, None] != regions[:, None, :]
        values = np.where(apart, REGION_PENALTY, 0.0)
        values = np.where((regions == PADDING)[:, None, :], PADDING_PENALTY, values)
        penalty = torch.as_tensor(values[:, None], dtype=dtype, device=device)
    spaced = log_spaced(torch.as_tensor(offsets, dtype=dtype, device=device), reference)
    return Positions(spaced, torch.as_tensor(index, device=device), penalty, window.area)


def build_plan(
    encoder: "SwinTransformerV2", grid: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> MapPlan:
    """Work out the plan of a map of ``grid`` tokens; position tables are in ``dtype``."""
    count = len(encoder.depths)
    sizes = [(-(-grid[0] // 2**i), -(-grid[1] // 2**i)) for i in range(count)]
    windows = [[clip_window(*size, encoder.window_size, shifted) for shifted in (False, True)] for size in sizes]
    stages = []
    for i, size in enumerate(sizes):
        orders = [window_order(window) for window in windows[i]]
        rows = np.arange(size[0] * size[1])
        merge: tuple[Move, ...] = ()
        if i + 1 < count:
            target = merged_order(size, windows[i + 1][0])
            merge = (Move(orders[0], target, device), Move(orders[1], target, device))
        plain, shifted = (_positions(window, encoder.references[i], device, dtype) for window in windows[i])
        stages.append(
            StagePlan(
                size,
                (plain, shifted),
                (Move(orders[1], orders[0], device), Move(orders[0], orders[1], device)),
                (Move(orders[0], rows, device), Move(orders[1], rows, device)),
                merge,
            )
        )
    order = window_order(windows[0][0])
    row, column = np.divmod(np.maximum(order, 0), grid[1])
    shrink = 2 ** (count - 1)
    mask_grid = (-(-grid[0] // shrink), -(-grid[1] // shrink))
    patch = (row // shrink) * mask_grid[1] + column // shrink
    enter = Move(np.arange(grid[0] * grid[1]), order, device)
    return MapPlan(enter, torch.as_tensor(patch, device=device), mask_grid, stages)


class PlanCache:
    """Plans of the sizes last seen; a copied or pickled model starts with none."""

    def __init__(self, limit: int = 8):
        self._limit = limit
        self._plans: dict[tuple, MapPlan] = {}

    def get(
        self, encoder: "SwinTransformerV2", grid: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> MapPlan:
        """Return the plan, worked out at the first call for its size, device and dtype."""
        key = (grid, device, dtype)
        if key not in self._plans:
            # A plan made in inference mode could not serve a later training step.
            with torch.inference_mode(False), torch.no_grad():
                plan = build_plan(encoder, grid, device, dtype)
            if isinstance(plan.patch_of_token, FakeTensor):
                return plan  # made under a tracing mode, of no use outside it
            if len(self._plans) >= self._limit:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plan
        return self._plans[key]

    def __deepcopy__(self, memo: dict) -> "PlanCache":
        return PlanCache(self._limit)

    def __reduce__(self) -> tuple:
        return PlanCache, (self._limit,)
