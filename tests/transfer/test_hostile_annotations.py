"""Annotations made to harm: each ends in an error that names the entry, before pycocotools' C code sees it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as run_lengths

from mimscale.data import ShardError
from mimscale.transfer.detection.annotations import _unpacked
from mimscale.transfer.detection.coco import read_instances


def content(**change):
    mask = np.zeros((40, 50), np.uint8, order="F")
    mask[5:20, 7:30] = 1
    packed = run_lengths.encode(mask)["counts"].decode()
    entry = {
        "id": 1,
        "image_id": 1,
        "category_id": 3,
        "bbox": [7, 5, 23, 15],
        "segmentation": {"size": [40, 50], "counts": packed},
    }
    image = {"id": 1, "height": 40, "width": 50, "file_name": "0.jpg"}
    made = {"image": image, "entry": entry, "category": {"id": 3, "name": "cell"}}
    for where, values in change.items():
        made[where] = {**made[where], **values}
    return {"images": [made["image"]], "annotations": [made["entry"]], "categories": [made["category"]]}


def read(folder, values):
    Image.new("RGB", (50, 40)).save(folder / "0.jpg")
    (folder / "a.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return read_instances(folder / "a.json", folder, keep_empty=True)


def packed(counts):
    return {"entry": {"segmentation": {"size": [40, 50], "counts": counts}}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (packed("oooo"), "annotation 1 has run-lengths that do not add up to its 50 x 40 pixels"),
        (packed("0P"), "do not add up"),
        (packed("\u20ac"), "do not add up"),
        (packed([2001, -1]), "do not add up"),
        (packed([2**32, 2000]), "do not add up"),
        (packed([1999.5, 0.5]), "do not add up"),
        (packed({}), "do not add up"),
        (
            {"entry": {"segmentation": {"size": [2**20, 2**20], "counts": [2**40]}}},
            "a mask of 1048576 x 1048576 pixels",
        ),
        ({"entry": {"segmentation": [[1e9] * 6]}}, "far out of its image"),
        ({"entry": {"segmentation": [[float("nan"), 1, 2, 3, 4, 5]]}}, "far out of its image"),
        ({"entry": {"segmentation": [["1", 1, 2, 3, 4, 5]]}}, "something else than numbers"),
        ({"entry": {"segmentation": [[0, 0, 50, 40] * 1000]}}, "times as long as its image"),
        ({"entry": {"segmentation": [[1, 2] * 500_000]}}, "an outline of 1,000,000 numbers"),
        ({"entry": {"segmentation": "text"}}, "neither a list of outlines nor run-lengths"),
        ({"entry": {"bbox": [1, 2, 3, float("inf")]}}, "not four numbers"),
        ({"entry": {"bbox": [1, 2, 3, True]}}, "not four numbers"),
        ({"entry": {"image_id": [1]}}, "of image \\[1\\], which the file does not list"),
        ({"entry": {"id": None}}, "entry 0 of 'annotations' has no number 'id'"),
        ({"entry": {"category_id": "3"}}, "has category 3; the file lists 3"),
        ({"image": {"height": 10**6, "width": 10**6}}, "over the limit of 100,000,000"),
        ({"image": {"height": -1}}, "no number of pixels"),
        ({"image": {"file_name": "../0.jpg"}}, "leads out of the folder"),
        ({"image": {"file_name": "/etc/passwd"}}, "leads out of the folder"),
        ({"image": {"file_name": "0.jpg\0"}}, r"the file_name 0.jpg\\x00"),
        ({"image": {"file_name": "\ud800/0.jpg"}}, "which is none"),
        ({"image": {"file_name": "\x1b[31m"}}, r"\\x1b\[31m"),
        ({"category": {"name": 5}}, "has no name"),
    ],
)
def test_an_entry_that_would_harm_is_named(tmp_path, change, said):
    with pytest.raises(ShardError, match=said):
        read(tmp_path, content(**change))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", "[]", "nonsense", '{"images": [1], "annotations": [], "categories": []}']
)
def test_a_file_in_no_form_of_coco_is_named(tmp_path, text):
    with pytest.raises(ShardError, match=r"a\.json"):
        read(tmp_path, text)


def test_three_thousand_objects_in_one_image_are_too_many(tmp_path):
    values = content()
    values["annotations"] = [{**values["annotations"][0], "id": number} for number in range(1, 3_001)]
    with pytest.raises(ShardError, match="image 1 has 3,000 annotations, more than 2,000"):
        read(tmp_path, values)


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 60))
def test_packed_run_lengths_are_read_as_pycocotools_reads_them(seed, height, width):
    generator = np.random.default_rng(seed)
    mask = np.asfortranarray((generator.random((height, width)) < generator.random()).astype(np.uint8))
    flat = mask.ravel(order="F")
    ends = np.concatenate((np.flatnonzero(np.diff(flat)) + 1, [flat.size]))
    runs = np.diff(np.concatenate(([0], [0] if flat[0] else [], ends)).astype(np.int64))
    assert _unpacked(run_lengths.encode(mask)["counts"].decode()).tolist() == runs.tolist()


@pytest.mark.parametrize("kind", ["packed", "plain", "outline"])
def test_what_is_whole_is_taken(tmp_path, kind):
    values = content()
    if kind == "plain":
        values["annotations"][0]["segmentation"]["counts"] = [2000 - 40, 40]
    elif kind == "outline":
        values["annotations"][0]["segmentation"] = [[5, 5, 20, 5, 20, 20]]
    assert read(tmp_path, values).classes == ["cell"]
