"""Recipes for semantic segmentation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mimscale.schema import Place, Positive, Section, key
from mimscale.transfer.dense.recipe import DenseData, DenseRecipe, Share


class SegmentationData(DenseData):
    """Folders of images and of their label pictures: IMAGES/NAME.jpg goes with ANNOTATIONS/NAME.png."""

    annotations: Place | None = key(None, "Folder of the training images' label pictures.", free=True)
    validation_annotations: Place | None = key(None, "Folder of the held-out images' label pictures.", free=True)
    classes: Place | None = key(
        None, "File with the classes' names, one a line, or ADE20K's objectInfo150.txt.", free=True
    )
    first_label: Annotated[int, Field(ge=0)] = key(
        1, "Value of the first class in label pictures; 0 for train ids such as Cityscapes'.", "ADE20K"
    )
    ignored_labels: tuple[int, ...] = key(
        (0,), "Values of pixels without a class; [255] for train ids such as Cityscapes'.", "ADE20K"
    )
    image_size: Positive = key(
        640, "Side of the training crops, and of the windows in evaluation, pixels.", "section 3.5"
    )
    jitter: tuple[float, float] = key(
        (0.5, 2.0),
        "Factors between which a training image's scale is drawn, times that of evaluation (`test_size`).",
        "section 3.5",
    )
    photometric_distortion: bool = key(
        True, "Vary brightness, contrast, saturation and hue of training images.", "section 3.5"
    )
    one_class: Annotated[float, Field(gt=0, le=1)] = key(
        0.75,
        "Share of a crop that one class may fill; above it another place is tried, up to ten times.",
        "Swin, UPerNet",
    )
    test_size: tuple[Positive, Positive] = key(
        (640, 2560),
        "Images are scaled until their shorter side is the first or their longer one the second, pixels.",
        "section 3.5",
    )
    stride: Positive = key(426, "Stride of the windows in evaluation, pixels.", "section 3.5")


class Decoder(Section):
    """UPerNet, and an auxiliary head on the map of stride 16."""

    channels: Positive = key(512, "Channels of UPerNet.", "Swin, UPerNet")
    dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.1, "Dropout before the classifiers.", "Swin, UPerNet")
    auxiliary_channels: Positive = key(256, "Channels of the auxiliary head.", "Swin, UPerNet")
    auxiliary_weight: Share = key(0.4, "Weight of the auxiliary head's loss; 0 leaves it out.", "Swin, UPerNet")


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
