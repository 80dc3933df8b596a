"""Files: written as a whole, so that a reader sees the old one or the new one; read with a bound, and only regular ones."""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mimscale.wording import counted, printable

# What a file may hold that is read as a whole; data (tars, tensors) has bounds of its own.
LARGEST = 64 * 2**20


class UnfitFile(OSError):
    """A path that is no regular file, or one that holds more than it may; the message names it."""


@contextmanager
def write_beside(path: Path, durable: bool = False, folder: Path | None = None) -> Iterator[Path]:
    """Give a place to write to, which becomes ``path`` when the block ends; where it raises, ``path`` stays as it was.

    Args:
        path: the file; its folder is made where it is missing.
        durable: bring the file and its name to the disk before the block ends, so that they survive a power cut.
        folder: where the place shall be, on the same file system; by default beside ``path``.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{path.name}.partial-{os.getpid()}-{threading.get_ident()}"
    beside = (folder or path.parent) / name
    try:
        yield beside
        if durable:
            sync(beside)
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def write_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Write ``content`` as the whole of a file; arguments and errors as in :func:`write_beside`."""
    with write_beside(path, durable) as beside:
        beside.write_bytes(content)


def write_text(path: Path, content: str, durable: bool = False) -> None:
    """Write ``content`` as the whole of a file, in UTF-8; arguments and errors as in :func:`write_beside`."""
    write_bytes(path, content.encode(), durable)


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path | str) -> int:
    """Open a file for reading and return its descriptor; what is no regular file (a pipe, a device, a folder) is refused.

    Raises:
        UnfitFile: it is something else.
        OSError: it cannot be opened.
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnfitFile(f"{printable(os.fspath(path))} is not a regular file")
    return descriptor


def read_bytes(path: Path | str, most: int = LARGEST) -> bytes:
    """Read the whole of a file.

    Args:
        path: of a regular file.
        most: bytes it may hold.

    Raises:
        UnfitFile: it is no regular file, or holds more.
        OSError: it cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UnfitFile(f"{printable(os.fspath(path))} holds more than {counted(most, 'byte')}, the most that is read")
    return content


def read_text(path: Path | str, most: int = LARGEST) -> str:
    """Read the whole of a text file in UTF-8, with or without a byte order mark; as :func:`read_bytes`.

    Raises:
        UnfitFile: it is no regular file, holds more than ``most`` bytes, or is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UnfitFile(f"{printable(os.fspath(path))} is not UTF-8 text (byte {problem.start})") from None


def parse_json(text: str | bytes, strict: bool = False) -> Any:
    """Parse JSON from an untrusted place.

    Args:
        text: of it.
        strict: as people write it: no key may come twice in an object, and every number is finite.

    Raises:
        ValueError: it is no JSON, or is nested too deeply; the message does not repeat the text.
    """
    try:
        if strict:
            return json.loads(
                text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite, parse_int=_whole
            )
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key '{printable(again, 100)}'; keep one")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{printable(text, 40)} is no finite number")
    return number


def _whole(text: str) -> int:
    if len(text) > 100:  # a million digits would take long to read
        raise ValueError(f"{printable(text, 40)} is too large a number")
    return int(text)


def read_json(path: Path | str, most: int = LARGEST) -> Any:
    """Read a JSON file; as :func:`read_bytes`.

    Raises:
        UnfitFile: it is no regular file, holds more than ``most`` bytes, or is no JSON.
        OSError: it cannot be read.
    """
    try:
        return parse_json(read_bytes(path, most))
    except ValueError as problem:
        raise UnfitFile(f"{printable(os.fspath(path))} is no JSON: {problem}") from None
