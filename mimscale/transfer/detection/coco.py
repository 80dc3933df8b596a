"""Annotations as COCO writes them, checked as a whole and held as a few arrays, so that data workers share them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as run_lengths

from mimscale.data import ShardError
from mimscale.transfer.detection.annotations import read_content
from mimscale.wording import printable


@dataclass(frozen=True)
class Instances:
    """N images and the M objects in them that can be learnt from, those of one image next to each other.

    Attributes:
        file: the annotations' file.
        folder: of the images.
        names: N file names below ``folder``.
        ids: int64 (N,), COCO's numbers of the images.
        sizes: int32 (N, 2), height and width in pixels.
        first: int64 (N + 1,): the objects of image i are those from first[i] up to first[i + 1].
        labels: int64 (M,), 1 for the first class.
        classes: names of the classes, in the order of their numbers in the file.
        categories: the classes' numbers in the file.
        left_out: how many objects (and images) were left out, by reason.
        build: digest of all of this but where it lies.
    """

    file: Path
    folder: Path
    names: list[str]
    ids: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    labels: np.ndarray
    classes: list[str]
    categories: list[int]
    left_out: dict[str, int]
    build: str
    # Outlines: all coordinates, where each ring of them begins, and the first ring of each object. An object without a ring
    # has run-lengths instead of them.
    _points: np.ndarray
    _rings: np.ndarray
    _first_ring: np.ndarray
    _runs: np.ndarray
    _first_run: np.ndarray

    def mask(self, item: int, place: Callable[[np.ndarray], np.ndarray], to: tuple[int, int]) -> np.ndarray | None:
        """An object's mask from its outline, uint8 of shape ``to``; ``None`` for one that :meth:`runs` gives.

        Args:
            item: which object.
            place: moves points (K, 2), x and y, to where they lie in the wanted image.
            to: its height and width.
        """
        rings = range(int(self._first_ring[item]), int(self._first_ring[item + 1]))
        if not rings:
            return None
        outlines = [
            place(self._points[self._rings[ring] : self._rings[ring + 1]].reshape(-1, 2)).ravel().astype(np.float64)
            for ring in rings
        ]
        parts = run_lengths.frPyObjects([outline.tolist() for outline in outlines], *to)
        return run_lengths.decode(run_lengths.merge(parts))

    def runs(self, item: int, size: tuple[int, int]) -> np.ndarray:
        """The mask, uint8 (height, width), of an object that has no outline, at the ``size`` of its image."""
        counts = self._runs[self._first_run[item] : self._first_run[item + 1]].tobytes()
        return run_lengths.decode({"size": list(size), "counts": counts})

    def objects_of_classes(self) -> np.ndarray:
        """How many objects each class has."""
        return np.bincount(self.labels - 1, minlength=len(self.classes))


def read_instances(file: Path, folder: Path, keep_empty: bool) -> Instances:
    """Read and check annotations and the names of their images.

    Left out and counted: crowds, boxes without area inside their image, objects without a mask.

    Args:
        file: in COCO's form.
        folder: of the images.
        keep_empty: keep images without an object; to learn from, they are left out.

    Raises:
        ShardError: the file is not as COCO writes it (see :func:`~mimscale.transfer.detection.annotations.read_content`), or an
            image is not there.
    """
    return _pack(read_content(file), file, folder, keep_empty)


def _pack(content: dict[str, Any], file: Path, folder: Path, keep_empty: bool) -> Instances:
    categories = sorted(content["categories"], key=lambda entry: entry["id"])
    label_of = {entry["id"]: place + 1 for place, entry in enumerate(categories)}
    images = {entry["id"]: entry for entry in content["images"]}
    _check_there(images, file, folder)
    left_out: Counter[str] = Counter()
    objects: dict[int, list[tuple[int, Any]]] = {number: [] for number in images}
    for entry in content["annotations"]:
        image = images[entry["image_id"]]
        shape, reason = _usable(entry, (image["height"], image["width"]))
        if reason is not None:
            left_out[reason] += 1
        else:
            objects[entry["image_id"]].append((label_of[entry["category_id"]], shape))
    kept = [number for number in sorted(images) if keep_empty or objects[number]]
    if len(kept) < len(images):
        left_out["images without an object"] = len(images) - len(kept)
    if not kept:
        raise ShardError(f"{printable(file)} has no image with an object to learn from; left out: {dict(left_out)}")
    flat = [item for number in kept for item in objects[number]]
    rings = [shape if isinstance(shape, list) else [] for _, shape in flat]
    runs = [b"" if isinstance(shape, list) else shape for _, shape in flat]
    arrays: dict[str, np.ndarray] = {
        "ids": np.array(kept, np.int64),
        "sizes": np.array([(images[n]["height"], images[n]["width"]) for n in kept], np.int32),
        "first": _starts([len(objects[number]) for number in kept]),
        "labels": np.array([label for label, _ in flat], np.int64),
        "_points": np.fromiter((value for shape in rings for ring in shape for value in ring), np.float32),
        "_rings": _starts([len(ring) for shape in rings for ring in shape]),
        "_first_ring": _starts([len(shape) for shape in rings]),
        "_runs": np.frombuffer(b"".join(runs), np.uint8),
        "_first_run": _starts([len(part) for part in runs]),
    }
    names = [str(images[number]["file_name"]) for number in kept]
    numbers = [int(entry["id"]) for entry in categories]
    digest = hashlib.sha256(json.dumps([names, [entry["name"] for entry in categories], numbers]).encode())
    for array in arrays.values():
        digest.update(array.tobytes())
    return Instances(
        file=file,
        folder=folder,
        names=names,
        classes=[printable(entry["name"]) for entry in categories],
        categories=numbers,
        left_out=dict(left_out),
        build=digest.hexdigest()[:16],
        **arrays,
    )


def _starts(lengths: list[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def _check_there(images: dict[int, Any], file: Path, folder: Path) -> None:
    present: dict[str, set[str]] = {}
    absent = []
    for entry in images.values():
        below, name = os.path.split(entry["file_name"])
        if below not in present:
            try:
                present[below] = {found.name for found in os.scandir(folder / below)}
            except OSError:
                present[below] = set()
        if name not in present[below]:
            absent.append(entry["file_name"])
    if absent:
        some = ", ".join(printable(name, 100) for name in absent[:3])
        raise ShardError(
            f"{len(absent)} of the {len(images)} images that {printable(file)} lists are not in "
            f"{printable(folder)}: {some}; give the folder that holds them, or take them out of the file"
        )


def _usable(entry: dict[str, Any], size: tuple[int, int]) -> tuple[Any, str | None]:
    """A checked object's outline (a list of rings) or run-lengths (bytes), or why it is left out."""
    if entry["iscrowd"]:
        return None, "crowds"
    box = entry["bbox"]
    inside = (min(box[0] + box[2], size[1]) - max(box[0], 0), min(box[1] + box[3], size[0]) - max(box[1], 0))
    if box[2] <= 0 or box[3] <= 0 or min(inside) <= 0:
        return None, "boxes without area"
    shape = entry["segmentation"]
    if isinstance(shape, dict):
        if isinstance(shape["counts"], list):
            shape = run_lengths.frPyObjects(shape, *size)
        counts = shape["counts"]
        counts = counts if isinstance(counts, bytes) else counts.encode()
        empty = not run_lengths.area({"size": list(size), "counts": counts})
        return (None, "objects without a mask") if empty else (counts, None)
    return (shape, None) if shape else (None, "objects without a mask")
