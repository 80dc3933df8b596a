"""Mask R-CNN of torchvision's parts on SwinV2's pyramid.

Two things are ours. Each image's anchors and proposals are sampled by a hash of its place in the run, and each image's losses
are its own mean, so that neither ranks nor micro-batches change a loss. And whatever is a coordinate or a score is in fp32:
anchors, decoded boxes, non-maximum suppression, RoIAlign, all losses; the layers run in the precision of their weights.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mimscale.models.drop_path import keyed_uniform
from mimscale.training.pretraining.module import normalise
from mimscale.transfer.dense.task import PyramidNorms
from mimscale.transfer.detection.images import unpack_masks

LEVELS = ["0", "1", "2", "3"]
STRIDES = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)
# What of the two stages' streams of draws tells them apart.
ANCHORS, PROPOSALS = 0, 1


class KeyedSampler:
    """Chooses which anchors or proposals of an image are learnt from, as torchvision's sampler, but keyed.

    Set ``key`` before each image.
    """

    def __init__(self, count: int, positive: float, stream: int):
        self.count, self.positive, self.stream = count, positive, stream
        self.key: Tensor | None = None

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Choose up to ``count`` of labels (n,), 1 and more being positive and 0 negative; bool (n,) of each kind."""
        (found,) = labels
        assert self.key is not None
        index = torch.arange(len(found), device=found.device)
        order = keyed_uniform(self.key.reshape(1).to(found.device), 2 * index + self.stream)[:, 0]
        positives = self._choose(order, found >= 1, int(self.count * self.positive))
        negatives = self._choose(order, found == 0, self.count - int(positives.sum()))
        return [positives], [negatives]

    @staticmethod
    def _choose(order: Tensor, among: Tensor, most: int) -> Tensor:
        places = among.nonzero()[:, 0]
        chosen = places[order[places].topk(min(most, len(places)), largest=False).indices]
        return torch.zeros_like(among).index_fill_(0, chosen, True)


class FixedAnchors(AnchorGenerator):
    """torchvision's anchors, in fp32 and at the strides of the levels, which it would guess from rounded sizes."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors (n, 4) of each image, over all levels."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in STRIDES]
        grids = [list(feature_map.shape[-2:]) for feature_map in feature_maps]
        return [torch.cat(self.grid_anchors(grids, strides))] * len(image_list.image_sizes)


class Fp32RPNHead(RPNHead):
    """Scores and offsets in fp32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """See torchvision's."""
        scores, offsets = super().forward(x)
        return [score.float() for score in scores], [offset.float() for offset in offsets]


class Fp32RoIAlign(MultiScaleRoIAlign):
    """RoIAlign in fp32, its result in the precision of the maps."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """See torchvision's."""
        wide = OrderedDict((name, x[name].float()) for name in self.featmap_names)
        return super().forward(wide, boxes, image_shapes).to(x[self.featmap_names[0]].dtype)


class Fp32BoxPredictor(FastRCNNPredictor):
    """Scores and offsets in fp32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See torchvision's."""
        scores, offsets = super().forward(x)
        return scores.float(), offsets.float()


class Fp32MaskPredictor(MaskRCNNPredictor):
    """Mask logits in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """See torchvision's."""
        return super().forward(input).float()


@dataclass(frozen=True)
class Sizes:
    """Of the heads: see the section ``detector`` of a recipe."""

    channels: int
    hidden: int
    anchors: tuple[int, ...]
    anchors_sampled: int
    proposals: int
    proposals_sampled: int
    detections: int
    score_threshold: float


class DetectionHeads(nn.Module):
    """Norms of the pyramid, feature pyramid network, region proposals, box and mask heads.

    Args:
        widths: channels of the encoder's maps.
        classes: how many there are, without the background.
        sizes: of the heads.
    """

    def __init__(self, widths: list[int], classes: int, sizes: Sizes):
        super().__init__()
        channels = sizes.channels
        self.norms = PyramidNorms(widths)
        self.fpn = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool())
        anchors = FixedAnchors(tuple((size,) for size in sizes.anchors), (RATIOS,) * len(sizes.anchors))
        kept = {"training": sizes.proposals, "testing": sizes.proposals}
        self.rpn = RegionProposalNetwork(
            anchors,
            Fp32RPNHead(channels, len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=sizes.anchors_sampled,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * sizes.proposals, "testing": sizes.proposals},
            post_nms_top_n=kept,
            nms_thresh=0.7,
        )
        self.roi_heads = RoIHeads(
            Fp32RoIAlign(LEVELS, output_size=7, sampling_ratio=2),
            TwoMLPHead(channels * 7 * 7, sizes.hidden),
            Fp32BoxPredictor(sizes.hidden, classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=sizes.proposals_sampled,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=sizes.score_threshold,
            nms_thresh=0.5,
            detections_per_img=sizes.detections,
            mask_roi_pool=Fp32RoIAlign(LEVELS, output_size=14, sampling_ratio=2),
            mask_head=MaskRCNNHeads(channels, [channels] * 4, dilation=1),
            mask_predictor=Fp32MaskPredictor(channels, channels, classes + 1),
        )
        self.rpn.fg_bg_sampler = KeyedSampler(sizes.anchors_sampled, 0.5, ANCHORS)
        self.roi_heads.fg_bg_sampler = KeyedSampler(sizes.proposals_sampled, 0.25, PROPOSALS)
        self.detections = sizes.detections

    def forward(
        self,
        maps: dict[str, Tensor],
        size: tuple[int, int],
        target: dict[str, Tensor] | None = None,
        draw_key: Tensor | None = None,
    ) -> Any:
        """One image: its losses, or what is found in it.

        Args:
            maps: of the feature pyramid network, each (1, channels, h, w).
            size: height and width of the padded image, pixels.
            target: while training: boxes (n, 4) fp32, labels (n,), masks (n, *size).
            draw_key: while training: int64 scalar that the sampling is keyed to.

        Returns:
            While training, the sum of the five losses; else boxes (n, 4), scores (n,), labels (n,) and masks (n, 1, 28, 28),
            as probabilities within their boxes.
        """
        self.rpn.fg_bg_sampler.key = self.roi_heads.fg_bg_sampler.key = draw_key
        image = ImageList(torch.empty(1, 3, *size, device="meta"), [size])
        targets = None if target is None else [target]
        proposals, first = self.rpn(image, maps, targets)
        found, second = self.roi_heads(maps, proposals, [size], targets)
        return sum((first | second).values()) if self.training else found[0]


class MaskRCNN(nn.Module):
    """An encoder with its heads.

    Args:
        encoder: a SwinV2.
        heads: for it.
        mean: of the images' channels.
        std: of the images' channels.
    """

    def __init__(self, encoder: Any, heads: DetectionHeads, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.encoder, self.heads = encoder, heads
        self.mean, self.std = mean, std

    def set_grad_checkpointing(self, enable: bool = True, **options: Any) -> None:
        """Recompute the encoder's blocks in the backward pass; ``options`` as in the encoder."""
        self.encoder.set_grad_checkpointing(enable, **options)

    def forward(
        self,
        images: Tensor,
        boxes: Tensor | None = None,
        labels: Tensor | None = None,
        masks: Tensor | None = None,
        draw_keys: Tensor | None = None,
    ) -> Any:
        """Loss of a micro-batch, or detections.

        Args:
            images: (B, 3, H, W) uint8, H and W multiples of 32.
            boxes: while training: (B, n, 4) fp32.
            labels: while training: (B, n) int64, 0 for what only fills up.
            masks: while training: (B, n, H, W / 8) uint8, eight pixels a byte.
            draw_keys: while training: (B,) int64 that drop path and sampling are keyed to.

        Returns:
            While training, the mean over images of the sum of their losses. In eval mode boxes (B, D, 4), scores (B, D), labels
            (B, D), 0 where fewer than D are found, and masks (B, D, 28, 28).
        """
        size = (images.shape[-2], images.shape[-1])
        normed = self.heads.norms(self.encoder, normalise(images, self.mean, self.std), draw_keys)
        maps = self.heads.fpn(OrderedDict(zip(LEVELS, normed, strict=True)))
        results = []
        # Image by image: what is sampled and kept in one does not depend on which others are in the micro-batch, and every
        # rank calls the same modules equally often.
        for row in range(len(images)):
            one = OrderedDict((name, x[row : row + 1]) for name, x in maps.items())
            target = None
            if self.training:
                assert boxes is not None
                assert labels is not None
                assert masks is not None
                there = labels[row] > 0
                target = {
                    "boxes": boxes[row][there],
                    "labels": labels[row][there],
                    "masks": unpack_masks(masks[row][there], size[1]),
                }
            results.append(self.heads(one, size, target, None if draw_keys is None else draw_keys[row]))
        if self.training:
            return torch.stack(results).mean()
        return tuple(
            torch.stack([_filled(found[name], self.heads.detections) for found in results])
            for name in ("boxes", "scores", "labels", "masks")
        )


def _filled(rows: Tensor, count: int) -> Tensor:
    """Rows (n, ...) filled up to ``count`` by zeros; masks lose their channel."""
    rows = rows[:, 0] if rows.ndim == 4 else rows
    return torch.cat((rows, rows.new_zeros(count - len(rows), *rows.shape[1:])))
