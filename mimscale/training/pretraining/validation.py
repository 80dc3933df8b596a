"""Validation loss: the pre-training objective on held-out images, under a protocol that never changes.

Centre crop, eval mode, one mask per image from a fixed seed, both l1 and l2 reduced in fp64 over the images. The number
depends on the weights and the images alone: not on the world size, the batch, or the run's own seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mimscale.data import ShardIndex, ValidationStream
from mimscale.training.pictures import to_uint8
from mimscale.training.recipe import Recipe
from mimscale.training.task import Evaluator


@dataclass(frozen=True)
class Validation:
    """Losses over all validation images, what predicting the local mean would lose, and some images to look at."""

    l1: float
    l2: float
    baseline_l1: float
    baseline_l2: float
    images: int
    samples: tuple[Tensor, Tensor, Tensor] | None

    def record(self, loss: str) -> dict[str, float]:
        """The figures for ``metrics.jsonl``; ``val_loss`` is the loss that the run trains on."""
        return {
            "val_loss": self.l1 if loss == "l1" else self.l2,
            "val_loss_l1": self.l1,
            "val_loss_l2": self.l2,
            "val_baseline": self.baseline_l1 if loss == "l1" else self.baseline_l2,
        }


def validate(engine: Evaluator, recipe: Recipe, index: ShardIndex) -> Validation | None:
    """Losses on the held-out images; ``None`` when the shards have none. Collective.

    The samples to look at are on the first rank: (original, mask, filled in), uint8 (N, 3, H, W) and bool (N, h, w).
    """
    if "val" not in index.fractions:
        return None
    ranks = engine.ranks
    stream = ValidationStream(
        index,
        image_size=recipe.data.image_size,
        batch_size=recipe.train.validate_batch or 2 * engine.micro,
        rank=ranks.rank,
        world_size=ranks.world_size,
        mask_grid=recipe.mask.grid[0],
        masked=recipe.mask.masked,
        limit=recipe.data.validation_images,
    )
    totals = torch.zeros(5, dtype=torch.float64, device=ranks.device)
    samples: list[tuple[Tensor, Tensor, Tensor]] = []
    wanted = recipe.train.reconstructions if ranks.is_first else 0
    for batch in stream:
        l1, l2, prediction = engine.evaluate(batch.images, batch.mask)
        images, mask = batch.images.to(ranks.device), batch.mask.to(ranks.device)
        zero_l1, zero_l2 = engine.module.baseline(images, mask)  # type: ignore[operator]
        valid = batch.valid.to(ranks.device)
        for slot, value in enumerate((l1, l2, zero_l1, zero_l2, torch.ones_like(l1))):
            # Selected rather than multiplied: a padding row may hold anything.
            totals[slot] += value[valid].double().sum()
        if wanted > 0:
            take = valid.nonzero().flatten()[:wanted]
            filled = engine.module.fill_in(images[take], mask[take], prediction[take])  # type: ignore[operator]
            samples.append((images[take].cpu(), mask[take].cpu(), to_uint8(filled).cpu()))
            wanted -= len(take)
    if ranks.world_size > 1:
        dist.all_reduce(totals)
    l1_sum, l2_sum, zero_l1_sum, zero_l2_sum, count = totals.tolist()
    if not count:
        return None
    shown = tuple(torch.cat(part) for part in zip(*samples, strict=True)) if samples else None
    return Validation(
        l1_sum / count,
        l2_sum / count,
        zero_l1_sum / count,
        zero_l2_sum / count,
        int(count),
        shown,  # type: ignore
    )
