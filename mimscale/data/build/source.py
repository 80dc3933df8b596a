"""Where a build's images come from: the contract of a source, and which of them a path is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mimscale.data.build.listing import Found
from mimscale.data.errors import ShardError
from mimscale.registry import sources


class ScanTask(Protocol):
    """One class of a source: picklable, and run in a worker process."""

    def run(self) -> Found:
        """List the images of the class."""
        ...


class Source(ABC):
    """Images with classes, in a folder, an archive or whatever else it recognises.

    Attributes:
        options: what ``open`` takes besides a path: "labels" (a file of labels), "fraction" (a name).
    """

    options: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path) -> bool:
        """Whether what lies at ``path``, which is there, is of this kind; sources are asked one after the other.

        Raises:
            ShardError: it is, but damaged.
        """

    @classmethod
    def open(cls, path: Path, held_out: bool = False, **options: Any) -> Source:
        """Look into it.

        Args:
            path: that it recognises.
            held_out: it is to be validated on.
            **options: some of ``cls.options``.

        Raises:
            ShardError: it cannot be used.
        """
        return cls(path, **options)  # type: ignore[call-arg]

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Names of its classes, in label order."""

    @abstractmethod
    def tasks(self, label_of: dict[str, int], thorough: bool = False) -> list[ScanTask]:
        """What to scan, given the number of each class name; ``thorough``: decode every image.

        Raises:
            ShardError: a class that ``label_of`` does not know.
        """


def open_source(path: Path, labels: Path | None = None, fraction: str | None = None, held_out: bool = False) -> Source:
    """Whatever ``path`` is, as a source: those of plug-ins are asked first, then mimscale's own in their order.

    Args:
        path: of a folder or file.
        labels: a file of labels, for a source that takes one.
        fraction: of a shard folder.
        held_out: it is to be validated on.

    Raises:
        ShardError: it is not there, nothing recognises it, it is damaged, or it takes no labels or fraction.
        RegistryError: a plug-in that does not keep the contract.
    """
    if not path.exists():
        raise ShardError(f"{path}: no such file or folder")
    given = {name: value for name, value in (("labels", labels), ("fraction", fraction)) if value is not None}
    others = sources.others()
    for name in [*others, *(name for name in sources.names() if name not in others)]:
        kind = sources.get(name)
        if given.keys() <= kind.options and kind.recognises(path):
            return kind.open(path, held_out, **given)
    if given:
        word = "--val-labels" if "labels" in given else "--fraction"
        raise ShardError(f"{word} {next(iter(given.values()))} does not go with {path}: it is no {_takers(set(given))}")
    raise ShardError(f"{path}: no kind of source recognises it ({', '.join(sources.names())})")


def _takers(options: set[str]) -> str:
    return " or ".join(name.replace("-", " ") for name in sources.names() if options <= sources.get(name).options)
