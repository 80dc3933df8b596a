"""What the engine trains: an MIM model fed with 8-bit crops, normalised on the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn, stack

from mimscale.mim import MIMObjective
from mimscale.models import Encoder, create_encoder
from mimscale.registry import RegistryError, objectives
from mimscale.training.recipe import Recipe, RecipeError


class MIMModule(nn.Module):
    """An MIM model behind the preprocessing that belongs to the device.

    The loss comes out as a plain tensor: ZeRO-3's hooks follow tensors and tuples of them, not objects.
    """

    def __init__(self, model: MIMObjective, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        # Plain numbers, not a buffer: DeepSpeed casts floating buffers to bf16, which holds only 8 bits of them.
        self.mean, self.std = mean, std

    @property
    def encoder(self) -> Encoder:
        """What is learnt."""
        return self.model.encoder

    def set_grad_checkpointing(self, enable: bool = True, **options: Any) -> None:
        """Recompute all blocks in the backward pass; see :meth:`mimscale.mim.MIMObjective.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable, **options)

    def normalise(self, images: Tensor) -> Tensor:
        """8-bit images (B, 3, H, W) as fp32 with the recipe's mean and deviation taken out."""
        return normalise(images, self.mean, self.std)

    def forward(self, images: Tensor, mask: Tensor, draw_keys: Tensor | None = None):
        """Loss of one micro-batch, or of each of its images.

        Args:
            images: (B, 3, H, W) uint8.
            mask: (B, h, w) bool, True is hidden.
            draw_keys: (B,) int64 that drop path is keyed to.

        Returns:
            While training, the mean loss over hidden pixels (a scalar). In eval mode ``(l1, l2, prediction)``: the losses of
            each image (B,) in fp32 and the prediction (B, 3, H, W) in the target's space.
        """
        normalised = self.normalise(images)
        out = self.model(normalised, mask, draw_keys)
        if self.training:
            return out.loss
        losses = out.per_sample
        return losses["l1"], losses["l2"], out.prediction

    def baseline(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (l1, l2), each (B,), of predicting zero: the local mean where the target is normalised by it."""
        return self.model.baseline(self.normalise(images), mask)

    def fill_in(self, images: Tensor, mask: Tensor, prediction: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]: visible parts as they are, hidden ones as predicted."""
        pixels = self.model.reconstruct(self.normalise(images), prediction, mask)
        channels = pixels.float().unbind(1)
        return stack([x * s + m for x, m, s in zip(channels, self.mean, self.std, strict=True)], dim=1).clamp(0, 1)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """8-bit images (B, 3, H, W) as fp32 with a mean and a deviation, one number a channel, taken out."""
    channels = images.float().unbind(1)
    return stack([(x / 255 - m) / s for x, m, s in zip(channels, mean, std, strict=True)], dim=1)


def build_objective(recipe: Recipe, **encoder: Any) -> MIMModule:
    """The recipe's encoder and objective.

    Args:
        recipe: of a pre-training.
        **encoder: arguments of the encoder besides, as ``extra_norm_every`` for released SwinV2 weights.

    Raises:
        RecipeError: the sizes do not fit together; the message says what would.
    """
    try:
        kind = objectives.get(recipe.mim.objective)
    except RegistryError as error:
        raise RecipeError(str(error)) from None
    try:
        settings = {"mask_token": kind.mask_token, **recipe.model.arguments(recipe.data.image_size), **encoder}
        model = kind.from_settings(create_encoder(recipe.model.name, **settings), recipe.mim)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model in the recipe: {error}") from None
    return MIMModule(model, recipe.data.mean, recipe.data.std)
