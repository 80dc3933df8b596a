"""WebDataset tars made elsewhere: scanned once, then read like our own, where they lie."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from zlib_ng import zlib_ng

from mimscale.data import pool
from mimscale.data.build.listing import safe_part
from mimscale.data.decode import MAX_BYTES
from mimscale.data.errors import ShardError
from mimscale.data.shards.format import (
    INDEX_NAME,
    MAX_KEY_BYTES,
    TABLE_NAME,
    Index,
    Shard,
    View,
    file_sha256,
    table_dtype,
)
from mimscale.data.shards.fractions import FRACTIONS
from mimscale.data.shards.tar import TarError, walk
from mimscale.files import open_regular, write_bytes
from mimscale.wording import counted, printable

_IMAGES = (b"jpg", b"jpeg", b"png", b"ppm", b"webp", b"bmp", b"tif", b"tiff")
# tar names that say they hold held-out images: val-000.tar, imagenet1k-validation-00.tar.
_HELD_OUT = re.compile(r"(^|[-_.])val(idation)?([-_.]|$)")


# What may follow the last member: zeros up to a whole record. A sparse file can be so long that its digest takes hours.
_MOST_AFTER = 64 * 2**20

# Labels may leave numbers out, up to this one; beyond it the numbers have to be used.
_DENSE_LABELS = 1 << 16


@dataclass
class _Scanned:
    rows: np.ndarray
    keys: list[bytes]
    sha256: str
    bytes: int
    broken: str | None = None


def _split(name: bytes) -> tuple[bytes, bytes]:
    """(key, extension) as WebDataset splits a name: at the first dot of its last part."""
    folder, slash, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    return folder + slash + stem, extension.lower()


def _scan(path: Path) -> _Scanned:
    """Every sample of one tar: its image and its label."""
    samples: dict[bytes, list[int]] = {}
    broken, end = None, 0
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        descriptor = file.fileno()
        try:
            whole = os.fstat(descriptor).st_size
            for member in walk(file, 0, whole, str(path)):
                end = member.offset + member.size
                key, extension = _split(member.name)
                if not member.is_file or extension not in (*_IMAGES, b"cls"):
                    continue
                # label, offset, size, crc; a sample counts once it has an image.
                row = samples.setdefault(key, [-1, -1, 0, 0])
                if extension == b"cls":
                    text = os.pread(descriptor, min(member.size, 20), member.offset).strip()
                    row[0] = int(text) if text.isdigit() else -1
                elif row[1] < 0 and member.size <= MAX_BYTES:
                    data = os.pread(descriptor, member.size, member.offset)
                    row[1:] = [member.offset, member.size, zlib_ng.crc32(data)]
            if whole - end > _MOST_AFTER:
                broken = f"{printable(path)}: {counted(whole - end, 'byte')} after its last member, at byte {end:,}"
        except TarError as error:
            broken = str(error)
    if broken:
        return _Scanned(np.empty((0, 4), np.int64), [], "", 0, broken)
    kept = {key: row for key, row in samples.items() if row[1] >= 0}
    if long := next((key for key in kept if len(key) > MAX_KEY_BYTES), None):
        broken = f"{path}: a key of {len(long):,} bytes; {MAX_KEY_BYTES:,} are the most that an index holds"
    rows = np.asarray(list(kept.values()), np.int64).reshape(-1, 4)
    return _Scanned(rows, list(kept), file_sha256(path), path.stat().st_size, broken)


def index_tars(
    folder: Path,
    seed: int = 0,
    workers: int = 1,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Index:
    """Write the index of a folder of WebDataset tars beside them.

    Their samples stay where they are, so the fractions are views over all shards, drawn per class by ``seed``. Tars whose
    names have "val" or "validation" as a part become the split "val".

    Args:
        folder: where the tars are.
        seed: decides the fractions.
        workers: processes.
        report: called with (what is done, how many, of how many).

    Raises:
        ShardError: no tars, no images in them, an index that is there already, or damage, with the names.
    """
    if (folder / INDEX_NAME).exists():
        raise ShardError(f"{folder / INDEX_NAME} is there already; move it away to scan the tars again")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ShardError(f"{folder}: no tars in it")
    tars.sort(key=lambda tar: bool(_HELD_OUT.search(tar.stem)))
    scanned = []
    for done, result in enumerate(pool.run(_scan, tars, workers)):
        scanned.append(result)
        report("scanning tars", done + 1, len(tars))
    if broken := [result.broken for result in scanned if result.broken]:
        raise ShardError(f"{counted(len(broken), 'tar')} damaged: " + "; ".join(broken[:10]))
    keys = [key for result in scanned for key in result.keys]
    if not keys:
        raise ShardError(f"{folder}: no images in its {counted(len(tars), 'tar')}")
    if len(set(keys)) < len(keys):
        # Many tools number samples anew in each tar.
        keys = [
            safe_part(tar.stem).encode() + b"/" + key for tar, r in zip(tars, scanned, strict=True) for key in r.keys
        ]
    if (longest := max(map(len, keys))) > MAX_KEY_BYTES:
        raise ShardError(f"{folder}: a key of {longest:,} bytes; {MAX_KEY_BYTES:,} are the most that an index holds")
    table = np.zeros(len(keys), table_dtype(longest))
    rows = np.concatenate([result.rows for result in scanned])
    table["shard"] = np.repeat(np.arange(len(tars)), [len(result.rows) for result in scanned])
    for column, name in enumerate(("label", "offset", "size", "crc")):
        table[name] = rows[:, column]
    table["key"] = keys
    labels = np.unique(rows[:, 0])
    if labels[-1] >= max(_DENSE_LABELS, 4 * len(labels)):
        row = int(rows[:, 0].argmax())
        key = printable(keys[row].decode("utf-8", "backslashreplace"))
        raise ShardError(
            f"{tars[table['shard'][row]]}: the label {labels[-1]:,} of {key} "
            f"among {counted(len(labels), 'different label')}: labels number the classes from 0 on; write them anew"
        )
    content = _npy(table)
    shards = [
        Shard(tar.name, "val" if _HELD_OUT.search(tar.stem) else "train", 0, len(r.rows), r.bytes, r.sha256)
        for tar, r in zip(tars, scanned, strict=True)
    ]
    import hashlib

    fractions = {"100": [shard.file for shard in shards if shard.split == "train"]}
    if any(shard.split == "val" for shard in shards):
        fractions["val"] = [shard.file for shard in shards if shard.split == "val"]
    digest = hashlib.sha256(content).hexdigest()
    index = Index(
        build=hashlib.sha256(f"{digest} {seed} {[shard.sha256 for shard in shards]}".encode()).hexdigest(),
        seed=seed,
        classes=[str(label) for label in range(int(table["label"].max()) + 1)],
        shards=shards,
        fractions=fractions,
        samples=len(table),
        key_bytes=table.dtype["key"].itemsize,
        table_sha256=digest,
        views={str(percent): View(seed, percent=percent) for percent in FRACTIONS[:-1]},
        foreign=True,
    )
    write_bytes(folder / TABLE_NAME, content, durable=True)
    write_bytes(folder / INDEX_NAME, index.to_json(), durable=True)
    return index


def _npy(table: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return buffer.getvalue()
