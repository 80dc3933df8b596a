"""SimMIM's prediction heads (the paper's Table 4): from the encoder's features to pixels, or to what else is predicted."""

from functools import partial
from typing import Any

import torch
import torch.nn as nn

from mimscale.models.attention import PositionBias
from mimscale.models.encoder import Encoder
from mimscale.models.layers import linear
from mimscale.models.swin_plan import PlanCache, build_stage
from mimscale.models.swin_v2 import SwinBlock, SwinTransformerV2, run_blocks

DECODERS = {"linear": 0, "4-blocks": 4, "8-blocks": 8}


class PixelHead(nn.Conv2d):
    """A 1 x 1 convolution that gives every feature the pixels of its patch."""

    def __init__(self, dim: int, outputs: int):
        super().__init__(dim, outputs, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (K, dim) to the pixels of their patches, (K, outputs)."""
        return linear(features, self.weight.flatten(1), self.bias)


class LinearDecoder(nn.Sequential):
    """One linear layer and a pixel shuffle, in the released names (``decoder.0``).

    Args:
        dim: channels of the features.
        stride: side of the patch that each feature stands for, in pixels, or in places of the map that is predicted.
        channels: of the images, or of that map.
    """

    def __init__(self, dim: int, stride: int, channels: int):
        super().__init__(PixelHead(dim, channels * stride * stride), nn.PixelShuffle(stride))

    def forward(self, features: torch.Tensor, masked: torch.Tensor | None = None) -> torch.Tensor:
        """Predict pixels.

        Args:
            features: (B, dim, h, w).
            masked: indices (K,) of the features, counted through (B, h, w), that are to be predicted; None for all.

        Returns:
            Images (B, channels, h * stride, w * stride), or with ``masked`` their patches
            (K, channels * stride * stride).
        """
        batch, _, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)
        if masked is not None:
            return self[0](rows.index_select(0, masked))
        pixels = self[0](rows).view(batch, height, width, -1).permute(0, 3, 1, 2)
        return self[1](pixels)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters with more than one dimension that weight decay leaves alone."""
        return {name for name, _ in self.named_parameters() if "cpb_mlp" in name or "logit_scale" in name}


class BlockDecoder(LinearDecoder):
    """SwinV2 blocks at the encoder's last width, then the linear layer.

    The blocks share one position bias: they attend in the same windows, and only so do the parameters add up to Table
    4's.

    Args:
        encoder: whose width, heads and windows the blocks take.
        depth: number of blocks.
        stride: as in ``LinearDecoder``.
        channels: likewise.
    """

    def __init__(self, encoder: SwinTransformerV2, depth: int, stride: int, channels: int):
        super().__init__(encoder.num_features, stride, channels)
        dim, heads = encoder.num_features, encoder.num_heads[-1]
        self.blocks: Any = nn.ModuleList(SwinBlock(dim, heads, own_bias=False) for _ in range(depth))
        self.cpb_mlp = PositionBias(heads)
        self.window, self.reference = encoder.window_size, encoder.references[-1]
        self._plans = PlanCache()

    def forward(self, features: torch.Tensor, masked: torch.Tensor | None = None) -> torch.Tensor:
        """Predict pixels, as ``LinearDecoder`` does."""
        batch, dim, height, width = features.shape
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        make = partial(build_stage, (height, width), self.window, self.reference, features.device, dtype)
        plan = self._plans.get((height, width, features.device, dtype), make)
        tokens = plan.enter(features.flatten(2).transpose(1, 2))
        bias = self.cpb_mlp(plan.positions[0])
        x, order = run_blocks(self.blocks, tokens, bias, plan=plan)
        x = plan.leave[order](x).transpose(1, 2).reshape(batch, dim, height, width)
        return super().forward(x, masked)


def create_decoder(
    name: str, encoder: Encoder, stride: int | None = None, channels: int | None = None
) -> LinearDecoder:
    """Make the decoder for an encoder.

    Args:
        name: one of ``DECODERS``.
        encoder: whose features it takes.
        stride: side of what is predicted for each feature; by default the encoder's, for pixels.
        channels: of what is predicted; by default the images'.

    Raises:
        ValueError: an unknown name, or blocks for an encoder that is no SwinV2.
    """
    if name not in DECODERS:
        raise ValueError(f'decoder is one of {", ".join(DECODERS)}, not "{name}"')
    stride, channels = stride or encoder.stride, channels or encoder.in_chans
    depth = DECODERS[name]
    if not depth:
        return LinearDecoder(encoder.num_features, stride, channels)
    if not isinstance(encoder, SwinTransformerV2):
        raise ValueError(
            f'decoder "{name}" is made of SwinV2 blocks, for a SwinV2 alone; "linear" goes with every encoder'
        )
    return BlockDecoder(encoder, depth, stride, channels)
