"""Detection on composed scenes: annotations as COCO reads them, crops that go with their masks, pycocotools' own figures."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from training_runs import ROOT

from mimscale.data import ShardError
from mimscale.training.recipe import RecipeError
from mimscale.transfer.dense.stream import DenseStream, HeldOutStream
from mimscale.transfer.detection.coco import read_instances
from mimscale.transfer.detection.images import DetectionImages, unpack_masks
from mimscale.transfer.detection.mask_rcnn import KeyedSampler
from mimscale.transfer.detection.scores import coco_figures
from mimscale.transfer.detection.task import Detection
from mimscale.transfer.recipe import load_finetune_recipe
from mimscale.transfer.weights import task_encoder

RECIPES = ROOT / "launchers/recipes/finetune"
GREY = (124, 116, 104)


def images_of(
    scenes: Path, split: str = "training", keep_empty: bool = False, size: int = 160, **changes: Any
) -> DetectionImages:
    instances = read_instances(scenes / f"instances_{split}.json", scenes / "images" / split, keep_empty)
    settings = {"jitter": (0.5, 1.5), "flip": 0.5, "test_size": (160, 240), "fill": GREY, **changes}
    return DetectionImages(instances, size, **settings)


def coco(file: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(file))


# -- annotations -----------------------------------------------------------------------------------------------------------


def test_objects_are_those_that_coco_reads(scenes):
    """Outlines and run-lengths alike, at the image's own size; classes in the order of their numbers."""
    images, truth = images_of(scenes), coco(scenes / "instances_training.json")
    kinds = set()
    for number, image_id in enumerate(images.instances.ids.tolist()):
        boxes, labels, masks = images.objects(number)
        entries = truth.loadAnns(truth.getAnnIds([image_id]))
        assert [images.instances.categories[label - 1] for label in labels.tolist()] == [
            entry["category_id"] for entry in entries
        ]
        for entry, box, mask in zip(entries, boxes.tolist(), masks.numpy(), strict=True):
            kinds.add(type(entry["segmentation"]))
            assert np.array_equal(mask, truth.annToMask(entry))
            left, top, width, height = entry["bbox"]
            assert box == pytest.approx([left, top, left + width, top + height], abs=1)
    assert kinds == {list, dict}


def changed(scenes: Path, tmp_path: Path, change) -> Path:
    content = json.loads((scenes / "instances_training.json").read_text())
    change(content)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    return path


def _twice(content):
    content["images"].append(content["images"][0])


def _cut_mask(content):
    entry = next(entry for entry in content["annotations"] if isinstance(entry["segmentation"], dict))
    entry["segmentation"]["size"][0] += 1


def _far_image(content):
    content["annotations"][3]["image_id"] = 99_999


def _far_class(content):
    content["annotations"][3]["category_id"] = 5


def _absent(content):
    content["images"][2]["file_name"] = "gone.jpg"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_absent, r"1 of the 48 images that .*changed.json lists are not in .*training: gone.jpg"),
        (_far_image, "annotation 4 is of image 99999, which the file does not list"),
        (_far_class, "annotation 4 has category 5; the file lists 3, 7, 11"),
        (_cut_mask, r"has a mask of \d+ x \d+ pixels on an image of"),
        (_twice, "images have the same number"),
        (lambda content: content.pop("categories"), "no list 'categories'"),
        (lambda content: content["annotations"][0].pop("bbox"), "annotation 1 has the box None, not four numbers"),
    ],
)
def test_a_mistake_in_the_annotations_is_named(scenes, tmp_path, change, said):
    with pytest.raises(ShardError, match=said):
        read_instances(changed(scenes, tmp_path, change), scenes / "images/training", False)


def test_what_cannot_be_learnt_from_is_left_out_and_counted(scenes, tmp_path):
    def change(content):
        first, second, third, fourth = content["annotations"][:4]
        first["bbox"][2] = 0
        second["iscrowd"] = 1
        third["segmentation"] = []
        fourth["bbox"][0] = 10_000

    before = read_instances(scenes / "instances_training.json", scenes / "images/training", True)
    after = read_instances(changed(scenes, tmp_path, change), scenes / "images/training", True)
    assert after.left_out == {"boxes without area": 2, "crowds": 1, "objects without a mask": 1}
    assert len(after.labels) == len(before.labels) - 4
    assert after.build != before.build


def test_a_class_without_an_object_is_said(scenes, tmp_path):
    file = changed(scenes, tmp_path, lambda content: content["categories"].append({"id": 90, "name": "hair drier"}))
    task = Detection(
        recipe(scenes, f"data.annotations={file}", "data.validation=null", "data.validation_annotations=null")
    )
    assert "7 classes" in task.describe()
    assert "classes without an object: hair drier" in task.describe()
    assert task.result([])["classes_without_objects"] == 1
    with pytest.raises(ShardError, match="do not list the same categories: 90 hair drier"):
        Detection(recipe(scenes, f"data.annotations={file}"))


def test_damaged_images_are_stood_in_for_by_others_and_named(scenes, tmp_path):
    """One that is cut short, and one that is not of the size that the annotations say."""
    shutil.copytree(scenes, tmp_path / "own")
    images = images_of(tmp_path / "own")
    folder = tmp_path / "own/images/training"
    (folder / images.keys[0]).write_bytes((folder / images.keys[0]).read_bytes()[:900])
    Image.open(folder / images.keys[5]).resize((100, 100)).save(folder / images.keys[5])
    stream = DenseStream(images, seed=0, global_batch=len(images.keys), stop_step=1)
    (batch,) = list(stream)
    reasons = dict(batch.skipped)
    assert set(reasons) == {images.keys[0], images.keys[5]}
    assert "100 x 100 pixels, but instances_training.json says" in reasons[images.keys[5]]
    assert sorted(batch.keys).count(images.keys[1]) == sorted(batch.keys).count(images.keys[6]) == 2
    with pytest.raises(ShardError, match=r"over the limit of data\.max_damaged=1"):
        list(DenseStream(images, seed=0, global_batch=len(images.keys), stop_step=1, max_damaged=1))
    validated = list(HeldOutStream(images, limit=None))
    assert [image.number for image in validated if not image.valid] == [1, 6]


# -- crops -----------------------------------------------------------------------------------------------------------------


def test_crops_belong_to_their_place_in_the_run(scenes):
    """Two ranks, a worker process, or a later start: the same pixels, boxes and masks."""
    images = images_of(scenes)
    whole = DenseStream(images, seed=3, global_batch=8)[5]
    for rank in range(2):
        (half,) = list(DenseStream(images, 3, 8, rank, 2, start_step=5, stop_step=6, workers=rank))
        rows = slice(4 * rank, 4 * rank + 4)
        assert half.keys == whole.keys[rows]
        for mine, all_of_them in zip(half.tensors, whole.tensors, strict=True):
            cut = all_of_them[rows]
            assert torch.equal(mine, cut[:, : mine.shape[1]] if 1 < cut.ndim < 4 or mine.shape != cut.shape else cut)
    assert not torch.equal(whole.tensors[0], DenseStream(images, seed=4, global_batch=8)[5].tensors[0])


def test_masks_move_with_the_pixels(scenes):
    """Objects painted in one colour are found again where the mask is, whatever was drawn."""
    images = images_of(scenes, jitter=(0.4, 2.0))
    plain = images.pixels

    def painted(number: int) -> np.ndarray:
        pixels = np.zeros_like(plain(number))
        pixels[images.objects(number)[2].numpy().any(0)] = 255
        return pixels

    images.pixels = painted  # type: ignore[method-assign]
    stream = DenseStream(images, seed=0, global_batch=48)
    pixels, boxes, labels, masks, _ = stream[0].tensors
    seen = 0
    for row in range(48):
        there = labels[row] > 0
        mask = unpack_masks(masks[row][there], 160).bool()
        bright = (pixels[row] > 127).all(0)
        assert (mask.any(0) ^ bright).sum() <= 0.12 * bright.sum() + 12
        for box, one in zip(boxes[row][there].long().tolist(), mask, strict=True):
            left, top, right, bottom = box
            assert one[top:bottom, left:right].sum() == one.sum() > 0
            assert all(edge.any() for edge in (one[top], one[bottom - 1], one[:, left], one[:, right - 1]))
            seen += 1
    assert seen > 60


def test_jitter_has_the_range_of_the_recipe(scenes):
    """A scene fits into the square of the crop times the factor: at 0.5 its longer side is 80 pixels of 160, the rest filled."""
    images = images_of(scenes, jitter=(0.5, 0.5))
    pixels = DenseStream(images, seed=0, global_batch=8)[0].tensors[0]
    fill = torch.tensor(GREY, dtype=torch.uint8)[:, None, None]
    assert bool((pixels[:, :, :, 80:] == fill).all())
    assert bool((pixels[:, :, 80:] == fill).all())
    assert not bool((pixels[:, :, :40, :40] == fill).all(1).all(-1).all(-1).any())


def test_images_are_tested_at_the_papers_size(scenes):
    images = images_of(scenes, "validation", keep_empty=True, test_size=(800, 1333))
    for number in range(4):
        image, size = images.whole(number)
        height, width = images.instances.sizes[number].tolist()
        shorter, longer = sorted(size.tolist())
        assert shorter == 800 or longer == 1333
        assert max(shorter / 800, longer / 1333) <= 1
        assert size[0] / size[1] == pytest.approx(height / width, rel=0.01)
        assert image.shape[1] % 32 == image.shape[2] % 32 == 0


# -- figures ---------------------------------------------------------------------------------------------------------------


def predictions(truth: COCO) -> list[dict[str, Any]]:
    """Some objects found, some moved, some taken for others, some missed, some where there is nothing."""
    rng = np.random.default_rng(0)
    found = []
    for entry in truth.anns.values():
        if rng.random() < 0.2:
            continue
        shift = rng.integers(-6, 7, 2)
        mask = np.roll(truth.annToMask(entry), shift, (0, 1))
        left, top, width, height = entry["bbox"]
        categories = sorted(truth.cats)
        found.append(
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"] if rng.random() < 0.8 else categories[int(rng.integers(6))],
                "bbox": [left + int(shift[1]), top + int(shift[0]), width, height],
                "score": float(rng.random()),
                "segmentation": _encoded(mask),
            }
        )
    return found


def _encoded(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as run_lengths

    return run_lengths.encode(np.asfortranarray(mask))


def test_figures_are_those_of_pycocotools(scenes, tmp_path):
    """Against result files as COCO's server takes them: boxes and masks apart."""
    file = scenes / "instances_validation.json"
    truth = coco(file)
    found = predictions(truth)
    ids = sorted(truth.imgs)
    ours = coco_figures(file, copy.deepcopy(found), ids)
    for kind, evaluated, key in (("box", "bbox", "bbox"), ("mask", "segm", "segmentation")):
        entries = [{name: entry[name] for name in ("image_id", "category_id", "score", key)} for entry in found]
        for entry in entries:
            if key == "segmentation":
                entry[key] = {"size": entry[key]["size"], "counts": entry[key]["counts"].decode()}
        (tmp_path / "results.json").write_text(json.dumps(entries))
        with contextlib.redirect_stdout(io.StringIO()):
            scores = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), evaluated)
            scores.evaluate()
            scores.accumulate()
            scores.summarize()
        names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
        expected = {f"val_{kind}_{n}": 100 * v for n, v in zip(names, scores.stats, strict=False) if v >= 0}
        assert {name: value for name, value in ours.items() if kind in name} == pytest.approx(expected, abs=1e-9)
        assert 5 < expected[f"val_{kind}_ap"] < 95
    assert coco_figures(file, [], ids)["val_box_ap"] == 0


def test_sampling_is_keyed_and_keeps_its_shares():
    labels = torch.cat((torch.ones(100), torch.zeros(300), -torch.ones(50)))
    sampler = KeyedSampler(64, 0.25, 0)

    def chosen(key: int) -> torch.Tensor:
        sampler.key = torch.tensor(key)
        (positives,), (negatives,) = sampler([labels])
        assert (int(positives.sum()), int(negatives.sum())) == (16, 48)
        assert not bool((positives & (labels < 1)).any() or (negatives & (labels != 0)).any())
        return positives | negatives

    assert torch.equal(chosen(7), chosen(7))
    assert not torch.equal(chosen(7), chosen(8))


# -- recipes ---------------------------------------------------------------------------------------------------------------


def recipe(scenes: Path, *overrides: str, name: str = "demo_detection"):
    data = [
        f"data.images={scenes}/images/training",
        f"data.annotations={scenes}/instances_training.json",
        f"data.validation={scenes}/images/validation",
        f"data.validation_annotations={scenes}/instances_validation.json",
    ]
    return load_finetune_recipe(RECIPES / f"{name}.yaml", [*data, *overrides])


@pytest.mark.parametrize("size", "sblhg")
def test_the_papers_settings(scenes, size):
    found = recipe(scenes, name=f"coco_swinv2_{size}")
    data = found.data
    assert (data.image_size, data.jitter, data.flip, data.test_size) == (1024, (0.1, 2.0), 0.5, (800, 1333))
    assert (found.learning_rate, found.optimizer.weight_decay, found.optimizer.betas) == (8e-5, 0.05, (0.9, 0.999))
    assert (found.train.global_batch, found.model.window_size) == (32, 14)
    epochs = [share * 36 for share in found.schedule.decay_at]
    assert epochs == pytest.approx([27, 33], abs=1e-4)
    with torch.device("meta"):
        encoder = task_encoder(found)
    assert [rows for rows, _ in encoder.references] == [12, 12, 12, 6]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.images=null"], "data.images is not set: give data.images=FOLDER"),
        (["data.validation=null"], "go together"),
        (["model.name=vit_b"], "take a feature pyramid, which SwinV2 has"),
        (["data.image_size=100"], "not a multiple of 32; 96 is"),
        (["detector.ancors=1"], "did you mean 'detector.anchors'"),
        (["data.shards=x"], "unknown key"),
    ],
)
def test_a_mistake_in_the_recipe_is_named(scenes, overrides, said):
    with pytest.raises(RecipeError, match=said):
        Detection(recipe(scenes, *overrides))
