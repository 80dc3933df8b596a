"""A json file of images, annotations and categories as a source: iNaturalist-18's form, which COCO's classes share.

    {"images": [{"id": 0, "file_name": "train_val2018/Aves/2761/a.jpg"}, ...],
     "annotations": [{"image_id": 0, "category_id": 2761}, ...],
     "categories": [{"id": 2761, "name": "..."}, ...]}

Paths are below the json file's own folder. Classes are numbered in the order of the categories' ids.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mimscale.data.build.listing import Found, unique
from mimscale.data.build.source import ScanTask, Source
from mimscale.data.build.sources.image_folder import listed_images
from mimscale.data.errors import ShardError
from mimscale.files import read_json
from mimscale.wording import counted, printable

_SHOWN = 5
# Of the file; COCO's are a quarter of it.
_MOST_BYTES = 2 * 2**30


@dataclass(frozen=True)
class ListedClass(ScanTask):
    """The images of one class, by path.

    Attributes:
        folder: what the paths are below.
        paths: of its images, sorted.
        prefix: what its keys start with.
        label: its number.
        thorough: decode every image.
        rejected: (where, why) of what is left out already.
    """

    folder: str
    paths: tuple[str, ...]
    prefix: str
    label: int
    thorough: bool
    rejected: tuple[tuple[str, str], ...] = ()

    def run(self) -> Found:
        """Look at every image; one that is not there is left out, and counted."""
        found = Found(self.folder, self.label, rejected=list(self.rejected))
        names = [PurePosixPath(path).name for path in self.paths]
        return listed_images(found, list(self.paths), names, self.prefix, self.thorough)


def _fail(path: Path, problem: str, examples: list[str]) -> ShardError:
    more = f" and {len(examples) - _SHOWN} more" if len(examples) > _SHOWN else ""
    return ShardError(f"{path}: {problem}: {', '.join(printable(example, 100) for example in examples[:_SHOWN])}{more}")


class AnnotatedJson(Source):
    """The images that a json file lists.

    An image without an annotation is left out and counted, as is one that is not there.

    Raises:
        ShardError: the file cannot be read or is of another form; an annotation's category or image is not in the lists;
            an image has two classes; a path leads out of the folder.
    """

    def __init__(self, path: Path):
        self.path, self.folder = path, path.resolve().parent
        content = _read(path)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        ids = [category["id"] for category in categories]
        if twice := [str(i) for i, count in Counter(ids).items() if count > 1]:
            raise _fail(path, "categories with the same id", twice)
        names = [str(category.get("name", category["id"])) for category in categories]
        if halves := [name for name in names if not _is_text(name)]:
            raise ShardError(f"{path}: the name {printable(halves[0], 80)} of a category has half a character; mend it")
        self._names = _distinct(names, ids)
        files = {image["id"]: image["file_name"] for image in content["images"]}
        if len(files) < len(content["images"]):
            counted = Counter(image["id"] for image in content["images"])
            raise _fail(path, "images with the same id", [str(i) for i, count in counted.items() if count > 1])
        outside = [name for name in files.values() if name.startswith("/") or ".." in PurePosixPath(name).parts]
        if outside:
            raise _fail(path, "images outside its folder", outside)
        self._members = self._sort(content["annotations"], files, {i: label for label, i in enumerate(ids)})

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A json file."""
        return path.is_file() and path.suffix == ".json"

    def _sort(self, annotations: list[dict], files: dict[Any, str], label_of: dict[Any, int]) -> dict[int, list[str]]:
        """Paths by class; the images without a class are those of class -1."""
        unknown = [
            f"{a['category_id']} (image {a['image_id']})" for a in annotations if a["category_id"] not in label_of
        ]
        if unknown:
            raise _fail(self.path, f"{len(unknown)} annotations have a category that is not in the list", unknown)
        missing = [str(a["image_id"]) for a in annotations if a["image_id"] not in files]
        if missing:
            raise _fail(self.path, f"{len(missing)} annotations are of images that are not in the list", missing)
        labels: dict[Any, set[int]] = defaultdict(set)
        for annotation in annotations:
            labels[annotation["image_id"]].add(label_of[annotation["category_id"]])
        several = [files[image] for image, found in labels.items() if len(found) > 1]
        if several:
            raise _fail(self.path, f"{counted(len(several), 'image')} with more than one class", several)
        members: dict[int, list[str]] = defaultdict(list)
        for image, name in files.items():
            members[min(labels[image]) if image in labels else -1].append(name)
        return members

    @property
    def classes(self) -> list[str]:
        """Names of the categories, in the order of their ids."""
        return self._names

    def tasks(self, label_of: dict[str, int], thorough: bool = False) -> list[ScanTask]:
        """One task a class with images, and what was left out with the first.

        Raises:
            ShardError: a class that ``label_of`` does not know; no image has a class.
        """
        if unknown := [name for name in self.classes if name not in label_of]:
            raise _fail(self.path, f"{counted(len(unknown), 'class')} not in the training images", unknown)
        prefix_of = dict(zip(label_of, unique(label_of), strict=True))
        left_out = tuple((f"{self.folder}/{name}", "has no annotation") for name in sorted(self._members[-1]))
        tasks: list[ScanTask] = []
        for own, name in enumerate(self.classes):
            if paths := tuple(sorted(self._members[own])):
                tasks.append(ListedClass(str(self.folder), paths, prefix_of[name], label_of[name], thorough, left_out))
                left_out = ()
        if not tasks:
            raise ShardError(f"{self.path}: none of its images has a class")
        return tasks


def _distinct(names: list[str], ids: list[Any]) -> list[str]:
    """Names of categories, with the id where two have the same one."""
    counted = Counter(names)
    return [name if counted[name] == 1 else f"{name} {i}" for name, i in zip(names, ids, strict=True)]


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_path(name: object) -> bool:
    """Whether it is a text that a file can have as its path."""
    try:
        return isinstance(name, str) and 0 < len(name.encode()) < 4096 and "\0" not in name
    except UnicodeEncodeError:
        return False


def _read(path: Path) -> dict[str, list[dict]]:
    try:
        content = read_json(path, _MOST_BYTES)
    except OSError as error:
        raise ShardError(f"{path} cannot be read as json ({error.strerror or error})") from None
    wanted = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id"), "categories": ("id",)}
    for part, keys in wanted.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and all(k in row for k in keys) for row in rows):
            raise ShardError(f"{path} has no list '{part}' of objects with {' and '.join(keys)}")
        for key in keys:
            if key == "file_name":
                if wrong := [row[key] for row in rows if not _is_path(row[key])]:
                    raise ShardError(
                        f"{path}: images need a file_name that is a path, not {printable(repr(wrong[0]), 80)}"
                    )
            elif len({type(row[key]) for row in rows} - {int}) > 0 and {type(row[key]) for row in rows} != {str}:
                raise ShardError(f"{path}: every '{key}' of '{part}' has to be a whole number, or every one a text")
    return content
