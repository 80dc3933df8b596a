"""Folders of images with a label picture each, as ADE20K lays them out: which there are, and what their labels mean."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimscale.data import DamagedSample, ShardError
from mimscale.data.decode import MAX_BYTES, opened, read_rgb
from mimscale.files import read_bytes, read_text
from mimscale.transfer.segmentation.upernet import IGNORED
from mimscale.wording import counted, printable

IMAGES = (".jpg", ".jpeg", ".png")
LABELS = ".png"
# Bytes of a list of classes, and how many there may be.
LARGEST_CLASSES, MOST_CLASSES = 1 << 20, 20_000
# Of a label picture, looked at together.
_PIXELS_AT_ONCE = 1 << 22
# Pillow's modes of pictures with one number a pixel.
MODES = ("1", "L", "P", "I", "I;16")


def read_classes(file: Path) -> list[str]:
    """Names of classes: one a line, or ADE20K's ``objectInfo150.txt``, whose last column they are.

    Raises:
        ShardError: it cannot be read, holds none, or one twice.
    """
    where = f"data.classes={printable(file)}"
    try:
        lines = [line.rstrip() for line in read_text(file, LARGEST_CLASSES).splitlines() if line.strip()]
    except OSError as error:
        raise ShardError(f"{where}: {error.strerror or error}") from None
    if lines and lines[0].split("\t")[0].strip() == "Idx":
        lines = [line.split("\t")[-1].strip() for line in lines[1:]]
    twice = sorted(name for name, count in Counter(lines).items() if count > 1)
    if not lines or twice:
        raise ShardError(f"{where} names {f'{printable(twice[0], 100)!r} twice' if twice else 'no class'}")
    if len(lines) > MOST_CLASSES:
        raise ShardError(f"{where} names {counted(len(lines), 'class')}, more than {MOST_CLASSES:,}")
    return [printable(line, 200) for line in lines]


@dataclass(frozen=True)
class LabelPictures:
    """One split.

    Attributes:
        images: folder of the images.
        labels: folder of the label pictures.
        names: file names of the images that have one, sorted.
        alone: names of images without a label picture, and of label pictures without an image.
        classes: how many there are.
        first: the value of the first class in label pictures.
        ignored: values that say nothing.
        build: digest of names and sizes of all files.
    """

    images: Path
    labels: Path
    names: list[str]
    alone: list[str]
    classes: int
    first: int
    ignored: tuple[int, ...]
    build: str

    @classmethod
    def find(cls, images: Path, labels: Path, classes: int, first: int, ignored: tuple[int, ...]) -> LabelPictures:
        """Pair the files of two folders by name.

        Raises:
            ShardError: a folder is not there, or no image has a label picture.
        """
        found = {Path(name).stem: (name, size) for name, size in _files(images, IMAGES)}
        described = {Path(name).stem: (name, size) for name, size in _files(labels, (LABELS,))}
        both = sorted(found.keys() & described.keys())
        if not both:
            raise ShardError(
                f"no image of {images} ({len(found)} of them) has a label picture of its name in {labels} "
                f"({len(described)} of them): IMAGES/NAME.jpg goes with LABELS/NAME.png"
            )
        told = "\n".join(f"{found[stem]} {described[stem]}" for stem in both)
        alone = sorted(
            {name for stem, (name, _) in (found | described).items() if stem not in found.keys() & described}
        )
        return cls(
            images,
            labels,
            [found[stem][0] for stem in both],
            alone,
            classes,
            first,
            ignored,
            hashlib.sha256(f"{classes} {first} {ignored}\n{told}".encode()).hexdigest()[:16],
        )

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """An image and its labels.

        Returns:
            uint8 (height, width, 3); int16 (height, width), classes from 0 on, -1 where nothing is labelled.

        Raises:
            DamagedSample: one of them cannot be read, they differ in size, or a label is none of the classes.
        """
        pixels = read_rgb(self.images / self.names[number])
        path = self.labels / f"{Path(self.names[number]).stem}{LABELS}"
        where = printable(path)
        try:
            stored = read_bytes(path, MAX_BYTES)
        except OSError as error:
            raise DamagedSample(f"{where}: {error.strerror or error}") from None
        try:
            with opened(stored) as picture:
                mode, (width, height) = picture.mode, picture.size
                fits = mode in MODES and (height, width) == pixels.shape[:2]
                values = np.asarray(picture) if fits else np.empty((0, 1), np.uint8)
        except DamagedSample as error:
            raise DamagedSample(f"{where} is no picture: {error.reason}") from None
        if mode not in MODES:
            raise DamagedSample(f"{where} has colours (mode {mode}), where one number a pixel is the class")
        if not fits:
            raise DamagedSample(
                f"{where} has {width} x {height} pixels, its image {pixels.shape[1]} x {pixels.shape[0]}"
            )
        labels = np.empty(values.shape, np.int16)
        rows = max(1, _PIXELS_AT_ONCE // width)
        for top in range(0, height, rows):
            labels[top : top + rows] = self._labels(values[top : top + rows].astype(np.int64), where)
        return pixels, labels

    def _labels(self, values: np.ndarray, where: str) -> np.ndarray:
        """Classes from 0 on, -1 where nothing is labelled, of a label picture's values.

        Raises:
            DamagedSample: a value is none of the classes, and not ignored.
        """
        labels = values - self.first
        outside = (labels < 0) | (labels >= self.classes)
        said = outside & ~np.isin(values, self.ignored)
        if said.any():
            raise DamagedSample(
                f"{where} has the label {values[said][0]}: classes are {self.first} to {self.first + self.classes - 1}, and "
                f"{', '.join(map(str, self.ignored)) or 'none'} is ignored"
            )
        labels[np.isin(values, self.ignored)] = IGNORED
        return labels


def _files(folder: Path, endings: tuple[str, ...]) -> list[tuple[str, int]]:
    """Names and sizes of a folder's files with such endings.

    Raises:
        ShardError: there is no such folder.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((e.name, e.stat().st_size) for e in entries if e.name.lower().endswith(endings))
    except OSError as error:
        raise ShardError(f"{printable(folder)}: {error.strerror}") from None
