"""The header of a safetensors file, checked against the file's size before any tensor is touched."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale.files import open_regular
from mimscale.wording import counted, printable

# A giant's thousand tensors take 150 kB of header.
LARGEST_HEADER = 8 * 2**20
MOST_TENSORS = 20_000
# Bits of an element, by the names of the format.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
}
_DIMENSIONS = 16


@dataclass(frozen=True)
class Header:
    """What the header says: the shape of each tensor by name, and the strings that are kept with them."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def read_header(path: str | Path) -> Header:
    """Read the header, and see that its tensors lie one behind the other and fill the file.

    Raises:
        ValueError: it is none, or does not fit the file; the message says where, without the file's name.
        OSError: the file cannot be opened, or is no regular one.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"it has {counted(len(start), 'byte')}, too few for a header")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, LARGEST_HEADER):
            raise ValueError(
                f"its header would have {counted(length, 'byte')}; the file has {counted(size, 'byte')}, "
                f"and a header {LARGEST_HEADER:,} at most"
            )
        text = file.read(length)
    if len(text) < length:
        raise ValueError("it ends within its header")
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("its header is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("its header is no JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the __metadata__ of its header are no strings by name")
    if len(content) > MOST_TENSORS:
        raise ValueError(f"its header lists {counted(len(content), 'tensor')}, more than {MOST_TENSORS:,}")
    places = {name: _place(name, entry) for name, entry in content.items()}
    reached = 0
    for name, (_, begin, end) in sorted(places.items(), key=lambda item: item[1][1:]):
        if begin != reached:
            raise ValueError(
                f"{printable(name)} begins at byte {begin:,}, where {reached:,} bytes are taken: tensors overlap, "
                "or leave a gap"
            )
        reached = end
    if reached != size - 8 - length:
        raise ValueError(f"its tensors take {counted(reached, 'byte')}, and it holds {size - 8 - length:,}: it is cut")
    return Header({name: shape for name, (shape, _, _) in places.items()}, metadata)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("duplicate name in its header")
    return found


def _place(name: str, entry: Any) -> tuple[tuple[int, ...], int, int]:
    """Shape of a tensor, where it begins and where it ends."""
    what = printable(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the header's entry of {what} is not its dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _BITS:
        raise ValueError(f"{what} has the type {printable(kind, 40)}, which is none of {', '.join(_BITS)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise ValueError(f"the shape or data_offsets of {what} are no sizes")
    if len(shape) > _DIMENSIONS or len(offsets) != 2 or math.prod(max(n, 1) for n in shape) >= 2**62:
        raise ValueError(f"the shape or data_offsets of {what} are too many or too large")
    if math.prod(shape) * _BITS[kind] // 8 != offsets[1] - offsets[0]:
        raise ValueError(f"{what} takes {offsets[1] - offsets[0]:,} bytes, which are not {kind} of shape {shape}")
    return tuple(shape), offsets[0], offsets[1]
