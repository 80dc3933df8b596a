"""What a build will store: one row an image, in columns on disk: fourteen million rows need little memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mimscale.data.errors import ShardError

_COLUMNS = {
    "container": "<i4",
    "offset": "<i8",
    "size": "<i8",
    "label": "<i4",
    "kind": "u1",
    "stratum": "u1",
    "key_end": "<i8",
    "name_end": "<i8",
}

# For images whose stratum is still to be drawn.
NO_STRATUM = 255


@dataclass
class Found:
    """The images that one class of one source holds, in their final order.

    Attributes:
        container: the folder that the names are in, or the archive that the offsets are in.
        label: class number, -1 for unlabelled.
        keys: one key an image, unique within the split.
        names: paths below the container, one an image; empty when the container is an archive.
        offsets: where each payload starts in the archive; empty for a folder.
        sizes: payload bytes.
        kinds: what ``decode.identify`` said.
        labels: a class an image, where ``label`` is not the class of all.
        stratum: where the images come from a shard folder, which of its strata; they then keep it, and their order.
        rejected: (where, why) of what looked like an image and is none.
        aside: (where, why) of everything else that was found and is not taken.
        identities: (device, inode) by number of the image, of those that have, or could have, a second name.
        broken: why the container could not be read to its end, if so.
    """

    container: str
    label: int
    keys: list[bytes] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    labels: list[int] | None = None
    stratum: int = NO_STRATUM
    rejected: list[tuple[str, str]] = field(default_factory=list)
    aside: list[tuple[str, str]] = field(default_factory=list)
    identities: dict[int, tuple[int, int]] = field(default_factory=dict)
    broken: str | None = None

    def take_once(self, seen: dict[tuple[int, int], str], why: str) -> None:
        """Set aside the images whose file ``seen`` knows by another name, and add the others to it."""
        second = set()
        for number, identity in self.identities.items():
            if identity in seen:
                second.add(number)
                self.aside.append((f"{self.container}/{self.names[number]}", f"{why}: {seen[identity]}"))
            else:
                seen[identity] = f"{self.container}/{self.names[number]}"
        if second:
            columns: list[list[Any] | None] = [self.keys, self.names, self.offsets, self.sizes, self.kinds, self.labels]
            for column in columns:
                if column:
                    column[:] = [value for number, value in enumerate(column) if number not in second]
        self.identities = {}


class Entry(NamedTuple):
    """One image to store: see the columns of :class:`Listing`."""

    container: str
    offset: int
    size: int
    label: int
    kind: int
    key: bytes
    name: str

    @property
    def where(self) -> str:
        """Its path, or its place in an archive."""
        return f"{self.container}/{self.name}" if self.name else f"{self.container} at byte {self.offset}"


class ListingWriter:
    """Appends what is found to the column files of a listing in ``folder``."""

    def __init__(self, folder: Path):
        if folder.is_symlink():  # what it leads to is none of ours to write into
            folder.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.containers: list[str] = []
        self.rows = 0
        self._files = {name: (folder / name).open("wb") for name in (*_COLUMNS, "keys", "names")}
        self._ends = {"key": 0, "name": 0}

    def _append(self, name: str, values: np.ndarray) -> None:
        values.astype(_COLUMNS[name]).tofile(self._files[name])

    def _append_text(self, kind: str, pieces: Sequence[bytes]) -> None:
        lengths = np.fromiter((len(piece) for piece in pieces), np.int64, len(pieces))
        self._files[f"{kind}s"].write(b"".join(pieces))
        self._append(f"{kind}_end", self._ends[kind] + np.cumsum(lengths))
        self._ends[kind] += int(lengths.sum())

    def add(self, found: Found) -> None:
        """Append the images of one class."""
        count = len(found.keys)
        if not count:
            return
        self._append("container", np.full(count, len(self.containers)))
        self.containers.append(found.container)
        self._append("offset", np.asarray(found.offsets) if found.offsets else np.full(count, -1))
        self._append("size", np.asarray(found.sizes))
        self._append("label", np.asarray(found.labels) if found.labels is not None else np.full(count, found.label))
        self._append("kind", np.asarray(found.kinds))
        self._append("stratum", np.full(count, found.stratum))
        self._append_text("key", found.keys)
        self._append_text("name", [os.fsencode(name) for name in found.names] or [b""] * count)
        self.rows += count

    def close(self) -> Listing:
        """Finish the files and open them as a listing."""
        for file in self._files.values():
            file.close()
        (self.folder / "containers").write_bytes(b"\0".join(os.fsencode(path) for path in self.containers))
        return Listing(self.folder)


class Listing:
    """A finished listing, its columns memory-mapped.

    Attributes:
        container: (rows,) number of the folder or archive.
        offset: (rows,) first byte in the archive, or -1 for a file of its own.
        size: (rows,) bytes.
        label: (rows,) class.
        kind: (rows,) ``decode.JPEG``, ``PNG``, ``PIXELS`` or ``OTHER``.
        stratum: (rows,) stratum to keep, or ``NO_STRATUM``.
    """

    container: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    kind: np.ndarray
    stratum: np.ndarray
    key_end: np.ndarray
    name_end: np.ndarray

    def __init__(self, folder: Path):
        self.folder = folder
        for name, dtype in _COLUMNS.items():
            path = folder / name
            setattr(self, name, np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype))
        self._keys = self._text("keys")
        self._names = self._text("names")
        self.containers = [os.fsdecode(path) for path in (folder / "containers").read_bytes().split(b"\0")]
        self._open = lru_cache(maxsize=64)(_Descriptor)

    def _text(self, name: str) -> np.ndarray:
        path = self.folder / name
        return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self.size)

    def entries(self, rows: np.ndarray) -> list[Entry]:
        """What is needed to store some images, looked up together: one by one costs as much as reading them."""
        keys = _pieces(self._keys, self.key_end, rows)
        names = _pieces(self._names, self.name_end, rows)
        columns = (self.container, self.offset, self.size, self.label, self.kind)
        values = zip(*(column[rows].tolist() for column in columns), strict=True)
        return [
            Entry(self.containers[container], offset, size, label, kind, key, os.fsdecode(name))
            for (container, offset, size, label, kind), key, name in zip(values, keys, names, strict=True)
        ]

    def payload(self, entry: Entry) -> bytes:
        """The original bytes of one image.

        Raises:
            ShardError: the source can no longer be read, or has changed since it was listed.
        """
        data = bytearray(entry.size + 1)
        self.read_into(entry, memoryview(data))
        return bytes(memoryview(data)[:-1])

    def read_into(self, entry: Entry, room: memoryview) -> None:
        """Read the original bytes of one image into ``room``, which has to be longer by a byte at least.

        Raises:
            ShardError: the source can no longer be read, or has changed since it was listed.
        """
        try:
            if entry.offset < 0:
                descriptor = os.open(entry.where, os.O_RDONLY)
                try:
                    # One byte more than there should be, to see a file that has grown.
                    count = os.readv(descriptor, [room[: entry.size + 1]])
                finally:
                    os.close(descriptor)
            else:
                count = os.preadv(self._open(entry.container).number, [room[: entry.size]], entry.offset)
        except OSError as error:
            raise ShardError(f"{entry.where}: cannot be read ({error.strerror}); run the build again") from None
        if count != entry.size:
            raise ShardError(
                f"{entry.where}: its {entry.size} bytes have changed since it was listed; run the build again"
            )


def _pieces(text: np.ndarray, ends: np.ndarray, rows: np.ndarray) -> list[bytes]:
    """The texts of ``rows`` out of one long text that the column ``ends`` cuts up."""
    lasts = ends[rows]
    firsts = np.where(rows > 0, ends[np.maximum(rows, 1) - 1], 0)
    return [text[first:last].tobytes() for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]


class _Descriptor:
    """An open file that closes with its last reference."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_UNSAFE = {code: "_" for code in (*range(32), 127, ord("."), ord("\\"), ord("/"))}
_MAX_KEY_PART = 90


def safe_part(name: str) -> str:
    """One part of a key: no dots (WebDataset ends a key at the first), no slashes; at most 90 bytes."""
    import hashlib

    safe = name.encode("utf-8", "replace").decode().translate(_UNSAFE) or "_"
    if len(safe.encode()) > _MAX_KEY_PART:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        safe = safe.encode()[: _MAX_KEY_PART - 13].decode("utf-8", "ignore") + "-" + digest
    return safe


def unique(names: Iterable[str], make: Callable[[str], str] = safe_part) -> list[str]:
    """Safe forms of ``names`` that differ from each other; the same names in the same order give the same result."""
    safe = [make(name) for name in names]
    taken = set()
    result = []
    reserved = set(safe)
    for form in safe:
        candidate, number = form, 1
        while candidate in taken or (number > 1 and candidate in reserved):
            number += 1
            candidate = f"{form}-{number}"
        taken.add(candidate)
        result.append(candidate)
    return result
