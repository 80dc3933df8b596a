"""A shard folder, opened for reading: which samples a fraction has, and the bytes of each."""

from __future__ import annotations

import mmap
import os
import stat
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng import zlib_ng

from mimscale.data.errors import DamagedSample, ShardError
from mimscale.data.shards import fractions, remote
from mimscale.data.shards.format import (
    INDEX_NAME,
    SUFFIXES,
    TABLE_NAME,
    WORK_FOLDER,
    Index,
    Shard,
    file_sha256,
    table_dtype,
)
from mimscale.data.shards.remote import ShardCache
from mimscale.data.shards.tar import BLOCK, TarError, parse_header
from mimscale.files import UnfitFile, open_regular
from mimscale.wording import printable

_MAX_OPEN_SHARDS, _MAX_OPEN_COPIES = 64, 8
_OPEN_ATTEMPTS = 5
# Of the sample table: rows that are looked at together, and the longest header of numpy's that is parsed.
_ROWS, _HEADER_BYTES = 1 << 20, 4096


class ShardIndex:
    """The samples of a shard folder; make one with :meth:`load`.

    Cheap to pickle: only the index travels, the sample table and the tars are opened again where they are first read.

    Attributes:
        root: the folder.
        content: what ``index.json`` says.
        cache: where a remote folder's files are kept; then ``root`` is the local side of it.
    """

    def __init__(self, root: Path, content: Index, cache: ShardCache | None = None):
        self.root = root
        self.content = content
        self.cache = cache
        self._open: OrderedDict[int, int] = OrderedDict()
        self._maps: dict[int, np.ndarray] = {}
        self._owner = os.getpid()

    @classmethod
    def load(
        cls, root: str | Path, cache: Path | None = None, cache_bytes: int = remote.DEFAULT_CACHE_BYTES
    ) -> ShardIndex:
        """Open a shard folder and check that its files are those its index was written for.

        Args:
            root: the folder, or its address (``https://``, ``s3://``, ...).
            cache: for an address: where local copies are kept; default ``$MIMSCALE_CACHE`` or the user's cache.
            cache_bytes: how much all copies may take.

        Raises:
            ShardError: no folder, an unfinished build, or an index that does not match its files; names the file and
                what to do.
        """
        if remote.is_remote(root):
            base = cache or remote.default_cache()
            path = ShardCache(str(root), base, cache_bytes).fetch(INDEX_NAME)
            content = _read_index(path.parent)
            # Copies of another build at the same address may have the same names and sizes.
            copies = ShardCache(str(root), base, cache_bytes, content.build)
            copies.fetch(TABLE_NAME, None, content.table_sha256)
            index = cls(copies.folder, content, copies)
            index.check_table()
            return index
        index = cls.load_unchecked(root)
        index._check_tars()
        index.check_table()
        return index

    @classmethod
    def load_unchecked(cls, root: str | Path) -> ShardIndex:
        """Open a shard folder without looking at anything but its index, to find out what is wrong with the rest.

        Raises:
            ShardError: no folder, or no usable index in it.
        """
        root = Path(root)
        return cls(root, _read_index(root))

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "content": self.content, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"], state["content"], state["cache"])  # type: ignore[misc]

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            self.close()

    def close(self) -> None:
        """Close the tars that are open; the next read opens them again."""
        while self._open:
            self._close_oldest()

    def _close_oldest(self) -> None:
        shard, descriptor = self._open.popitem(last=False)
        # The mapping goes when the last array that looks into it does.
        self._maps.pop(shard, None)
        os.close(descriptor)

    def _check_tars(self) -> None:
        for shard in self.content.shards:
            path = self.root / shard.file
            try:
                facts = path.stat()
            except OSError:
                raise ShardError(
                    f"{path} is missing: index does not match its tars; restore it, or build again"
                ) from None
            if not stat.S_ISREG(facts.st_mode):
                raise ShardError(f"{path} is not a regular file; restore it, or build again")
            size = facts.st_size
            if size != shard.bytes:
                raise ShardError(
                    f"{path} has {size:,} bytes and the index says {shard.bytes:,}: index does not match its tars; "
                    "restore it, or build again"
                )

    def check_table(self) -> None:
        """Raise ShardError unless the sample table is the one that the index was written with."""
        path = self.root / TABLE_NAME
        again = "restore it, or build again"
        # What is longer cannot be the table, and a sparse file can be so long that its digest takes hours.
        most = self.content.samples * table_dtype(self.content.key_bytes).itemsize + _HEADER_BYTES
        try:
            digest = file_sha256(path) if path.stat().st_size <= most or not path.is_file() else None
        except UnfitFile as problem:
            raise ShardError(f"{problem}: {again}") from None
        except OSError:
            raise ShardError(f"{path} is missing, but the index needs it: {again}") from None
        if digest != self.content.table_sha256:
            raise ShardError(f"{path} is not the sample table that the index was written with: {again}")
        if contradiction := self._contradiction():
            raise ShardError(f"{path} has {contradiction}: {again}")

    def _contradiction(self) -> str:
        """What in the sample table cannot be, given the index; empty where all can. Goes over it piece by piece."""
        held = np.array([shard.bytes for shard in self.shards], np.int64)
        for start in range(0, len(self._table), _ROWS):
            rows = self._table[start : start + _ROWS]
            shards = np.searchsorted(self._starts, np.arange(start, start + len(rows)), side="right") - 1
            if not np.array_equal(rows["shard"], shards):
                return "rows in another order than the index's shards"
            offsets, sizes = rows["offset"], rows["size"].astype(np.int64)
            if (offsets < BLOCK).any() or (offsets > held[shards] - sizes).any():
                return "images beyond the end of their tars"
            if (rows["label"] < -1).any() or (rows["label"] >= max(len(self.classes), 1)).any():
                return f"labels that are none of the {len(self.classes)} classes"
        return ""

    @cached_property
    def _table(self) -> np.ndarray:
        return read_table(self.root / TABLE_NAME, self.content)

    @cached_property
    def _checksums(self) -> np.ndarray:
        return self._table["crc"]

    @cached_property
    def _starts(self) -> np.ndarray:
        """(shards + 1,) first sample of each shard."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.content.shards], dtype=np.int64)])

    def __len__(self) -> int:
        """Samples of all splits together."""
        return self.content.samples

    @property
    def classes(self) -> list[str]:
        """Class names; a label is a position in this list."""
        return self.content.classes

    @property
    def shards(self) -> list[Shard]:
        """Every tar of the set."""
        return self.content.shards

    @property
    def fractions(self) -> list[str]:
        """Names that :meth:`samples` takes: "10" to "100", the views, "val" where there is one."""
        return [*self.content.fractions, *self.content.views]

    @property
    def largest_fraction(self) -> str:
        """The fraction that holds every training image: "100", or less in a folder made of another's fraction."""
        return max((name for name in self.content.fractions if name.isdigit()), key=int)

    def _require(self, fraction: str) -> str:
        fraction = str(fraction)
        if fraction not in self.content.fractions and fraction not in self.content.views:
            raise ShardError(f"{self.root} has no fraction {fraction!r}; it has {', '.join(self.fractions)}")
        return fraction

    def shard_files(self, fraction: str) -> list[Path]:
        """The tars that hold a fraction and, unless it is a view, nothing else: what a stock WebDataset reader takes.

        Raises:
            ShardError: no such fraction.
        """
        fraction = self._require(fraction)
        if fraction in self.content.fractions:
            return [self.root / file for file in self.content.fractions[fraction]]
        used = np.unique(self._table["shard"][self.samples(fraction)])
        return [self.root / self.shards[number].file for number in used]

    def samples(self, fraction: str) -> np.ndarray:
        """Ids of the samples of a fraction, ascending, int64.

        Raises:
            ShardError: no such fraction.
        """
        fraction = self._require(fraction)
        if fraction in self.content.fractions:
            files = set(self.content.fractions[fraction])
            pieces = [
                np.arange(self._starts[n], self._starts[n + 1])
                for n, shard in enumerate(self.shards)
                if shard.file in files
            ]
            return np.concatenate(pieces) if pieces else np.empty(0, np.int64)
        view = self.content.views[fraction]
        train = self.samples("100")
        labels = self.labels(train)
        if view.classes is not None:
            return train[np.isin(labels, view.classes)]
        # By key and not by place, so that the view does not depend on the strata that the tars happen to have.
        by_key = np.argsort(self._table["key"][train], kind="stable")
        percents = tuple(sorted({*fractions.FRACTIONS, view.percent or 100}))
        # Unlabelled samples (-1) are a class like any other here.
        drawn = fractions.assign(labels[by_key] - labels.min(), percents, view.seed)
        chosen = drawn <= percents.index(view.percent or 100)
        return np.sort(train[by_key[chosen]])

    def key(self, sample: int) -> str:
        """The key of a sample, ``class/name``."""
        return self._table["key"][sample].decode("utf-8", "backslashreplace")

    def keys(self, samples: np.ndarray) -> list[str]:
        """The keys of many samples."""
        return [key.decode("utf-8", "backslashreplace") for key in self._table["key"][samples].tolist()]

    def label(self, sample: int) -> int:
        """The class of a sample, -1 if it has none."""
        return int(self._table["label"][sample])

    def labels(self, samples: np.ndarray) -> np.ndarray:
        """The classes of many samples, int64."""
        return self._table["label"][samples].astype(np.int64)

    def shard_numbers(self, samples: np.ndarray) -> np.ndarray:
        """The tars that hold many samples, as positions in :attr:`shards`."""
        return self._table["shard"][samples].astype(np.int64)

    def offset(self, sample: int) -> int:
        """Where the image of a sample starts in its tar, bytes."""
        return int(self._table["offset"][sample])

    def shard_of(self, sample: int) -> Path:
        """The tar that holds a sample."""
        return self.root / self.shards[int(self._table["shard"][sample])].file

    def read(self, sample: int) -> bytes:
        """The stored bytes of a sample's image.

        Raises:
            DamagedSample: the tar holds something else at that place, or ends before it.
            ShardError: the tar cannot be opened.
        """
        return bytes(self.read_view(sample))

    def read_view(self, sample: int) -> memoryview:
        """:meth:`read` without the copy.

        Raises:
            DamagedSample: the tar holds something else at that place, or ends before it.
            ShardError: the tar cannot be opened.
        """
        shard, offset, size, key = self._place(sample)
        block = os.pread(self._descriptor(shard), BLOCK + size, offset - BLOCK) if offset >= BLOCK else b""
        if len(block) != BLOCK + size:
            raise DamagedSample(f"{self.shard_of(sample)} ends before it")
        self._check_header(block[:BLOCK], key, size, sample)
        return memoryview(block)[BLOCK:]

    def view(self, sample: int) -> np.ndarray:
        """The stored bytes of a sample's image as uint8 (size,), mapped and not copied: for stored pixels.

        Raises:
            DamagedSample: the tar holds something else at that place, or ends before it.
            ShardError: the tar cannot be opened.
        """
        shard, offset, size, key = self._place(sample)
        descriptor = self._descriptor(shard)
        # Touching a page past the end of a file ends the process, so a tar that was cut since must be seen before.
        if not BLOCK <= offset <= os.fstat(descriptor).st_size - size:
            raise DamagedSample(f"{self.shard_of(sample)} ends before it")
        mapped = self._maps.get(shard)
        if mapped is None:
            # A private mapping is writable without the file being so, which spares torch's warning about read-only
            # arrays.
            mapped = np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY), np.uint8)
            self._maps[shard] = mapped
        if offset + size > len(mapped):
            raise DamagedSample(f"{self.shard_of(sample)} ended before it when it was opened")
        self._check_header(mapped[offset - BLOCK : offset].tobytes(), key, size, sample)
        return mapped[offset : offset + size]

    def _place(self, sample: int) -> tuple[int, int, int, bytes]:
        """(shard, offset, size, key) of a sample."""
        row = self._table[sample].item()
        return row[0], row[2], row[3], row[5]

    def _check_header(self, head: bytes, key: bytes, size: int, sample: int) -> None:
        """Hold the tar header before a payload against the table.

        Raises:
            DamagedSample: they are not about the same image.
        """
        # Parsing the whole header costs as much as reading the image, and a short name stands first in it, entire.
        named = self.content.foreign or (head.startswith(key) and head[len(key) : len(key) + 4] in SUFFIXES)
        if named and _plain_size(head) == size:
            return
        where = self.shard_of(sample)
        try:
            name, held, _ = parse_header(head)
        except TarError as error:
            raise DamagedSample(f"{where}: {error}") from None
        named = self.content.foreign or (name[:-4] == key and name[-4:] in SUFFIXES)
        if not named or held != size:
            raise DamagedSample(f"{where} holds {name.decode('utf-8', 'replace')!r} of {held} bytes in its place")

    def intact(self, sample: int, data: bytes | memoryview) -> bool:
        """Whether ``data`` are the bytes that the build stored (by their CRC-32)."""
        return zlib_ng.crc32(data) == int(self._checksums[sample])

    def _descriptor(self, shard: int) -> int:
        if self._owner != os.getpid():
            # After a fork the parent's descriptors are shared, file positions are not used, and closing them is the
            # parent's.
            self._open, self._maps, self._owner = OrderedDict(), {}, os.getpid()
        descriptor = self._open.get(shard)
        if descriptor is not None:
            self._open.move_to_end(shard)
            return descriptor
        descriptor = self._open_shard(shard)
        self._open[shard] = descriptor
        # An open copy takes its space on the disk even after the cache has dropped it.
        if len(self._open) > (_MAX_OPEN_SHARDS if self.cache is None else _MAX_OPEN_COPIES):
            self._close_oldest()
        return descriptor

    def _open_shard(self, shard: int) -> int:
        for _ in range(_OPEN_ATTEMPTS):
            path = self.fetch(shard)
            try:
                return open_regular(path)
            except UnfitFile as problem:
                raise ShardError(str(problem)) from None
            except FileNotFoundError:
                # Another process may have made room in the cache since.
                if self.cache is None:
                    break
            except OSError as error:
                raise ShardError(f"{path}: cannot be opened ({error.strerror})") from None
        raise ShardError(f"{path}: is gone; restore it or build again" if self.cache is None else
                         f"{path}: dropped from the cache as soon as it is there; raise the cache's limit")  # fmt: skip

    def fetch(self, shard: int) -> Path:
        """Where a tar is on this machine; a remote one is brought into the cache first.

        Raises:
            ShardError: it cannot be fetched.
        """
        facts = self.shards[shard]
        if self.cache is None:
            return self.root / facts.file
        return self.cache.fetch(facts.file, facts.bytes, facts.sha256)

    def summary(self) -> list[dict[str, Any]]:
        """One row a fraction: name, images, classes, shards, bytes (of those shards), for ``list``."""
        size_of = {shard.file: shard.bytes for shard in self.shards}
        rows = []
        for name in self.fractions:
            samples, files = self.samples(name), self.shard_files(name)
            labels = self.labels(samples)
            rows.append(
                {
                    "fraction": name,
                    "images": len(samples),
                    "classes": len(np.unique(labels[labels >= 0])),
                    "shards": len(files),
                    "bytes": sum(size_of[file.name] for file in files),
                }
            )
        return rows


def read_table(path: Path, content: Index) -> np.ndarray:
    """The sample table, mapped and not read.

    Args:
        path: of the file.
        content: what its header has to agree with.

    Raises:
        ShardError: it cannot be read, or its header says something else.
    """
    dtype, again = table_dtype(content.key_bytes), "restore it, or build again"
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            header = read(file, max_header_size=_HEADER_BYTES)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
            if header != ((content.samples,), False, dtype) or size != start + content.samples * dtype.itemsize:
                raise ShardError(f"{path} does not have the rows that the index says: {again}")
            return (
                np.asarray(np.memmap(file, dtype, "r", start, content.samples))
                if content.samples
                else np.empty(0, dtype)
            )
    except UnfitFile as problem:
        raise ShardError(f"{problem}: {again}") from None
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror}): {again}") from None
    except ShardError:
        raise
    except Exception:  # numpy's parser of headers raises SyntaxError, TokenError and others besides ValueError
        raise ShardError(f"{path} is no table of numpy's: {again}") from None


def _plain_size(head: bytes) -> int:
    """The size field of a tar header as our own writer leaves it; -1 for any other form."""
    try:
        return int(head[124:135], 8)
    except ValueError:
        return -1


def _read_index(root: Path) -> Index:
    path = root / INDEX_NAME
    try:
        return Index.read(path)
    except FileNotFoundError:
        pass
    except UnfitFile as problem:
        raise ShardError(str(problem)) from None
    except NotADirectoryError:
        raise ShardError(f"{root} is a file; data.shards names the folder that mimscale shards build wrote") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{printable(path)}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not root.exists():
        raise ShardError(f"{root}: no such folder; build it with: mimscale shards build --source SRC --out {root}")
    if (root / WORK_FOLDER).exists():
        raise ShardError(
            f"{root} holds a build that did not finish; run the same build command again, it resumes where it was"
        )
    if any(root.glob("*.tar")):
        raise ShardError(
            f"{root} has tars but no {INDEX_NAME}: the build did not finish (run it again), or they come from elsewhere "
            "(run: mimscale shards index)"
        )
    raise ShardError(f"{root} has no {INDEX_NAME}: not a shard folder; build one with: mimscale shards build")


def draw_view_classes(count: int, of: int, seed: int) -> list[int]:
    """The classes of a view of ``count`` classes.

    Raises:
        ShardError: more classes than there are.
    """
    if not 0 < count <= of:
        raise ShardError(f"a view of {count} classes cannot be drawn from {of} classes")
    return fractions.pick_classes(count, of, seed).tolist()
