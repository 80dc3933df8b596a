"""Batches for masked image modelling: the rank's share of every global batch, augmented and masked."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mimscale.data import draws
from mimscale.data.stream.crops import Batch, CropStream
from mimscale.masking import SIMMIM_PATCH, SIMMIM_RATIO, masked_up


@dataclass
class MIMBatch(Batch):
    """One rank's share of one global batch.

    Attributes:
        step: which global batch.
        images: uint8 (b, 3, S, S), channels innermost in memory (``torch.channels_last``).
        mask: bool (b, g, g), True = masked.
        keys: the samples' keys; where a damaged sample was replaced, the replacement's.
        positions: int64 (b,), ``step * global_batch + i``.
        draw_keys: int64 (b,), non-negative; what the model keys its own draws to.
        valid: bool (b,); False where a validation batch was filled up.
        skipped: (key, reason) of the damaged samples met on the way.
    """

    step: int
    images: torch.Tensor
    mask: torch.Tensor
    keys: list[str]
    positions: torch.Tensor
    draw_keys: torch.Tensor
    valid: torch.Tensor
    skipped: list[tuple[str, str]] = field(default_factory=list)


def mask_shape(image_size: int, mask_grid: int | None, masked: int | None) -> tuple[int, int]:
    """(cells a side, masked cells), with SimMIM's defaults: cells of 32 pixels, 60 % rounded up.

    Raises:
        ValueError: the grid does not fit.
    """
    if image_size < 1:
        raise ValueError(f"image_size={image_size} must be at least 1")
    if mask_grid is None:
        if image_size % SIMMIM_PATCH:
            raise ValueError(f"image_size={image_size} is no multiple of {SIMMIM_PATCH}; give mask_grid")
        mask_grid = image_size // SIMMIM_PATCH
    cells = mask_grid * mask_grid
    if masked is None:
        masked = masked_up(cells, SIMMIM_RATIO)
    if mask_grid < 1 or not 0 <= masked <= cells:
        raise ValueError(f"masked={masked} of a {mask_grid} x {mask_grid} grid is not possible")
    return mask_grid, masked


@dataclass(eq=False, repr=False)
class MIMStream(CropStream):
    """Iterates over a run's masked batches, one a step, for ever or up to ``stop_step``.

    Masks are keyed to a sample's position in the run, as its crop is. Attributes not listed are those of
    :class:`CropStream`; crops are SimMIM's unless told otherwise.

    Attributes:
        mask_grid: cells a side; default image_size / 32.
        masked: masked cells of each image; default 60 %, rounded up.

    Raises:
        ValueError: a batch that does not divide, a rank outside the world, or a mask that does not fit.
        ShardError: no such fraction; while iterating, more damaged samples than ``max_damaged``.
    """

    fraction: str = "10"
    mask_grid: int | None = field(default=None, kw_only=True)
    masked: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mask = mask_shape(self.crops.image_size, self.mask_grid, self.masked)

    def batch(self, step: int) -> MIMBatch:
        """The rank's share of global batch ``step``: a pure function.

        Raises:
            ShardError: a sample is damaged and so are the ``max_damaged`` after it, or a tar cannot be opened.
        """
        positions = self.positions(step)
        images, samples, skipped = self.cut(positions)
        return MIMBatch(
            step,
            images,
            torch.from_numpy(draws.random_masks(self.seed, positions, *self._mask)),
            self.index.keys(samples),
            torch.from_numpy(positions),
            torch.from_numpy(draws.draw_keys(self.seed, positions)),
            torch.ones(len(positions), dtype=torch.bool),
            skipped,
        )
