"""What is in a shard folder: file names, the index and the sample table.

``index.json`` is small and says everything about the set as a whole; it is written last, so a folder without it is an
unfinished build. ``samples.npy`` has one fixed-width row a sample, memory-mapped, in the order of the shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from mimscale.data.errors import ShardError
from mimscale.files import open_regular, parse_json, read_bytes
from mimscale.wording import printable

FORMAT, VERSION = "mimscale-shards", 1
INDEX_NAME, TABLE_NAME, REJECTED_NAME = "index.json", "samples.npy", "rejected.tsv"
# Finished shards, journal and listing of a build that is under way.
WORK_FOLDER = ".build"
SUFFIXES = (b".jpg", b".png", b".ppm")
# How images lie in the tars: as they came, or decoded.
STORES = ("bytes", "pixels")


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


# What an index may say, which is read before anything it names is.
MAX_INDEX_BYTES = 256 * 2**20
MAX_SAMPLES = 2**40
MAX_KEY_BYTES = 1024
_Count = Annotated[int, Field(ge=0, le=MAX_SAMPLES)]
_Bytes = Annotated[int, Field(ge=0, le=2**62)]
_Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Percent = Annotated[int, Field(ge=1, le=100)]


def _plain(name: str) -> str:
    if not name.endswith(".tar") or "/" in name or "\0" in name or len(name.encode("utf-8", "surrogatepass")) > 255:
        raise ValueError("not the plain name of a tar in the folder")
    return name


_FileName = Annotated[str, AfterValidator(_plain)]
_STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass
class Shard:
    """One tar of the set; ``stratum`` is the smallest percentage that it belongs to, 0 for validation shards."""

    __pydantic_config__ = _STRICT

    file: _FileName
    split: str
    stratum: Annotated[int, Field(ge=0, le=100)]
    samples: _Count
    bytes: _Bytes
    sha256: _Digest


@dataclass
class View:
    """A named choice of training samples, not stored: ``classes`` drawn by ``seed``, or ``percent`` of each class."""

    __pydantic_config__ = _STRICT

    seed: _Seed
    classes: list[_Count] | None = None
    percent: _Percent | None = None


@dataclass
class Index:
    """The content of ``index.json``."""

    __pydantic_config__ = _STRICT

    build: str
    seed: _Seed
    classes: list[str]
    shards: list[Shard]
    fractions: dict[str, list[_FileName]]
    samples: _Count
    key_bytes: Annotated[int, Field(ge=0, le=MAX_KEY_BYTES)]
    table_sha256: _Digest
    views: dict[str, View] = field(default_factory=dict)
    samples_per_shard: _Count = 0
    resize_shorter: _Count | None = None
    store: str = "bytes"
    foreign: bool = False
    rejected: _Count = 0
    rewritten: _Count = 0

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
            content = parse_json(text)
        except ValueError as error:
            raise ShardError(f"{where} is not valid JSON ({error}); {again}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ShardError(f"{where} is not the index of a shard folder")
        if content.get("version") != VERSION:
            raise ShardError(
                f"{where} has format version {printable(content.get('version'), 40)}; this release reads {VERSION}: build again"
            )
        if content.pop("sha256", None) != _digest(content):
            raise ShardError(f"{where} is not as it was written (its own SHA-256 does not hold); {again}")
        del content["format"], content["version"]
        try:
            index = _adapter().validate_json(json.dumps(content))
        except ValidationError as errors:
            first = errors.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise ShardError(
                f"{where} lacks or mistypes a field ({printable(field)}: {first['msg']}); {again}"
            ) from None
        if problem := index._contradiction():
            raise ShardError(f"{where} contradicts itself ({problem}); {again}")
        if index.to_json() != text:
            raise ShardError(f"{where} is not as it was written; {again}")
        return index

    @classmethod
    def read(cls, path: Path) -> Index:
        """Read the file.

        Raises:
            OSError: it cannot be read, is no regular file, or holds more than ``MAX_INDEX_BYTES``.
            ShardError: as :meth:`from_json`.
        """
        return cls.from_json(read_bytes(path, MAX_INDEX_BYTES), path)

    def _contradiction(self) -> str:
        """What in it cannot be; empty where all can."""
        names = [shard.file for shard in self.shards]
        if len(set(names)) < len(names):
            return "a shard twice"
        if sum(shard.samples for shard in self.shards) != self.samples:
            return "sample counts"
        # A sample is a header and a payload of at least a block each.
        if any(shard.samples * 512 > shard.bytes for shard in self.shards):
            return "more samples than bytes in a shard"
        if any(not set(files) <= set(names) for files in self.fractions.values()):
            return "a fraction of shards that are not there"
        if self.shards and not any(name.isascii() and name.isdigit() for name in self.fractions):
            return "no fraction of training images"
        if any(name.isdigit() and not (name.isascii() and len(name) <= 3) for name in self.fractions):
            return "a fraction whose name is no percentage"
        if self.store not in STORES:
            return "a kind of store that is not known"
        for view in self.views.values():
            if (view.classes is None) == (view.percent is None):
                return "a view that is neither of classes nor of a percentage"
            if view.classes is not None and max(view.classes, default=0) >= max(len(self.classes), 1):
                return "a view of classes that are not there"
        return ""


@cache
def _adapter() -> TypeAdapter[Index]:
    return TypeAdapter(Index)


def _as_text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")


def _digest(content: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(_as_text(content)).hexdigest()
    except UnicodeEncodeError:
        return ""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces.

    Raises:
        UnfitFile: it is no regular file.
        OSError: it cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
