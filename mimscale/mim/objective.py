"""What an objective is: the contract that SimMIM and MAE keep, and that an objective of anyone's package keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from mimscale.masking import MaskGeometry
from mimscale.mim.masking import expand_mask
from mimscale.mim.output import MIMOutput
from mimscale.mim.settings import MIMSettings
from mimscale.models.encoder import Encoder
from mimscale.models.recompute import set_checkpoints

Self = TypeVar("Self", bound="MIMObjective")


class MIMObjective(nn.Module, ABC):
    """An encoder, and what it learns by: images and a mask in, a loss out.

    Attributes:
        Settings: the ``mim`` section of recipes that name it.
        mask_token: whether its encoders are made with a mask token.
        encoder: what is learnt, in the names of ``encoder.``.
    """

    Settings: ClassVar[type[MIMSettings]]
    mask_token: ClassVar[bool]

    encoder: Encoder

    @classmethod
    @abstractmethod
    def from_settings(cls: type[Self], encoder: Encoder, settings: Any) -> Self:
        """Make it for a recipe.

        Args:
            encoder: with a mask token, where ``mask_token``, and without a classifier.
            settings: of its ``Settings``.

        Raises:
            ValueError: an encoder or settings that do not fit; the message says what would.
        """

    @property
    @abstractmethod
    def mask_geometry(self) -> MaskGeometry:
        """The masks of images of the encoder's ``img_size``."""

    @abstractmethod
    def forward(self, images: Tensor, mask: Tensor, draw_keys: Tensor | None = None) -> MIMOutput:
        """Predict what is masked.

        Args:
            images: (B, C, H, W), normalised, fp32.
            mask: (B, h, w) bool, as ``mask_geometry`` says, True = masked.
            draw_keys: (B,) int64, one for each sample draw, that drop-path decisions derive from.

        Returns:
            The loss, and on demand the prediction and the losses of every image.

        Raises:
            ValueError: shapes that do not fit.
        """

    @abstractmethod
    def encode(self, images: Tensor, mask: Tensor | None = None, draw_keys: Tensor | None = None) -> Tensor:
        """Give the features of images (B, C, H, W) of which ``mask`` is hidden; arguments as in ``forward``."""

    @abstractmethod
    def target(self, images: Tensor) -> Tensor:
        """Give what is to be predicted of images (B, C, H, W): a map (B, D, H / s, W / s), in fp32 at least."""

    @abstractmethod
    def reconstruct(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Fill the masked parts of images with what was predicted, so that a person can look at it.

        Args:
            images: (B, C, H, W) as the model was given them.
            prediction: ``MIMOutput.prediction``.
            mask: (B, h, w), True = masked.

        Returns:
            (B, C, H, W), in the space of ``images``.
        """

    def baseline(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (l1, l2), each (B,) in fp64, of predicting 0: the local mean, where the target is normalised by it."""
        target = self.target(images)
        masked = expand_mask(mask, target.shape[-1] // mask.shape[-1]).unsqueeze(1).expand_as(target)
        return zero_losses(target.flatten(1), masked.flatten(1))

    def no_weight_decay(self, fidelity: str = "paper") -> set[str]:
        """Name the parameters, beside vectors and biases, that weight decay leaves alone.

        Args:
            fidelity: "paper", or "released" for what the authors' code spares.

        Raises:
            ValueError: an unknown fidelity.
        """
        check_fidelity(fidelity)
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True, **options: Any) -> None:
        """Recompute all blocks in the backward pass, those of a ``decoder`` too; ``options`` as in the encoder."""
        self.encoder.set_grad_checkpointing(enable=enable, **options)
        decoder = getattr(self, "decoder", None)
        set_checkpoints(getattr(decoder, "blocks", ()), enable, **options)

    def to_released(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Give this model's weights, by name, the names of its authors' release."""
        return dict(state)


def zero_losses(target: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (l1, l2), each (B,), of predicting 0 where ``masked`` (B, N) of ``target`` (B, N)."""
    where = masked.double()
    l1, l2 = ((target**power).abs() * where for power in (1, 2))
    return l1.sum(1) / where.sum(1), l2.sum(1) / where.sum(1)


def check_fidelity(fidelity: str) -> None:
    """Raise unless a fidelity is known.

    Raises:
        ValueError: neither "paper" nor "released".
    """
    if fidelity not in ("paper", "released"):
        raise ValueError(f'fidelity is "paper" or "released", not "{fidelity}"')


def check_mask(mask: Tensor, images: Tensor, patch: int) -> None:
    """Raise unless a mask has a cell for every ``patch`` x ``patch`` pixels of images.

    Raises:
        ValueError: it has another shape, or images are not whole patches.
    """
    expected = (len(images), images.shape[-2] // patch, images.shape[-1] // patch)
    if mask.shape != torch.Size(expected) or images.shape[-2] % patch or images.shape[-1] % patch:
        raise ValueError(
            f"mask must be {expected} for images {tuple(images.shape)} and squares of {patch} pixels, not {tuple(mask.shape)}"
        )
