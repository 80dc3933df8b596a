"""MAE on a ViT: encode the visible quarter of the patches, let a light transformer predict the pixels of the rest."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from mimscale.mim.masking import expand_mask, hidden_patches
from mimscale.mim.output import MIMOutput, check_loss, elementwise_loss
from mimscale.models.layers import XavierLinear, trunc_normal
from mimscale.models.recompute import set_checkpoints
from mimscale.models.vit import (
    NORM_EPSILON,
    VisionTransformer,
    VitBlock,
    check_vit_sizes,
    drop_positions,
    run_vit_blocks,
    sincos_positions,
)
from mimscale.torch_private import assert_async

EPSILON = 1e-6


class MAEDecoder(nn.Module):
    """Put mask tokens where patches are hidden, mix all tokens, predict pixels.

    Args:
        encoder: whose tokens it takes.
        dim: its own width.
        depth: blocks.
        heads: of every block.
    """

    def __init__(self, encoder: VisionTransformer, dim: int, depth: int, heads: int):
        super().__init__()
        check_vit_sizes(encoder.img_size, encoder.patch_size, dim, heads)
        self.dim, self.grid = dim, encoder.grid
        self.embed = XavierLinear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        trunc_normal(self.mask_token)
        self.blocks: Any = nn.ModuleList(VitBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.pred = XavierLinear(dim, encoder.in_chans * encoder.patch_size**2)

    def forward(self, tokens: torch.Tensor, place: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Predict the pixels of all patches.

        Args:
            tokens: (B, 1 + K, C), class token first.
            place: (B, L) int64, where each patch's token is among the K visible ones; K for the hidden.
            grid: rows and columns of patches.

        Returns:
            (B, L, patch * patch * 3), pixel by pixel.
        """
        x = self.embed(tokens)
        batch, _, dim = x.shape
        x_patches = torch.cat((x[:, 1:], self.mask_token.to(x.dtype).expand(batch, 1, -1)), dim=1)
        x_patches = x_patches.gather(1, place.unsqueeze(-1).expand(-1, -1, dim))
        x = torch.cat((x[:, :1], x_patches), dim=1) + sincos_positions(dim, grid, self.grid, x.device, x.dtype)
        return self.pred(self.norm(run_vit_blocks(self.blocks, x)))[:, 1:]

    def drop_tables(self, state: dict[str, torch.Tensor], prefix: str) -> None:
        """Take the stored positions out of ``state``, for they are worked out here.

        Raises:
            ValueError: positions that are not the decoder's.
        """
        drop_positions(state, f"{prefix}pos_embed", self.dim, self.grid)


class MAE(nn.Module):
    """Masked autoencoder (He et al., 2022, which the paper's section 3.1 follows strictly).

    Args:
        encoder: a ViT with no classifier.
        norm_pix: predict pixels normalised by the mean and variance of their own patch.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: heads of the decoder.
        loss: "l2" (MAE) or "l1".
        mask_ratio: share of hidden patches, which an accelerator relies on; on the CPU the mask itself is counted.

    Raises:
        ValueError: an encoder that is no ViT or has a classifier; sizes that do not divide; an unknown loss.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        norm_pix: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        loss: str = "l2",
        mask_ratio: float = 0.75,
    ):
        super().__init__()
        if not isinstance(encoder, VisionTransformer) or encoder.num_classes:
            raise ValueError('MAE needs a ViT encoder without a classifier: create_encoder("vit_b", img_size=224)')
        self.encoder = encoder
        self.decoder = MAEDecoder(encoder, decoder_dim, decoder_depth, decoder_heads)
        self.loss, self.norm_pix, self.mask_ratio = check_loss(loss), norm_pix, mask_ratio

    def encode(
        self, images: torch.Tensor, mask: torch.Tensor | None = None, draw_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode the visible patches of images (B, 3, H, W): (B, 1 + K, C), class token first, patches row by row.

        Args:
            images: (B, 3, H, W).
            mask: (B, H/patch, W/patch) bool, True = hidden; None for nothing.
            draw_keys: (B,) int64 that drop-path decisions derive from.

        Raises:
            ValueError: a mask of the wrong shape, or one that hides different numbers of patches.
        """
        visible = None if mask is None else self._split(images, mask)[0]
        return self.encoder(images, visible=visible, draw_keys=draw_keys, output="tokens")

    def _split(self, images: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """List the visible patches (B, K), and the place of each patch among them (B, L), K for the hidden."""
        p = self.encoder.patch_size
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        if mask.shape != (len(images), *grid):
            raise ValueError(
                f"mask must be {(len(images), *grid)} for images {tuple(images.shape)}, not {tuple(mask.shape)}"
            )
        hidden = mask.flatten(1).bool()
        counts = hidden.sum(1)
        if mask.device.type == "cpu":
            count = int(counts[0])
            if (counts != count).any():
                raise ValueError(f"MAE's masks must hide equally many patches of every image, not {counts.tolist()}")
        else:
            # Counting on an accelerator would mean waiting for it, so the number is known and checked in passing.
            count = hidden_patches("mae", hidden.shape[1], self.mask_ratio)
            if mask.device.type == "cuda":
                assert_async((counts == count).all(), f"a mask does not hide the {count} patches of mask_ratio")
        keep = hidden.shape[1] - count
        visible = hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, :keep]
        place = ((~hidden).cumsum(1) - 1).masked_fill(hidden, keep)
        return visible, place

    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Give what is to be predicted of images (B, 3, H, W): (B, L, patch * patch * 3), in fp32 at least."""
        patches = self._patches(images.to(torch.promote_types(images.dtype, torch.float32)))
        if not self.norm_pix:
            return patches
        mean, deviation = _patch_statistics(patches)
        return (patches - mean) / deviation

    def _patches(self, images: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = images.shape
        p = self.encoder.patch_size
        patches = images.view(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(batch, -1, p * p * channels)

    def _image(self, patches: torch.Tensor, size: torch.Size) -> torch.Tensor:
        p, (batch, channels, height, width) = self.encoder.patch_size, size
        pixels = patches.view(batch, height // p, width // p, p, p, channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(size)

    def forward(self, images: torch.Tensor, mask: torch.Tensor, draw_keys: torch.Tensor | None = None) -> MIMOutput:
        """Predict the hidden patches from the visible ones.

        Args:
            images: (B, 3, H, W), normalised by ImageNet's mean and deviation, fp32.
            mask: (B, H/patch, W/patch) bool, True = hidden, equally many of every image.
            draw_keys: (B,) int64, one per sample draw, that drop-path decisions derive from.

        Returns:
            The loss, and on demand the prediction and the losses of every image.

        Raises:
            ValueError: shapes that do not fit.
        """
        visible, place = self._split(images, mask)
        tokens = self.encoder(images, visible=visible, draw_keys=draw_keys, output="tokens")
        target = self.target(images)
        predicted = self.decoder(tokens, place, mask.shape[1:]).to(target.dtype)
        weight = mask.flatten(1).to(target.dtype)

        def mean(kind: str, dims: tuple[int, ...]) -> torch.Tensor:
            each = elementwise_loss(predicted, target, kind).mean(-1)
            return (each * weight).sum(dims) / weight.sum(dims).clamp(min=1)

        return MIMOutput(
            mean(self.loss, (0, 1)),
            lambda: self._image(predicted, images.shape),
            lambda: {kind: mean(kind, (1,)) for kind in ("l1", "l2")},
        )

    def reconstruct(self, images: torch.Tensor, prediction: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Fill the hidden patches of images with what was predicted, so that a person can look at it.

        Where the prediction is of normalised pixels, it is turned back with the mean and deviation of the true image's
        own patches, which the model never saw: colour and contrast are the image's, structure is the model's.

        Args:
            images: (B, 3, H, W) as the model was given them.
            prediction: (B, 3, H, W), ``MIMOutput.prediction``.
            mask: (B, H/patch, W/patch), True = hidden.

        Returns:
            (B, 3, H, W), in the space of ``images``.
        """
        filled = prediction
        if self.norm_pix:
            mean, deviation = _patch_statistics(self._patches(images.double()))
            filled = self._image(self._patches(prediction.double()) * deviation + mean, images.shape)
        hidden = expand_mask(mask.bool(), self.encoder.patch_size).unsqueeze(1)
        return torch.where(hidden, filled.to(images.dtype), images)

    def no_weight_decay(self, fidelity: str = "paper") -> set[str]:
        """Name the parameters, beside vectors and biases, that weight decay leaves alone.

        Args:
            fidelity: "paper": class and mask token; "released": none, for the released code decays them.

        Raises:
            ValueError: an unknown fidelity.
        """
        if fidelity not in ("paper", "released"):
            raise ValueError(f'fidelity is "paper" or "released", not "{fidelity}"')
        spared = {f"encoder.{name}" for name in self.encoder.no_weight_decay()} | {"decoder.mask_token"}
        return spared if fidelity == "paper" else set()

    def set_grad_checkpointing(self, enable: bool = True, **options: Any) -> None:
        """Recompute blocks of encoder and decoder in the backward pass; ``options`` as in the encoder."""
        self.encoder.set_grad_checkpointing(enable=enable, **options)
        set_checkpoints(self.decoder.blocks, enable, **options)

    def from_released(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give weights in MAE's released names the names of this model."""
        if any(name.startswith("encoder.") for name in state):
            return dict(state)
        named = {}
        for name, value in state.items():
            if name == "mask_token":
                name = "decoder.mask_token"
            elif name.startswith("decoder_"):
                name = name.replace("decoder_", "decoder.", 1)
            else:
                name = f"encoder.{name}"
            named[name] = value
        return named

    def to_released(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give this model's weights MAE's released names, with the position tables that it stores."""
        named = {}
        for name, value in state.items():
            name = name.removeprefix("encoder.")
            named["mask_token" if name == "decoder.mask_token" else name.replace("decoder.", "decoder_", 1)] = value
        grid, device = self.encoder.grid, torch.device("cpu")
        tables = {"pos_embed": self.encoder.embed_dim, "decoder_pos_embed": self.decoder.dim}
        for name, dim in tables.items():
            named.setdefault(name, sincos_positions(dim, grid, grid, device, torch.float32))
        return named


def _patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of patches (B, L, D), each (B, L, 1); the variance is unbiased."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, unbiased=True)
    return mean, (variance + EPSILON).sqrt()
