"""Recipes for detection and instance segmentation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mimscale.schema import Place, Section, Side, Span, Width, key
from mimscale.transfer.dense.recipe import DenseData, DenseRecipe

# The side of a cell of the coarsest stage: padding to it leaves every map whole.
STRIDE = 32
# Of one image.
Boxes = Annotated[int, Field(gt=0, le=100_000)]


class DetectionData(DenseData):
    """Folders of images and their annotations in COCO's form."""

    annotations: Place | None = key(None, "File with the training images' objects, in COCO's form.", free=True)
    validation_annotations: Place | None = key(
        None, "File with the held-out images' objects, in COCO's form.", free=True
    )
    image_size: Side = key(1024, "Side of the training crops, pixels.", "section 3.5")
    jitter: Span = key(
        (0.1, 2.0), "Factors between which a training image's scale is drawn (large-scale jitter).", "section 3.5"
    )
    test_size: tuple[Side, Side] = key(
        (800, 1333),
        "Held-out images are scaled until their shorter side is the first or their longer one the second, pixels.",
        "section 3.5",
    )


class Detector(Section):
    """The heads of Mask R-CNN."""

    channels: Width = key(256, "Channels of the feature pyramid.", "Mask R-CNN, torchvision")
    hidden: Width = key(1024, "Width of the box head.", "Mask R-CNN, torchvision")
    anchors: tuple[Side, Side, Side, Side, Side] = key(
        (32, 64, 128, 256, 512), "Side of the anchors of each level, pixels.", "Mask R-CNN, torchvision"
    )
    anchors_sampled: Boxes = key(
        256, "Anchors of an image that the proposals' loss is taken over.", "Mask R-CNN, torchvision"
    )
    proposals: Boxes = key(1000, "Proposals kept of an image after suppression.", "Mask R-CNN, torchvision")
    proposals_sampled: Boxes = key(
        512, "Proposals of an image that the heads' losses are taken over.", "Mask R-CNN, torchvision"
    )
    detections: Boxes = key(100, "Most detections of an image.", "COCO")
    score_threshold: Annotated[float, Field(ge=0, lt=1)] = key(
        0.05, "Least score of a detection.", "Mask R-CNN, torchvision"
    )


class DetectionRecipe(DenseRecipe):
    """A recipe for detection."""

    kind = "detection"
    data_places: ClassVar[dict[str, str]] = {"images": "FOLDER", "annotations": "FILE, in COCO's form"}

    task: Literal["detection"] = key("detection", "Which task.", "section 3.5")
    data: DetectionData = DetectionData()
    detector: Detector = Detector()

    @model_validator(mode="after")
    def _crops_are_whole_cells(self) -> DetectionRecipe:
        size = self.data.image_size
        if size % STRIDE:
            raise PydanticCustomError(
                "image_size",
                "data.image_size={size} is not a multiple of {stride}; {fits} is",
                {"size": size, "stride": STRIDE, "fits": max(STRIDE, round(size / STRIDE) * STRIDE)},
            )
        return self
