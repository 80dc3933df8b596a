"""What a recipe says of an objective: its ``mim`` section, one class for each, without torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mimscale.masking import MAE_RATIO, SIMMIM_PATCH, SIMMIM_RATIO, MaskGeometry, visible_down
from mimscale.models.settings import Blocks, EncoderSettings, Heads
from mimscale.registry import targets
from mimscale.schema import Section, Side, Width, Word, key

Ratio = Annotated[float, Field(gt=0, lt=1)]


class MIMSettings(Section):
    """Keys of every objective; one derives its own from this and gives it to its class as ``Settings``."""

    # The loss where a recipe does not say, by its fidelity.
    losses: ClassVar[dict[str, str]] = {"paper": "l2", "released": "l2"}

    objective: str = key(..., "What is learnt.")
    loss: Literal["l1", "l2"] | None = key(
        None,
        "Mean absolute (l1) or squared (l2) difference to the target; null: what the fidelity uses.",
        "section 3.1",
    )
    mask_ratio: Ratio = key(..., "Share of an image that is masked.")
    target: Word | None = key(None, "What is predicted, by name; null: the objective's own target.")
    target_options: dict[str, Any] = key({}, "Arguments of a target that is given by name, as {window: 31}.")

    @model_validator(mode="before")
    @classmethod
    def _unset_is_the_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mask_ratio", 0) is None:
            return {name: value for name, value in values.items() if name != "mask_ratio"}
        return values

    @field_validator("target")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in targets:
            raise PydanticCustomError("target", "{problem}", {"problem": str(targets.unknown(name))})
        return name

    @abstractmethod
    def mask_geometry(self, model: EncoderSettings, image_size: int) -> MaskGeometry:
        """The masks of a recipe's images.

        Args:
            model: the encoder's settings.
            image_size: side of the images, pixels.

        Raises:
            ValueError: masks that are not whole patches of the encoder, or images that are not whole patches of the mask.
        """


class SimMIMSettings(MIMSettings):
    """SimMIM (section 3.1): masked squares are replaced by a token, and a light decoder predicts what they held."""

    losses: ClassVar[dict[str, str]] = {"paper": "l2", "released": "l1"}

    objective: str = key(
        "simmim", "Masked squares become mask tokens, and a light decoder predicts them.", "section 3.1"
    )
    decoder: Literal["linear", "4-blocks", "8-blocks"] = key(
        "linear", "One linear layer, or SwinV2 blocks before it.", "Table 4"
    )
    target_window: Side | None = key(
        47, "Side in pixels of the neighbourhood that normalises the target; null: raw pixels.", "section 3.1"
    )
    mask_ratio: Ratio = key(SIMMIM_RATIO, "Share of the squares that are masked, rounded up.", "section 3.1")
    mask_patch: Side = key(
        SIMMIM_PATCH, "Side in pixels of the squares that are masked: a multiple of the encoder's patch.", "section 3.1"
    )

    def mask_geometry(self, model: EncoderSettings, image_size: int) -> MaskGeometry:
        """Squares of ``mask_patch``."""
        check_mask_patch(self.mask_patch, model.patch, model.name)
        return MaskGeometry.of(image_size, self.mask_patch, self.mask_ratio, whose=model.name)


def check_mask_patch(mask_patch: int, patch: int, name: str = "the encoder") -> None:
    """Raise unless what is masked is whole patches of the encoder.

    Raises:
        ValueError: it is not; the message says what would be.
    """
    if mask_patch % patch:
        low = mask_patch // patch * patch
        fits = [size for size in (low, low + patch) if size]
        raise ValueError(
            f"mim.mask_patch={mask_patch} is not a multiple of the {patch}-pixel patch of {name}; "
            f"{' or '.join(map(str, fits))} would fit"
        )


class MAESettings(MIMSettings):
    """MAE (He et al., 2022): visible patches alone are encoded, and a light transformer predicts the others."""

    objective: str = key(
        "mae", "Visible patches alone are encoded, and a transformer predicts the others.", "section 3.1"
    )
    norm_pix: bool = key(True, "Normalise the target by the mean and variance of its own patch.", "MAE")
    decoder_dim: Width = key(512, "Width of the decoder.", "MAE")
    decoder_depth: Blocks = key(8, "Blocks of the decoder.", "MAE")
    decoder_heads: Heads = key(16, "Attention heads of the decoder.", "MAE")
    mask_ratio: Ratio = key(
        MAE_RATIO, "Share of the patches that are masked; the visible are rounded down.", "section 3.1"
    )

    def mask_geometry(self, model: EncoderSettings, image_size: int) -> MaskGeometry:
        """The encoder's own patches."""
        return MaskGeometry.of(image_size, model.patch, self.mask_ratio, visible_down, model.name)
