"""UPerNet on SwinV2's pyramid: segmentation-models-pytorch's decoder, and the auxiliary head of the reference recipe."""

from __future__ import annotations

from typing import Any

import torch
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from mimscale.models.drop_path import keyed_uniform
from mimscale.training.pretraining.module import normalise
from mimscale.transfer.dense.sync_batch_norm import SyncedBatchNorm2d, synced
from mimscale.transfer.dense.task import PyramidNorms

IGNORED = -1
# Which map the auxiliary head looks at, that of stride 16; and what tells the two heads' draws apart.
AUXILIARY_MAP = 2
MAIN, AUXILIARY = 0, 1


def drop_channels(x: Tensor, rate: float, draw_keys: Tensor, stream: int) -> Tensor:
    """Dropout of whole channels of maps (B, C, H, W), keyed to each sample's place in the run."""
    channels = torch.arange(x.shape[1], device=x.device)
    drawn = keyed_uniform(draw_keys.to(x.device), 2 * channels + stream).T
    kept = (drawn >= int(rate * 2.0**53)).to(x.dtype) / (1 - rate)
    return x * kept[:, :, None, None]


class UPerNetHeads(nn.Module):
    """Norms of the pyramid, UPerNet's decoder and classifier, and an auxiliary convolutional head.

    Args:
        widths: channels of the encoder's maps, of strides 4, 8, 16 and 32.
        classes: how many there are.
        channels: of the decoder.
        auxiliary_channels: of the auxiliary head.
        dropout: rate before both classifiers.
    """

    def __init__(self, widths: list[int], classes: int, channels: int, auxiliary_channels: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.norms = PyramidNorms(widths)
        # The decoder wants maps of strides 1, 2, 4, ... and does not look at the first two.
        decoder = UPerNetDecoder([0, 0, *widths], encoder_depth=len(widths) + 1, decoder_channels=channels)
        decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in widths)  # the pyramid's norms stand for them
        self.decoder = synced(decoder)
        self.classifier = nn.Conv2d(channels, classes, 1)
        self.auxiliary = nn.Sequential(
            nn.Conv2d(widths[AUXILIARY_MAP], auxiliary_channels, 3, padding=1, bias=False),
            SyncedBatchNorm2d(auxiliary_channels),
            nn.ReLU(),
        )
        self.auxiliary_classifier = nn.Conv2d(auxiliary_channels, classes, 1)

    def forward(self, maps: list[Tensor], draw_keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, classes, H / 4, W / 4), and while training the auxiliary ones (B, classes, H / 16, W / 16)."""
        unused = maps[0]
        features = self.decoder([unused, unused, *maps])
        if not self.training or draw_keys is None:
            return self.classifier(features), None
        side = self.auxiliary(maps[AUXILIARY_MAP])
        return (
            self.classifier(drop_channels(features, self.dropout, draw_keys, MAIN)),
            self.auxiliary_classifier(drop_channels(side, self.dropout, draw_keys, AUXILIARY)),
        )


class UPerNet(nn.Module):
    """An encoder with its heads, on uint8 images.

    Args:
        encoder: with a pyramid.
        heads: of it.
        mean: of the images.
        std: of the images.
        auxiliary_weight: of the auxiliary head's loss.
    """

    def __init__(
        self,
        encoder: Any,
        heads: UPerNetHeads,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        auxiliary_weight: float,
    ):
        super().__init__()
        self.encoder, self.heads = encoder, heads
        self.mean, self.std, self.auxiliary_weight = mean, std, auxiliary_weight

    def set_grad_checkpointing(self, enable: bool = True, **options: Any) -> None:
        """Recompute the encoder's blocks in the backward pass; ``options`` as in the encoder."""
        self.encoder.set_grad_checkpointing(enable, **options)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, draw_keys: Tensor | None = None
    ) -> Tensor | tuple[Tensor]:
        """Loss of one micro-batch, or logits.

        Args:
            images: (B, 3, H, W) uint8.
            labels: (B, H, W) int16, classes from 0 on, -1 where nothing is labelled; needed while training.
            draw_keys: (B,) int64 that drop path and dropout are keyed to.

        Returns:
            While training, the loss (a scalar): cross-entropy over all pixels, those left open counting 0, and the auxiliary
            head's. In eval mode the logits (B, classes, H / 4, W / 4) in fp32, in a tuple.
        """
        maps = self.heads.norms(self.encoder, normalise(images, self.mean, self.std), draw_keys)
        logits, side = self.heads(maps, draw_keys)
        if not self.training:
            return (logits.float(),)
        assert labels is not None and side is not None
        return self._loss(logits, labels) + self.auxiliary_weight * self._loss(side, labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        full = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear")
        # Not the mean over the pixels that say something: that would weigh images by what their micro-batch holds.
        return F.cross_entropy(full, labels.long(), ignore_index=IGNORED, reduction="sum") / labels.numel()
