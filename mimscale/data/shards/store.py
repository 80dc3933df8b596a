"""The forms in which images are stored: as they came, smaller, or decoded."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

from mimscale.data import decode

BYTES, PIXELS = "bytes", "pixels"
# Bound of a pixel store where none is given, pixels: crops of 192 and 224 are still cut from more than they need.
PIXEL_STORE_SHORTER = 256
# At 95 a re-encoded photograph differs from its source by less than the next resize does.
_QUALITY = 95
# Of the kinds that are stored as they came.
SUFFIX_OF = {decode.JPEG: b".jpg", decode.PNG: b".png"}


def _shrunk(pixels: np.ndarray, shorter: int) -> np.ndarray:
    """Pixels with their shorter side brought down to ``shorter``; smaller images stay as they are."""
    height, width = pixels.shape[:2]
    if min(height, width) <= shorter:
        return pixels
    factor = shorter / min(height, width)
    to = (max(shorter, round(width * factor)), max(shorter, round(height * factor)))
    return np.asarray(Image.fromarray(pixels).resize(to, Image.Resampling.BICUBIC))


def _as_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def as_pixels(pixels: np.ndarray) -> bytes:
    """uint8 (height, width, 3) as a binary PPM: a line of header, then the pixels in the order of memory."""
    height, width = pixels.shape[:2]
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()


def stored_form(data: bytes, kind: int, store: str, resize_shorter: int | None) -> tuple[bytes, bytes, bool]:
    """What to store of an image.

    Args:
        data: its bytes.
        kind: what ``decode.identify`` said of them.
        store: ``BYTES`` or ``PIXELS``.
        resize_shorter: bound of its shorter side, pixels.

    Returns:
        The bytes to store, their suffix, and whether they differ from ``data``.

    Raises:
        DamagedSample: it had to be decoded and does not.
    """
    if store == PIXELS:
        if kind == decode.PIXELS and resize_shorter is None:
            return data, b".ppm", False
        return as_pixels(_shrunk(decode.decode_rgb(data), resize_shorter or PIXEL_STORE_SHORTER)), b".ppm", True
    if resize_shorter is not None:
        pixels = decode.decode_rgb(data)
        small = _shrunk(pixels, resize_shorter)
        if small is not pixels:
            if kind == decode.JPEG:
                return (
                    simplejpeg.encode_jpeg(np.ascontiguousarray(small), _QUALITY, colorsubsampling="420"),
                    b".jpg",
                    True,
                )
            return _as_png(small), b".png", True
    if kind in SUFFIX_OF:
        return data, SUFFIX_OF[kind], False
    return _as_png(decode.decode_rgb(data)), b".png", True
