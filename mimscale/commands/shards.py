"""Build, check and list shard folders.

mimscale shards build --source SRC --out OUT [--val SRC | --val-share 5%]
mimscale shards index FOLDER
mimscale shards verify OUT
mimscale shards list OUT
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mimscale.commands import Parser
from mimscale.data import pool
from mimscale.data.build import writer
from mimscale.data.build.existing_tars import index_tars
from mimscale.data.build.job_array import Part, build_part
from mimscale.data.build.shard_writer import Options
from mimscale.data.build.source import open_source
from mimscale.data.build.sources.shard_folder import ShardFolder
from mimscale.data.errors import ShardError
from mimscale.data.shards import fractions, store
from mimscale.data.shards.format import REJECTED_NAME, View
from mimscale.data.shards.index import ShardIndex, draw_view_classes
from mimscale.data.shards.verify import verify
from mimscale.entry import INTERRUPTED_EXIT
from mimscale.files import read_text
from mimscale.registry import RegistryError, load_plugins
from mimscale.wording import counted, printable

_SHOWN_PROBLEMS = 200
_SHOWN_REASONS = 6
_MOST_REJECTED_BYTES = 2**30


class Progress:
    """How far a build is and when it ends: one line that renews itself on a terminal, else one every half minute."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._what, self._began, self._printed = "", 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""
        now = time.monotonic()
        if what != self._what:
            self._end_line()
            self._what, self._began, self._printed, self._first = what, now, 0.0, done
        if done < total and now - self._printed < (0.2 if self._terminal else 30):
            return
        self._printed = now
        rate = (done - self._first) / max(now - self._began, 1e-9)
        left = (total - done) / rate if rate > 0 else 0
        line = f"{what}: {done:,}/{total:,}, {rate:,.0f}/s, {int(left) // 60} min {int(left) % 60:02} s left"
        print(
            f"\r\x1b[K{line}" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )
        if done >= total:
            self._end_line()
            self._what = ""

    def _end_line(self) -> None:
        if self._terminal and self._what:
            print(file=sys.stderr)


def parse_view(text: str, seed: int, classes: int) -> tuple[str, View]:
    """A view from ``NAME=K`` (K classes), ``NAME=K@SEED``, ``NAME=P%`` or ``NAME=P%@SEED`` (P % of each).

    Raises:
        ShardError: none of these, or more classes than there are.
    """
    name, _, amount = text.partition("=")
    amount, _, own_seed = amount.partition("@")
    number = amount.removesuffix("%")
    if not name or not number.isdigit() or (own_seed and not own_seed.isdigit()) or name.isdigit() or name == "val":
        raise ShardError(
            f"--subset {text}: write NAME=K or NAME=P%, with @SEED after it for another draw; "
            "NAME is not a number and not val"
        )
    seed = int(own_seed) if own_seed else seed
    if amount.endswith("%"):
        if not 0 < int(number) <= 100:
            raise ShardError(f"--subset {text}: {amount} is not between 1% and 100%")
        return name, View(seed, percent=int(number))
    return name, View(seed, classes=draw_view_classes(int(number), classes, seed))


def _build(options: argparse.Namespace) -> int:
    load_plugins(options.plugins)
    source = open_source(options.source, fraction=options.fraction)
    val = open_source(options.val, options.val_labels, held_out=True) if options.val else None
    percents: tuple[int, ...] = fractions.FRACTIONS
    if isinstance(source, ShardFolder):
        percents = source.percents
        if val is None and "val" in source.index.fractions:
            if options.val_share:
                raise ShardError(f"--val-share {options.val_share}%: {options.source} holds images out already")
            val = ShardFolder(options.source, "val")
    views = dict(parse_view(text, options.seed, len(source.classes)) for text in options.subset)
    how: dict[str, Any] = {
        "val": val,
        "val_share": options.val_share,
        "options": Options(options.samples_per_shard, options.seed, options.resize_shorter, options.store),
        "percents": percents,
        "views": views,
        "workers": options.workers,
        "report": Progress(),
    }
    if options.part is None:
        index = writer.build(source, options.out, **how)
    else:
        part = Part.parse(options.part)
        found, left = build_part(part, source, options.out, **how)
        if found is None:
            print(
                f"part {part.number}/{part.count} is written; still to come: {counted(left, 'shard')} of others, and the index"
            )
            return 0
        index = found
    _list(options)
    if index.rewritten:
        print(f"rewritten, as neither JPEG nor PNG, or resized: {counted(index.rewritten, 'image')}")
    if (options.out / REJECTED_NAME).exists():
        print(f"{_left_out(options.out, index.rejected)}: {printable(options.out / REJECTED_NAME)} names them")
    if empty := _empty_classes(options.out):
        print(f"{len(empty)} of {len(index.classes)} classes have no training image: {', '.join(empty[:10])}")
    if index.rejected > index.samples and not options.allow_loss:
        raise ShardError(
            f"{printable(options.out)}: only {index.samples:,} of {counted(index.samples + index.rejected, 'image')} could be "
            "taken; with --allow-loss that is no error"
        )
    return 0


def _left_out(out: Path, lost: int) -> str:
    """How many files a build left out, and why; ``lost`` of them looked like images."""
    said = f"{counted(lost, 'file')} could not be decoded, or had no class"
    try:
        lines = read_text(out / REJECTED_NAME, _MOST_REJECTED_BYTES).splitlines()
    except OSError as error:
        return f"{said}, and others were left out ({printable(error.strerror)})"
    reasons = [line.rpartition("\t")[2] for line in lines]
    return f"{said}, and {len(reasons) - lost:,} others were left out ({_kinds(reasons)})"


def _kinds(reasons: list[str]) -> str:
    """The most frequent reasons, with how often each came."""
    kinds = Counter(re.sub(r"[0-9,]+", "N", why.split(":")[0]) for why in reasons).most_common()
    shown = [f"{count:,} {why}" for why, count in kinds[:_SHOWN_REASONS]]
    rest = sum(count for _, count in kinds[_SHOWN_REASONS:])
    return "; ".join(shown + ([f"{rest:,} for other reasons"] if rest else []))


def _empty_classes(out: Path) -> list[str]:
    index = ShardIndex.load(out)
    present = set(index.labels(index.samples(index.largest_fraction)).tolist())
    return [name for label, name in enumerate(index.classes) if label not in present]


def _index(options: argparse.Namespace) -> int:
    index_tars(options.out, options.seed, options.workers, Progress())
    return _list(options)


def _verify(options: argparse.Namespace) -> int:
    problems = verify(options.out, options.workers, Progress())
    for problem in problems[:_SHOWN_PROBLEMS]:
        print(problem)
    if problems:
        if len(problems) > _SHOWN_PROBLEMS:
            print(f"... and {len(problems) - _SHOWN_PROBLEMS} more")
        print(f"{printable(options.out)}: {counted(len(problems), 'problem')}", file=sys.stderr)
        return 1
    index = ShardIndex.load(options.out)
    held = f"{counted(len(index), 'sample')} in {counted(len(index.shards), 'shard')}"
    print(f"{printable(options.out)}: {held}, all as the index says")
    return 0


def _list(options: argparse.Namespace) -> int:
    index = ShardIndex.load(options.out)
    print(f"{'fraction':<12}{'images':>12}{'classes':>10}{'shards':>8}{'bytes':>20}")
    for row in index.summary():
        print(f"{row['fraction']:<12}{row['images']:>12,}{row['classes']:>10,}{row['shards']:>8,}{row['bytes']:>20,}")
    return 0


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _share(text: str) -> int:
    number = text.removesuffix("%")
    if not (number.isascii() and number.isdigit() and len(number) <= 2 and 1 <= int(number) <= 50):
        raise argparse.ArgumentTypeError(f"{printable(text)}: write a whole number of percent, 1% to 50%")
    return int(number)


def parser(program: str = "mimscale shards") -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    cores = pool.usable_cores()

    build = commands.add_parser("build", help="write shards from images; resumes a killed build")
    build.add_argument(
        "--source",
        type=Path,
        required=True,
        metavar="SRC",
        help="training images: a folder of class folders, or flat; an archive of class tars, or a folder of them; "
        "a json of images, annotations and categories; a shard folder",
    )
    build.add_argument(
        "--plugins", nargs="*", default=[], metavar="PACKAGE", help="packages that know other kinds of sources"
    )
    build.add_argument("--out", type=Path, required=True, help="folder to write")
    held_out = build.add_mutually_exclusive_group()
    held_out.add_argument("--val", type=Path, metavar="SRC", help="held-out images, become the split 'val'")
    held_out.add_argument(
        "--val-share",
        type=_share,
        default=0,
        metavar="P%",
        help="hold out P%% of each class of the training images as the split 'val', drawn by the seed",
    )
    build.add_argument("--val-labels", type=Path, metavar="FILE", help="labels of a tar or folder given as --val")
    build.add_argument(
        "--allow-loss", action="store_true", help="exit with 0 also where less than half of the images could be taken"
    )
    build.add_argument("--fraction", help="of a shard folder given as --source: which of its fractions to take")
    build.add_argument(
        "--samples-per-shard", type=_at_least_one, default=1000, help="at most this many in a tar (1000)"
    )
    build.add_argument(
        "--resize-shorter", type=_at_least_one, metavar="PX", help="re-encode images whose shorter side is longer"
    )
    build.add_argument(
        "--store",
        choices=(store.BYTES, store.PIXELS),
        default=store.BYTES,
        help=f"bytes: as they came; pixels: decoded, shorter side at most {store.PIXEL_STORE_SHORTER} or --resize-shorter",
    )
    build.add_argument(
        "--workers", type=_at_least_one, default=cores, help=f"processes ({cores}); the result is the same with any"
    )
    build.add_argument(
        "--part",
        metavar="K/N@ID",
        help="write the K-th of N parts; parts with one ID run side by side, and the last to end writes the index",
    )
    build.add_argument("--seed", type=int, default=0, help="decides fractions and order (0)")
    build.add_argument(
        "--subset",
        action="append",
        default=[],
        metavar="NAME=K",
        help="a view of K classes; NAME=P%%@SEED: of P %% of each",
    )
    build.set_defaults(run=_build)

    scan = commands.add_parser("index", help="make a folder of WebDataset tars from elsewhere readable, where it lies")
    scan.add_argument("out", type=Path, help="the folder; gets an index beside its tars")
    scan.add_argument("--workers", type=_at_least_one, default=cores)
    scan.add_argument("--seed", type=int, default=0, help="decides the fractions (0)")
    scan.set_defaults(run=_index)

    check = commands.add_parser("verify", help="read every byte and name what is damaged")
    check.add_argument("out", type=Path)
    check.add_argument("--workers", type=_at_least_one, default=cores)
    check.set_defaults(run=_verify)

    show = commands.add_parser("list", help="the fractions: images, classes, shards, bytes")
    show.add_argument("out", type=Path)
    show.set_defaults(run=_list)
    return top


def main(arguments: list[str] | None = None, program: str = "mimscale shards") -> int:
    """Run a command; returns its exit status."""
    options = parser(program).parse_args(arguments)
    try:
        return options.run(options)
    except (ShardError, RegistryError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
    except OSError as error:
        print(
            f"mimscale: error: {printable(error.filename or options.out)}: {error.strerror or printable(error)}",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("stopped; the same command resumes from here", file=sys.stderr)
        return INTERRUPTED_EXIT
    return 1
