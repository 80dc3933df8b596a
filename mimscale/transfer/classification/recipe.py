"""Recipes for classification."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mimscale.schema import Positive, Section, Word
from mimscale.transfer.recipe import Finetune, FinetuneRecipe

Share = Annotated[float, Field(ge=0, le=1)]


class LabelledData(Section):
    """Labelled shards: how training images are augmented, and held-out ones resized and cut.

    ``rand_augment`` is timm's description, ``null`` for none. Held-out images are those of the fraction ``validation``,
    resized to a shorter side of ``resize_shorter`` (``null``: image_size / 0.875, so 256 for 224) and cut from the centre.
    """

    shards: str | None = None
    fraction: Word = "100"
    image_size: Positive = 224
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Share = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erasing: Share = 0.25
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    shuffle: Literal["full", "window"] = "full"
    shuffle_window: Positive = 16
    cache: str | None = None
    cache_gib: Annotated[float, Field(gt=0)] | None = None
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    max_damaged: Annotated[int, Field(ge=0)] = 100
    validation: str = "val"
    validation_images: Positive | None = None
    resize_shorter: Positive | None = None


class Mix(Section):
    """How images and their labels are mixed: alphas of mixup and cutmix (0 for none), and the smoothing of labels."""

    mixup: Annotated[float, Field(ge=0)] = 0.8
    cutmix: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @property
    def mixes(self) -> bool:
        """Whether images come in pairs."""
        return bool(self.mixup or self.cutmix)


class ClassificationFinetune(Finetune):
    """``ema``: decay of a moving average of the weights, which is then what is validated and used; ``null`` for none."""

    ema: Annotated[float, Field(gt=0, lt=1)] | None = None


class ClassificationRecipe(FinetuneRecipe):
    """A recipe for classification."""

    free_keys = FinetuneRecipe.free_keys | {"data.validation_images"}

    task: Literal["classification"] = "classification"
    data: LabelledData = LabelledData()
    mix: Mix = Mix()
    finetune: ClassificationFinetune = ClassificationFinetune()
