"""Files: written as a whole, so that a reader sees the old one or the new one; read with a bound, and only regular ones.

Whoever may write into a folder may plant links in it. So nothing is ever written through a link in the place of a file: a file
that is written as a whole takes the link's place, and one that is added to is refused. Links to folders are followed.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mimscale.wording import counted, printable

# What a file may hold that is read as a whole; data (tars, tensors) has bounds of its own.
LARGEST = 64 * 2**20


class UnfitFile(OSError):
    """A path that is no regular file, or one that holds something else than it should; the message names it.

    Args:
        path: the file.
        what: what is wrong with it, in words that follow its name.
    """

    def __init__(self, path: Path | str, what: str = ""):
        super().__init__(f"{printable(os.fspath(path), 4096)} {what}" if what else os.fspath(path))
        if what:  # else it comes out of a pickle, with its message alone
            self.filename, self.strerror = os.fspath(path), what

    def __str__(self) -> str:
        return str(self.args[0])


# What a full disk, a used-up quota or a limit on files says.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of a name on the disk, in bytes.
_LONGEST_NAME = 255


@contextmanager
def write_beside(path: Path, durable: bool = False, folder: Path | None = None) -> Iterator[Path]:
    """Give a place to write to, which becomes ``path`` when the block ends; where it raises, ``path`` stays as it was.

    The place is a new, empty file of a name that nobody can guess, so that no link can be waiting there. Where ``path`` is a
    link, the file takes its place, and what the link leads to stays as it is.

    Args:
        path: the file; its folder is made where it is missing.
        durable: bring the file and its name to the disk before the block ends, so that they survive a power cut.
        folder: where the place shall be, on the same file system; by default beside ``path``.

    Raises:
        UnfitFile: it would be one of the devices.
        OSError: the file cannot be written; it names ``path``, also where the disk is full.
    """
    beside: Path | None = None
    if path.parent.resolve() == Path("/dev"):  # whose /dev/stdout root could replace
        raise UnfitFile(path, "is no place for a file; give the name of one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = _new_file(folder or path.parent, path.name)
        yield beside
        if durable:
            sync(beside)
        beside.replace(path)
    except OSError as error:
        if (error.filename is None and error.errno in _FULL) or (beside and error.filename == str(beside)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if beside is not None:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def _new_file(folder: Path, name: str) -> Path:
    mark = f".partial-{secrets.token_hex(8)}"
    kept = os.fsencode(name)[: _LONGEST_NAME - len(mark) - 1]
    path = folder / f".{os.fsdecode(kept)}{mark}"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    return path


def remove_partial(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder; for one process to call while no other writes there.

    Raises:
        OSError: something of such a name cannot be removed.
    """
    for path in folder.glob(".*.partial-*"):
        path.unlink(missing_ok=True)


def open_to_append(path: Path) -> int:
    """Open a file to add to its end (a log, or a lock), make it where it is missing, and return its descriptor.

    Raises:
        UnfitFile: it is a link, or no regular file.
        OSError: it cannot be opened.
    """
    what = "is not a regular file"
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody to read from it.
        how = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, how, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno == errno.ELOOP:
            what = "is a link, and what it leads to is not written to"
        elif error.errno not in (errno.ENXIO, errno.EISDIR):
            raise
    raise UnfitFile(path, f"{what}; remove it and try again")


def append_text(path: Path, content: str) -> None:
    """Add to the end of a file that no other process adds to, in UTF-8, all of ``content`` or nothing.

    Raises:
        UnfitFile: see :func:`open_to_append`.
        OSError: it cannot be written; it names ``path``, also where the disk is full.
    """
    rest = memoryview(content.encode())
    descriptor = open_to_append(path)
    before = os.fstat(descriptor).st_size
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(descriptor, before)
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def set_aside(path: Path) -> Path:
    """Give a damaged file the first free name of ``NAME.damaged-1``, ``-2`` and so on; returns where it is now.

    Raises:
        OSError: it cannot be renamed.
    """
    aside = free_name(path)
    path.rename(aside)
    return aside


def free_name(path: Path) -> Path:
    """The first of ``NAME.damaged-1``, ``-2`` and so on beside ``path`` that is not taken."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    return aside


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
        raise UnfitFile(path, "is not a regular file")
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
        # By its size first: a sparse file may be longer than all memory. Read with the bound: its size may be a lie, or grow.
        content = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if content is None or len(content) > most:
        raise UnfitFile(path, f"holds more than {counted(most, 'byte')}, the most that is read")
    return content


# Bytes of a large text that are looked at together.
_PIECE = 1 << 22


def read_json_bytes(path: Path | str, most: int = LARGEST) -> bytes:
    """Read the whole of a JSON file that may be large; no further than to what no JSON holds, a zero byte.

    Raises:
        UnfitFile: it is no regular file, holds more than ``most`` bytes, or a zero byte.
        OSError: it cannot be read.
    """
    pieces: list[bytes] = []
    held = 0
    with open(open_regular(path), "rb") as file:
        while piece := file.read(_PIECE):
            held += len(piece)
            if held > most:
                raise UnfitFile(path, f"holds more than {counted(most, 'byte')}, the most that is read")
            if b"\0" in piece:
                raise UnfitFile(path, f"is no JSON: byte {held - len(piece) + piece.index(0):,} is zero")
            pieces.append(piece)
    return b"".join(pieces)


def read_end(path: Path | str, most: int) -> bytes:
    """The last ``most`` bytes of a file, or all that there are; errors as in :func:`open_regular`."""
    with open(open_regular(path), "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most)


def read_text(path: Path | str, most: int = LARGEST) -> str:
    """Read the whole of a text file in UTF-8, with or without a byte order mark; as :func:`read_bytes`.

    Raises:
        UnfitFile: it is no regular file, holds more than ``most`` bytes, or is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UnfitFile(path, f"is not UTF-8 text (byte {problem.start})") from None


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


def is_number(value: Any) -> bool:
    """Whether a parsed value is a number that can be computed with; NaN and infinity, of a run that diverged, are."""
    return type(value) is float or is_whole(value, -(2**63))


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether a parsed value is a whole number from ``least`` to what 64 bits hold."""
    return type(value) is int and least <= value < 2**63


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
        return parse_json(read_json_bytes(path, most))
    except ValueError as problem:
        raise UnfitFile(path, f"is no JSON: {problem}") from None
