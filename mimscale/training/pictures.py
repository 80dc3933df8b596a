"""Pictures for people: reconstructions and loss curves, as PNG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from mimscale.files import write_beside

GAP = 4
HEADER = 18


def save_png(image: Image.Image, path: Path) -> None:
    """Write beside and rename, so that a viewer never sees half a picture."""
    with write_beside(path) as beside:
        image.save(beside, format="PNG")


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as 8-bit."""
    return (images.float().clamp(0, 1) * 255).round().byte()


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Grey out what the encoder does not see: images (B, 3, H, W) uint8, mask (B, h, w) True is hidden."""
    scale = images.shape[-2] // mask.shape[-2], images.shape[-1] // mask.shape[-1]
    hidden = mask.repeat_interleave(scale[0], 1).repeat_interleave(scale[1], 2).unsqueeze(1)
    return images.masked_fill(hidden, 127)


def reconstruction_sheet(images: Tensor, mask: Tensor, filled: Tensor) -> Image.Image:
    """One row per image: original, what the encoder sees, and the hidden parts filled in.

    Args:
        images: (B, 3, H, W) uint8.
        mask: (B, h, w) bool, True is hidden.
        filled: (B, 3, H, W) uint8, the visible parts as they are and the hidden ones as predicted.
    """
    columns = [images, hide(images, mask), filled]
    height, width = images.shape[-2:]
    sheet = Image.new("RGB", (3 * width + 4 * GAP, HEADER + len(images) * (height + GAP) + GAP), color=(255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(zip(("original", "seen", "filled in"), columns, strict=True)):
        left = GAP + column * (width + GAP)
        pen.text((left + 2, 3), title, fill=(0, 0, 0))
        for row, picture in enumerate(pictures):
            pixels = np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy())
            sheet.paste(Image.fromarray(pixels), (left, HEADER + GAP + row * (height + GAP)))
    return sheet


def loss_curves(records: list[dict[str, Any]], path: Path, baseline: float | None = None) -> None:
    """Training and validation loss, and the learning rate, against the step.

    Args:
        records: lines of ``metrics.jsonl``.
        path: PNG to write.
        baseline: validation loss of predicting the local mean, drawn as a dashed line.
    """
    from matplotlib.figure import Figure

    train = [r for r in records if "loss" in r]
    validation = [r for r in records if "val_loss" in r]
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], lw=0.8, color="#7a9cc6", label="training loss")
    if validation:
        axes.plot(
            [r["step"] for r in validation],
            [r["val_loss"] for r in validation],
            "o-",
            ms=4,
            color="#c1440e",
            label="validation loss",
        )
    if baseline is not None:
        axes.axhline(baseline, ls="--", lw=1, color="#555555", label="predicting the local mean")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss")
    rate = axes.twinx()
    rate.plot([r["step"] for r in train], [r.get("lr", math.nan) for r in train], lw=0.8, color="#999999", ls=":")
    rate.set_ylabel("learning rate (dotted)", color="#777777")
    rate.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right")
    save_png(figure_image(figure), path)


def figure_image(figure: Any) -> Image.Image:
    """A matplotlib figure as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
