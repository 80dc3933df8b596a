"""What the recipes of detection and semantic segmentation hold."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from mimscale.models.settings import EncoderSettings
from mimscale.registry import encoders
from mimscale.schema import (
    ChosenBy,
    Count,
    Deviations,
    Means,
    Place,
    Positive,
    Probability,
    Section,
    Side,
    Span,
    Workers,
    key,
)
from mimscale.transfer.recipe import FinetuneRecipe, transfer_settings


# Where the data lies may change between two starts: that it is the same data is checked by its digest.
class DenseData(Section):
    """Images and targets to train on, and those held out; a task says which are folders and which files."""

    images: Place | None = key(None, "Folder of the training images.", free=True)
    annotations: Place | None = key(None, "Targets of the training images.", free=True)
    validation: Place | None = key(None, "Folder of the held-out images; null for no validation.", free=True)
    validation_annotations: Place | None = key(None, "Targets of the held-out images.", free=True)
    validation_images: Positive | None = key(
        None, "Validate on so many held-out images, evenly spread; null for all.", free=True
    )
    image_size: Side = key(..., "Side of the training crops, pixels.")
    jitter: Span = key(..., "Factors between which a training image's scale is drawn.")
    flip: Probability = key(0.5, "Probability that a training image is flipped left to right.", "section 3.5")
    mean: Means = key(
        (0.485, 0.456, 0.406), "Subtracted from the channels R, G, B, which are 0 to 1.", "ImageNet, released code"
    )
    std: Deviations = key((0.229, 0.224, 0.225), "What the channels are then divided by.", "ImageNet, released code")
    workers: Workers | Literal["auto"] = key(
        "auto", "Decoding processes of each rank, 0 for none; auto shares the machine's cores.", free=True
    )
    max_damaged: Count = key(100, "How many damaged images are skipped before the run stops.", free=True)


def pyramid_settings(name: str) -> type[EncoderSettings]:
    """The ``model`` section of a fine-tuning of that encoder on a task that takes a feature pyramid.

    Raises:
        ValueError: there is no such encoder, or all its maps have one stride.
    """
    section = transfer_settings(name)
    if section.pyramid is EncoderSettings.pyramid:
        raise ValueError(f"{name}: the dense tasks take a feature pyramid, which SwinV2 has and a ViT has not")
    return section


class DenseRecipe(FinetuneRecipe):
    """A recipe for a dense task."""

    pad_windows: ClassVar[bool] = True

    model: Annotated[EncoderSettings, ChosenBy("name", None, pyramid_settings, encoders.names)]
    data: DenseData
