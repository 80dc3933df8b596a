"""Hold a shard folder against its index, and name every shard and sample that does not match."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mimscale.data import pool
from mimscale.data.errors import DamagedSample, ShardError
from mimscale.data.shards.format import file_sha256
from mimscale.data.shards.index import ShardIndex
from mimscale.data.shards.tar import BLOCK, TarError, parse_header
from mimscale.wording import escaped


@dataclass(frozen=True)
class _Check:
    root: Path
    number: int
    start: int
    stop: int


def verify(
    root: Path, workers: int = 1, report: Callable[[str, int, int], None] = lambda what, done, total: None
) -> list[str]:
    """Everything that is wrong with a shard folder, one line each; empty if nothing is.

    Every byte is read: SHA-256 of each shard, and where that fails each sample of it.

    Args:
        root: the folder.
        workers: processes.
        report: called with (what is done, how many, of how many).

    Raises:
        ShardError: the index itself cannot be used.
    """
    index = ShardIndex.load_unchecked(root)
    try:
        index.check_table()
    except ShardError as error:
        # Without its table nothing in a shard can be named but the shard itself.
        return [str(error), *map(escaped, _damaged_shards(index))]
    problems: list[str] = []
    tasks, start = [], 0
    for number, shard in enumerate(index.shards):
        tasks.append(_Check(root, number, start, start + shard.samples))
        start += shard.samples
    for done, found in enumerate(pool.run(_check_shard, tasks, workers)):
        problems += map(escaped, found)
        report("verifying shards", done + 1, len(tasks))
    return problems


def _damaged_shards(index: ShardIndex) -> list[str]:
    problems = []
    for shard in index.shards:
        path = index.root / shard.file
        if not path.is_file():
            problems.append(f"{path}: missing; all of its {shard.samples} samples are lost")
        elif path.stat().st_size != shard.bytes or file_sha256(path) != shard.sha256:
            problems.append(f"{path}: its SHA-256 is not the one in the index")
    return problems


def _check_shard(task: _Check) -> list[str]:
    index = ShardIndex.load_unchecked(task.root)
    shard = index.shards[task.number]
    path = task.root / shard.file
    try:
        size = path.stat().st_size
        # A sparse file can be so long that its digest takes hours.
        digest = file_sha256(path) if size == shard.bytes or not path.is_file() else None
    except OSError as error:
        return [f"{path}: {error.strerror}; all of its {shard.samples} samples are lost"]
    if size == shard.bytes and digest == shard.sha256:
        return []
    what = (
        f"has {size:,} bytes instead of {shard.bytes:,}"
        if size != shard.bytes
        else "its SHA-256 is not the one in the index"
    )
    samples = [f"{path}: {problem}" for problem in _damaged_samples(index, path, task)]
    if not samples and size == shard.bytes:
        what += "; all images and labels in it are intact, padding or empty blocks are not"
    return [f"{path}: {what}", *samples]


def _damaged_samples(index: ShardIndex, path: Path, task: _Check) -> list[str]:
    """What is wrong with each sample of a shard that does not match its SHA-256."""
    problems = []
    for sample in range(task.start, task.stop):
        key = index.key(sample)
        try:
            data = index.read(sample)
            if not index.intact(sample, data):
                problems.append(f"{key}: image bytes have changed")
                continue
            if not index.content.foreign:
                _check_label(index, path, sample, len(data))
        except (DamagedSample, ShardError, TarError) as error:
            problems.append(f"{key}: {error}")
    return problems


def _check_label(index: ShardIndex, path: Path, sample: int, image_bytes: int) -> None:
    offset = index.offset(sample) + image_bytes + -image_bytes % BLOCK
    with path.open("rb", buffering=0) as file:
        block = os.pread(file.fileno(), 2 * BLOCK, offset)
    name, size, _ = parse_header(block[:BLOCK])
    if name != index.key(sample).encode() + b".cls" or block[BLOCK : BLOCK + size] != b"%d" % index.label(sample):
        raise TarError("its label has changed")
