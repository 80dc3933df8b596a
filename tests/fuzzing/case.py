"""One input: its folder, its random numbers, and the register of kinds."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Reader = Callable[[], object]


class Misfit(AssertionError):
    """What a reader did, though it raised nothing, is against what it promises; the message says what."""


class Ended(Exception):
    """A command that has ended with an error, as commands do; what it said."""


@dataclass
class Case:
    """One input.

    Attributes:
        folder: of its own, empty at first; ``given`` in it holds the input, ``out`` (the working folder) what may be written.
        material: sound files, by name; not to be changed.
        victim: a folder that no reader has any business in; links may lead there.
        rng: all that is drawn comes from it, so that kind and seed give the same input again.
        outputs: folders that the reader may write in.
        notes: what was done to the input, for whoever looks at a replay.
    """

    folder: Path
    material: Path
    victim: Path
    rng: random.Random
    name: str = "given"
    outputs: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def given(self) -> Path:
        """Where the input lies."""
        return self.folder / self.name

    @property
    def out(self) -> Path:
        """Where may be written."""
        return self.folder / "out"

    def copy(self, name: str, to: str | None = None) -> Path:
        """A copy of some material, to be changed."""
        source, target = self.material / name, self.given / (to or name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copyfile(source, target)
        return target


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        prepare: makes the input, and gives what reads it.
        refusals: what the commands turn into "mimscale: error: ...". One of Python's own counts only where mimscale raises it
            (or, an OSError, where the system does, of a file).
        needs: names of material.
        share: of the inputs of other kinds that this one gets; less where one takes long.
        starts: whether the reader may start a process.
    """

    name: str
    prepare: Callable[[Case], Reader]
    refusals: tuple[type[BaseException], ...]
    needs: tuple[str, ...] = ()
    share: float = 1.0
    starts: bool = False


KINDS: dict[str, Kind] = {}
MATERIAL: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {}


def kind(
    name: str, *refusals: type[BaseException], needs: tuple[str, ...] = (), share: float = 1.0, starts: bool = False
) -> Callable[[Callable[[Case], Reader]], Callable[[Case], Reader]]:
    """Register a kind; what it decorates prepares an input and returns the reader."""

    def register(prepare: Callable[[Case], Reader]) -> Callable[[Case], Reader]:
        KINDS[name] = Kind(name, prepare, refusals, needs, share, starts)
        return prepare

    return register


def material(name: str, *needs: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register what makes ``folder / name``, once what it needs is in the folder too."""

    def register(make: Callable[[Path], None]) -> Callable[[Path], None]:
        MATERIAL[name] = make, needs
        return make

    return register


def needed(names: tuple[str, ...]) -> list[str]:
    """These materials and what they are made of, in the order of their making."""
    found: dict[str, None] = {}
    for name in names:
        found.update(dict.fromkeys([*needed(MATERIAL[name][1]), name]))
    return list(found)
