"""One build shared out over processes that know nothing of each other, such as the tasks of a job array.

The first part to come lists the source and settles the layout; the others wait for it. Then each writes its own share of the
shards, and the one that finds all of them written writes the index. Files on the shared folder are all they have in common:
locks (``flock``, which network file systems carry over) and the journal of finished shards.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mimscale.data import pool
from mimscale.data.build import writer
from mimscale.data.build.layout import Layout, lay_out
from mimscale.data.build.listing import Listing
from mimscale.data.build.shard_writer import Options, ShardTask, journal_entry
from mimscale.data.errors import ShardError
from mimscale.data.shards import fractions
from mimscale.data.shards.format import INDEX_NAME, WORK_FOLDER, Index, View
from mimscale.files import open_to_append, read_json, write_bytes


@dataclass(frozen=True)
class Part:
    """Share ``number`` (from 1) of ``count``. The parts with the same ``array`` go by one listing of the source."""

    number: int
    count: int
    array: str

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read ``K/N@ID``.

        Raises:
            ShardError: it is not of that form, or K is not one of 1 to N.
        """
        share, _, array = text.partition("@")
        number, _, count = share.partition("/")
        if not (number.isdigit() and count.isdigit() and array and 1 <= int(number) <= int(count)):
            raise ShardError(
                f"--part {text}: write K/N@ID, such as 3/32@4711: the third of 32 parts of the build that all share the "
                f"ID 4711 (the job array's, say)"
            )
        return cls(int(number), int(count), array)


def build_part(
    part: Part,
    train: writer.Source,
    out: Path,
    *,
    val: writer.Source | None = None,
    val_share: int = 0,
    options: Options = writer.DEFAULTS,
    percents: tuple[int, ...] = fractions.FRACTIONS,
    views: dict[str, View] | None = None,
    workers: int = 1,
    report: writer.Progress = lambda what, done, total: None,
) -> tuple[Index | None, int]:
    """Write one part's shards, or what is missing of them; arguments as for :func:`mimscale.data.build.writer.build`.

    Returns:
        The index, or ``None`` where a part that still runs, or is to run, will write it; and how many shards are still to
        be written.

    Raises:
        ShardError: as for a build of one piece, or another part was given other images or options.
    """
    work = out / WORK_FOLDER
    wish = [train.classes, asdict(options), percents, {n: asdict(v) for n, v in (views or {}).items()}, val_share]
    asked = hashlib.sha256(json.dumps(wish).encode()).hexdigest()
    with _locked(work, "listing", fcntl.LOCK_EX):
        held, layout = _settle(part, asked, train, val, val_share, out, options, percents, workers, report)
    try:
        if (out / INDEX_NAME).exists():
            return _finished(out, work, layout), 0
        mine = layout.tasks(out)[part.number - 1 :: part.count]
        images = sum(task.stop - task.start for task in mine)
        done = 0
        with _locked(work, f"part-{part.number}-of-{part.count}", fcntl.LOCK_EX | fcntl.LOCK_NB):
            report(f"writing images of part {part.number}/{part.count}", 0, images)
            for count in pool.run(writer.make_shard, mine, workers):
                done += count
                report(f"writing images of part {part.number}/{part.count}", done, images)
        with _locked(work, "listing", fcntl.LOCK_EX):
            if (out / INDEX_NAME).exists():
                return _finished(out, work, layout), 0
            left = sum(not _is_written(task) for task in layout.tasks(out))
            # Not under the feet of a part that still runs: that one comes here after us.
            if left or not _alone(held):
                held.close()
                return None, left
            return writer.join(out, layout, val is not None or val_share > 0, views), 0
    finally:
        held.close()


def _alone(held: BinaryIO) -> bool:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _settle(
    part: Part,
    asked: str,
    train: writer.Source,
    val: writer.Source | None,
    val_share: int,
    out: Path,
    options: Options,
    percents: tuple[int, ...],
    workers: int,
    report: writer.Progress,
) -> tuple[BinaryIO, Layout]:
    """The layout all parts go by, and the builders' lock, shared with the other parts."""
    work = out / WORK_FOLDER
    made = work / "listing" / "made.json"
    known = _settled(made)
    fresh = known.get("array") != part.array
    with ExitStack() as unless_settled:
        held = unless_settled.enter_context(os.fdopen(open_to_append(work / "lock"), "ab"))
        try:
            fcntl.flock(held, (fcntl.LOCK_EX if fresh else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{out}: another build is writing into it; wait for it, or end it") from None
        if fresh:
            with writer.leaving_nothing(out, work):
                listing, train_rows, rejected = writer.scan(train, val, work, options.decodes, workers, report)
                layout = lay_out(listing, train_rows, rejected, train.classes, percents, options, val_share)
                layout.refuse_other(out)
            writer.remove_strays(out)
            layout.keep(work)
            kept = {"array": part.array, "asked": asked, "train_rows": train_rows, "rejected": rejected}
            write_bytes(made, json.dumps(kept).encode(), durable=True)
            fcntl.flock(held, fcntl.LOCK_SH)
        else:
            if known["asked"] != asked:
                raise ShardError(f"{out}: another part of {part.array} was given other images or options")
            rejected = [(where, why) for where, why in known["rejected"]]
            layout = lay_out(
                Listing(work / "listing"), known["train_rows"], rejected, train.classes, percents, options, val_share
            )
        unless_settled.pop_all()
        return held, layout


def _settled(made: Path) -> dict[str, Any]:
    """What the first part has written of the listing; empty where there is none, or it is damaged, so that it is made anew."""
    try:
        known = read_json(made)
    except OSError:
        return {}
    kinds = {"array": str, "asked": str, "train_rows": int, "rejected": list}
    if not isinstance(known, dict) or {name: type(value) for name, value in known.items()} != kinds:
        return {}
    pairs = all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in known["rejected"]
    )
    return known if pairs and known["train_rows"] >= 0 else {}


def _finished(out: Path, work: Path, layout: Layout) -> Index:
    """The index of a build that other parts have finished."""
    layout.refuse_other(out)
    shutil.rmtree(work, ignore_errors=True)
    return Index.read(out / INDEX_NAME)


def _is_written(task: ShardTask) -> bool:
    """Whether a part has finished this shard; its bytes were hashed as they were written."""
    entry = journal_entry(Path(task.work), task.file)
    try:
        return (
            entry is not None and entry.plan == task.plan and (Path(task.out) / task.file).stat().st_size == entry.bytes
        )
    except OSError:
        return False


@contextmanager
def _locked(work: Path, name: str, how: int) -> Iterator[None]:
    """Hold the lock ``name``. The part that finishes the build removes the folder; who waited then makes it anew."""
    path = work / f"{name}.lock"
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.fdopen(open_to_append(path), "ab")
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, how)
            if os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                break
        except FileNotFoundError:
            pass
        except BlockingIOError:
            lock.close()
            raise ShardError(f"{work.parent}: another process writes this part; wait for it, or end it") from None
        lock.close()
    try:
        yield
    finally:
        lock.close()
