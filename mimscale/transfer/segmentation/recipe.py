"""Recipes for semantic segmentation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mimscale.schema import Positive, Section
from mimscale.transfer.dense.recipe import DenseData, DenseRecipe, Share


class SegmentationData(DenseData):
    """Folders of images and of their label pictures (``annotations``): IMAGES/NAME.jpg goes with ANNOTATIONS/NAME.png.

    ``classes``: a file with their names, one a line, or ADE20K's objectInfo150.txt. In label pictures the first class has
    the value ``first_label``; those of ``ignored_labels`` say nothing (ADE20K: 1 and [0]; train ids such as Cityscapes':
    0 and [255]). Images are scaled for the shorter side to be ``test_size[0]`` or the longer one ``test_size[1]``, whichever
    is reached first; for training, times a factor of ``jitter``. Evaluation slides windows of ``image_size`` by ``stride``.
    Where one class fills more than ``one_class`` of a crop, another place is tried, up to ten times.
    """

    classes: str | None = None
    first_label: Annotated[int, Field(ge=0)] = 1
    ignored_labels: tuple[int, ...] = (0,)
    image_size: Positive = 640
    jitter: tuple[float, float] = (0.5, 2.0)
    photometric_distortion: bool = True
    one_class: Annotated[float, Field(gt=0, le=1)] = 0.75
    test_size: tuple[Positive, Positive] = (640, 2560)
    stride: Positive = 426


class Decoder(Section):
    """UPerNet's width, and the reference recipe's auxiliary head on the map of stride 16; 0 weight leaves it out of the loss."""

    channels: Positive = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    auxiliary_channels: Positive = 256
    auxiliary_weight: Share = 0.4


class SegmentationRecipe(DenseRecipe):
    """A recipe for semantic segmentation."""

    free_keys = DenseRecipe.free_keys | {"data.classes"}

    data_places: ClassVar[dict[str, str]] = {
        "images": "FOLDER",
        "annotations": "FOLDER, with a label picture for each image",
        "classes": "FILE, with the classes' names",
    }

    task: Literal["segmentation"] = "segmentation"
    data: SegmentationData = SegmentationData()
    decoder: Decoder = Decoder()
