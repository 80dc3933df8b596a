"""Sources in, shards out; a killed build resumes where it was.

The plan (which sample goes where) is settled from the listing alone, before a byte is written. So it does not depend
on how many processes write, and a shard that was finished before a kill is the shard that would be written again.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mimscale.data import pool
from mimscale.data.build.layout import PLAN_NAME, Layout, lay_out
from mimscale.data.build.listing import Found, Listing, ListingWriter
from mimscale.data.build.shard_writer import (
    Options,
    ShardTask,
    Written,
    holds_rows,
    is_finished,
    journal_entry,
    write_shard,
)
from mimscale.data.build.source import ScanTask, Source
from mimscale.data.build.tree import IS_SECOND, is_loss
from mimscale.data.errors import ShardError
from mimscale.data.shards import fractions
from mimscale.data.shards.format import (
    INDEX_NAME,
    REJECTED_NAME,
    TABLE_NAME,
    WORK_FOLDER,
    Index,
    Shard,
    View,
    file_sha256,
    table_dtype,
)
from mimscale.files import open_to_append, write_beside, write_bytes
from mimscale.wording import counted, printable

# Of a Python object, in somebody else's message: another one in each build.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

Progress = Callable[[str, int, int], None]
DEFAULTS = Options()


def _run_scan(task: ScanTask) -> Found:
    return task.run()


def scan(
    train: Source, val: Source | None, work: Path, thorough: bool, workers: int, report: Progress
) -> tuple[Listing, int, list[tuple[str, str]]]:
    """List both splits. Returns the listing, how many of its rows are training images, and what was rejected."""
    shutil.rmtree(work / "listing", ignore_errors=True)
    writer = ListingWriter(work / "listing")
    label_of = {name: label for label, name in enumerate(train.classes)}
    rejected: list[tuple[str, str]] = []
    broken: list[str] = []
    seen: dict[tuple[int, int], str] = {}
    tasks = train.tasks(label_of, thorough)
    train_tasks, train_rows = len(tasks), 0
    if val is not None:
        tasks = [*tasks, *val.tasks(label_of, thorough)]
    for number, found in enumerate(pool.run(_run_scan, tasks, workers)):
        if number == train_tasks:
            train_rows, seen = writer.rows, {}
        found.take_once(seen, IS_SECOND)
        writer.add(found)
        rejected += [(where, _ADDRESS.sub("", why)) for where, why in (*found.rejected, *sorted(found.aside))]
        broken += [found.broken] if found.broken else []
        report("listing classes", number + 1, len(tasks))
    if len(tasks) == train_tasks:
        train_rows = writer.rows
    listing = writer.close()
    if broken:
        raise ShardError(f"{counted(len(broken), 'archive')} damaged; fetch them again: " + "; ".join(broken[:10]))
    if not train_rows:
        raise ShardError(f"the source holds no image that can be stored ({_reasons(rejected)})")
    return listing, train_rows, rejected


def _reasons(rejected: list[tuple[str, str]]) -> str:
    lost = [why for _, why in rejected if is_loss(why)]
    return f"{len(lost)} could not be decoded, {len(rejected) - len(lost)} were no images"


def make_shard(task: ShardTask) -> int:
    """Write a shard unless it stands already; how many images it holds."""
    if not is_finished(task):
        write_shard(task)
    return task.stop - task.start


def _join_tables(tasks: list[ShardTask], out: Path, work: Path) -> tuple[int, str]:
    """Write the sample table from the journal's pieces, one piece in memory at a time.

    Returns:
        Bytes of a key, which are those of the longest, and the table's SHA-256.
    """
    pieces = [work / "journal" / f"{task.file}.npy" for task in tasks]
    # A piece is as wide as its own longest key.
    key_bytes = max(np.load(piece, mmap_mode="r", allow_pickle=False).dtype["key"].itemsize for piece in pieces)
    dtype, total = table_dtype(key_bytes), tasks[-1].stop
    with write_beside(out / TABLE_NAME, durable=True, folder=work) as beside:
        with beside.open("wb") as file:
            _write_table(file, pieces, dtype, total)
        digest = file_sha256(beside)
    return key_bytes, digest


def _write_table(file: BinaryIO, pieces: list[Path], dtype: np.dtype, total: int) -> None:
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (total,)}
    )
    for number, piece in enumerate(pieces):
        rows = np.load(piece, allow_pickle=False).astype(dtype)
        rows["shard"] = number
        file.write(rows.tobytes())


@contextmanager
def _sole_builder(out: Path, work: Path) -> Iterator[None]:
    """Two builds into one folder would take turns destroying each other's work."""
    work.mkdir(parents=True, exist_ok=True)
    with os.fdopen(open_to_append(work / "lock"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{out}: another build is writing into it; wait for it, or end it") from None
        with leaving_nothing(out, work):
            yield


@contextmanager
def leaving_nothing(out: Path, work: Path) -> Iterator[None]:
    """Remove the work folder of a build that fails, unless a layout is kept there for the next one to resume from.

    To be entered by the only builder in ``out``.
    """
    try:
        yield
    except BaseException:
        if (out / INDEX_NAME).exists() or not (work / PLAN_NAME).exists():
            shutil.rmtree(work, ignore_errors=True)
        raise


def remove_strays(out: Path) -> None:
    """Remove what a build that was cut off was about to give its name; its successor has another process id."""
    for stray in out.glob("*.partial-*"):
        stray.unlink(missing_ok=True)


def build(
    train: Source,
    out: Path,
    *,
    val: Source | None = None,
    val_share: int = 0,
    options: Options = DEFAULTS,
    percents: tuple[int, ...] = fractions.FRACTIONS,
    views: dict[str, View] | None = None,
    workers: int = 1,
    report: Progress = lambda what, done, total: None,
) -> Index:
    """Write the shards of a source, or resume a build that was cut off.

    Args:
        train: the training images.
        out: folder to write; made if missing.
        val: held-out images, split "val" of the same folder; their classes must be among those of ``train``.
        val_share: percent of each class to hold out as that split, drawn by the seed; not with ``val``.
        options: everything else that decides the bytes.
        percents: the fractions to lay the training images out in, ascending.
        views: named choices over the training shards to write into the index.
        workers: processes; the result does not depend on it.
        report: called with (what is done, how many, of how many).

    Raises:
        ShardError: the source holds nothing, the folder holds something else, the disk is full, workers keep dying.
    """
    work = out / WORK_FOLDER
    out.mkdir(parents=True, exist_ok=True)
    with _sole_builder(out, work):
        listing, train_rows, rejected = scan(train, val, work, options.decodes, workers, report)
        layout = lay_out(listing, train_rows, rejected, train.classes, percents, options, val_share)
        layout.refuse_other(out)
        remove_strays(out)
        layout.keep(work)
        done = 0
        report("writing images", 0, layout.samples)
        for count in pool.run(make_shard, layout.tasks(out), workers):
            done += count
            report("writing images", done, layout.samples)
        return join(out, layout, val is not None or val_share > 0, views)


def _journaled(work: Path, task: ShardTask) -> Written:
    """What the journal says of a shard that is written.

    Raises:
        ShardError: it says nothing that can be used: somebody else has changed it.
    """
    entry = journal_entry(work, task.file)
    try:
        whole = entry is not None and holds_rows(work, task, entry.table)
    except OSError:
        whole = False
    if entry is None or not whole:
        raise ShardError(f"{work}: the journal's entry of {task.file} is damaged; run the same build again")
    return entry


def join(out: Path, layout: Layout, with_val: bool, views: dict[str, View] | None) -> Index:
    """Make a folder of whose layout every shard is written a finished build."""
    work = out / WORK_FOLDER
    tasks = layout.tasks(out)
    entries = [_journaled(work, task) for task in tasks]
    options, percents = layout.options, layout.percents
    key_bytes, table_sha256 = _join_tables(tasks, out, work)
    index = Index(
        build=layout.plan,
        seed=options.seed,
        classes=layout.classes,
        shards=[
            Shard(task.file, task.split, task.stratum, task.stop - task.start, entry.bytes, entry.sha256)
            for task, entry in zip(tasks, entries, strict=True)
        ],
        fractions={
            **{str(p): [t.file for t in tasks if t.split == "train" and t.stratum <= p] for p in percents},
            **({"val": [t.file for t in tasks if t.split == "val"]} if with_val else {}),
        },
        samples=layout.samples,
        key_bytes=key_bytes,
        table_sha256=table_sha256,
        views=views or {},
        samples_per_shard=options.samples_per_shard,
        resize_shorter=options.resize_shorter,
        store=options.store,
        rejected=sum(is_loss(why) for _, why in layout.rejected),
        rewritten=sum(entry.rewritten for entry in entries),
    )
    if layout.rejected:
        lines = "".join(f"{printable(where, 8192)}\t{printable(why)}\n" for where, why in layout.rejected)
        write_bytes(out / REJECTED_NAME, lines.encode(), durable=True)
    write_bytes(out / INDEX_NAME, index.to_json(), durable=True)
    shutil.rmtree(work, ignore_errors=True)
    return index
