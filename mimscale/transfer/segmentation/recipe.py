"""Recipes for semantic segmentation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mimscale.schema import Decay, Place, Probability, Section, Share, Side, Span, Width, key
from mimscale.transfer.dense.recipe import DenseData, DenseRecipe


class SegmentationData(DenseData):
    """Folders of images and of their label pictures: IMAGES/NAME.jpg goes with ANNOTATIONS/NAME.png."""

    annotations: Place | None = key(None, "Folder of the training images' label pictures.", free=True)
    validation_annotations: Place | None = key(None, "Folder of the held-out images' label pictures.", free=True)
    classes: Place | None = key(
        None, "File with the classes' names, one a line, or ADE20K's objectInfo150.txt.", free=True
    )
    first_label: Annotated[int, Field(ge=0, le=65_535)] = key(
        1, "Value of the first class in label pictures; 0 for train ids such as Cityscapes'.", "ADE20K"
    )
    ignored_labels: Annotated[tuple[Annotated[int, Field(ge=-65_535, le=65_535)], ...], Field(max_length=1000)] = key(
        (0,), "Values of pixels without a class; [255] for train ids such as Cityscapes'.", "ADE20K"
    )
    image_size: Side = key(640, "Side of the training crops, and of the windows in evaluation, pixels.", "section 3.5")
    jitter: Span = key(
        (0.5, 2.0),
        "Factors between which a training image's scale is drawn, times that of evaluation (`test_size`).",
        "section 3.5",
    )
    photometric_distortion: bool = key(
        True, "Vary brightness, contrast, saturation and hue of training images.", "section 3.5"
    )
    one_class: Share = key(
        0.75,
        "Share of a crop that one class may fill; above it another place is tried, up to ten times.",
        "Swin, UPerNet",
    )
    test_size: tuple[Side, Side] = key(
        (640, 2560),
        "Images are scaled until their shorter side is the first or their longer one the second, pixels.",
        "section 3.5",
    )
    stride: Side = key(426, "Stride of the windows in evaluation, pixels.", "section 3.5")


class Decoder(Section):
    """UPerNet, and an auxiliary head on the map of stride 16."""

    channels: Width = key(512, "Channels of UPerNet.", "Swin, UPerNet")
    dropout: Decay = key(0.1, "Dropout before the classifiers.", "Swin, UPerNet")
    auxiliary_channels: Width = key(256, "Channels of the auxiliary head.", "Swin, UPerNet")
    auxiliary_weight: Probability = key(0.4, "Weight of the auxiliary head's loss; 0 leaves it out.", "Swin, UPerNet")


class SegmentationRecipe(DenseRecipe):
    """A recipe for semantic segmentation."""

    kind = "segmentation"
    data_places: ClassVar[dict[str, str]] = {
        "images": "FOLDER",
        "annotations": "FOLDER, with a label picture for each image",
        "classes": "FILE, with the classes' names",
    }

    task: Literal["segmentation"] = key("segmentation", "Which task.", "section 3.5")
    data: SegmentationData = SegmentationData()
    decoder: Decoder = Decoder()
