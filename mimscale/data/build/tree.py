"""One rule for classes: the same tree of files has the same classes as a folder, as a tar, and as a tar of class tars.

A class is a folder at the top, with everything below it; a class tar is such a folder. Where the top holds a single folder,
and that one or the only one in it holds several, those are the classes: a tree that was packed with its own folder. Images
without any folder are one class.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from mimscale.data.errors import ShardError
from mimscale.wording import counted, printable

# By these names alone; anything else is an image if its first bytes say so.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif",
    ".jfif", ".jpe", ".avif", ".jp2", ".heic", ".heif",
)  # fmt: skip
TAR_SUFFIX = ".tar"
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar")
FLAT_CLASS = "images"

IMAGE, TAR, OTHER, HIDDEN = range(4)
HEAD_BYTES = 16

NOT_AN_IMAGE = "is no image"
IS_HIDDEN = "is hidden"
IS_PACKED = "is a packed archive, which is not read; unpack it first"
IS_NESTED = "is a tar among images, which is not read"
IS_HARD_LINK = "is a link to a member that the tar holds anyway"
IS_LINK = "is a link in a tar, which is not followed"
IS_NO_FILE = "is no regular file"
IS_SECOND = "is the same file as another one of the source"
IS_EMPTY = "holds no files, so it is no class"

IS_LINKED_FOLDER = "is a link to a folder that the source holds anyway"
IS_LINKED_IMAGE = "is a link to an image that the source holds anyway"
IS_LISTED_FOLDER = "is a folder that was listed by another link"
IS_REPEATED = "comes again in the tar; the last one is taken"
HAS_NO_IMAGE = "is the label of no image here"

# What is no image lost: another file, or one that is stored by another name.
_ASIDE = (
    NOT_AN_IMAGE, IS_HIDDEN, IS_PACKED, IS_NESTED, IS_HARD_LINK, IS_LINK, IS_SECOND, IS_EMPTY, IS_LINKED_FOLDER, IS_LINKED_IMAGE,
    IS_LISTED_FOLDER, IS_REPEATED, HAS_NO_IMAGE,
)  # fmt: skip


def is_loss(why: str) -> bool:
    """Whether what is left out for this reason looked like an image that the source has by no other name."""
    return not why.startswith(_ASIDE)


_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"\x00\x00\x00\x0cjP  ")
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1")
_SPLIT = re.compile(
    r"(?:(?:images?|imgs?|ilsvrc2012_img)[-_. ]?)?"
    r"(?:(train|training)|(val|valid|validation|test|testing|dev|eval))"
    r"(?:[-_. ]?(?:set|images?|imgs?|\d+))?",
    re.IGNORECASE,
)


def looks_like_image(head: bytes) -> bool:
    """Whether the first ``HEAD_BYTES`` bytes of a file are those of an image format that says so itself."""
    if head.startswith(_MAGIC):
        return True
    return (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or (head[4:8] == b"ftyp" and head[8:12] in _BRANDS)


def kind_of(name: str, head: Callable[[], bytes]) -> int:
    """What a file of this name is to a build: IMAGE, TAR, OTHER or HIDDEN.

    Args:
        name: the last part of its path.
        head: gives its first ``HEAD_BYTES`` bytes; called where the name does not settle it.
    """
    lower = name.lower()
    if lower.startswith("."):
        return HIDDEN
    if lower.endswith(IMAGE_SUFFIXES):
        return IMAGE
    if lower.endswith(TAR_SUFFIX):
        return TAR
    if lower.endswith(PACKED_SUFFIXES):
        return OTHER
    return IMAGE if looks_like_image(head()) else OTHER


def why_not(name: str) -> str:
    """Why a file that is OTHER is left out."""
    return IS_PACKED if name.lower().endswith(PACKED_SUFFIXES) else NOT_AN_IMAGE


class Tree(Protocol):
    """What the rule asks of a folder or a tar; a place is a path such as ``train/``, and "" is the top."""

    def folders(self, place: str) -> list[str]:
        """Names of the folders there with an image in or below them, sorted."""
        ...

    def loose(self, place: str) -> list[str]:
        """Names of the images there that are in no folder, sorted."""
        ...

    def tars(self, place: str) -> list[str]:
        """Names of the tars there, sorted."""
        ...

    def images(self, place: str) -> int:
        """How many images there are at and below a place."""
        ...


@dataclass(frozen=True)
class Classes:
    """Where the classes of a tree are.

    Attributes:
        place: what the class folders are in.
        names: of the class folders, sorted; empty where all is one class.
    """

    place: str = ""
    names: list[str] = field(default_factory=list)


def find_classes(tree: Tree, where: str) -> Classes:
    """The classes of a tree with images in it.

    Args:
        tree: of the files.
        where: how to call it in errors.

    Raises:
        ShardError: images or tars beside class folders, or folders that are the splits of a data set.
    """
    place = _unwrapped(tree)
    names, loose, tars = tree.folders(place), tree.loose(place), tree.tars(place)
    shown = printable(f"{where}/{place}".rstrip("/"), 4096)
    if names and loose:
        held = sum(tree.images(f"{place}{name}/") for name in names)
        raise ShardError(
            f"{shown}: {counted(len(loose), 'image')} ({printable(loose[0], 100)}) beside {counted(len(names), 'class folder')} "
            f"with {counted(held, 'image')}: a class is a folder; move them into one, or away"
        )
    if tars and (names or loose):
        raise ShardError(
            f"{shown}: {counted(len(tars), 'tar')} ({printable(tars[0], 100)}) beside {counted(tree.images(place), 'image')}: "
            "classes are tars or folders; move one of them away"
        )
    refuse_splits(names, shown)
    return Classes(place, names)


def _unwrapped(tree: Tree) -> str:
    """The place below a single folder, or a single one in it, where several are; else the top."""
    place = ""
    while True:
        names = tree.folders(place)
        if len(names) != 1:
            return place if len(names) > 1 else ""
        if tree.loose(place):
            return ""
        place += f"{names[0]}/"


def refuse_splits(names: list[str], where: str) -> None:
    """Refuse folders (or tars) whose names are those of a data set's splits.

    Raises:
        ShardError: they are.
    """
    found = [(name, match) for name in names if (match := _SPLIT.fullmatch(name))]
    training = [name for name, match in found if match[1]]
    held_out = [name for name, match in found if match[2]]
    if (training and held_out) or (len(held_out) > 1 and len(found) == len(names)):
        first = training[0] if training else held_out[0]
        shown = ", ".join(printable(name, 100) for name, _ in found)
        raise ShardError(
            f"{where}: {shown} are splits of a data set, not classes: give one of them as --source (.../{printable(first, 100)}) "
            "and one as --val; from a tar, unpack it or pack them one by one"
        )
