"""What the recipes of detection and semantic segmentation hold."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mimscale.models.sizes import SWIN_SIZES
from mimscale.schema import Positive, Section
from mimscale.transfer.recipe import FinetuneRecipe

Share = Annotated[float, Field(ge=0, le=1)]


class DenseData(Section):
    """Images and targets of the training split (``images``, ``annotations``) and of the held-out one (``validation...``).

    What these four are, folders or files, is the task's. ``image_size`` is the side of the training crops in pixels;
    ``validation_images`` evaluates on so many images only, evenly spread.
    """

    images: str | None = None
    annotations: str | None = None
    validation: str | None = None
    validation_annotations: str | None = None
    validation_images: Positive | None = None
    image_size: Positive
    jitter: tuple[float, float]
    flip: Share = 0.5
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    max_damaged: Annotated[int, Field(ge=0)] = 100


class DenseRecipe(FinetuneRecipe):
    """A recipe for a dense task."""

    # Where the data lies may change; that it is the same data is checked by its digest.
    free_keys = FinetuneRecipe.free_keys | {
        "data.images",
        "data.annotations",
        "data.validation",
        "data.validation_annotations",
        "data.validation_images",
    }

    pad_windows: ClassVar[bool] = True

    data: DenseData

    @model_validator(mode="after")
    def _has_a_pyramid(self) -> DenseRecipe:
        if self.model.name not in SWIN_SIZES:
            raise PydanticCustomError(
                "pyramid",
                "model.name={name}: the dense tasks take a feature pyramid, which SwinV2 has and a ViT has not: {names}",
                {"name": self.model.name, "names": ", ".join(SWIN_SIZES)},
            )
        return self
