"""Recipes for detection and instance segmentation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mimscale.schema import Positive, Section
from mimscale.transfer.dense.recipe import DenseData, DenseRecipe

# The side of a cell of the coarsest stage: padding to it leaves every map whole.
STRIDE = 32


class DetectionData(DenseData):
    """Folders of images and their annotations in COCO's form.

    ``images``, ``validation``: folders; ``annotations``, ``validation_annotations``: files such as COCO's
    instances_train2017.json. Training: large-scale jitter by factors of ``jitter``, crops of ``image_size``. Evaluation: the
    shorter side ``test_size[0]`` or the longer one ``test_size[1]``, whichever is reached first.
    """

    image_size: Positive = 1024
    jitter: tuple[float, float] = (0.1, 2.0)
    test_size: tuple[Positive, Positive] = (800, 1333)


class Detector(Section):
    """The heads: widths, side of the anchors of each level in pixels, how many are sampled, kept and found in an image."""

    channels: Positive = 256
    hidden: Positive = 1024
    anchors: tuple[Positive, Positive, Positive, Positive, Positive] = (32, 64, 128, 256, 512)
    anchors_sampled: Positive = 256
    proposals: Positive = 1000
    proposals_sampled: Positive = 512
    detections: Positive = 100
    score_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.05


class DetectionRecipe(DenseRecipe):
    """A recipe for detection."""

    data_places: ClassVar[dict[str, str]] = {"images": "FOLDER", "annotations": "FILE, in COCO's form"}

    task: Literal["detection"] = "detection"
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
