"""From decoded pixels to what the model sees: crop boxes, resizes. All on uint8; the device normalises."""

from __future__ import annotations

import math

import numpy as np
import torch

from mimscale.torch_private import antialiased_resize

TRIES = 10
# Two numbers a try (area, aspect) and two for the place.
DRAWS_PER_CROP = 2 * TRIES + 2


def crop_box(
    numbers: np.ndarray, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop box, from given uniform numbers.

    Args:
        numbers: (DRAWS_PER_CROP,) uniform in [0, 1).
        height: of the image, pixels.
        width: of the image, pixels.
        scale: area of the crop, as a share of the image, least and most.
        ratio: width / height of the crop, least and most; drawn uniformly in its logarithm.

    Returns:
        (top, left, height, width). If ten tries do not fit: the largest centred box with a ratio inside the bounds.
    """
    area = height * width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    values = numbers.tolist()
    for attempt in range(TRIES):
        target = area * (scale[0] + (scale[1] - scale[0]) * values[2 * attempt])
        aspect = math.exp(log_low + (log_high - log_low) * values[2 * attempt + 1])
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(values[-2] * (height - h + 1)), int(values[-1] * (width - w + 1)), h, w
    if width < ratio[0] * height:
        w, h = width, round(width / ratio[0])
    elif width > ratio[1] * height:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    h, w = max(1, min(h, height)), max(1, min(w, width))
    return (height - h) // 2, (width - w) // 2, h, w


RESIZES = {name: antialiased_resize(name) for name in ("bilinear", "bicubic")}


def resize_into(images: torch.Tensor, pixels: np.ndarray, interpolation: str) -> None:
    """Antialiased resize of uint8 (height, width, 3) to the size of ``images`` and into it.

    Args:
        images: uint8 (1, 3, H, W), channels innermost in memory.
        pixels: need not be contiguous.
        interpolation: "bilinear" or "bicubic".
    """
    # With strides that read as channels-last the resize leaves channels innermost, and turning them outwards costs as
    # much as half the resize. numpy arranges them in a fraction of the time that torch takes.
    source = torch.from_numpy(pixels[None].transpose(0, 3, 1, 2))
    size = images.shape[2:]
    if pixels.shape[:2] == size:
        images.copy_(source)
    else:
        RESIZES[interpolation](source, size, False, out=images)


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Antialiased resize of uint8 (height, width, 3).

    Returns:
        uint8 (3, *size), channels innermost in memory.
    """
    images = torch.empty((1, *size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    resize_into(images, pixels, interpolation)
    return images[0]


def shorter_side(image_size: int, resize_shorter: int | None = None) -> int:
    """What evaluation resizes an image's shorter side to before it cuts the centre: 256 for 224, unless told otherwise."""
    return resize_shorter or round(image_size / 0.875)


def resize_and_centre_crop(pixels: np.ndarray, shorter: int, size: int, interpolation: str) -> torch.Tensor:
    """Shorter side to ``shorter`` pixels, then the centred ``size`` x ``size`` box, as torchvision does it.

    Returns:
        uint8 (3, size, size).
    """
    height, width = pixels.shape[:2]
    if height <= width:
        to = (shorter, int(shorter * width / height))
    else:
        to = (int(shorter * height / width), shorter)
    image = resize(pixels, to, interpolation)
    top, left = round((to[0] - size) / 2), round((to[1] - size) / 2)
    return image[:, top : top + size, left : left + size]
