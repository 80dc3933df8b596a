"""SimMIM's prediction heads (the paper's Table 4): from the encoder's features to pixels."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from mimscale.models.swin_v2 import SwinTransformerV2

DECODERS = ("linear", "4-blocks", "8-blocks")


class PixelHead(nn.Conv2d):
    """A 1 x 1 convolution that gives every feature the pixels of its patch."""

    def __init__(self, dim: int, outputs: int):
        super().__init__(dim, outputs, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (K, dim) to the pixels of their patches, (K, outputs)."""
        return F.linear(features, self.weight.flatten(1), self.bias)


class LinearDecoder(nn.Sequential):
    """One linear layer and a pixel shuffle, in the released names (``decoder.0``)."""

    def __init__(self, dim: int, stride: int, channels: int):
        super().__init__(PixelHead(dim, channels * stride * stride), nn.PixelShuffle(stride))

    def forward(self, features: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Predict pixels.

        Args:
            features: (B, dim, h, w).
            hidden: indices (K,) of the features, counted through (B, h, w), that are to be predicted; None for all.

        Returns:
            Images (B, channels, h * stride, w * stride), or with ``hidden`` their patches (K, channels * stride *
            stride).
        """
        batch, dim, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).reshape(-1, dim)
        if hidden is not None:
            return self[0](rows.index_select(0, hidden))
        pixels = self[0](rows).view(batch, height, width, -1).permute(0, 3, 1, 2)
        return self[1](pixels)


def create_decoder(name: str, encoder: SwinTransformerV2) -> nn.Module:
    """Make the decoder for an encoder.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DECODERS:
        raise ValueError(f'decoder is one of {", ".join(DECODERS)}, not "{name}"')
    return LinearDecoder(encoder.num_features, encoder.stride, encoder.in_chans)
