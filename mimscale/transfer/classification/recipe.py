"""Recipes for classification."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mimscale.schema import (
    Amount,
    AmountOrZero,
    Count,
    Decay,
    Deviations,
    Means,
    Place,
    Positive,
    Probability,
    Section,
    Shares,
    Side,
    Span,
    Word,
    Workers,
    key,
)
from mimscale.transfer.recipe import Finetune, FinetuneRecipe


class LabelledData(Section):
    """Labelled shards: how training images are augmented, and held-out ones resized and cut."""

    shards: Place | None = key(
        None, "Shard folder that `mimscale shards build` made, or the http(s) or s3 address of one.", free=True
    )
    fraction: Word = key("100", "Which of the shards' images are trained on: a stored fraction or a named subset.")
    image_size: Side = key(224, "Side of the crops, pixels.", "section 3.5")
    crop_scale: Shares = key((0.08, 1.0), "Area of a training crop, as a share of the image's.", "released code")
    crop_ratio: Span = key((3 / 4, 4 / 3), "Aspect ratio of a training crop, width over height.", "released code")
    flip: Probability = key(0.5, "Probability that a training crop is flipped left to right.", "released code")
    interpolation: Literal["bilinear", "bicubic"] = key(
        "bicubic", "How images are resized, with antialiasing.", "released code"
    )
    rand_augment: str | None = key(
        "rand-m9-mstd0.5-inc1", "RandAugment of training crops, as timm describes it; null for none.", "released code"
    )
    erasing: Probability = key(0.25, "Probability that a rectangle of a training crop is erased.", "released code")
    mean: Means = key(
        (0.485, 0.456, 0.406), "Subtracted from the channels R, G, B, which are 0 to 1.", "ImageNet, released code"
    )
    std: Deviations = key((0.229, 0.224, 0.225), "What the channels are then divided by.", "ImageNet, released code")
    shuffle: Literal["full", "window"] = key(
        "full", "Order of the images: over all of them, or within windows of shards, which suits network storage."
    )
    shuffle_window: Positive = key(16, "Shards in a window.")
    cache: Place | None = key(None, "Folder for local copies of shards whose `shards` is an address.", free=True)
    cache_gib: Amount | None = key(None, "Most that those copies may take, GiB; null for no limit.", free=True)
    workers: Workers | Literal["auto"] = key(
        "auto", "Decoding processes of each rank, 0 for none; auto shares the machine's cores.", free=True
    )
    max_damaged: Count = key(100, "How many damaged images are skipped before the run stops.", free=True)
    validation: Word = key("val", "Which of the shards' images are held out, to validate on.")
    validation_images: Positive | None = key(
        None, "Validate on so many held-out images, evenly spread; null for all.", free=True
    )
    resize_shorter: Side | None = key(
        None,
        "Shorter side that held-out images are resized to before their centre is cut, pixels; null for image_size / 0.875.",
        "released code",
    )


class Mix(Section):
    """How images and their labels are mixed."""

    mixup: AmountOrZero = key(0.8, "Alpha of mixup; 0 for none.", "released code")
    cutmix: AmountOrZero = key(1.0, "Alpha of CutMix; 0 for none.", "released code")
    label_smoothing: Decay = key(0.1, "Share of a label that is spread over all classes.", "released code")

    @property
    def mixes(self) -> bool:
        """Whether images come in pairs."""
        return bool(self.mixup or self.cutmix)


class ClassificationFinetune(Finetune):
    """Where the weights come from, and how the learning rate falls towards the input."""

    ema: Annotated[float, Field(gt=0, lt=1)] | None = key(
        None, "Decay of a moving average of the weights, which is then what is validated and used; null for none."
    )


class ClassificationRecipe(FinetuneRecipe):
    """A recipe for classification."""

    kind = "classification"

    task: Literal["classification"] = key("classification", "Which task.", "section 3.5")
    data: LabelledData = LabelledData()
    mix: Mix = Mix()
    finetune: ClassificationFinetune = ClassificationFinetune()
