"""Pictures of detections: boxes, masks and names drawn on images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from mimscale.training.pictures import GAP, HEADER
from mimscale.transfer.detection.scores import Detections

SHOWN, COLUMNS, CELL = 6, 2, 240
# Less likely ones would hide the picture.
LEAST = 0.3


def colour(label: int) -> tuple[int, int, int]:
    """A class's colour; hues of neighbouring numbers lie far apart."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def drawn(pixels: np.ndarray, boxes: Tensor, labels: Tensor, masks: Tensor, words: Sequence[str]) -> Image.Image:
    """Objects on an image, uint8 (height, width, 3); ``words`` has one word for each."""
    picture = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    if len(labels):
        colours = [colour(label) for label in labels.tolist()]
        picture = draw_segmentation_masks(picture, masks, alpha=0.45, colors=colours)
        picture = draw_bounding_boxes(
            picture,
            boxes,
            list(words),
            colours,
            width=2,
            label_colors="white",
            label_background_colors=colours,
            fill_labels=True,
        )
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def drawn_detections(pixels: np.ndarray, found: Detections, classes: Sequence[str]) -> Image.Image:
    """Detections on an image, unlikely ones left out."""
    found = found.above(LEAST)
    pairs = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    words = [f"{classes[label - 1]} {score:.0%}" for label, score in pairs]
    return drawn(pixels, found.boxes, found.labels, found.masks, words)


class DetectionSheet:
    """The first held-out images, each with its true objects on the left and those found on the right."""

    def __init__(self) -> None:
        self.rows: list[tuple[Image.Image, Image.Image]] = []

    @property
    def full(self) -> bool:
        """Whether it takes no more."""
        return len(self.rows) >= SHOWN

    def draw(self) -> Image.Image:
        """The sheet."""
        width = 2 * CELL + 2 * GAP
        small = [tuple(shrunk(picture) for picture in pair) for pair in self.rows]
        lines = [small[first : first + COLUMNS] for first in range(0, len(small), COLUMNS)]
        heights = [max(pair[0].height for pair in line) for line in lines]
        sheet = Image.new(
            "RGB", (COLUMNS * width + GAP, HEADER + sum(heights) + GAP * (len(lines) + 1)), (255, 255, 255)
        )
        pen = ImageDraw.Draw(sheet)
        top = HEADER + GAP
        for line, height in zip(lines, heights, strict=True):
            for column, pair in enumerate(line):
                for side, (picture, title) in enumerate(
                    zip(pair, ("true", f"found ({LEAST:.0%} or more)"), strict=True)
                ):
                    left = GAP + column * width + side * (CELL + GAP)
                    sheet.paste(picture, (left, top))
                    if line is lines[0]:
                        pen.text((left + 2, 3), title, fill=(0, 0, 0))
            top += height + GAP
        return sheet


def shrunk(picture: Image.Image) -> Image.Image:
    """A picture with a longer side of CELL pixels."""
    scale = CELL / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
