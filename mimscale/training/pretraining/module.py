"""What the engine trains: an MIM model fed with 8-bit crops, normalised on the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn, stack

from mimscale import mim as objectives
from mimscale.mim.masking import expand_mask
from mimscale.models import create_encoder
from mimscale.training.recipe import Recipe, RecipeError


class MIMModule(nn.Module):
    """An MIM model behind the preprocessing that belongs to the device.

    The loss comes out as a plain tensor: ZeRO-3's hooks follow tensors and tuples of them, not objects.
    """

    def __init__(self, model: Any, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        # Plain numbers, not a buffer: DeepSpeed casts floating buffers to bf16, which holds only 8 bits of them.
        self.mean, self.std = mean, std

    @property
    def encoder(self) -> nn.Module:
        """What is compiled."""
        return self.model.encoder

    def set_grad_checkpointing(self, enable: bool = True, **options: Any) -> None:
        """Recompute all blocks, the decoder's too, in the backward pass; ``options`` as in the encoder."""
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
        target = self.model.target(self.normalise(images))
        if target.ndim == 3:  # MAE's: patches (B, L, P)
            hidden = mask.flatten(1).unsqueeze(-1)
        else:
            hidden = expand_mask(mask, target.shape[-1] // mask.shape[-1]).unsqueeze(1)
        hidden = hidden.expand_as(target).flatten(1).double()
        l1, l2 = ((target.flatten(1) ** power).abs() * hidden for power in (1, 2))
        return l1.sum(1) / hidden.sum(1), l2.sum(1) / hidden.sum(1)

    def fill_in(self, images: Tensor, mask: Tensor, prediction: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]: visible parts as they are, hidden ones as predicted."""
        pixels = self.model.reconstruct(self.normalise(images), prediction, mask)
        channels = pixels.float().unbind(1)
        return stack([x * s + m for x, m, s in zip(channels, self.mean, self.std, strict=True)], dim=1).clamp(0, 1)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """8-bit images (B, 3, H, W) as fp32 with a mean and a deviation, one number a channel, taken out."""
    channels = images.float().unbind(1)
    return stack([(x / 255 - m) / s for x, m, s in zip(channels, mean, std, strict=True)], dim=1)


def build_objective(recipe: Recipe, extra_norm_every: int = 0) -> MIMModule:
    """The recipe's encoder and objective.

    Args:
        recipe: of a pre-training.
        extra_norm_every: for released SwinV2 weights that have one more norm after every so many blocks.

    Raises:
        RecipeError: the sizes do not fit together; the message says what would.
    """
    settings, mim = recipe.model, recipe.mim
    overrides: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in settings.model_dump(include={"embed_dim", "depths", "num_heads", "depth"}).items()
        if value is not None
    }
    assert mim.loss is not None
    assert mim.mask_ratio is not None
    try:
        if mim.objective == "simmim":
            encoder: Any = create_encoder(
                settings.name,
                img_size=recipe.data.image_size,
                window_size=settings.window_size,
                pretrained_window_size=settings.pretrained_window_size,
                drop_path=settings.drop_path,
                **overrides,
                **({"extra_norm_every": extra_norm_every} if extra_norm_every else {}),
            )
            model: Any = objectives.SimMIM(encoder, decoder=mim.decoder, loss=mim.loss, target_window=mim.target_window)
        else:
            encoder = create_encoder(
                settings.name, img_size=recipe.data.image_size, drop_path=settings.drop_path, **overrides
            )
            model = objectives.MAE(
                encoder,
                norm_pix=mim.norm_pix,
                decoder_dim=mim.decoder_dim,
                decoder_depth=mim.decoder_depth,
                decoder_heads=mim.decoder_heads,
                loss=mim.loss,
                mask_ratio=mim.mask_ratio,
            )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model in the recipe: {error}") from None
    return MIMModule(model, recipe.data.mean, recipe.data.std)
