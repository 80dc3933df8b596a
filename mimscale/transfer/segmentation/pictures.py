"""Pictures of segmentations: classes in colours over images, with a legend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mimscale.training.pictures import GAP, HEADER

SHOWN, CELL, LINE = 6, 200, 15
STRENGTH = 0.6
NAMED = 16


def colours(classes: int) -> np.ndarray:
    """A colour a class, uint8 (classes, 3); those of neighbouring numbers differ most."""
    import colorsys

    # Steps of the golden section go round the circle of hues without ever coming close to an earlier one.
    found = [
        colorsys.hsv_to_rgb(number * 0.618034 % 1, (0.85, 0.55)[number // 8 % 2], (0.95, 0.7)[number // 16 % 2])
        for number in range(classes)
    ]
    return np.round(255 * np.array(found)).astype(np.uint8)


def coloured(pixels: np.ndarray, labels: np.ndarray, classes: int) -> Image.Image:
    """Classes over an image.

    Args:
        pixels: uint8 (height, width, 3).
        labels: int (height, width); -1 leaves a pixel black.
        classes: how many there are.
    """
    table = np.concatenate((colours(classes), np.zeros((1, 3), np.uint8)))
    mixed = (1 - STRENGTH) * pixels + STRENGTH * table[labels]
    return Image.fromarray(np.where((labels < 0)[..., None], 0, mixed.round()).astype(np.uint8))


def with_legend(picture: Image.Image, shown: Sequence[int], classes: Sequence[str]) -> Image.Image:
    """A picture with the names of classes below it, in their colours."""
    shown = list(shown)[:NAMED]
    columns = max(1, picture.width // 130)
    height = LINE * -(-len(shown) // columns) + 4
    whole = Image.new("RGB", (picture.width, picture.height + height), (255, 255, 255))
    whole.paste(picture)
    pen, table = ImageDraw.Draw(whole), colours(len(classes))
    for place, number in enumerate(shown):
        left, top = 4 + place % columns * 130, picture.height + 3 + place // columns * LINE
        pen.rectangle((left, top + 2, left + 9, top + 11), fill=tuple(table[number].tolist()))
        pen.text((left + 13, top), classes[number][:18], fill=(0, 0, 0))
    return whole


class SegmentationSheet:
    """The first held-out images: as they are, with their true classes, with the predicted ones."""

    def __init__(self, classes: Sequence[str]):
        self.classes = classes
        self.rows: list[tuple[Image.Image, ...]] = []
        self.seen: dict[int, int] = {}

    @property
    def full(self) -> bool:
        """Whether it takes no more."""
        return len(self.rows) >= SHOWN

    def add(self, pixels: np.ndarray, labels: np.ndarray, said: np.ndarray) -> None:
        """Take an image, uint8 (height, width, 3), with its classes and what was said, (height, width)."""
        count = len(self.classes)
        numbers, pixels_of = np.unique(np.concatenate((labels, said)), return_counts=True)
        for number, many in zip(numbers.tolist(), pixels_of.tolist(), strict=True):
            if number >= 0:
                self.seen[number] = self.seen.get(number, 0) + many
        self.rows.append((Image.fromarray(pixels), coloured(pixels, labels, count), coloured(pixels, said, count)))

    def draw(self) -> Image.Image:
        """The sheet."""
        step = CELL + GAP
        sheet = Image.new("RGB", (2 * 3 * step + GAP, HEADER + -(-len(self.rows) // 2) * step), (255, 255, 255))
        pen = ImageDraw.Draw(sheet)
        for number, row in enumerate(self.rows):
            for column, (picture, title) in enumerate(zip(row, ("image", "true", "said"), strict=True)):
                left, top = GAP + (number % 2 * 3 + column) * step, HEADER + number // 2 * step
                if number < 2:
                    pen.text((left + 2, 3), title, fill=(0, 0, 0))
                scale = CELL / max(picture.size)
                sheet.paste(picture.resize((round(picture.width * scale), round(picture.height * scale))), (left, top))
        largest = sorted(self.seen, key=lambda number: -self.seen[number])
        return with_legend(sheet, sorted(largest[:NAMED]), self.classes)
