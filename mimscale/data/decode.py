"""Bytes to RGB pixels, and the cheaper question whether bytes are an image at all.

JPEGs go through libjpeg-turbo; PNGs, and whatever libjpeg-turbo will not turn into RGB (CMYK, lossless, odd sampling),
through Pillow. Nothing is allocated before the header's size has been looked at.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from mimscale.data.errors import DamagedSample
from mimscale.files import UnfitFile, read_bytes
from mimscale.wording import counted, printable

# 300 MB of RGB. The largest photographs in ImageNet-22K are a quarter of this; a 65,500 x 65,500 JPEG would ask for 13
# GB.
MAX_PIXELS = 100_000_000

# Of an encoded image: over six bytes for each of the most pixels.
MAX_BYTES = 640 * 2**20

# What Pillow may take bytes for. It knows others that start programs (EPS), fetch files or hold many layers.
FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "GIF",
    "BMP",
    "DIB",
    "PPM",
    "TIFF",
    "WEBP",
    "AVIF",
    "HEIF",
    "JPEG2000",
    "PCX",
    "QOI",
    "SGI",
)

JPEG, PNG, OTHER, PIXELS = range(4)
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
# Baseline, extended and progressive Huffman: what libjpeg-turbo and Pillow both decode.
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise DamagedSample(f"its header gives a size of {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise DamagedSample(f"its header asks for {width} x {height} pixels, over the limit of {MAX_PIXELS:,}")


def jpeg_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG that has RGB to give.

    Raises:
        DamagedSample: too large.
        ValueError: not a JPEG, or one of other colours.
    """
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    if colours in ("CMYK", "YCCK", "Gray"):
        raise ValueError(colours)
    return height, width


# Memory above this is not kept: 5.6 megapixels, more than nearly all of ImageNet's images have.
_KEPT_BYTES = 1 << 24


class PixelMemory:
    """Memory that one JPEG after another is decoded into: it stays in the core's cache, where fresh memory is not.

    What was decoded into it is good until the next image.
    """

    def __init__(self) -> None:
        self._kept = np.empty(0, np.uint8)

    def of(self, size: int) -> np.ndarray:
        """At least ``size`` bytes, uint8."""
        if size > _KEPT_BYTES:
            return np.empty(size, np.uint8)
        if size > len(self._kept):
            self._kept = np.empty(size, np.uint8)
        return self._kept


def decode_jpeg_strictly(data: bytes | memoryview, memory: PixelMemory | None = None) -> np.ndarray:
    """A JPEG in which libjpeg-turbo finds nothing at all to complain of, as uint8 (height, width, 3).

    Raises:
        DamagedSample: too large.
        ValueError: anything it complains of, harmless or not, or colours it does not turn into RGB.
    """
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    if colours in ("CMYK", "YCCK"):
        raise ValueError("CMYK")
    return simplejpeg.decode_jpeg(data, "RGB", buffer=(memory or PixelMemory()).of(3 * height * width))


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow and its plug-ins know."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def opened(data: bytes | memoryview) -> Iterator[Image.Image]:
    """An image whose header has been read, and whose size has been looked at, by Pillow.

    Raises:
        DamagedSample: not an image of one of ``FORMATS``, cut short, or too large; also for what is raised inside.
    """
    try:
        # A broken EXIF block is reported by Pillow as a warning; the pixels are unharmed.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=formats()) as image:
                _check_size(*image.size)
                yield image
    except DamagedSample:
        raise
    except UnidentifiedImageError:  # its own message is about the object in memory
        raise DamagedSample("cannot be decoded: it is no image, or of a kind that is not read") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds, SyntaxError and struct.error among them
        raise DamagedSample(f"cannot be decoded: {printable(error) or type(error).__name__}") from None


# Pixels that are converted at a time: larger images are converted band by band, and not held several times.
_BAND_PIXELS = 1 << 22


def rgb_of(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode as uint8 (height, width, 3)."""
    width, height = image.size
    rows = max(_BAND_PIXELS // max(width, 1), 1)
    if rows >= height:
        return _rgb_of(image)
    image.load()
    whole = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        whole[top:bottom] = _rgb_of(image.crop((0, top, width, bottom)))
    return whole


def _rgb_of(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        # 16 bits a pixel: Pillow's own conversion clips instead of scaling.
        grey = np.clip(np.asarray(image, np.int64), 0, 65535) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def decode_leniently(data: bytes | memoryview) -> np.ndarray:
    """Whatever Pillow makes of the bytes, as uint8 (height, width, 3).

    Stray bytes between markers are no error, an early end is.

    Raises:
        DamagedSample: not an image, cut short, or too large.
    """
    with opened(data) as image:
        return rgb_of(image)


def decode_pixels(data: bytes | memoryview) -> np.ndarray:
    """A binary PPM as ``store.as_pixels`` writes it, as uint8 (height, width, 3), not copied.

    Raises:
        DamagedSample: another kind of PPM, too large, or cut short.
    """
    head = bytes(data[:40])
    end = head.find(b"\n")
    try:
        magic, width, height, depth = head[: max(end, 0)].split(b" ")
        size = int(width), int(height)
    except ValueError:
        raise DamagedSample("its header is not that of stored pixels") from None
    _check_size(*size)
    if magic != b"P6" or depth != b"255" or len(data) != end + 1 + 3 * size[0] * size[1]:
        raise DamagedSample(f"its header says {size[0]} x {size[1]} pixels, which its {len(data)} bytes do not hold")
    return np.frombuffer(data, np.uint8, offset=end + 1).reshape(size[1], size[0], 3)


def decode_rgb(data: bytes | memoryview, memory: PixelMemory | None = None) -> np.ndarray:
    """Image bytes as uint8 (height, width, 3).

    Args:
        data: the image.
        memory: to decode into; then the pixels are good until it is used again.

    Raises:
        DamagedSample: not an image, cut short, or too large.
    """
    if data[:2] == b"\xff\xd8":
        try:
            return decode_jpeg_strictly(data, memory)
        except DamagedSample:
            raise
        except ValueError:
            pass
    return decode_leniently(data)


def read_rgb(path: Path) -> np.ndarray:
    """An image file as uint8 (height, width, 3): what training sees of it.

    Raises:
        DamagedSample: it cannot be read, or is not an image; its path is named.
    """
    try:
        return decode_rgb(read_bytes(path, MAX_BYTES))
    except UnfitFile as problem:
        raise DamagedSample(str(problem)) from None
    except (OSError, ValueError) as error:  # a path with a NUL, too, is a ValueError
        reason = error.reason if isinstance(error, DamagedSample) else getattr(error, "strerror", None) or error
        raise DamagedSample(f"{printable(path)}: {reason}") from None


Read = Callable[[int, int], bytes]


# Of a file, looked at together: most photographs' headers are shorter.
_HEAD_BYTES = 4096
# Markers whose segments say nothing about the size: tables, application data, comments.
_STEPPED_OVER = frozenset((*range(0xE0, 0xF0), 0xDB, 0xC4, 0xC8, 0xCC, 0xDD, 0xFE))


def _jpeg_size(head: bytes, read: Read, size: int) -> tuple[int, int]:
    """(width, height) from a JPEG's frame header, with every segment up to the first scan walked.

    Args:
        head: the first bytes of the file.
        read: see :func:`identify`.
        size: of the file, bytes.

    Raises:
        ValueError: no frame header that libjpeg-turbo decodes before the first scan.
    """
    start, at, found = 0, 2, None
    while True:
        i = at - start
        if i + 10 > len(head):
            head, start, i = read(at, min(size - at, _HEAD_BYTES)), at, 0
            if len(head) < 4:
                raise ValueError("no scan before its end")
        if head[i] != 0xFF:
            raise ValueError(f"no marker at byte {at}")
        marker = head[i + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:
            at += 2
            continue
        length = head[i + 2] << 8 | head[i + 3]
        if length < 2 or at + 2 + length > size:
            raise ValueError(f"a segment at byte {at} runs past its end")
        if marker in _STEPPED_OVER:
            pass
        elif 0xC0 <= marker <= 0xCF:
            if marker not in _JPEG_FRAMES or head[i + 4] != 8:
                raise ValueError("a kind of JPEG that needs another decoder")
            found = (head[i + 7] << 8 | head[i + 8], head[i + 5] << 8 | head[i + 6])
        elif marker == 0xDA:
            if found is None:
                raise ValueError("a scan before the frame header")
            return found
        elif marker == 0xD9:
            raise ValueError("no scan before its end")
        at += 2 + length


def identify(read: Read, size: int, thorough: bool = False) -> int:
    """Which kind of image lies behind ``read``, from its structure where that is enough.

    A JPEG whose segments hold together up to the first scan and whose last bytes are its end marker is taken at its
    word: that costs microseconds and catches cut files. Anything else is decoded.

    Args:
        read: read(offset, length) gives those bytes of the image.
        size: how many bytes there are.
        thorough: decode every image.

    Returns:
        JPEG, PNG, or OTHER for a format that must be rewritten to be stored.

    Raises:
        DamagedSample: not an image, cut short, or too large.
    """
    if size == 0:
        raise DamagedSample("has no bytes")
    if size > MAX_BYTES:
        raise DamagedSample(f"has {counted(size, 'byte')}, over the limit of {MAX_BYTES:,}")
    head = read(0, min(size, _HEAD_BYTES))
    if head[:2] == b"\xff\xd8":
        try:
            _check_size(*_jpeg_size(head, read, size))
            if not thorough and read(size - 2, 2) == b"\xff\xd9":
                return JPEG
        except DamagedSample:
            raise
        except (ValueError, IndexError):
            pass
        decode_rgb(read(0, size))
        return JPEG
    data = read(0, size)
    if head[:8] == _PNG_MAGIC and size >= 33:
        _check_size(*struct.unpack(">II", data[16:24]))
        decode_leniently(data)
        if _PNG_END not in data:
            raise DamagedSample("a PNG without its end")
        return PNG
    decode_leniently(data)
    return OTHER
