"""A folder of images as a source: one subfolder a class, or no subfolders and one class."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mimscale.data import decode
from mimscale.data.build.listing import Found, safe_part, unique
from mimscale.data.build.source import ScanTask, Source
from mimscale.data.errors import DamagedSample, ShardError
from mimscale.wording import counted

# What torchvision's ImageFolder takes, and GIF, which ImageNet-22K's crawl left some of.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
FLAT_CLASS = "images"


def _image_paths(folder: str) -> list[str]:
    """Paths below ``folder`` of everything named like an image, sorted; hidden files and folders are passed over."""
    paths = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(parent, folder)
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                paths.append(name if below == "." else f"{below}/{name}")
    return sorted(paths)


def has_images(folder: Path) -> bool:
    """Whether anything below ``folder`` is named like an image."""
    for _, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") for name in files):
            return True
    return False


@dataclass(frozen=True)
class FolderClass(ScanTask):
    """One class folder to list.

    Attributes:
        folder: where its images are.
        prefix: what its keys start with.
        label: its number.
        thorough: decode every image.
    """

    folder: str
    prefix: str
    label: int
    thorough: bool = False

    def run(self) -> Found:
        """List the class; every image's structure is looked at."""
        paths = _image_paths(self.folder)
        return listed_images(Found(self.folder, self.label), paths, paths, self.prefix, self.thorough)


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
            descriptor = os.open(full, os.O_RDONLY)
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
        self._folders = [entry for entry in inside if has_images(entry)]
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
            return [FolderClass(str(self.folder), FLAT_CLASS, label_of.get(FLAT_CLASS, -1), thorough)]
        if unknown := [name for name in self.classes if name not in label_of]:
            raise ShardError(
                f"{self.folder}: {counted(len(unknown), 'class')} not in the training images: {', '.join(unknown[:5])}"
            )
        # Prefixes follow the training classes, so that a held-out image of a class has the prefix that its training
        # images have.
        prefix_of = dict(zip(label_of, unique(label_of), strict=True))
        return [
            FolderClass(str(folder), prefix_of[name], label_of[name], thorough)
            for folder, name in zip(self._folders, self.classes, strict=True)
        ]
