"""COCO's figures by pycocotools, from what all ranks found; every image is counted once whatever the world size."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from mimscale.transfer.detection.annotations import read_content

# pycocotools' twelve figures start with these.
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
KINDS = {"box": "bbox", "mask": "segm"}


@dataclass(frozen=True)
class Detections:
    """What is found in one image of D objects, in its own pixels.

    ``boxes`` (D, 4) left, top, right, bottom; ``scores`` (D,); ``labels`` (D,) from 1 on; ``masks`` (D, H, W) bool.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor

    @classmethod
    def of(cls, outputs: tuple[Tensor, ...], resized: Tensor, size: tuple[int, int]) -> Detections:
        """The first image's share of a model's outputs.

        Args:
            outputs: as :class:`mimscale.transfer.detection.mask_rcnn.MaskRCNN` gives them.
            resized: the height and width that the model saw the image at.
            size: its height and width.
        """
        boxes, scores, labels, masks = (part[0] for part in outputs)
        found = labels > 0
        height, width = (own / seen for own, seen in zip(size, resized.tolist(), strict=True))
        boxes = boxes[found] * boxes.new_tensor([width, height, width, height])
        pasted = paste_masks_in_image(masks[found][:, None].float(), boxes, size)
        return cls(boxes.cpu(), scores[found].cpu(), labels[found].cpu(), pasted[:, 0].cpu() > 0.5)

    def entries(self, image_id: int, categories: list[int]) -> list[dict[str, Any]]:
        """As COCO's result files have them."""
        return [
            {
                "image_id": image_id,
                "category_id": categories[label - 1],
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
                "segmentation": run_lengths.encode(np.asfortranarray(mask.numpy().astype(np.uint8))),
            }
            for (left, top, right, bottom), score, label, mask in zip(
                self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.masks, strict=True
            )
        ]

    def above(self, score: float) -> Detections:
        """Those of at least that score."""
        kept = self.scores >= score
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept], self.masks[kept])


def coco_figures(file: Path, found: list[dict[str, Any]], image_ids: list[int]) -> dict[str, float]:
    """Average precisions in percent, for ``metrics.jsonl``; those of sizes that no object has are left out.

    Args:
        file: the truth, in COCO's form.
        found: entries of a COCO result file, with ``bbox`` and ``segmentation``.
        image_ids: the images that count.
    """
    with _quietly():
        truth = COCO()
        content = read_content(file)
        # An outline without an area is nothing that could be found.
        content["annotations"] = [entry for entry in content["annotations"] if entry["segmentation"]]
        truth.dataset = {**content, "info": {}}
        truth.createIndex()
        record: dict[str, float] = {}
        for kind, evaluated in KINDS.items():
            # With a box beside it, pycocotools would take a mask's size for that of the box.
            left_out = "bbox" if kind == "mask" else "segmentation"
            entries = [{key: value for key, value in entry.items() if key != left_out} for entry in found]
            if not entries:
                record |= {f"val_{kind}_{name}": 0.0 for name in FIGURES[:3]}
                continue
            scores = COCOeval(truth, truth.loadRes(entries), evaluated)
            scores.params.imgIds = sorted(image_ids)
            scores.evaluate()
            scores.accumulate()
            scores.summarize()
            values = zip(FIGURES, scores.stats.tolist(), strict=False)
            record |= {f"val_{kind}_{name}": 100 * value for name, value in values if value >= 0}
        return record


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """pycocotools reports on itself by printing."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def detect(model: Any, tensors: tuple[Tensor, ...], size: tuple[int, int]) -> Detections:
    """Detections of one image.

    Args:
        model: called with the image (1, 3, H, W).
        tensors: the image and its size without padding, as :func:`mimscale.transfer.detection.images.at_test_size` gives them.
        size: its own height and width.
    """
    image, resized = tensors
    with torch.no_grad():
        return Detections.of(model(image[None]), resized, size)
