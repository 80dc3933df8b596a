"""What detection and segmentation are taught with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths

from fuzzing.case import Case, Reader, kind, material
from fuzzing.data import photograph
from fuzzing.mutations import bytes_mutated, clutter, file_mutated, json_mutated, lines_mutated
from mimscale.data import DamagedSample, ShardError
from mimscale.transfer.detection.coco import read_instances
from mimscale.transfer.segmentation.label_maps import LabelPictures, read_classes


@material("scenes")
def make_scenes(folder: Path) -> None:
    """Images with outlines, run-lengths and label pictures."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    images, annotations = [], []
    for number in range(3):
        photograph(number, 50, 40).save(folder / f"images/{number}.jpg")
        values = np.zeros((40, 50), np.uint8)
        values[5:20, 7:30] = 1 + number
        Image.fromarray(values).save(folder / f"labels/{number}.png")
        images.append({"id": number, "height": 40, "width": 50, "file_name": f"{number}.jpg"})
        mask = np.asfortranarray(values > 0, np.uint8)
        packed = run_lengths.encode(mask)
        shapes = (
            [[7.0, 5.0, 30.0, 5.0, 30.0, 20.0, 7.0, 20.0], [1, 1, 3, 1, 3, 3]],
            {"size": [40, 50], "counts": packed["counts"].decode()},
            {"size": [40, 50], "counts": [285, 15, 25, 15, 1660]},
        )
        for place, shape in enumerate(shapes):
            entry = {"id": 3 * number + place, "image_id": number, "category_id": 3 + place, "bbox": [7, 5, 23, 15]}
            annotations.append({**entry, "segmentation": shape, "iscrowd": 0, "area": 345.0})
    categories = [{"id": 3 + place, "name": f"class {place}"} for place in range(3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "classes.txt").write_text("wall\nfloor\nlamp\nsky\n")
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t1\t1\twall\n2\t0.2\t1\t1\tfloor\n")


@kind("coco", ShardError, needs=("scenes",))
def coco(case: Case) -> Reader:
    """Annotations in COCO's form, and all masks made of them."""
    folder = case.copy("scenes")
    file_mutated(folder / "instances.json", json_mutated, case)

    def read() -> None:
        found = read_instances(folder / "instances.json", folder / "images", keep_empty=case.rng.random() < 0.5)
        for item in range(len(found.labels)):
            image = int(np.searchsorted(found.first, item, side="right")) - 1
            size = (int(found.sizes[image][0]), int(found.sizes[image][1]))
            if found.mask(item, lambda points: points, (64, 64)) is None:
                found.runs(item, size)
        found.objects_of_classes()

    return read


@kind("label-pictures", ShardError, DamagedSample, needs=("scenes",))
def label_pictures(case: Case) -> Reader:
    """Images with a label picture each, and a list of classes."""
    folder, rng = case.copy("scenes"), case.rng
    classes = folder / rng.choice(("classes.txt", "objectInfo150.txt"))
    way = rng.random()
    if way < 0.4:
        file_mutated(classes, lines_mutated, case)
    elif way < 0.8:
        path = rng.choice(sorted([*folder.glob("labels/*"), *folder.glob("images/*")]))
        if rng.random() < 0.4:
            mode = rng.choice(("1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK"))
            Image.new("L" if mode == "I;16" else mode, rng.choice(((50, 40), (40, 50), (1, 1), (3000, 3000)))).save(
                path, "tiff" if mode == "CMYK" else "png"
            )
        else:
            file_mutated(path, bytes_mutated, case)
    else:
        clutter(folder / rng.choice(("images", "labels")), case)

    def read() -> None:
        names = read_classes(classes)
        first, ignored = rng.choice(((0, ()), (1, (0,)), (0, (255,))))
        pictures = LabelPictures.find(folder / "images", folder / "labels", len(names), first, ignored)
        for number in range(len(pictures.names)):
            try:
                pictures.read(number)
            except DamagedSample as error:
                print(error)

    return read
