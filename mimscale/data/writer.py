"""Sources in, shards out; a killed build goes on where it was.

The plan (which sample goes where) is settled from the listing alone, before a byte is written. So it does not depend
on how many processes write, and a shard that was finished before a kill is the shard that would be written again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np

from mimscale.data import crew, draws, strata
from mimscale.data.errors import ShardError
from mimscale.data.listing import NO_STRATUM, Found, Listing, ListingWriter
from mimscale.data.shard_format import (
    INDEX_NAME,
    REJECTED_NAME,
    TABLE_NAME,
    WORK_FOLDER,
    Index,
    Shard,
    View,
    file_sha256,
    table_dtype,
    write_durably,
)
from mimscale.data.shard_writer import Options, ShardTask, is_finished, save_array, write_shard

Progress = Callable[[str, int, int], None]
_DEFAULTS = Options()


class ScanTask(Protocol):
    """One class of a source: picklable, and run in a worker process."""

    def run(self) -> Found:
        """List the images of the class."""
        ...


class Source(Protocol):
    """Where images come from."""

    @property
    def classes(self) -> list[str]:
        """Names of its classes, in label order."""
        ...

    def tasks(self, label_of: dict[str, int], thorough: bool) -> list[ScanTask]:
        """What to scan, given the number of each class name; ``thorough``: decode every image."""
        ...


def _run_scan(task: ScanTask) -> Found:
    return task.run()


def _scan(
    train: Source, val: Source | None, work: Path, thorough: bool, workers: int, report: Progress
) -> tuple[Listing, int, list[tuple[str, str]]]:
    """List both splits. Returns the listing, how many of its rows are training images, and what was rejected."""
    shutil.rmtree(work / "listing", ignore_errors=True)
    writer = ListingWriter(work / "listing")
    label_of = {name: label for label, name in enumerate(train.classes)}
    rejected: list[tuple[str, str]] = []
    broken: list[str] = []
    tasks = train.tasks(label_of, thorough)
    train_tasks, train_rows = len(tasks), 0
    if val is not None:
        tasks = [*tasks, *val.tasks(label_of, thorough)]
    for number, found in enumerate(crew.run(_run_scan, tasks, workers)):
        if number == train_tasks:
            train_rows = writer.rows
        writer.add(found)
        rejected += found.rejected
        broken += [found.broken] if found.broken else []
        report("listing classes", number + 1, len(tasks))
    if len(tasks) == train_tasks:
        train_rows = writer.rows
    listing = writer.close()
    if broken:
        raise ShardError(f"{len(broken)} archives are damaged; fetch them again: " + "; ".join(broken[:10]))
    if not train_rows:
        raise ShardError(f"the source holds no image that can be stored ({len(rejected)} could not be decoded)")
    return listing, train_rows, rejected


def _plan(
    listing: Listing, train_rows: int, percents: tuple[int, ...], options: Options
) -> tuple[np.ndarray, list[tuple[str, str, int, int, int]]]:
    """The order of all samples (rows of the listing), and the shards as (file, split, stratum, start, stop) of it."""
    stratum_of = np.array(listing.stratum[:train_rows])
    drawn = stratum_of == NO_STRATUM
    if drawn.any():
        stratum_of[drawn] = strata.assign(np.asarray(listing.label[:train_rows][drawn]), percents, options.seed)
    order = np.empty(len(listing), np.uint32 if len(listing) < 1 << 32 else np.int64)
    shards: list[tuple[str, str, int, int, int]] = []

    def lay(rows: np.ndarray, split: str, stratum: int, start: int) -> int:
        # Shuffled inside the stratum, so that any run of samples mixes classes; but what comes from shards has its
        # order.
        kept = len(rows) > 0 and listing.stratum[rows[0]] != NO_STRATUM
        order[start : start + len(rows)] = (
            rows if kept else rows[draws.permutation(len(rows), options.seed, draws.SHUFFLE, stratum)]
        )
        count = -(-len(rows) // options.samples_per_shard)
        for number in range(count):
            name = f"{split}-{stratum:03}-{number:06}.tar" if split == "train" else f"{split}-{number:06}.tar"
            first, last = start + number * len(rows) // count, start + (number + 1) * len(rows) // count
            shards.append((name, split, stratum, first, last))
        return start + len(rows)

    start = 0
    for number, percent in enumerate(percents):
        start = lay(np.flatnonzero(stratum_of == number).astype(order.dtype), "train", percent, start)
    lay(np.arange(train_rows, len(listing), dtype=order.dtype), "val", 0, start)
    return order, shards


def _digest(listing: Listing, order: np.ndarray, shards: list, classes: list[str], options: Options) -> str:
    """What identifies a plan: two builds with the same digest write the same bytes."""
    digest = hashlib.sha256(json.dumps([asdict(options), shards, classes]).encode())
    for column in (listing.size, listing.label, listing.kind, listing.key_end, listing._keys, order):
        for start in range(0, len(column), 1 << 20):
            digest.update(np.ascontiguousarray(column[start : start + (1 << 20)]).data)
    return digest.hexdigest()


def _make_shard(task: ShardTask) -> int:
    if not is_finished(task):
        write_shard(task)
    return task.stop - task.start


def _join_tables(tasks: list[ShardTask], out: Path, work: Path, key_bytes: int) -> str:
    """Write the sample table from the journal's pieces, one piece in memory at a time. Returns its SHA-256."""
    dtype, total = table_dtype(key_bytes), tasks[-1].stop
    beside = work / TABLE_NAME
    with beside.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (total,)}
        )
        for number, task in enumerate(tasks):
            piece = np.load(work / "journal" / f"{task.file}.npy", allow_pickle=False).astype(dtype)
            piece["shard"] = number
            file.write(piece.tobytes())
        file.flush()
        os.fsync(file.fileno())
    digest = file_sha256(beside)
    beside.replace(out / TABLE_NAME)
    return digest


@contextmanager
def _sole_builder(out: Path, work: Path) -> Iterator[None]:
    """Two builds into one folder would take turns destroying each other's work."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{out}: another build is writing into it; wait for it, or end it") from None
        yield


def _refuse_other_plan(out: Path, work: Path, plan: str) -> None:
    """What lies in the folder already must be this very build."""
    known = None
    if (out / INDEX_NAME).exists():
        known = Index.from_json((out / INDEX_NAME).read_bytes(), out / INDEX_NAME).build
    elif (work / "plan").exists():
        known = (work / "plan").read_text()
    elif tars := sorted(out.glob("*.tar")):
        raise ShardError(f"{out} holds {tars[0].name}, which no build of mimscale's left there; choose an empty folder")
    if known is not None and known != plan:
        raise ShardError(
            f"{out} holds a build of other images or with other options; choose another folder, or delete this one"
        )


def build(
    train: Source,
    out: Path,
    *,
    val: Source | None = None,
    options: Options = _DEFAULTS,
    percents: tuple[int, ...] = strata.FRACTIONS,
    views: dict[str, View] | None = None,
    workers: int = 1,
    report: Progress = lambda what, done, total: None,
) -> Index:
    """Write the shards of a source, or go on with a build that was cut off.

    Args:
        train: the training images.
        out: folder to write; made if missing.
        val: held-out images, split "val" of the same folder; their classes must be among those of ``train``.
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
        # What a build that was cut off was about to give its name; its successor has another process id.
        for stray in out.glob("*.partial-*"):
            stray.unlink()
        listing, train_rows, rejected = _scan(train, val, work, options.decodes, workers, report)
        order, shards = _plan(listing, train_rows, percents, options)
        plan = _digest(listing, order, shards, train.classes, options)
        _refuse_other_plan(out, work, plan)
        write_durably(work / "plan", plan.encode())
        save_array(work / "order.npy", order)
        (work / "journal").mkdir(exist_ok=True)
        tasks = [ShardTask(*shard, str(work), str(out), plan, options) for shard in shards]
        done = 0
        report("writing images", 0, len(order))
        for count in crew.run(_make_shard, tasks, workers):
            done += count
            report("writing images", done, len(order))
        entries = [json.loads((work / "journal" / f"{task.file}.json").read_bytes()) for task in tasks]
        widest = int(np.diff(listing.key_end, prepend=0).max())
        index = Index(
            build=plan,
            seed=options.seed,
            classes=train.classes,
            shards=[
                Shard(task.file, task.split, task.stratum, task.stop - task.start, entry["bytes"], entry["sha256"])
                for task, entry in zip(tasks, entries, strict=True)
            ],
            fractions={
                **{str(p): [t.file for t in tasks if t.split == "train" and t.stratum <= p] for p in percents},
                **({"val": [t.file for t in tasks if t.split == "val"]} if val is not None else {}),
            },
            samples=len(order),
            key_bytes=widest,
            table_sha256=_join_tables(tasks, out, work, widest),
            views=views or {},
            samples_per_shard=options.samples_per_shard,
            resize_shorter=options.resize_shorter,
            store=options.store,
            rejected=len(rejected),
            rewritten=sum(entry["rewritten"] for entry in entries),
        )
        if rejected:
            lines = "".join(f"{where}\t{why}\n" for where, why in rejected)
            write_durably(out / REJECTED_NAME, lines.encode("utf-8", "replace"))
        write_durably(out / INDEX_NAME, index.to_json())
    shutil.rmtree(work, ignore_errors=True)
    return index
