"""COCO's form as it is read: what each entry holds, checked before anything is made of it, pycocotools' C code least of all."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mimscale.data import ShardError
from mimscale.data.decode import MAX_PIXELS
from mimscale.files import UnfitFile, parse_json, read_json_bytes
from mimscale.wording import counted, printable

# COCO's own largest file has 450 MB, and LVIS's 1.2 GB.
LARGEST_FILE = 2 * 2**30
MOST_CLASSES = 20_000
# Of one image, of which all masks are held at once; LVIS has 300 at most.
MOST_OBJECTS = 2_000
# Of one object: rings, numbers of a ring, and the way round it, in sides of its image.
MOST_RINGS, MOST_NUMBERS, LONGEST_WAY = 10_000, 400_000, 1_000
# A ring of so few numbers is never longer than that.
_SHORT_RING = 600


def read_content(file: Path) -> dict[str, Any]:
    """A COCO file's images, annotations and categories.

    Numbers are whole where they must be, names are plain, and of an outline the rings with fewer than three points are left
    out. ``area`` and ``iscrowd`` are filled in where they are missing.

    Raises:
        ShardError: it is not there, is no JSON, lacks a section, or an entry is not as COCO writes it; the entry is named.
    """
    where = printable(file)
    try:
        content = parse_json(read_json_bytes(file, LARGEST_FILE))
    except UnfitFile as error:
        raise ShardError(str(error)) from None
    except OSError as error:
        raise ShardError(f"{where}: {error.strerror}; give a file such as COCO's instances_train2017.json") from None
    except ValueError as error:
        raise ShardError(f"{where} is no JSON: {printable(error)}") from None
    for section in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise ShardError(f"{where} has no list '{section}', which a file in COCO's form has")
        for place, entry in enumerate(content[section]):
            if not isinstance(entry, dict) or not _is_whole(entry.get("id")):
                raise ShardError(f"{where}: entry {place} of '{section}' has no number 'id'")
        _check_distinct(content[section], section, where)
    if len(content["categories"]) > MOST_CLASSES:
        raise ShardError(
            f"{where} lists {counted(len(content['categories']), 'category', 'categories')}, over {MOST_CLASSES:,}"
        )
    for entry in content["categories"]:
        if not isinstance(entry.get("name"), str) or not entry["name"] or len(entry["name"]) > 200:
            raise ShardError(f"{where}: category {entry['id']} has no name of 200 characters at most")
    images = {entry["id"]: _size(entry, f"{where}: image {entry['id']}") for entry in content["images"]}
    categories = {entry["id"] for entry in content["categories"]}
    objects = Counter(entry["image_id"] for entry in content["annotations"] if _is_whole(entry.get("image_id")))
    for image, number in objects.most_common(1):
        if number > MOST_OBJECTS:
            raise ShardError(f"{where}: image {image} has {counted(number, 'annotation')}, more than {MOST_OBJECTS:,}")
    for entry in content["annotations"]:
        _check_annotation(entry, images, categories, f"{where}: annotation {entry['id']}")
    return content


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # false for NaN


def _encodes(text: str) -> bool:
    """Whether it has no halves of characters, which JSON can write and no file system takes."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _check_distinct(entries: list[dict[str, Any]], section: str, where: str) -> None:
    found = Counter(entry["id"] for entry in entries)
    if len(found) != len(entries):
        twice = [number for number, count in found.items() if count > 1]
        raise ShardError(f"{where}: {section} have the same number: {twice[:5]}")


def _size(entry: dict[str, Any], where: str) -> tuple[int, int]:
    """Height and width of an image, whose name is looked at too."""
    for key in ("height", "width"):
        value = entry.get(key)
        if type(value) is float and value.is_integer():
            value = entry[key] = int(value)
        if type(value) is not int or not 1 <= value < 2**63:
            raise ShardError(f"{where} has the {key} {printable(value, 40)}, which is no number of pixels")
    if entry["height"] * entry["width"] > MAX_PIXELS:
        raise ShardError(f"{where} has {entry['width']} x {entry['height']} pixels, over the limit of {MAX_PIXELS:,}")
    name = entry.get("file_name")
    if not isinstance(name, str) or not name or len(name) > 1000 or "\0" in name or not _encodes(name):
        raise ShardError(f"{where} has the file_name {printable(name, 60)}, which is none")
    if name.startswith("/") or ".." in name.split("/"):
        raise ShardError(f"{where} has the file_name {printable(name)}, which leads out of the folder of images")
    return entry["height"], entry["width"]


def _check_annotation(
    entry: dict[str, Any], images: dict[int, tuple[int, int]], categories: set[int], where: str
) -> None:
    image, category = entry.get("image_id"), entry.get("category_id")
    if not _is_whole(image) or image not in images:
        raise ShardError(f"{where} is of image {printable(image, 40)}, which the file does not list")
    if not _is_whole(category) or category not in categories:
        known = ", ".join(map(str, sorted(categories)[:8]))
        raise ShardError(f"{where} has category {printable(category, 40)}; the file lists {known}, ...")
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ShardError(f"{where} has the box {printable(box, 80)}, not four numbers: left, top, width, height")
    if entry.setdefault("iscrowd", 0) not in (0, 1):
        raise ShardError(f"{where} has iscrowd {printable(entry['iscrowd'], 40)}, which is neither 0 nor 1")
    if not _is_number(entry.setdefault("area", max(box[2], 0) * max(box[3], 0))):
        raise ShardError(f"{where} has the area {printable(entry['area'], 40)}, which is no number")
    shape = entry.get("segmentation")
    if isinstance(shape, dict):
        _check_runs(shape, images[image], where)
    elif shape is None or isinstance(shape, list):
        entry["segmentation"] = _rings(shape or [], images[image], where)
    else:
        raise ShardError(f"{where} has a segmentation that is neither a list of outlines nor run-lengths")


def _rings(rings: list[Any], size: tuple[int, int], where: str) -> list[list[float]]:
    """The rings of an outline that have an area."""
    side = max(size)
    if len(rings) > MOST_RINGS:
        raise ShardError(f"{where} has {counted(len(rings), 'outline')}, more than {MOST_RINGS:,}")
    kept = []
    for ring in rings:
        if not isinstance(ring, list):
            raise ShardError(f"{where} has an outline that is no list of x, y, x, y, ...")
        if len(ring) < 6 or len(ring) % 2:
            continue
        if len(ring) > MOST_NUMBERS:
            raise ShardError(f"{where} has an outline of {counted(len(ring), 'number')}, more than {MOST_NUMBERS:,}")
        if not set(map(type, ring)) <= {int, float}:
            raise ShardError(f"{where} has an outline with something else than numbers")
        if not (-side <= min(ring) and max(ring) <= 2 * side) or not math.isfinite(sum(ring)):
            raise ShardError(f"{where} has an outline that leads far out of its image of {size[1]} x {size[0]} pixels")
        if len(ring) > _SHORT_RING:
            points = np.array(ring, np.float64).reshape(-1, 2)
            way = np.abs(np.diff(points, axis=0)).max(1).sum() / side
            if way > LONGEST_WAY:
                raise ShardError(f"{where} has an outline {way:,.0f} times as long as its image, over {LONGEST_WAY:,}")
        kept.append(ring)
    return kept


def _check_runs(shape: dict[str, Any], size: tuple[int, int], where: str) -> None:
    """See that run-lengths cover their image, no more and no less."""
    told = shape.get("size")
    if not isinstance(told, list) or len(told) != 2 or not all(map(_is_whole, told)):
        raise ShardError(f"{where} has run-lengths without a size, height and width")
    if tuple(told) != size:
        raise ShardError(f"{where} has a mask of {told[1]} x {told[0]} pixels on an image of {size[1]} x {size[0]}")
    runs = shape.get("counts")
    pixels = size[0] * size[1]
    if isinstance(runs, str):
        found = _unpacked(runs)
        fits = found is not None and bool((found >= 0).all()) and int(found.sum()) == pixels
    elif isinstance(runs, list):
        fits = all(map(_is_whole, runs)) and min(runs, default=0) >= 0 and sum(runs) == pixels
    else:
        fits = False
    if not fits:
        raise ShardError(f"{where} has run-lengths that do not add up to its {size[1]} x {size[0]} pixels")


def _unpacked(text: str) -> np.ndarray | None:
    """COCO's packed run-lengths as int64, or ``None`` where they are damaged.

    Each number is written in groups of five bits, the lowest first, in characters from 48 on, whose sixth bit says that more
    follow; from the fourth number on it is the difference to the last but one.
    """
    if not text or not text.isascii():
        return None
    characters = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(characters & 32 == 0)
    if characters.min() < 0 or characters.max() > 63 or not len(ends) or ends[-1] != len(characters) - 1:
        return None
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 6:
        return None
    place = np.arange(len(characters)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((characters & 31) << (5 * place), starts)
    numbers -= np.where(characters[ends] & 16, np.int64(1) << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
