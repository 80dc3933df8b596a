"""A folder of images as a source: one subfolder a class, or no subfolders and one class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mimscale.data import decode
from mimscale.data.build.listing import Found, safe_part, unique
from mimscale.data.build.source import ScanTask, Source
from mimscale.data.errors import DamagedSample, ShardError
from mimscale.files import UnfitFile, open_regular
from mimscale.wording import counted

# What torchvision's ImageFolder takes, and GIF, which ImageNet-22K's crawl left some of.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
FLAT_CLASS = "images"


def _image_paths(folder: str, root: str, rejected: list[tuple[str, str]]) -> Iterator[str]:
    """Paths below ``folder`` of everything named like an image; hidden files and folders are passed over.

    Links are followed out of ``root``, the source, and once to each folder. One to what the source holds anyway is not: the
    same image would count twice, and a link to a folder above would never end.

    Args:
        folder: to look in.
        root: the source that it is in.
        rejected: gets what is left out, and why.
    """
    inside = os.path.realpath(root)
    seen = {_identity(folder)}
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(f"{folder}/{below}") as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as problem:
            rejected.append((f"{folder}/{below}".rstrip("/"), f"cannot be read: {problem.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{below}{entry.name}"
            try:
                is_folder = entry.is_dir()
            except OSError as problem:  # a link to itself
                rejected.append((entry.path, f"cannot be followed: {problem.strerror}"))
                continue
            if is_folder:
                if entry.is_symlink() and _is_in(entry.path, inside):
                    rejected.append((entry.path, "is a link to a folder that the source holds anyway"))
                elif (identity := _identity(entry.path)) in seen:
                    rejected.append((entry.path, "is a folder that was listed by another link"))
                else:
                    seen.add(identity)
                    waiting.append(path + "/")
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                if entry.is_symlink() and _is_listed(entry.path, inside):
                    rejected.append((entry.path, "is a link to an image that the source holds anyway"))
                else:
                    yield path


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
    return target.startswith(f"{root}/") and not hidden and target.lower().endswith(IMAGE_SUFFIXES)


def has_images(folder: Path, root: Path | None = None) -> bool:
    """Whether anything below ``folder`` is named like an image."""
    return next(_image_paths(str(folder), str(root or folder), []), None) is not None


@dataclass(frozen=True)
class FolderClass(ScanTask):
    """One class folder to list.

    Attributes:
        folder: where its images are.
        prefix: what its keys start with.
        label: its number.
        thorough: decode every image.
        root: of the source; by default the folder.
        rejected: (where, why) of what is left out already.
    """

    folder: str
    prefix: str
    label: int
    thorough: bool = False
    root: str = ""
    rejected: tuple[tuple[str, str], ...] = ()

    def run(self) -> Found:
        """List the class; every image's structure is looked at."""
        found = Found(self.folder, self.label, rejected=list(self.rejected))
        paths = sorted(_image_paths(self.folder, self.root or self.folder, found.rejected))
        return listed_images(found, paths, paths, self.prefix, self.thorough)


def listed_images(found: Found, paths: list[str], names: list[str], prefix: str, thorough: bool) -> Found:
    """Add images to ``found`` after a look at the structure of each; what is not an image is rejected.

    Args:
        found: of a class; its container is what the paths are below.
        paths: of the images.
        names: what their keys are made of.
        prefix: what their keys start with.
        thorough: decode every image.
    """
    for path, stem in zip(paths, unique(names, _stem), strict=True):
        full = f"{found.container}/{path}"
        try:
            descriptor = open_regular(full)
        except UnfitFile:
            found.rejected.append((full, "is no regular file"))
            continue
        except OSError as error:
            found.rejected.append((full, f"cannot be opened: {error.strerror}"))
            continue
        try:
            size = os.fstat(descriptor).st_size
            kind = decode.identify(partial(_pread, descriptor), size, thorough)
        except (DamagedSample, OSError) as error:
            found.rejected.append((full, str(error)))
            continue
        finally:
            os.close(descriptor)
        found.keys.append(f"{prefix}/{stem}".encode())
        found.names.append(path)
        found.sizes.append(size)
        found.kinds.append(kind)
    return found


def _pread(descriptor: int, start: int, length: int) -> bytes:
    return os.pread(descriptor, length, start)


def _stem(path: str) -> str:
    return safe_part(os.path.splitext(path)[0])  # noqa: PTH122 - half a million of them


class ImageFolder(Source):
    """Class subfolders, or a flat folder as one class.

    Args:
        folder: the images.
        labelled_by: for a flat folder of held-out images: classes of the training source. With more than one, the
            images stay unlabelled (-1).

    Raises:
        ShardError: no such folder, or nothing in it is named like an image.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ShardError(f"{folder}: no such folder")
        self.folder = folder.resolve()
        inside = sorted(entry for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        twice = {entry for entry in inside if entry.is_symlink() and _is_in(str(entry), str(self.folder))}
        self._left_out = tuple(
            (str(entry), "is a link to a folder that the source holds anyway") for entry in sorted(twice)
        )
        self._folders = [entry for entry in inside if entry not in twice and has_images(entry, self.folder)]
        if not self._folders and not has_images(self.folder):
            raise ShardError(f"{folder}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)}, also in subfolders)")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Any folder."""
        return path.is_dir()

    @property
    def classes(self) -> list[str]:
        """Names of the class folders, sorted."""
        return [os.fsencode(folder.name).decode("utf-8", "replace") for folder in self._folders] or [FLAT_CLASS]

    def tasks(self, label_of: dict[str, int], thorough: bool = False) -> list[ScanTask]:
        """One task a class.

        Raises:
            ShardError: a class that ``label_of`` does not know.
        """
        if not self._folders:
            label = label_of.get(FLAT_CLASS, -1)
            return [FolderClass(str(self.folder), FLAT_CLASS, label, thorough, str(self.folder))]
        if unknown := [name for name in self.classes if name not in label_of]:
            raise ShardError(
                f"{self.folder}: {counted(len(unknown), 'class')} not in the training images: {', '.join(unknown[:5])}"
            )
        # Prefixes follow the training classes, so that a held-out image of a class has the prefix that its training
        # images have.
        prefix_of = dict(zip(label_of, unique(label_of), strict=True))
        return [
            FolderClass(
                str(folder),
                prefix_of[name],
                label_of[name],
                thorough,
                str(self.folder),
                () if number else self._left_out,
            )
            for number, (folder, name) in enumerate(zip(self._folders, self.classes, strict=True))
        ]
