"""MAE: encode the visible quarter of the patches, let a light transformer predict the pixels of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from mimscale.masking import MAE_RATIO, MaskGeometry, visible_down
from mimscale.mim.masking import expand_mask
from mimscale.mim.objective import MIMObjective, check_fidelity, check_mask, zero_losses
from mimscale.mim.output import MIMOutput, check_loss, elementwise_loss
from mimscale.mim.settings import MAESettings
from mimscale.mim.targets import Target, create_target, cut, join
from mimscale.models.encoder import Encoder
from mimscale.models.layers import XavierLinear, trunc_normal
from mimscale.models.vit import (
    NORM_EPSILON,
    VitBlock,
    check_vit_sizes,
    drop_positions,
    run_vit_blocks,
    sincos_positions,
)
from mimscale.torch_private import assert_async


class MAEDecoder(nn.Module):
    """Put mask tokens where patches are masked, mix all tokens, predict pixels.

    Args:
        encoder: whose tokens it takes.
        dim: its own width.
        depth: blocks.
        heads: of every block.
        outputs: numbers that are predicted of each patch.
    """

    def __init__(self, encoder: Encoder, dim: int, depth: int, heads: int, outputs: int):
        super().__init__()
        check_vit_sizes(encoder.img_size, encoder.patch_size, dim, heads)
        height, width = encoder.img_size
        self.dim, self.grid = dim, (height // encoder.patch_size, width // encoder.patch_size)
        self.embed = XavierLinear(encoder.num_features, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        trunc_normal(self.mask_token)
        self.blocks: Any = nn.ModuleList(VitBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.pred = XavierLinear(dim, outputs)

    def forward(self, tokens: torch.Tensor, place: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Predict the pixels of all patches.

        Args:
            tokens: (B, 1 + K, C), class token first.
            place: (B, L) int64, where each patch's token is among the K visible ones; K for the masked.
            grid: rows and columns of patches.

        Returns:
            (B, L, outputs), of pixels pixel by pixel.
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


class MAE(MIMObjective):
    """Masked autoencoder (He et al., 2022, which the paper's section 3.1 follows strictly).

    Args:
        encoder: one that encodes visible patches alone, as a ViT, with no classifier.
        norm_pix: predict pixels normalised by the mean and variance of their own patch.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: heads of the decoder.
        loss: "l2" (MAE) or "l1".
        mask_ratio: share of masked patches, which an accelerator relies on; on the CPU the mask itself is counted.
        target: what is predicted instead of pixels; ``norm_pix`` is then of no account.

    Raises:
        ValueError: an encoder that needs all patches or has a classifier; sizes that do not divide; an unknown loss.
    """

    Settings = MAESettings
    mask_token = False

    def __init__(
        self,
        encoder: Encoder,
        norm_pix: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        loss: str = "l2",
        mask_ratio: float = MAE_RATIO,
        target: Target | None = None,
    ):
        super().__init__()
        if not encoder.takes_visible or encoder.num_classes:
            raise ValueError(
                "MAE needs an encoder that encodes visible patches alone, as a ViT encoder does, without a classifier: "
                'create_encoder("vit_b", img_size=224)'
            )
        if target is None:
            options = {"patch": encoder.patch_size} if norm_pix else {}
            target = create_target("patch-normalised-pixels" if norm_pix else "raw-pixels", encoder.in_chans, **options)
        if encoder.patch_size % target.stride:
            raise ValueError(
                f"the patch, {encoder.patch_size}, is not a multiple of the target's stride, {target.stride}"
            )
        self.encoder, self.predicts, self.cell = encoder, target, encoder.patch_size // target.stride
        outputs = target.channels * self.cell**2
        self.decoder = MAEDecoder(encoder, decoder_dim, decoder_depth, decoder_heads, outputs)
        self.loss, self.mask_ratio = check_loss(loss), mask_ratio

    @classmethod
    def from_settings(cls, encoder: Encoder, settings: MAESettings) -> MAE:
        """Make it for a recipe; see :meth:`MIMObjective.from_settings`."""
        target = None
        if settings.target is not None:
            target = create_target(settings.target, encoder.in_chans, **settings.target_options)
        return cls(
            encoder,
            settings.norm_pix,
            settings.decoder_dim,
            settings.decoder_depth,
            settings.decoder_heads,
            settings.loss or cls.Settings.losses["paper"],
            settings.mask_ratio,
            target,
        )

    @property
    def mask_geometry(self) -> MaskGeometry:
        """The encoder's patches, the visible rounded down."""
        return MaskGeometry.of(self.encoder.img_size, self.encoder.patch_size, self.mask_ratio, visible_down)

    def encode(
        self, images: torch.Tensor, mask: torch.Tensor | None = None, draw_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode the visible patches of images (B, 3, H, W): (B, 1 + K, C), class token first, patches row by row.

        Args:
            images: (B, 3, H, W).
            mask: (B, H/patch, W/patch) bool, True = masked; None for nothing.
            draw_keys: (B,) int64 that drop-path decisions derive from.

        Raises:
            ValueError: a mask of the wrong shape, or one that hides different numbers of patches.
        """
        visible = None if mask is None else self._split(images, mask)[0]
        return self.encoder(images, visible=visible, draw_keys=draw_keys, output="tokens")

    def _split(self, images: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """List the visible patches (B, K), and the place of each patch among them (B, L), K for the masked."""
        check_mask(mask, images, self.encoder.patch_size)
        masked = mask.flatten(1).bool()
        counts = masked.sum(1)
        if mask.device.type == "cpu":
            count = int(counts[0])
            if (counts != count).any():
                raise ValueError(f"MAE's masks must hide equally many patches of every image, not {counts.tolist()}")
        else:
            # Counting on an accelerator would mean waiting for it, so the number is known and checked in passing.
            count = visible_down(masked.shape[1], self.mask_ratio)
            if mask.device.type == "cuda":
                assert_async((counts == count).all(), f"a mask does not hide the {count} patches of mask_ratio")
        keep = masked.shape[1] - count
        visible = masked.to(torch.uint8).argsort(dim=1, stable=True)[:, :keep]
        place = ((~masked).cumsum(1) - 1).masked_fill(masked, keep)
        return visible, place

    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Give what is to be predicted of images (B, C, H, W), as its :class:`Target` does: of pixels (B, C, H, W)."""
        return self.predicts(images)

    def baseline(self, images: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`MIMObjective.baseline`; summed patch by patch."""
        target = cut(self.target(images), self.cell)
        return zero_losses(target.flatten(1), mask.flatten(1).unsqueeze(-1).expand_as(target).flatten(1))

    def forward(self, images: torch.Tensor, mask: torch.Tensor, draw_keys: torch.Tensor | None = None) -> MIMOutput:
        """Predict the masked patches from the visible ones.

        Args:
            images: (B, 3, H, W), normalised by ImageNet's mean and deviation, fp32.
            mask: (B, H/patch, W/patch) bool, True = masked, equally many of every image.
            draw_keys: (B,) int64, one per sample draw, that drop-path decisions derive from.

        Returns:
            The loss, and on demand the prediction and the losses of every image.

        Raises:
            ValueError: shapes that do not fit.
        """
        visible, place = self._split(images, mask)
        tokens = self.encoder(images, visible=visible, draw_keys=draw_keys, output="tokens")
        target = self.target(images)
        wanted = cut(target, self.cell)
        predicted = self.decoder(tokens, place, mask.shape[1:]).to(target.dtype)
        weight = mask.flatten(1).to(target.dtype)

        def mean(kind: str, dims: tuple[int, ...]) -> torch.Tensor:
            each = elementwise_loss(predicted, wanted, kind).mean(-1)
            return (each * weight).sum(dims) / weight.sum(dims).clamp(min=1)

        return MIMOutput(
            mean(self.loss, (0, 1)),
            lambda: join(predicted, target.shape, self.cell),
            lambda: {kind: mean(kind, (1,)) for kind in ("l1", "l2")},
        )

    def reconstruct(self, images: torch.Tensor, prediction: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Fill the masked patches of images with what was predicted, so that a person can look at it.

        Where the prediction is of normalised pixels, it is turned back with the mean and deviation of the true image's
        own patches, which the model never saw: colour and contrast are the image's, structure is the model's.

        Args:
            images: (B, 3, H, W) as the model was given them.
            prediction: (B, 3, H, W), ``MIMOutput.prediction``.
            mask: (B, H/patch, W/patch), True = masked.

        Returns:
            (B, 3, H, W), in the space of ``images``.
        """
        filled = self.predicts.pixels(prediction, images)
        masked = expand_mask(mask.bool(), self.encoder.patch_size).unsqueeze(1)
        return torch.where(masked, torch.zeros_like(images) if filled is None else filled, images)

    def no_weight_decay(self, fidelity: str = "paper") -> set[str]:
        """Name the parameters, beside vectors and biases, that weight decay leaves alone.

        Args:
            fidelity: "paper": class and mask token; "released": none, for the released code decays them.

        Raises:
            ValueError: an unknown fidelity.
        """
        check_fidelity(fidelity)
        spared = {f"encoder.{name}" for name in self.encoder.no_weight_decay()} | {"decoder.mask_token"}
        return spared if fidelity == "paper" else set()

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

    def to_released(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Give this model's weights MAE's released names, with the position tables that it stores."""
        named = {}
        for name, value in state.items():
            name = name.removeprefix("encoder.")
            named["mask_token" if name == "decoder.mask_token" else name.replace("decoder.", "decoder_", 1)] = value
        grid, device = self.decoder.grid, torch.device("cpu")
        tables = {"pos_embed": self.encoder.num_features, "decoder_pos_embed": self.decoder.dim}
        for name, dim in tables.items():
            named.setdefault(name, sincos_positions(dim, grid, grid, device, torch.float32))
        return named
