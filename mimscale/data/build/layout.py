"""Which sample goes where, settled from the listing alone, before a byte is written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mimscale.data import draws
from mimscale.data.build.listing import NO_STRATUM, Listing
from mimscale.data.build.shard_writer import Options, ShardTask, save_array
from mimscale.data.errors import ShardError
from mimscale.data.shards import fractions
from mimscale.data.shards.format import INDEX_NAME, WORK_FOLDER, Index
from mimscale.files import read_text, write_bytes
from mimscale.wording import counted


def _order(
    listing: Listing, train_rows: int, percents: tuple[int, ...], options: Options, val_share: int
) -> tuple[np.ndarray, list[tuple[str, str, int, int, int]]]:
    """The order of all samples (rows of the listing), and the shards as (file, split, stratum, start, stop) of it."""
    stratum_of = np.array(listing.stratum[:train_rows])
    held_out = np.zeros(len(listing), bool)
    held_out[train_rows:] = True
    if val_share:
        held_out[:train_rows] = fractions.hold_out(np.asarray(listing.label[:train_rows]), val_share, options.seed)
        if not held_out.any():
            raise ShardError(
                f"--val-share {val_share}% of {counted(train_rows, 'image')} is less than one image; name a larger share"
            )
    drawn = (stratum_of == NO_STRATUM) & ~held_out[:train_rows]
    if drawn.any():
        stratum_of[drawn] = fractions.assign(np.asarray(listing.label[:train_rows][drawn]), percents, options.seed)
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
        start = lay(
            np.flatnonzero((stratum_of == number) & ~held_out[:train_rows]).astype(order.dtype), "train", percent, start
        )
    lay(np.flatnonzero(held_out).astype(order.dtype), "val", 0, start)
    return order, shards


def _digest(listing: Listing, order: np.ndarray, shards: list, classes: list[str], options: Options) -> str:
    """What identifies a plan: two builds with the same digest write the same bytes."""
    digest = hashlib.sha256(json.dumps([asdict(options), shards, classes]).encode())
    for column in (listing.size, listing.label, listing.kind, listing.key_end, listing._keys, order):
        for start in range(0, len(column), 1 << 20):
            digest.update(np.ascontiguousarray(column[start : start + (1 << 20)]).data)
    return digest.hexdigest()


# In the work folder: the digest of the layout that what is written there goes by.
PLAN_NAME = "plan"
_PLAN_BYTES = 4096


@dataclass(frozen=True)
class Layout:
    """Which sample goes where; ``plan`` is its digest, ``order`` the rows of the listing in the order of the shards."""

    listing: Listing
    rejected: list[tuple[str, str]]
    classes: list[str]
    percents: tuple[int, ...]
    options: Options
    order: np.ndarray
    shards: list[tuple[str, str, int, int, int]]
    plan: str

    @property
    def samples(self) -> int:
        """Images in all."""
        return len(self.order)

    def tasks(self, out: Path) -> list[ShardTask]:
        """Every shard to write, in the order of the index."""
        return [ShardTask(*shard, str(out / WORK_FOLDER), str(out), self.plan, self.options) for shard in self.shards]

    def keep(self, work: Path) -> None:
        """Leave in the work folder what those who write shards look up there."""
        write_bytes(work / PLAN_NAME, self.plan.encode(), durable=True)
        save_array(work / "order.npy", self.order)
        (work / "journal").mkdir(exist_ok=True)

    def refuse_other(self, out: Path) -> None:
        """Raise unless what the folder already holds belongs to this very build."""
        known = None
        if (out / INDEX_NAME).exists():
            try:
                known = Index.read(out / INDEX_NAME).build
            except ShardError as error:  # ends with "build again"
                raise ShardError(f"{error} into another folder, or delete this one") from None
        elif (out / WORK_FOLDER / PLAN_NAME).exists():
            try:
                known = read_text(out / WORK_FOLDER / PLAN_NAME, _PLAN_BYTES)
            except OSError as problem:
                raise ShardError(
                    f"{out / WORK_FOLDER / PLAN_NAME} cannot be read ({problem.strerror or problem}); choose another folder, or "
                    "delete this one"
                ) from None
        elif tars := sorted(out.glob("*.tar")):
            raise ShardError(
                f"{out} holds {tars[0].name}, which no build of mimscale's left there; choose an empty folder"
            )
        if known is not None and known != self.plan:
            raise ShardError(
                f"{out} holds a build of other images or with other options; choose another folder, or delete this one"
            )


def lay_out(
    listing: Listing,
    train_rows: int,
    rejected: list[tuple[str, str]],
    classes: list[str],
    percents: tuple[int, ...],
    options: Options,
    val_share: int = 0,
) -> Layout:
    """Settle which sample goes where; arguments as :func:`scan` returns and :func:`build` takes them.

    Raises:
        ShardError: ``val_share`` comes to less than one image.
    """
    order, shards = _order(listing, train_rows, percents, options, val_share)
    plan = _digest(listing, order, shards, classes, options)
    return Layout(listing, rejected, classes, percents, options, order, shards, plan)
