"""One shard, written: images go from their source into the tar's own bytes, which are hashed and stored from there.

A buffer that stays in the core's cache is filled with headers, images and labels in the order of the tar; an image is
read straight into its place. So its bytes are copied once by the read and once by the write, and hashed in between.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np
from zlib_ng import zlib_ng

from mimscale.data.build.listing import Entry, Listing
from mimscale.data.errors import DamagedSample, ShardError
from mimscale.data.shards import store
from mimscale.data.shards.format import file_sha256, table_dtype
from mimscale.data.shards.tar import BLOCK, END_OF_ARCHIVE, TarError, pack_header, padding
from mimscale.files import open_regular, read_json, write_beside, write_bytes

# Half of what a core keeps of its own on common machines.
_BUFFER_BYTES = 512 * 1024


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a build, besides its source."""

    samples_per_shard: int = 1000
    seed: int = 0
    resize_shorter: int | None = None
    store: str = store.BYTES

    @property
    def decodes(self) -> bool:
        """Whether every image is decoded to be stored, so that every one must be known to decode."""
        return self.store != store.BYTES or self.resize_shorter is not None


@dataclass(frozen=True)
class ShardTask:
    """A shard of a plan: rows ``start`` to ``stop`` of its order, to be written as ``out/file``.

    Attributes:
        file: name of the tar.
        split: "train" or "val".
        stratum: percent, 0 for held-out images.
        start: first row.
        stop: row after the last.
        work: folder with the plan and the journal.
        out: folder of the tars.
        plan: digest of the plan.
        options: of the build.
    """

    file: str
    split: str
    stratum: int
    start: int
    stop: int
    work: str
    out: str
    plan: str
    options: Options


class _TarFile:
    """A tar that grows: bytes are put into a view of its buffer, and leave it hashed."""

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._filled = 0
        self.bytes = 0

    def room(self, size: int) -> memoryview:
        """The next ``size`` bytes of the tar, to be filled before the next call; they hold what was there before."""
        if self._filled + size > len(self._buffer):
            self._flush()
            if size > len(self._buffer):
                self._buffer = memoryview(bytearray(size))
        view = self._buffer[self._filled : self._filled + size]
        self._filled += size
        self.bytes += size
        return view

    def _flush(self) -> None:
        rest = self._buffer[: self._filled]
        self._digest.update(rest)
        while len(rest):
            rest = rest[self._file.write(rest) :]
        self._filled = 0

    def finish(self) -> str:
        """Write what is left; returns the SHA-256."""
        self.room(len(END_OF_ARCHIVE))[:] = END_OF_ARCHIVE
        self._flush()
        return self._digest.hexdigest()

    def __enter__(self) -> _TarFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


@lru_cache(maxsize=2)
def _plan_in(work: str, plan: str) -> tuple[Listing, np.ndarray]:
    """A worker's view of the plan, opened once a process."""
    return Listing(Path(work) / "listing"), np.load(Path(work) / "order.npy", mmap_mode="r", allow_pickle=False)


def write_shard(task: ShardTask) -> None:
    """Write one tar and, after it is safe on the disk, its entry in the journal.

    Raises:
        ShardError: an image changed since it was listed, a name that no tar holds, or the disk is full.
    """
    listing, order = _plan_in(task.work, task.plan)
    out, journal = Path(task.out), Path(task.work) / "journal"
    entries = listing.entries(np.asarray(order[task.start : task.stop]))
    rows: list[tuple] = []
    rewritten = 0
    try:
        # In the working folder, which goes as a whole with a build that is given up.
        with write_beside(out / task.file, durable=True, folder=Path(task.work)) as beside, _TarFile(beside) as tar:
            for entry in entries:
                row, changed = _add(tar, listing, entry, task.options)
                rows.append(row)
                rewritten += changed
            sha256 = tar.finish()
    except TarError as error:
        raise ShardError(str(error)) from None
    except OSError as error:
        raise ShardError(
            f"{out / task.file}: cannot be written ({error.strerror}); free some space and run the same build again"
        ) from None
    save_array(journal / f"{task.file}.npy", np.array(rows, table_dtype(max(len(entry.key) for entry in entries))))
    line = {"plan": task.plan, "bytes": tar.bytes, "sha256": sha256, "rewritten": rewritten}
    write_bytes(journal / f"{task.file}.json", json.dumps(line).encode(), durable=True)


def _add(tar: _TarFile, listing: Listing, entry: Entry, options: Options) -> tuple[tuple, bool]:
    """Append one sample. Returns its row of the table, and whether its bytes differ from the source's."""
    if options.decodes or entry.kind not in store.SUFFIX_OF:
        data, suffix, changed = _stored_form(listing.payload(entry), entry, options)
        size = len(data)
    else:
        data, suffix, changed, size = None, store.SUFFIX_OF[entry.kind], False, entry.size
    label = b"%d" % entry.label
    filled = padding(size)
    position = tar.bytes + BLOCK
    room = tar.room(BLOCK + size + filled + 2 * BLOCK)
    room[:BLOCK] = pack_header(entry.key + suffix, size)
    if data is None:
        # Whatever a grown file has too much of falls where the padding and the label come next.
        listing.read_into(entry, room[BLOCK:])
    else:
        room[BLOCK : BLOCK + size] = data
    crc = zlib_ng.crc32(room[BLOCK : BLOCK + size])
    room[BLOCK + size :] = b"".join(
        (bytes(filled), pack_header(entry.key + b".cls", len(label)), label, bytes(padding(len(label))))
    )
    return (0, entry.label, position, size, crc, entry.key), changed


def _stored_form(data: bytes, entry: Entry, options: Options) -> tuple[bytes, bytes, bool]:
    """(bytes to store, suffix, whether they differ from the source's)."""
    try:
        return store.stored_form(data, entry.kind, options.store, options.resize_shorter)
    except DamagedSample as error:
        raise ShardError(f"{entry.where} has changed since it was listed: {error}; run the build again") from None


# Of an entry of the journal, and of the header of a piece of the table.
_ENTRY_BYTES = 4096


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array durably, in numpy's own format."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue(), durable=True)


@dataclass(frozen=True)
class Written:
    """What the journal says of a finished shard: of which plan, its bytes, its SHA-256, and how many images were rewritten."""

    plan: str
    bytes: int
    sha256: str
    rewritten: int


def journal_entry(work: Path, file: str) -> Written | None:
    """The journal's entry of a shard; ``None`` where there is none, or it is damaged, so that the shard is written again."""
    try:
        entry = read_json(work / "journal" / f"{file}.json", _ENTRY_BYTES)
    except OSError:
        return None
    kinds = {"plan": str, "bytes": int, "sha256": str, "rewritten": int}
    if not isinstance(entry, dict) or {name: type(value) for name, value in entry.items()} != kinds:
        return None
    return Written(**entry)


def is_finished(task: ShardTask) -> bool:
    """Whether the shard of an earlier, killed build stands as it must: journal entry, table, size and SHA-256."""
    path, work = Path(task.out) / task.file, Path(task.work)
    entry = journal_entry(work, task.file)
    try:
        return (
            entry is not None
            and entry.plan == task.plan
            and holds_rows(work / "journal" / f"{task.file}.npy", task.stop - task.start)
            and path.stat().st_size == entry.bytes
            and file_sha256(path) == entry.sha256
        )
    except OSError:
        return False


def holds_rows(path: Path, rows: int) -> bool:
    """Whether a file is a piece of the sample table, of so many rows.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            if np.lib.format.read_magic(file) != (1, 0):
                return False
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_ENTRY_BYTES)
        except Exception:  # numpy's parser of headers raises SyntaxError, TokenError and others besides ValueError
            return False
        fits = (
            shape == (rows,)
            and not by_column
            and "key" in (dtype.names or ())
            and dtype == table_dtype(dtype["key"].itemsize)
        )
        return fits and os.fstat(file.fileno()).st_size == file.tell() + rows * dtype.itemsize
