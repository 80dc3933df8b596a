"""Scores of a classifier on held-out images, every image counted once whatever the world size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mimscale.data import EvaluationStream
from mimscale.data.stream.labelled import LabelledBatch

TOP = 5


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of N images.

    Attributes:
        labels: int64 (N,), the true classes.
        top: int64 (N, up to 5), the likeliest classes, best first.
        losses: float64 (N,), cross-entropy without smoothing.
    """

    labels: np.ndarray
    top: np.ndarray
    losses: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool (N,): whether the likeliest class is the true one."""
        return self.top[:, 0] == self.labels

    def figures(self, shots: dict[str, np.ndarray]) -> dict[str, float]:
        """Percentages and loss, for ``metrics.jsonl``.

        Args:
            shots: groups of classes, each bool over the classes; where the images fall into more than one of them, each
                has its own top-1.
        """
        found = {
            "val_top1": 100 * float(self.right.mean()),
            "val_top5": 100 * float((self.top == self.labels[:, None]).any(1).mean()),
            "val_loss": float(self.losses.mean()),
            "val_images": len(self.labels),
        }
        inside = {name: classes[self.labels] for name, classes in shots.items()}
        inside = {name: rows for name, rows in inside.items() if rows.any()}
        if len(inside) > 1:
            found |= {f"val_top1_{name}": 100 * float(self.right[rows].mean()) for name, rows in inside.items()}
        return found

    def worst_classes(self, count: int) -> list[int]:
        """Up to ``count`` classes with the lowest top-1 here, the worst first."""
        present, inverse = np.unique(self.labels, return_inverse=True)
        rates = np.bincount(inverse, weights=self.right) / np.bincount(inverse)
        return present[np.argsort(rates, kind="stable")[:count]].tolist()


def predict(outputs: Iterable[tuple[LabelledBatch, Tensor]], ranks_device: torch.device) -> Predictions | None:
    """Collect the predictions for one pass of an :class:`EvaluationStream`; ``None`` without any image. Collective.

    Args:
        outputs: each batch with its logits (b, classes).
        ranks_device: where the ranks' collectives work.
    """
    rows = []
    for batch, logits in outputs:
        logits = logits.float().cpu()
        losses = torch.nn.functional.cross_entropy(logits.double(), batch.labels.clamp(min=0), reduction="none")
        top = logits.topk(min(TOP, logits.shape[1])).indices
        head = torch.stack((batch.positions, batch.valid.long(), batch.labels), dim=1)
        rows.append(torch.cat((head.double(), losses[:, None], top.double()), dim=1))
    mine = torch.cat(rows)
    if dist.is_initialized() and dist.get_world_size() > 1:
        mine = mine.to(ranks_device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)  # every rank has as many rows: the stream fills batches up
        mine = torch.cat(parts).cpu()
    table = mine.numpy()
    table = table[table[:, 1] == 1]
    table = table[np.argsort(table[:, 0], kind="stable")]
    if not len(table):
        return None
    return Predictions(table[:, 2].astype(np.int64), table[:, 4:].astype(np.int64), table[:, 3])


def read_ahead(stream: EvaluationStream, model: object) -> Iterator[tuple[LabelledBatch, Tensor]]:
    """Each batch of a stream with what ``model(batch)`` makes of it."""
    for batch in stream:
        yield batch, model(batch)  # type: ignore[operator]
