"""A folder of images as a source: one subfolder a class, or no subfolders and one class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mimscale.data import decode
from mimscale.data.build import tree
from mimscale.data.build.listing import Found, safe_part, unique
from mimscale.data.build.source import ScanTask, Source
from mimscale.data.build.sources.labels import numbered, read_labels, require_known
from mimscale.data.build.tree import FLAT_CLASS, IMAGE_SUFFIXES
from mimscale.data.errors import DamagedSample, ShardError
from mimscale.files import UnfitFile, open_regular

# What tools keep a data set's history or its content in; one line names such a folder, whatever it holds.
_STORES = (".git", ".svn", ".hg", ".datalad", ".dvc")


def _head(path: str) -> bytes:
    try:
        descriptor = open_regular(path)
    except OSError:
        return b""
    try:
        return os.pread(descriptor, tree.HEAD_BYTES, 0)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


@dataclass
class _Walk:
    """Everything in and below a folder.

    Links are followed out of ``root``, the source, and once to each folder. One to what the source holds anyway is not: the
    same image would count twice, and a link to a folder above would never end.

    Attributes:
        folder: to look in.
        root: the source that it is in.
        rejected: gets (where, why) of images that cannot be reached.
        aside: gets (where, why) of everything else that is left out.
        deep: look into subfolders.
    """

    folder: str
    root: str
    rejected: list[tuple[str, str]] = field(default_factory=list)
    aside: list[tuple[str, str]] = field(default_factory=list)
    deep: bool = True

    def files(self) -> Iterator[tuple[str, bool, int]]:
        """(path below the folder, whether a link leads there, IMAGE or TAR) of what a build could take."""
        inside = os.path.realpath(self.root)
        seen = {_identity(self.folder)}
        waiting = [("", False)]
        while waiting:
            below, linked = waiting.pop()
            try:
                with os.scandir(f"{self.folder}/{below}") as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as problem:
                self.rejected.append((f"{self.folder}/{below}".rstrip("/"), f"cannot be read: {problem.strerror}"))
                continue
            if not entries and below:
                self.aside.append((f"{self.folder}/{below}".rstrip("/"), tree.IS_EMPTY))
            for entry in entries:
                try:
                    is_folder = entry.is_dir()
                except OSError as problem:  # a link to itself
                    self._left_out(entry.path, f"cannot be followed: {problem.strerror}")
                    continue
                is_link = linked or entry.is_symlink()
                if is_folder:
                    if not self.deep:
                        continue
                    if entry.name.startswith("."):
                        self.aside += _hidden(entry.path)
                    elif entry.is_symlink() and _is_in(entry.path, inside):
                        self.aside.append((entry.path, tree.IS_LINKED_FOLDER))
                    elif (identity := _identity(entry.path)) in seen:
                        self.aside.append((entry.path, tree.IS_LISTED_FOLDER))
                    else:
                        seen.add(identity)
                        waiting.append((f"{below}{entry.name}/", is_link))
                    continue
                kind = tree.kind_of(entry.name, partial(_head, entry.path))
                if kind == tree.HIDDEN:
                    self.aside.append((entry.path, tree.IS_HIDDEN))
                elif kind == tree.OTHER:
                    self.aside.append((entry.path, tree.why_not(entry.name)))
                elif kind == tree.IMAGE and entry.is_symlink() and _is_listed(entry.path, inside):
                    self.aside.append((entry.path, tree.IS_LINKED_IMAGE))
                else:
                    yield f"{below}{entry.name}", is_link, kind

    def _left_out(self, path: str, why: str) -> None:
        (self.rejected if path.lower().endswith(IMAGE_SUFFIXES) else self.aside).append((path, why))

    def images(self) -> Iterator[tuple[str, bool]]:
        """(path below the folder, whether a link leads there) of its images; tars are left out."""
        for path, linked, kind in self.files():
            if kind == tree.IMAGE:
                yield path, linked
            else:
                self.aside.append((f"{self.folder}/{path}", tree.IS_NESTED))


def _hidden(folder: str) -> list[tuple[str, str]]:
    """A line for each file in a hidden folder, or one for a store of a data set's history."""
    if os.path.basename(folder) in _STORES:  # noqa: PTH119
        return [(folder, tree.IS_HIDDEN)]
    return [
        (os.path.join(place, name), tree.IS_HIDDEN)  # noqa: PTH118
        for place, below, names in os.walk(folder)
        for name in sorted(names) + [name for name in sorted(below) if os.path.islink(os.path.join(place, name))]  # noqa: PTH114, PTH118
    ]


def _identity(path: str) -> tuple[int, int]:
    facts = os.stat(path)  # noqa: PTH116 - many thousands of them
    return facts.st_dev, facts.st_ino


def _is_in(link: str, root: str) -> bool:
    """Whether a link leads to the source, into it, or to a folder that it is in."""
    target = os.path.realpath(link)
    return f"{target}/".startswith(f"{root}/") or f"{root}/".startswith(f"{target}/".replace("//", "/"))


def _is_listed(link: str, root: str) -> bool:
    """Whether a link leads to a file that is listed by its own name."""
    target = os.path.realpath(link)
    parts = target[len(root) :].split("/")
    hidden = any(part.startswith(".") for part in parts)  # a store of content, as git-annex keeps it
    if hidden or not target.startswith(f"{root}/"):
        return False
    return tree.kind_of(parts[-1], partial(_head, target)) == tree.IMAGE


class _Folders(tree.Tree):
    """A folder as the rule for classes sees it."""

    def __init__(self, root: str):
        self.root = root
        self._held: dict[str, list[str]] = {}

    def _subfolders(self, place: str) -> list[str]:
        inside = os.path.realpath(self.root)
        try:
            with os.scandir(f"{self.root}/{place}") as found:
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except OSError:
            return []
        return sorted(e.name for e in entries if _is_folder(e) and not (e.is_symlink() and _is_in(e.path, inside)))

    def folders(self, place: str) -> list[str]:
        if place not in self._held:
            self._held[place] = [
                name for name in self._subfolders(place) if has_images(f"{self.root}/{place}{name}", self.root)
            ]
        return self._held[place]

    def _here(self, place: str, kind: int) -> list[str]:
        walk = _Walk(f"{self.root}/{place}", self.root, deep=False)
        return [path for path, _, found in walk.files() if found == kind]

    def loose(self, place: str) -> list[str]:
        return self._here(place, tree.IMAGE)

    def tars(self, place: str) -> list[str]:
        return self._here(place, tree.TAR)

    def images(self, place: str) -> int:
        return sum(1 for _ in _Walk(f"{self.root}/{place}", self.root).images())

    def beside(self, classes: tree.Classes) -> tuple[tuple[str, str], ...]:
        """(where, why) of everything outside the class folders."""
        left: list[tuple[str, str]] = []
        place = ""
        while True:
            names = self.folders(place)
            walk = _Walk(f"{self.root}/{place}".rstrip("/"), self.root, deep=False)
            left += [(f"{walk.folder}/{path}", tree.IS_NESTED) for path, _, _ in walk.files()]
            left += walk.rejected + walk.aside
            with os.scandir(walk.folder) as found:
                others = sorted(
                    (entry for entry in found if entry.name not in names and _is_folder(entry)), key=lambda e: e.name
                )
            for entry in others:
                if entry.name.startswith("."):
                    left += _hidden(entry.path)
                elif entry.is_symlink() and _is_in(entry.path, os.path.realpath(self.root)):
                    left.append((entry.path, tree.IS_LINKED_FOLDER))
                else:
                    below = _Walk(entry.path, self.root)
                    left += [(f"{entry.path}/{path}", tree.IS_NESTED) for path, _, _ in below.files()]
                    left += below.rejected + below.aside
                    if not os.listdir(entry.path):  # noqa: PTH208
                        left.append((entry.path, tree.IS_EMPTY))
            if place == classes.place:
                return tuple(left)
            place += f"{names[0]}/"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def has_images(folder: str, root: str) -> bool:
    """Whether anything below ``folder`` in the source ``root`` is an image by its name or its first bytes."""
    return next(_Walk(folder, root).images(), None) is not None


def files_beside(folder: Path, names: set[str]) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """Everything in a folder but its files of some names: paths of images, and (where, why) of the rest."""
    walk = _Walk(str(folder), str(folder))
    images = []
    for path, _, kind in walk.files():
        if kind == tree.IMAGE:
            images.append(path)
        elif path not in names:
            walk.aside.append((f"{folder}/{path}", tree.IS_NESTED))
    return sorted(images), (*walk.rejected, *walk.aside)


@dataclass(frozen=True)
class FolderClass(ScanTask):
    """One class folder to list.

    Attributes:
        folder: where its images are.
        prefix: what its keys start with.
        label: its number.
        thorough: decode every image.
        root: of the source; by default the folder.
        aside: (where, why) of what is left out already.
        labels: label of each image by its path, where it differs between images.
        prefixes: key prefixes by label, then.
    """

    folder: str
    prefix: str
    label: int
    thorough: bool = False
    root: str = ""
    aside: tuple[tuple[str, str], ...] = ()
    labels: dict[str, int] | None = None
    prefixes: tuple[str, ...] = ()

    def run(self) -> Found:
        """List the class; every image's structure is looked at."""
        found = Found(self.folder, self.label, aside=list(self.aside))
        walk = _Walk(self.folder, self.root or self.folder, found.rejected, found.aside)
        images = sorted(walk.images())
        paths = [path for path, _ in images]
        linked = {path for path, is_linked in images if is_linked}
        if self.labels is None:
            return listed_images(found, paths, paths, self.prefix, self.thorough, linked)
        found.labels = []
        labels = [self.labels.get(path, -1) for path in paths]
        prefix = [self.prefixes[label] if label >= 0 else FLAT_CLASS for label in labels]
        return listed_images(found, paths, paths, prefix, self.thorough, linked, labels)


def listed_images(
    found: Found,
    paths: list[str],
    names: list[str],
    prefix: str | list[str],
    thorough: bool,
    linked: set[str] = frozenset(),  # type: ignore[assignment]
    labels: list[int] | None = None,
) -> Found:
    """Add images to ``found`` after a look at the structure of each; what is not an image is rejected.

    Args:
        found: of a class; its container is what the paths are below.
        paths: of the images.
        names: what their keys are made of.
        prefix: what their keys start with; one for all, or one an image.
        thorough: decode every image.
        linked: paths that a link leads to.
        labels: one an image, where ``found`` has labels.
    """
    for number, (path, stem) in enumerate(zip(paths, unique(names, _stem), strict=True)):
        full = f"{found.container}/{path}"
        try:
            descriptor = open_regular(full)
        except UnfitFile:
            found.rejected.append((full, tree.IS_NO_FILE))
            continue
        except OSError as error:
            found.rejected.append((full, f"cannot be opened: {error.strerror}"))
            continue
        try:
            facts = os.fstat(descriptor)
            kind = decode.identify(partial(_pread, descriptor), facts.st_size, thorough)
        except (DamagedSample, OSError) as error:
            found.rejected.append((full, str(error)))
            continue
        finally:
            os.close(descriptor)
        if facts.st_nlink > 1 or path in linked:
            found.identities[len(found.keys)] = (facts.st_dev, facts.st_ino)
        found.keys.append(f"{prefix if isinstance(prefix, str) else prefix[number]}/{stem}".encode())
        found.names.append(path)
        found.sizes.append(facts.st_size)
        found.kinds.append(kind)
        if labels is not None and found.labels is not None:
            found.labels.append(labels[number])
    return found


def _pread(descriptor: int, start: int, length: int) -> bytes:
    return os.pread(descriptor, length, start)


def _stem(path: str) -> str:
    return safe_part(os.path.splitext(path)[0])  # noqa: PTH122 - half a million of them


class ImageFolder(Source):
    """Class subfolders, or a flat folder as one class (see :mod:`mimscale.data.build.tree`).

    Images of a flat folder of held-out images stay unlabelled (-1) where the training source has classes of other names.

    Args:
        folder: the images.
        labels: a file of labels for them (see :func:`mimscale.data.build.sources.labels.read_labels`); folders are then no
            classes.

    Raises:
        ShardError: no such folder, nothing in it is an image, images beside class folders, or a folder of splits.
    """

    options = frozenset({"labels"})

    def __init__(self, folder: Path, labels: Path | None = None):
        if not folder.is_dir():
            raise ShardError(f"{folder}: no such folder")
        self.folder = folder.resolve()
        self._tree = _Folders(str(self.folder))
        if not has_images(str(self.folder), str(self.folder)):
            raise ShardError(f"{folder}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)}, also in subfolders)")
        self._class_of: dict[str, str] | None = None
        self._unused: tuple[tuple[str, str], ...] = ()
        if labels is not None:
            self._classes = tree.Classes()
            names = sorted(path for path, _ in _Walk(str(self.folder), str(self.folder)).images())
            self._class_of, self._unused = read_labels(labels, names)
        else:
            self._classes = tree.find_classes(self._tree, str(self.folder))

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Any folder."""
        return path.is_dir()

    @property
    def classes(self) -> list[str]:
        """Names of the class folders, sorted."""
        if self._class_of is not None:
            return sorted(set(self._class_of.values()))
        return [os.fsencode(name).decode("utf-8", "replace") for name in self._classes.names] or [FLAT_CLASS]

    def tasks(self, label_of: dict[str, int], thorough: bool = False) -> list[ScanTask]:
        """One task a class.

        Raises:
            ShardError: a class that ``label_of`` does not know.
        """
        root = str(self.folder)
        prefixes = unique(label_of)
        if self._class_of is not None:
            labels = numbered(self._class_of, label_of, str(self.folder))
            return [FolderClass(root, "", -1, thorough, root, self._unused, labels, tuple(prefixes))]
        if not self._classes.names:
            return [FolderClass(root, FLAT_CLASS, label_of.get(FLAT_CLASS, -1), thorough, root)]
        require_known(root, self.classes, label_of)
        # Prefixes follow the training classes, so that a held-out image of a class has the prefix that its training
        # images have.
        prefix_of = dict(zip(label_of, prefixes, strict=True))
        left_out = self._tree.beside(self._classes)
        return [
            FolderClass(
                f"{root}/{self._classes.place}{folder}",
                prefix_of[name],
                label_of[name],
                thorough,
                root,
                () if number else left_out,
            )
            for number, (folder, name) in enumerate(zip(self._classes.names, self.classes, strict=True))
        ]
