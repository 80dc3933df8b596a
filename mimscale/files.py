"""Files that change as a whole: a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
