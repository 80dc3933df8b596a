"""The labels of held-out images, from a file of their own."""

from __future__ import annotations

import codecs
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

from mimscale.data.build.sources.devkit import synsets
from mimscale.data.build.tree import HAS_NO_IMAGE
from mimscale.data.errors import ShardError
from mimscale.files import read_bytes
from mimscale.wording import counted, printable

_WHOLE = re.compile(r"([0-9]{1,18})(\.0*)?")
_SEPARATORS = re.compile(r"\t+|[,;]|\s+")
# Of the places where a line could be cut into a name and a class.
_MOST_CUTS = 64

Left = tuple[tuple[str, str], ...]


def whole_number(text: str) -> int | None:
    """The number that a label is, also as ``1.0``; None where it is none."""
    found = _WHOLE.fullmatch(text)
    return int(found[1]) if found else None


def read_labels(path: Path, names: list[str]) -> tuple[dict[str, str], Left]:
    """The class of each held-out image.

    Three forms are known: a line "NAME CLASS" an image (or with a tab, a comma or a semicolon between them), with a class name or
    a number in the sorted class names; a class name a line, in the order of the image names; and the devkit's
    ``ILSVRC2012_validation_ground_truth.txt``, a number a line, with the devkit's ``meta.mat`` beside it, which gives the class
    of a number. NAME is the image's path or the last part of it, with or without its suffix.

    Args:
        path: the file, in UTF-8 or UTF-16.
        names: the images, sorted.

    Returns:
        The class as it is written, by image name; and (where, why) of lines that are of no image.

    Raises:
        ShardError: none of these, not a class for every image, or two for one.
    """
    lines = [(n, line.strip()) for n, line in enumerate(_text(path).splitlines(), 1) if line.strip()]
    known = _forms(names)
    given: dict[str, str] = {}
    unused: list[tuple[str, str]] = []
    for number, line in lines:
        cut = _cut(line, known)
        if cut is None:
            unused.append((f"{path}:{number}", HAS_NO_IMAGE))
            continue
        name, value = cut
        if given.setdefault(name, value) != value:
            raise ShardError(
                f"{path}: two labels for {printable(name)}: {printable(given[name])} and {printable(value)}"
            )
    if given:
        if missing := [name for name in names if name not in given]:
            raise ShardError(
                f"{path}: no label for {counted(len(missing), 'image')}, {printable(missing[0])} among them"
            )
        return {name: given[name] for name in names}, tuple(unused)
    values = [line for _, line in lines]
    if len(values) != len(names):
        raise ShardError(
            f"{path}: {counted(len(values), 'label')} for {counted(len(names), 'image')}, and no line that names one of them; "
            "write one a line, or lines of NAME CLASS"
        )
    numbers = [whole_number(value) for value in values]
    if all(number is not None for number in numbers):
        synset_of = _devkit_synsets(path)
        if unknown := sorted({n for n in numbers if n is not None and n not in synset_of}):
            raise ShardError(f"{path}: number {unknown[0]} is not in the devkit's meta.mat")
        values = [synset_of[number] for number in numbers if number is not None]
    return dict(zip(names, values, strict=True)), ()


def _text(path: Path) -> str:
    try:
        content = read_bytes(path)
    except OSError as error:
        raise ShardError(f"{path}: labels cannot be read ({error.strerror or error})") from None
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as problem:
        raise ShardError(
            f"{path}: labels cannot be read (is not {encoding[:6].upper()} text at byte {problem.start})"
        ) from None


def _forms(names: list[str]) -> dict[str, str]:
    """The image that each way to write its name means; "" where several are meant."""
    meant: dict[str, set[str]] = defaultdict(set)
    for name in names:
        path = PurePosixPath(name)
        for form in {name, path.name, str(path.with_suffix("")) if path.suffix else name, path.stem}:
            meant[form].add(name)
    whole = set(names)
    return {form: form if form in whole else min(of) if len(of) == 1 else "" for form, of in meant.items()}


def _cut(line: str, known: dict[str, str]) -> tuple[str, str] | None:
    """(image, class) of a line that starts with the name of a known image."""
    for number, found in enumerate(_SEPARATORS.finditer(line)):
        if number >= _MOST_CUTS:
            break
        written = line[: found.start()].strip().strip('"').strip()
        value = line[found.end() :].strip().strip('"').strip(" \t,;")
        if not value:
            continue
        for form in (written, written.removeprefix("./"), written.replace("\\", "/").rpartition("/")[2]):
            if form in known:
                if not known[form]:
                    raise ShardError(
                        f"{printable(form)} of the labels could be one of several images: write their paths"
                    )
                return known[form], value
    return None


def numbered(class_of: dict[str, str], label_of: dict[str, int], where: str) -> dict[str, int]:
    """Numbers for labels that are class names, or all numbers in the class names; a name wins over a number.

    Raises:
        ShardError: neither, or some are only names and others only numbers.
    """
    values = set(class_of.values())
    unknown = sorted(value for value in values if value not in label_of)
    if not unknown:
        return {name: label_of[value] for name, value in class_of.items()}
    if wrong := [value for value in unknown if whole_number(value) is None]:
        require_known(where, wrong, label_of)
    if named := sorted(value for value in values if value in label_of):
        raise ShardError(
            f"{where}: the label {printable(named[0])} is the name of a class and {printable(unknown[0])} is not: "
            "a label could be a name or a number: write class names"
        )
    numbers = {value: number for value in values if (number := whole_number(value)) is not None}
    if (most := max(numbers.values())) >= len(label_of):
        raise ShardError(f"{where}: the label {most} goes beyond the {counted(len(label_of), 'class')} to train on")
    return {name: numbers[value] for name, value in class_of.items()}


def require_known(where: str, classes: list[str], label_of: dict[str, int]) -> None:
    """Raise unless every class is one to train on.

    Raises:
        ShardError: which are not.
    """
    if unknown := [name for name in classes if name not in label_of]:
        raise ShardError(
            f"{where}: {counted(len(unknown), 'class')} not in the training images: "
            f"{', '.join(printable(name, 100) for name in unknown[:5])}"
        )


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
