"""What fine-tuning and evaluation read."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.data import auto_augment

from mimscale.data import Erasing, EvaluationStream, LabelledStream, ShardIndex
from mimscale.data.stream.labelled import drawing_from, timm_rand_augment
from mimscale.resources import LAUNCHERS


@pytest.fixture(scope="module")
def photos(photo_shards) -> ShardIndex:
    return ShardIndex.load(photo_shards)


def test_labels_and_augmented_pixels_are_the_same_at_any_world_size_and_worker_count(photos):
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    whole = next(iter(LabelledStream(photos, image_size=96, global_batch=8)))
    assert state[0] == random.getstate() and np.array_equal(state[1], np.random.get_state()[1])
    assert torch.equal(state[2], torch.get_rng_state())
    parts = [
        next(iter(LabelledStream(photos, image_size=96, global_batch=8, rank=r, world_size=2, workers=r)))
        for r in (0, 1)
    ]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.cat([part.labels for part in parts]).tolist() == whole.labels.tolist()
    assert [photos.classes[label] for label in whole.labels] == [key.split("/")[0] for key in whole.keys]
    plain = next(iter(LabelledStream(photos, image_size=96, global_batch=8, rand_augment=None)))
    assert plain.keys == whole.keys and not torch.equal(plain.images, whole.images)


def test_ten_thousand_augmentations_of_the_recipes_are_drawn_and_no_bits_are_black(photographs):
    with Image.open(min(photographs.rglob("*.JPEG"))) as opened:
        photo = opened.convert("RGB").resize((24, 24))
    said = [yaml.safe_load(path.read_text()) for path in (LAUNCHERS / "recipes").rglob("*.yaml")]
    asked = {recipe["data"]["rand_augment"] for recipe in said if recipe.get("data", {}).get("rand_augment")}
    assert asked
    for description in asked:
        augment = timm_rand_augment(description, 24)
        with drawing_from(0):
            black = sum(augment(photo).getbbox() is None for _ in range(10_000))
        assert black, "no image was asked for 0 bits"
    # Others' use of timm is left as it was.
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize


def test_erasing_depends_on_the_sample_only(photos):
    keys = torch.arange(40) * 7919
    images = torch.zeros(40, 3, 32, 32)
    erased = Erasing(0.5)(images.clone(), keys)
    share = erased.flatten(1).ne(0).any(1).float().mean()
    assert 0.2 < share < 0.8
    assert torch.equal(Erasing(0.5)(images[20:].clone(), keys[20:]), erased[20:])


def test_evaluation_crops_are_torchvisions_and_each_image_comes_once(photos, photographs):
    from torchvision.transforms import v2

    theirs = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    seen = {}
    for rank in (0, 1, 2):
        for batch in EvaluationStream(photos, "100", 224, 5, rank, 3):
            assert len(batch.images) == 5
            for row in torch.nonzero(batch.valid)[:, 0].tolist():
                assert batch.keys[row] not in seen
                seen[batch.keys[row]] = (batch.images[row], int(batch.labels[row]))
    assert len(seen) == 32
    for key, (image, label) in list(seen.items())[:6]:
        with Image.open(photographs / f"{key}.JPEG") as opened:
            reference = theirs(torch.from_numpy(np.array(opened)).permute(2, 0, 1))
        assert (reference.int() - image.int()).abs().max() <= 1
        assert photos.classes[label] == key.split("/")[0]


def test_evaluation_pictures_are_those_of_timms_transform(photos, photographs):
    from timm.data import create_transform

    theirs = create_transform(
        224, is_training=False, interpolation="bicubic", crop_pct=0.875, mean=(0,) * 3, std=(1,) * 3
    )
    for batch in EvaluationStream(photos, "100", 224, 8):
        for key, image in zip(batch.keys[:2], batch.images, strict=False):
            with Image.open(photographs / f"{key}.JPEG") as opened:
                error = theirs(opened).mul(255).sub(image).square().mean()
            assert 10 * torch.log10(255**2 / error) > 50


def test_rand_augment_is_that_of_timms_training_transform_at_the_same_draws(photos):
    from timm.data import create_transform
    from timm.data.auto_augment import RandAugment

    theirs = create_transform(
        96, is_training=True, interpolation="bicubic", auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25
    )
    (augment,) = [step for step in theirs.transforms if isinstance(step, RandAugment)]
    plain, augmented = (
        next(iter(LabelledStream(photos, image_size=96, global_batch=24, rand_augment=description)))
        for description in (None, "rand-m9-mstd0.5-inc1")
    )
    for row, key in enumerate(plain.draw_keys.tolist()):
        with drawing_from(key):
            expected = augment(Image.fromarray(plain.images[row].permute(1, 2, 0).numpy()))
        assert np.array_equal(augmented.images[row].permute(1, 2, 0), np.array(expected))
