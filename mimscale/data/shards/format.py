"""What is in a shard folder: file names, the index and the sample table.

``index.json`` is small and says everything about the set as a whole; it is written last, so a folder without it is an
unfinished build. ``samples.npy`` has one fixed-width row a sample, memory-mapped, in the order of the shards.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mimscale.data.errors import ShardError

FORMAT, VERSION = "mimscale-shards", 1
INDEX_NAME, TABLE_NAME, REJECTED_NAME = "index.json", "samples.npy", "rejected.tsv"
# Finished shards, journal and listing of a build that is under way.
WORK_FOLDER = ".build"
SUFFIXES = (b".jpg", b".png", b".ppm")


def table_dtype(key_bytes: int) -> np.dtype:
    """One row of the sample table; ``offset``, ``size`` (bytes) and ``crc`` (CRC-32) are those of the image payload."""
    return np.dtype(
        [
            ("shard", "<u4"),
            ("label", "<i4"),
            ("offset", "<i8"),
            ("size", "<u4"),
            ("crc", "<u4"),
            ("key", f"S{max(key_bytes, 1)}"),
        ]
    )


@dataclass
class Shard:
    """One tar of the set; ``stratum`` is the smallest percentage that it belongs to, 0 for validation shards."""

    file: str
    split: str
    stratum: int
    samples: int
    bytes: int
    sha256: str


@dataclass
class View:
    """A named choice of training samples, not stored: ``classes`` drawn by ``seed``, or ``percent`` of each class."""

    seed: int
    classes: list[int] | None = None
    percent: int | None = None


@dataclass
class Index:
    """The content of ``index.json``."""

    build: str
    seed: int
    classes: list[str]
    shards: list[Shard]
    fractions: dict[str, list[str]]
    samples: int
    key_bytes: int
    table_sha256: str
    views: dict[str, View] = field(default_factory=dict)
    samples_per_shard: int = 0
    resize_shorter: int | None = None
    store: str = "bytes"
    foreign: bool = False
    rejected: int = 0
    rewritten: int = 0

    def to_json(self) -> bytes:
        """The bytes of the file: the same index gives the same bytes. They end with a SHA-256 of all the rest."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return _as_text({**content, "sha256": _digest(content)})

    @classmethod
    def from_json(cls, text: bytes, where: Path) -> Index:
        """Read the file's content.

        Raises:
            ShardError: not JSON, another format or version, changed since it was written, or fields that contradict
                each other.
        """
        again = "restore it, or build again"
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{where} is not valid JSON ({error}); {again}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ShardError(f"{where} is not the index of a shard folder")
        if content.get("version") != VERSION:
            raise ShardError(
                f"{where} has format version {content.get('version')}; this release reads {VERSION}: build again"
            )
        if content.pop("sha256", None) != _digest(content):
            raise ShardError(f"{where} is not as it was written (its own SHA-256 does not hold); {again}")
        del content["format"], content["version"]
        try:
            content["shards"] = [Shard(**shard) for shard in content["shards"]]
            content["views"] = {name: View(**view) for name, view in content["views"].items()}
            index = cls(**content)
            names = {shard.file for shard in index.shards}
            ok = (
                sum(shard.samples for shard in index.shards) == index.samples
                and all(Path(name).name == name for name in names)
                and all(set(files) <= names for files in index.fractions.values())
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ShardError(f"{where} lacks or mistypes a field ({error}); {again}") from None
        if ok and index.to_json() != text:
            raise ShardError(f"{where} is not as it was written; {again}")
        if not ok:
            raise ShardError(f"{where} contradicts itself (sample counts, or shards outside its folder); {again}")
        return index


def _as_text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")


def _digest(content: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(_as_text(content)).hexdigest()
    except UnicodeEncodeError:
        return ""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
