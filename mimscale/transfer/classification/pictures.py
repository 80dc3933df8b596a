"""Pictures of a classifier's work: a sheet of predictions, and what the worst classes are taken for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mimscale.data.stream.labelled import LabelledBatch
from mimscale.training.pictures import GAP, figure_image
from mimscale.transfer.classification.scores import Predictions

SIDE, COLUMNS, SHOWN = 160, 4, 12
CAPTION = 30
WORST = 12
GREEN, RED = (0, 110, 40), (180, 30, 20)


class PredictionSheet:
    """The first images of a validation with what is predicted of them, true answers in green and wrong ones in red."""

    def __init__(self, classes: Sequence[str], count: int = SHOWN):
        self.classes, self.count = classes, count
        self.cells: list[tuple[np.ndarray, str, str, bool]] = []

    def add(self, batch: LabelledBatch, logits: Tensor) -> None:
        """Take what is still wanted from a batch and its logits (b, classes)."""
        for row in torch.nonzero(batch.valid)[:, 0].tolist()[: max(0, self.count - len(self.cells))]:
            chances = logits[row].float().softmax(0).cpu()
            said, truth = int(chances.argmax()), int(batch.labels[row])
            true_name = self.classes[truth] if truth >= 0 else "?"
            pixels = np.ascontiguousarray(batch.images[row].permute(1, 2, 0).cpu().numpy())
            self.cells.append((pixels, f"{self.classes[said]} {chances[said]:.0%}", true_name, said == truth))

    def draw(self) -> Image.Image:
        """The sheet."""
        rows = -(-max(1, len(self.cells)) // COLUMNS)
        width, height = SIDE + GAP, SIDE + CAPTION + GAP
        sheet = Image.new("RGB", (COLUMNS * width + GAP, rows * height + GAP), (255, 255, 255))
        pen = ImageDraw.Draw(sheet)
        for number, (pixels, said, truth, right) in enumerate(self.cells):
            left, top = GAP + number % COLUMNS * width, GAP + number // COLUMNS * height
            sheet.paste(Image.fromarray(pixels).resize((SIDE, SIDE)), (left, top))
            pen.text((left, top + SIDE + 2), said[:26], fill=GREEN if right else RED)
            pen.text((left, top + SIDE + 15), f"is {truth}"[:26], fill=(60, 60, 60))
        return sheet


def confusion_picture(found: Predictions, classes: Sequence[str]) -> Image.Image:
    """What the classes with the lowest top-1 are taken for, in shares of their images."""
    from matplotlib.figure import Figure

    rows = found.worst_classes(WORST)
    said = found.top[:, 0]
    mistaken_for = np.bincount(said[np.isin(found.labels, rows)], minlength=len(classes))
    others = [c for c in np.argsort(-mistaken_for, kind="stable").tolist() if mistaken_for[c] and c not in rows]
    columns = rows + others[: max(0, WORST + 4 - len(rows))]
    shares = np.array(
        [[((found.labels == r) & (said == c)).sum() / (found.labels == r).sum() for c in columns] for r in rows]
    )
    figure = Figure(figsize=(1.8 + 0.55 * len(columns), 1.6 + 0.42 * len(rows)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if share:
            axes.text(
                column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color="w" if share > 0.5 else "k"
            )
    axes.set_xticks(range(len(columns)), [classes[c][:18] for c in columns], rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), [classes[r][:18] for r in rows], fontsize=7)
    axes.set_xlabel("taken for")
    axes.set_ylabel(f"the {len(rows)} worst classes")
    return figure_image(figure)
