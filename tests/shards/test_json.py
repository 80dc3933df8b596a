"""Shards from a json file of images, annotations and categories: iNaturalist-18's form."""

from __future__ import annotations

import json
from pathlib import Path

import build
import pytest

from mimscale.data import ShardIndex


@pytest.fixture
def listed(solar_folders, tmp_path) -> Path:
    """A folder with the photographs and a train.json that lists 4 of each of the 8 classes; ids do not start at 0."""
    (tmp_path / "photographs").symlink_to(solar_folders / "train")
    names = sorted(folder.name for folder in (solar_folders / "train").iterdir())
    content: dict = {"images": [], "annotations": [], "categories": []}
    for number, name in enumerate(names):
        content["categories"].append({"id": 10 * number, "name": f"species {name}"})
        for file in sorted(path.name for path in (solar_folders / "train" / name).iterdir())[:4]:
            image = 100 + len(content["images"])
            content["images"].append({"id": image, "file_name": f"photographs/{name}/{file}"})
            content["annotations"].append({"id": image, "image_id": image, "category_id": 10 * number})
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path


def change(folder: Path, **changes) -> Path:
    content = json.loads((folder / "train.json").read_text())
    for part, rows in changes.items():
        content[part] += rows
    (folder / "changed.json").write_text(json.dumps(content))
    return folder / "changed.json"


def make(source: Path, out: Path) -> int:
    return build.main(["build", "--source", str(source), "--val", str(source), "--out", str(out), "--workers", "1"])


def test_every_listed_image_is_stored_with_its_class(listed, solar_folders):
    assert make(listed / "train.json", listed / "out") == 0
    index = ShardIndex.load(listed / "out")
    content = json.loads((listed / "train.json").read_text())
    assert index.classes == [category["name"] for category in content["categories"]]
    samples = index.samples("100")
    assert len(samples) == len(content["images"]) == len(index.samples("val"))
    for sample in samples.tolist()[::5]:
        label, name = index.label(sample), index.key(sample).rsplit("/", 1)[1]
        folder = index.classes[label].removeprefix("species ")
        assert index.read(sample) == (solar_folders / "train" / folder / f"{name}.png").read_bytes()


def test_what_is_missing_is_left_out_and_named(listed, capsys):
    source = change(
        listed,
        images=[{"id": 1, "file_name": "photographs/gone.png"}, {"id": 2, "file_name": "photographs/nobody.png"}],
        annotations=[{"image_id": 1, "category_id": 0}],
        categories=[{"id": 999, "name": "yeti"}],
    )
    assert make(source, listed / "out") == 0
    said = capsys.readouterr().out
    assert "1 of 9 classes have no training image: yeti" in said
    rejected = (listed / "out/rejected.tsv").read_text()
    assert "gone.png\tcannot be opened" in rejected
    assert "nobody.png\thas no annotation" in rejected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotations": [{"image_id": 100, "category_id": 7}]}, "a category that is not in the list: 7 (image 100)"),
        ({"annotations": [{"image_id": 5, "category_id": 0}]}, "images that are not in the list: 5"),
        ({"annotations": [{"image_id": 100, "category_id": 10}]}, "1 image with more than one class"),
        ({"images": [{"id": 1, "file_name": "../secret.png"}]}, "images outside its folder: ../secret.png"),
        ({"images": [{"id": 100, "file_name": "a.png"}]}, "images with the same id: 100"),
        ({"categories": [{"id": 10, "name": "again"}]}, "categories with the same id: 10"),
        ({"categories": [{"id": 999, "name": "half \ud800"}]}, "half \\ud800 of a category has half a character"),
        ({"annotations": [{"image_id": 100}]}, "no list 'annotations' of objects with image_id and category_id"),
    ],
)
def test_a_json_that_contradicts_itself_is_an_error(listed, capsys, changes, said):
    assert make(change(listed, **changes), listed / "out") == 1
    assert said in capsys.readouterr().err
    assert not (listed / "out/index.json").exists()
