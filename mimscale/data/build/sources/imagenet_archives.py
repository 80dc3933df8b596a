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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from mimscale.data import decode
from mimscale.data.build.listing import Found, safe_part, unique
from mimscale.data.build.source import ScanTask, Source
from mimscale.data.build.sources.devkit import synsets
from mimscale.data.build.sources.image_folder import FLAT_CLASS, IMAGE_SUFFIXES
from mimscale.data.errors import DamagedSample, ShardError
from mimscale.data.shards.tar import Member, TarError, walk
from mimscale.files import open_regular, read_text
from mimscale.wording import counted, printable


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def _is_image(member: Member) -> bool:
    base = _text(member.name).rsplit("/", 1)[-1]
    return member.is_file and base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith(".")


def _pread(descriptor: int, first: int, start: int, length: int) -> bytes:
    return os.pread(descriptor, length, first + start)


def _stem(name: str) -> str:
    return safe_part(os.path.splitext(name)[0])  # noqa: PTH122 - a million of them


@dataclass(frozen=True)
class ArchiveRange(ScanTask):
    """The images of one class in a range of bytes of an archive.

    Attributes:
        archive: path of the archive.
        start: first byte of the tar that holds the class.
        end: where that tar must have ended, -1 for the end of the file.
        label: the class.
        prefix: what the class's keys start with.
        thorough: decode every image.
        folder: only members below this folder; None takes all.
        labels: label of each image by its name, where it differs between images; those without one get -1.
        prefixes: key prefixes by label, then.
    """

    archive: str
    start: int
    end: int
    label: int
    prefix: str
    thorough: bool
    folder: str | None = None
    labels: dict[str, int] | None = None
    prefixes: list[str] = field(default_factory=list)

    def _members(self, descriptor: int, found: Found) -> list[Member]:
        end = self.end if self.end >= 0 else os.fstat(descriptor).st_size
        members = []
        try:
            for member in walk(descriptor, self.start, end, self.archive):
                if _is_image(member) and (self.folder is None or _text(member.name).startswith(self.folder + "/")):
                    members.append(member)
        except (TarError, OSError) as error:
            found.broken = str(error)
        # By name, as the images of a folder are: a tar's own order is that of whoever packed it.
        return sorted(members, key=lambda member: member.name)

    def run(self) -> Found:
        """List the class; every image's structure is looked at."""
        found = Found(self.archive, self.label, labels=None if self.labels is None else [])
        descriptor = open_regular(self.archive)
        try:
            members = self._members(descriptor, found)
            skip = len(self.folder) + 1 if self.folder else 0
            names = [_text(member.name)[skip:] for member in members]
            for member, name, stem in zip(members, names, unique(names, _stem), strict=True):
                try:
                    read = partial(_pread, descriptor, member.offset)
                    kind = decode.identify(read, member.size, self.thorough)
                except (DamagedSample, OSError) as error:
                    why = error.strerror if isinstance(error, OSError) else str(error)
                    found.rejected.append((f"{self.archive}: {name}", why or "cannot be read"))
                    continue
                prefix = self.prefix
                if self.labels is not None and found.labels is not None:
                    label = self.labels.get(PurePosixPath(name).name, -1)
                    found.labels.append(label)
                    prefix = self.prefixes[label] if label >= 0 else FLAT_CLASS
                found.keys.append(f"{prefix}/{stem}".encode())
                found.offsets.append(member.offset)
                found.sizes.append(member.size)
                found.kinds.append(kind)
        finally:
            os.close(descriptor)
        return found


def _outer_members(path: Path) -> list[Member]:
    try:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            return [m for m in walk(file, 0, os.fstat(file.fileno()).st_size, str(path)) if m.is_file]
    except TarError as error:
        raise ShardError(f"{error}; the archive is damaged or incomplete, fetch it again") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror or error})") from None


class ClassTars(Source):
    """Class tars, in an archive of their own or in a folder; a tar's name without its suffix is the class.

    Raises:
        ShardError: none in it, or the archive is damaged.
    """

    def __init__(self, path: Path):
        self.path = path.resolve()
        if path.is_dir():
            tars = sorted(entry for entry in self.path.iterdir() if entry.suffix == ".tar" and entry.is_file())
            self._parts = {tar.stem: (str(tar), 0, -1) for tar in tars}
        else:
            inner = [(PurePosixPath(_text(m.name)), m) for m in _outer_members(self.path)]
            self._parts = {
                name.stem: (str(self.path), m.offset, m.offset + m.size) for name, m in inner if name.suffix == ".tar"
            }
        if not self._parts:
            raise ShardError(f"{path}: no class tars in it")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A folder with tars in it, or a tar of tars."""
        if path.is_dir():
            return any(entry.suffix == ".tar" for entry in path.iterdir())
        return path.suffix != ".json" and any(_text(m.name).endswith(".tar") for m in _outer_members(path))

    @property
    def classes(self) -> list[str]:
        """Names of the tars, sorted."""
        return sorted(self._parts)

    def tasks(self, label_of: dict[str, int], thorough: bool = False) -> list[ScanTask]:
        """One task a class.

        Raises:
            ShardError: a class that ``label_of`` does not know.
        """
        _require_known(self.path, self.classes, label_of)
        prefix_of = dict(zip(label_of, unique(label_of), strict=True))
        return [
            ArchiveRange(*self._parts[name], label_of[name], prefix_of[name], thorough)
            for name in self.classes
        ]  # fmt: skip


class PlainTar(Source):
    """A tar of images: one folder a class, or flat with its labels in a file (ImageNet's validation images).

    Args:
        path: the tar.
        labels: see :func:`read_labels`; without it, folders in the tar are the classes, and a flat tar is one class.

    Raises:
        ShardError: no images in it, or it is damaged.
    """

    options = frozenset({"labels"})

    def __init__(self, path: Path, labels: Path | None = None):
        self.path = path.resolve()
        names = [_text(member.name) for member in _outer_members(self.path) if _is_image(member)]
        if not names:
            raise ShardError(f"{path}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")
        by_class: dict[str, int] = defaultdict(int)
        for name in names:
            by_class[str(PurePosixPath(name).parent)] += 1
        self._folders = {} if labels or list(by_class) == ["."] else {PurePosixPath(f).name: f for f in by_class}
        if self._folders and len(self._folders) < len(by_class):
            raise ShardError(f"{path}: two folders in it have the same name")
        self._class_of = read_labels(labels, sorted({PurePosixPath(name).name for name in names})) if labels else None

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Any file that no source before it is."""
        return path.is_file()

    @property
    def classes(self) -> list[str]:
        """Names of its classes, sorted."""
        if self._class_of is not None:
            return sorted({name for name in self._class_of.values() if isinstance(name, str)})
        return sorted(self._folders) or [FLAT_CLASS]

    def tasks(self, label_of: dict[str, int], thorough: bool = False) -> list[ScanTask]:
        """One task for each folder in the tar.

        Raises:
            ShardError: a class that ``label_of`` does not know.
        """
        archive, prefixes = str(self.path), unique(label_of)
        if self._class_of is not None:
            _require_known(self.path, self.classes, label_of)
            if any(isinstance(value, int) and not 0 <= value < len(label_of) for value in self._class_of.values()):
                raise ShardError(f"{self.path}: its labels go beyond the {counted(len(label_of), 'class')} to train on")
            numbers = {n: value if isinstance(value, int) else label_of[value] for n, value in self._class_of.items()}
            return [ArchiveRange(archive, 0, -1, -1, "", thorough, labels=numbers, prefixes=prefixes)]
        if not self._folders:
            return [ArchiveRange(archive, 0, -1, label_of.get(FLAT_CLASS, -1), FLAT_CLASS, thorough)]
        _require_known(self.path, self.classes, label_of)
        return [
            ArchiveRange(archive, 0, -1, label_of[name], prefixes[label_of[name]], thorough, folder=self._folders[name])
            for name in self.classes
        ]


def _require_known(path: Path, classes: list[str], label_of: dict[str, int]) -> None:
    if unknown := [name for name in classes if name not in label_of]:
        raise ShardError(
            f"{path}: {counted(len(unknown), 'class')} not in the training images: {', '.join(map(printable, unknown[:5]))}"
        )


def read_labels(path: Path, names: list[str]) -> dict[str, str | int]:
    """The class of each held-out image.

    Three forms are known: a line "NAME CLASS" an image, with a class name or a number in the sorted class names; a
    class name a line, in the order of the image names; and the devkit's ``ILSVRC2012_validation_ground_truth.txt``, a
    number a line, with the devkit's ``meta.mat`` beside it, which gives the class of a number.

    Args:
        path: the file.
        names: the images, sorted.

    Returns:
        Class name, or number in the sorted class names, by image name.

    Raises:
        ShardError: none of these, or not a class for every image.
    """
    try:
        lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    except OSError as error:
        raise ShardError(f"{path}: labels cannot be read ({error.strerror or error})") from None
    if lines and all(len(line) == 2 for line in lines):
        given = {PurePosixPath(name).name: int(value) if _is_number(value) else value for name, value in lines}
        if missing := [name for name in names if name not in given]:
            raise ShardError(
                f"{path}: no label for {counted(len(missing), 'image')}, {printable(missing[0])} among them"
            )
        return {name: given[name] for name in names}
    if len(lines) != len(names) or any(len(line) != 1 for line in lines):
        raise ShardError(
            f"{path}: {counted(len(lines), 'label')} for {counted(len(names), 'image')}; write one a line, or lines of NAME CLASS"
        )
    values = [line[0] for line in lines]
    if all(_is_number(value) for value in values):
        synset_of = _devkit_synsets(path)
        if unknown := sorted({value for value in values if int(value) not in synset_of}):
            raise ShardError(f"{path}: number {unknown[0]} is not in the devkit's meta.mat")
        values = [synset_of[int(value)] for value in values]
    return dict(zip(names, values, strict=True))


def _is_number(text: str) -> bool:
    """Whether it is a number of a class, or of the devkit's."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def _devkit_synsets(labels: Path) -> dict[int, str]:
    """ILSVRC2012_ID to synset, from the devkit's own table: its numbers are not in the order of the synsets."""
    folders = [labels.parent, labels.parent / "data", labels.parent.parent / "data"]
    table = next((folder / "meta.mat" for folder in folders if (folder / "meta.mat").is_file()), None)
    advice = "or give --val-labels a list of synsets, one an image"
    if table is None:
        raise ShardError(f"{labels} holds the devkit's numbers; put the devkit's meta.mat beside it, {advice}")
    try:
        return synsets(table)
    except ShardError as error:
        raise ShardError(f"{error}; restore it, {advice}") from None
