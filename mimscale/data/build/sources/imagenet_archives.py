"""ImageNet's archives as sources, read where they lie: nothing is unpacked.

- ``ILSVRC2012_img_train.tar``: a tar of 1,000 class tars.
- A folder of class tars: ImageNet-22K as it is distributed.
- ``ILSVRC2012_img_val.tar``: a flat tar, its labels in a file of their own.
- Any other tar of images, with one folder a class or none.

A class tar inside an archive is stored uncompressed, so an image in it is a range of bytes of the archive itself.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mimscale.data import decode
from mimscale.data.build import tree
from mimscale.data.build.listing import Found, safe_part, unique
from mimscale.data.build.source import ScanTask, Source
from mimscale.data.build.sources.image_folder import files_beside
from mimscale.data.build.sources.labels import numbered, read_labels, require_known
from mimscale.data.build.tree import FLAT_CLASS, IMAGE_SUFFIXES
from mimscale.data.errors import DamagedSample, ShardError
from mimscale.data.shards.tar import Member, TarError, walk
from mimscale.files import open_regular
from mimscale.wording import counted, printable


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def _plain(name: bytes) -> str:
    """A member's name without what does not matter in it: ``./`` before it, doubled slashes."""
    return "/".join(part for part in _text(name).split("/") if part not in ("", "."))


def _pread(descriptor: int, first: int, start: int, length: int) -> bytes:
    return os.pread(descriptor, length, first + start)


def _stem(name: str) -> str:
    return safe_part(os.path.splitext(name)[0])  # noqa: PTH122 - a million of them


@dataclass(frozen=True)
class Picture:
    """An image in an archive: its plain name, and its first byte and length there."""

    name: str
    offset: int
    size: int


@dataclass
class Contents:
    """What an archive holds.

    Attributes:
        images: in the order of their names; a tar's own order is that of whoever packed it.
        tars: class tars, likewise.
        aside: (where, why) of everything else.
    """

    images: list[Picture] = field(default_factory=list)
    tars: list[Picture] = field(default_factory=list)
    aside: list[tuple[str, str]] = field(default_factory=list)


def contents(descriptor: int, members: Iterable[Member], archive: str) -> Contents:
    """Sort the members of an archive into images, tars and what is left out."""
    found = Contents()
    last_of: dict[str, Picture] = {}
    kinds: dict[str, int] = {}
    folders: set[str] = set()
    for member in members:
        name = _plain(member.name)
        if not member.is_file:
            if member.kind == b"5":
                folders.add(name)
            else:
                why = {b"1": tree.IS_HARD_LINK, b"2": tree.IS_LINK}.get(member.kind, tree.IS_NO_FILE)
                found.aside.append((f"{archive}: {name}", why))
            continue
        kind = tree.kind_of(name.rpartition("/")[2], partial(_head, descriptor, member))
        if any(part.startswith(".") and part != ".." for part in name.split("/")):
            kind = tree.HIDDEN
        if kind in (tree.HIDDEN, tree.OTHER):
            found.aside.append((f"{archive}: {name}", tree.IS_HIDDEN if kind == tree.HIDDEN else tree.why_not(name)))
            continue
        if name in last_of:  # as tar unpacks it, the last one stands
            found.aside.append((f"{archive}: {name}", tree.IS_REPEATED))
        last_of[name], kinds[name] = Picture(name, member.offset, member.size), kind
    ordered = sorted(last_of.values(), key=lambda picture: os.fsencode(picture.name))
    found.images = [picture for picture in ordered if kinds[picture.name] == tree.IMAGE]
    found.tars = [picture for picture in ordered if kinds[picture.name] == tree.TAR]
    held = {parent for name in last_of for parent in _parents(name)}
    found.aside += [
        (f"{archive}: {name}", tree.IS_EMPTY) for name in sorted(folders - held - {""}) if not _below(name, folders)
    ]
    return found


def _below(name: str, folders: set[str]) -> bool:
    return any(other.startswith(f"{name}/") for other in folders)


def _parents(name: str) -> Iterable[str]:
    at = name.find("/")
    while at >= 0:
        yield name[:at]
        at = name.find("/", at + 1)


def _head(descriptor: int, member: Member) -> bytes:
    return os.pread(descriptor, min(member.size, tree.HEAD_BYTES), member.offset)


class _Names(tree.Tree):
    """The members of a tar as the rule for classes sees them."""

    def __init__(self, found: Contents):
        self._here: dict[str, dict[int, list[str]]] = defaultdict(lambda: {tree.IMAGE: [], tree.TAR: []})
        self._count: dict[str, int] = defaultdict(int)
        self._folders: dict[str, set[str]] = defaultdict(set)
        for kind, pictures in ((tree.IMAGE, found.images), (tree.TAR, found.tars)):
            for picture in pictures:
                parts = picture.name.split("/")
                self._here["".join(f"{part}/" for part in parts[:-1])][kind].append(parts[-1])
                if kind == tree.IMAGE:
                    for depth in range(len(parts)):
                        place = "".join(f"{part}/" for part in parts[:depth])
                        self._count[place] += 1
                        if depth < len(parts) - 1:
                            self._folders[place].add(parts[depth])

    def folders(self, place: str) -> list[str]:
        return sorted(self._folders.get(place, ()))

    def loose(self, place: str) -> list[str]:
        return self._here[place][tree.IMAGE]

    def tars(self, place: str) -> list[str]:
        return self._here[place][tree.TAR]

    def images(self, place: str) -> int:
        return self._count[place]


@dataclass(frozen=True)
class ArchiveImages(ScanTask):
    """The images of one class in an archive.

    Attributes:
        archive: path of the archive.
        label: the class.
        prefix: what the class's keys start with.
        thorough: decode every image.
        images: the images, named below the class's folder; None for a class tar, which is then walked.
        start: first byte of the class tar.
        end: where that must have ended, -1 for the end of the file.
        labels: label of each image by its name, where it differs between images; those without one get -1.
        prefixes: key prefixes by label, then.
        aside: (where, why) of what is left out already.
    """

    archive: str
    label: int
    prefix: str
    thorough: bool
    images: tuple[Picture, ...] | None = None
    start: int = 0
    end: int = -1
    labels: dict[str, int] | None = None
    prefixes: tuple[str, ...] = ()
    aside: tuple[tuple[str, str], ...] = ()

    def _members(self, descriptor: int, found: Found) -> tuple[Picture, ...]:
        if self.images is not None:
            return self.images
        end = self.end if self.end >= 0 else os.fstat(descriptor).st_size
        members = []
        try:
            for member in walk(descriptor, self.start, end, self.archive):
                members.append(member)
        except (TarError, OSError) as error:
            found.broken = str(error)
        held = contents(descriptor, members, self.archive)
        found.aside += [*held.aside, *((f"{self.archive}: {tar.name}", tree.IS_NESTED) for tar in held.tars)]
        return tuple(held.images)

    def run(self) -> Found:
        """List the class; every image's structure is looked at."""
        found = Found(self.archive, self.label, labels=None if self.labels is None else [], aside=list(self.aside))
        descriptor = open_regular(self.archive)
        try:
            images = self._members(descriptor, found)
            stems = unique([image.name for image in images], _stem)
            for image, stem in zip(images, stems, strict=True):
                try:
                    kind = decode.identify(partial(_pread, descriptor, image.offset), image.size, self.thorough)
                except (DamagedSample, OSError) as error:
                    why = error.strerror if isinstance(error, OSError) else str(error)
                    found.rejected.append((f"{self.archive}: {image.name}", why or "cannot be read"))
                    continue
                prefix = self.prefix
                if self.labels is not None and found.labels is not None:
                    label = self.labels.get(image.name, -1)
                    found.labels.append(label)
                    prefix = self.prefixes[label] if label >= 0 else FLAT_CLASS
                found.keys.append(f"{prefix}/{stem}".encode())
                found.offsets.append(image.offset)
                found.sizes.append(image.size)
                found.kinds.append(kind)
        finally:
            os.close(descriptor)
        return found


def _opened(path: Path) -> Contents:
    """What a tar holds.

    Raises:
        ShardError: it is damaged, packed, or cannot be read.
    """
    try:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            members = walk(file, 0, os.fstat(file.fileno()).st_size, str(path))
            return contents(file.fileno(), members, str(path))
    except TarError as error:
        raise ShardError(f"{error}; the archive is damaged or incomplete, fetch it again") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror or error})") from None


def _is_tar(entry: Path) -> bool:
    return entry.name.lower().endswith(tree.TAR_SUFFIX) and not entry.name.startswith(".")


class ClassTars(Source):
    """Class tars, in an archive of their own or in a folder; a tar's name without its suffix is the class.

    Raises:
        ShardError: none in it, two of one class, images beside them, or the archive is damaged.
    """

    def __init__(self, path: Path):
        self.path = path.resolve()
        self._aside: tuple[tuple[str, str], ...] = ()
        if path.is_dir():
            tars = sorted(entry for entry in self.path.iterdir() if _is_tar(entry) and entry.is_file())
            names = [tar.name for tar in tars]
            parts = [(str(tar), 0, -1) for tar in tars]
            loose, self._aside = files_beside(self.path, set(names))
        else:
            held = _opened(self.path)
            names = [tar.name for tar in held.tars]
            parts = [(str(self.path), tar.offset, tar.offset + tar.size) for tar in held.tars]
            loose, self._aside = [image.name for image in held.images], tuple(held.aside)
        if not parts:
            raise ShardError(f"{path}: no class tars in it")
        if loose:
            raise ShardError(
                f"{path}: {counted(len(loose), 'image')} ({printable(loose[0], 100)}) beside {counted(len(parts), 'class tar')}: "
                "classes are tars or folders; move one of them away"
            )
        tree.refuse_splits([name.split("/")[0].removesuffix(tree.TAR_SUFFIX) for name in names], str(path))
        stems = [name.rpartition("/")[2][: -len(tree.TAR_SUFFIX)] for name in names]
        if len(set(stems)) < len(stems):
            twice = next(stem for stem in stems if stems.count(stem) > 1)
            raise ShardError(f"{path}: two class tars of the name {printable(twice)}; give each class one")
        self._parts = dict(zip(stems, parts, strict=True))

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A folder with tars in it, or a tar whose tars are in no folder with images."""
        if path.is_dir():
            return any(_is_tar(entry) for entry in path.iterdir())
        if path.suffix == ".json":
            return False
        held = _opened(path)
        return bool(held.tars) and (not held.images or any("/" not in tar.name for tar in held.tars))

    @property
    def classes(self) -> list[str]:
        """Names of the tars, sorted."""
        return sorted(self._parts)

    def tasks(self, label_of: dict[str, int], thorough: bool = False) -> list[ScanTask]:
        """One task a class.

        Raises:
            ShardError: a class that ``label_of`` does not know.
        """
        require_known(str(self.path), self.classes, label_of)
        prefix_of = dict(zip(label_of, unique(label_of), strict=True))
        tasks: list[ScanTask] = []
        for name in self.classes:
            archive, start, end = self._parts[name]
            aside = () if tasks else self._aside
            tasks.append(
                ArchiveImages(archive, label_of[name], prefix_of[name], thorough, start=start, end=end, aside=aside)
            )
        return tasks


class PlainTar(Source):
    """A tar of images: one folder a class (see :mod:`mimscale.data.build.tree`), or flat with its labels in a file.

    Args:
        path: the tar.
        labels: see :func:`mimscale.data.build.sources.labels.read_labels`; without it, folders in the tar are the classes,
            and a flat tar is one class.

    Raises:
        ShardError: no images in it, images beside class folders, a tar of splits, or it is damaged.
    """

    options = frozenset({"labels"})

    def __init__(self, path: Path, labels: Path | None = None):
        self.path = path.resolve()
        held = _opened(self.path)
        if not held.images:
            raise ShardError(f"{path}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")
        self._images = held.images
        self._class_of: dict[str, str] | None = None
        unused: tuple[tuple[str, str], ...] = ()
        self._classes = tree.Classes()
        if labels:
            self._class_of, unused = read_labels(labels, [image.name for image in held.images])
        else:
            self._classes = tree.find_classes(_Names(held), str(path))
        nested = [(f"{self.path}: {tar.name}", tree.IS_NESTED) for tar in held.tars]
        self._aside = (*held.aside, *nested, *unused)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Any file that no source before it is."""
        return path.is_file()

    @property
    def classes(self) -> list[str]:
        """Names of its classes, sorted."""
        if self._class_of is not None:
            return sorted(set(self._class_of.values()))
        return self._classes.names or [FLAT_CLASS]

    def tasks(self, label_of: dict[str, int], thorough: bool = False) -> list[ScanTask]:
        """One task for each folder in the tar.

        Raises:
            ShardError: a class that ``label_of`` does not know.
        """
        archive, prefixes = str(self.path), tuple(unique(label_of))
        everything = tuple(self._images)
        if self._class_of is not None:
            labels = numbered(self._class_of, label_of, archive)
            return [
                ArchiveImages(
                    archive, -1, "", thorough, everything, labels=labels, prefixes=prefixes, aside=self._aside
                )
            ]
        if not self._classes.names:
            label = label_of.get(FLAT_CLASS, -1)
            return [ArchiveImages(archive, label, FLAT_CLASS, thorough, everything, aside=self._aside)]
        require_known(archive, self.classes, label_of)
        skip = len(self._classes.place)
        of_class: dict[str, list[Picture]] = defaultdict(list)
        for image in self._images:
            name, _, below = image.name[skip:].partition("/")
            of_class[name].append(Picture(below, image.offset, image.size))
        return [
            ArchiveImages(
                archive,
                label_of[name],
                prefixes[label_of[name]],
                thorough,
                tuple(of_class[name]),
                aside=() if number else self._aside,
            )
            for number, name in enumerate(self.classes)
        ]
