"""Histograms of oriented gradients as a target (MaskFeat: Wei et al., 2022, section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from mimscale.mim import Target
from mimscale.registry import targets


@targets.register("hog")
class HOG(Target):
    """Of every cell and channel, how strong edges of each orientation are, normalised to unit length.

    Args:
        in_chans: channels of the images.
        bins: orientations between 0 and 180 degrees.
        cell: side of a cell, pixels.
    """

    def __init__(self, in_chans: int = 3, bins: int = 9, cell: int = 8):
        super().__init__(in_chans)
        self.bins, self.stride, self.channels = bins, cell, in_chans * bins

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Describe images (B, C, H, W): (B, C * bins, H / cell, W / cell)."""
        x = images.to(torch.promote_types(images.dtype, torch.float32))
        batch, channels, height, width = x.shape
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
        down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
        strength = (across**2 + down**2).sqrt()
        chosen = (torch.atan2(down, across) / math.pi * self.bins).floor().long() % self.bins
        by_bin = x.new_zeros(batch, channels, self.bins, height, width).scatter_(
            2, chosen[:, :, None], strength[:, :, None]
        )
        sums = F.avg_pool2d(by_bin.flatten(0, 1), self.stride)
        return F.normalize(sums, dim=1).view(batch, self.channels, *sums.shape[-2:])

    def pixels(self, prediction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Draw a line for each orientation in every cell, as bright as it is strong, mean over channels."""
        side = torch.arange(self.stride, device=images.device) - (self.stride - 1) / 2
        angles = (torch.arange(self.bins, device=images.device) + 0.5) * math.pi / self.bins
        # An edge runs across its gradient.
        away = side[:, None] * angles.sin()[:, None, None] + side * angles.cos()[:, None, None]
        lines = (away.abs() < 0.75).to(images.dtype)  # (bins, cell, cell)
        batch, _, rows, columns = prediction.shape
        strong = prediction.to(images.dtype).view(batch, -1, self.bins, rows, columns).mean(1).clamp(min=0)
        drawn = torch.einsum("bnij,nyx->biyjx", strong, lines).reshape(batch, 1, *images.shape[-2:])
        return (4 * drawn - 2).expand_as(images)
