"""Detection and instance segmentation: Mask R-CNN on data in COCO's form, trained as the paper trains it (section 3.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from typing_extensions import override

from mimscale.data import ShardError
from mimscale.training.planning.throughput import training_flops
from mimscale.training.ranks import gather
from mimscale.training.recipe import RecipeError
from mimscale.training.task import Evaluator, ValidationResult
from mimscale.transfer.dense.scaling import fill
from mimscale.transfer.dense.task import DenseTask
from mimscale.transfer.detection.coco import Instances, read_instances
from mimscale.transfer.detection.images import DetectionImages, at_test_size
from mimscale.transfer.detection.mask_rcnn import DetectionHeads, MaskRCNN, Sizes
from mimscale.transfer.detection.pictures import LEAST, DetectionSheet, drawn, drawn_detections
from mimscale.transfer.detection.recipe import DetectionRecipe
from mimscale.transfer.detection.scores import coco_figures, detect
from mimscale.wording import counted


class Detection(DenseTask):
    """Detection and instance segmentation."""

    schema = DetectionRecipe
    metric = "box_ap"

    recipe: DetectionRecipe
    images: DetectionImages
    held_out: DetectionImages | None

    def __init__(self, recipe: DetectionRecipe):
        super().__init__(recipe)
        data = recipe.data
        recipe.check_data_places()
        assert data.images is not None and data.annotations is not None
        self.images = self._split(data.images, data.annotations, keep_empty=False)
        self.classes = self.images.instances.classes
        self.held_out = None
        if data.validation is not None and data.validation_annotations is not None:
            self.held_out = self._split(data.validation, data.validation_annotations, keep_empty=True)
            self._check_same_categories(self.held_out.instances)
        elif data.validation is not None or data.validation_annotations is not None:
            raise RecipeError("data.validation=FOLDER and data.validation_annotations=FILE go together")
        sizes = data.image_size, recipe.detector.channels, recipe.detector.proposals_sampled
        self.flops_per_image = training_flops(self.build, lambda module: forward_once(module, *sizes))

    def _split(self, folder: str, file: str, keep_empty: bool) -> DetectionImages:
        data = self.recipe.data
        instances = read_instances(Path(file), Path(folder), keep_empty)
        return DetectionImages(instances, data.image_size, data.jitter, data.flip, data.test_size, fill(data.mean))

    def _check_same_categories(self, held_out: Instances) -> None:
        ours, theirs = self.images.instances, held_out
        if (ours.categories, ours.classes) != (theirs.categories, theirs.classes):
            differing = set(zip(ours.categories, ours.classes, strict=True)) ^ set(
                zip(theirs.categories, theirs.classes, strict=True)
            )
            some = ", ".join(f"{number} {name}" for number, name in sorted(differing)[:5])
            raise ShardError(f"{ours.file} and {theirs.file} do not list the same categories: {some}")

    @classmethod
    @override
    def heads(cls, recipe: DetectionRecipe, classes: int) -> DetectionHeads:
        return DetectionHeads(recipe.model.pyramid, classes, Sizes(**recipe.detector.model_dump()))

    @classmethod
    @override
    def join(cls, recipe: DetectionRecipe, encoder: nn.Module, heads: nn.Module) -> MaskRCNN:
        return MaskRCNN(encoder, heads, recipe.data.mean, recipe.data.std)  # type: ignore[arg-type]

    @override
    def describe(self) -> str:
        instances = self.images.instances
        objects = instances.objects_of_classes()
        empty = [name for name, count in zip(self.classes, objects.tolist(), strict=True) if not count]
        left_out = instances.left_out
        return (
            f"Mask R-CNN on {self.recipe.model.name} from {self.recipe.finetune.source or 'scratch'}, "
            f"{self.flops_per_image / 3e9:.2f} GFLOPs an image forward; {objects.sum()} objects of {len(self.classes)} classes "
            f"in {counted(len(instances.names), 'image')}"
            + (f", left out: {', '.join(f'{n} {what}' for what, n in left_out.items())}" if left_out else "")
            + (f"; classes without an object: {', '.join(empty[:5])}" if empty else "")
        )

    @override
    def validate(self, engine: Evaluator, step: int) -> ValidationResult | None:
        if self.held_out is None:
            return None
        instances, ranks = self.held_out.instances, engine.ranks
        sheet = DetectionSheet()
        entries: list[dict[str, Any]] = []
        seen: list[int] = []
        for image in self.held_out_stream(ranks):
            number = image.number
            size = (int(instances.sizes[number][0]), int(instances.sizes[number][1]))
            found = detect(engine.evaluate, image.tensors, size)
            if not image.valid:
                continue
            seen.append(int(instances.ids[number]))
            entries += found.entries(seen[-1], instances.categories)
            if ranks.is_first and not sheet.full:
                pixels = self.held_out.pixels(number)
                sheet.rows.append((self._true(number, pixels), drawn_detections(pixels, found, self.classes)))
        gathered = gather((seen, entries))
        if not ranks.is_first:
            return ValidationResult({}, "")
        images = [number for part, _ in gathered for number in part]
        record = coco_figures(instances.file, [entry for _, part in gathered for entry in part], images)
        text = (
            f"box AP {record['val_box_ap']:.2f} (50: {record['val_box_ap50']:.2f}), mask AP {record['val_mask_ap']:.2f} "
            f"(50: {record['val_mask_ap50']:.2f}) on {counted(len(images), 'image')}"
        )
        return ValidationResult(record, text, {"detections": sheet.draw()})

    def _true(self, number: int, pixels: np.ndarray) -> Image.Image:
        """An image with its true objects."""
        assert self.held_out is not None
        boxes, labels, masks = self.held_out.objects(number)
        return drawn(pixels, boxes, labels, masks.bool(), [self.classes[label - 1] for label in labels.tolist()])

    @classmethod
    @override
    def say(
        cls, recipe: DetectionRecipe, data: dict[str, Any], module: Any, pixels: np.ndarray
    ) -> tuple[str, Image.Image | None]:
        settings = recipe.data
        tensors = at_test_size(pixels, settings.test_size, fill(settings.mean))
        found = detect(module, tensors, (pixels.shape[0], pixels.shape[1]))
        sure = found.above(LEAST)
        named = zip(sure.labels.tolist(), sure.scores.tolist(), sure.boxes.round().long().tolist(), strict=True)
        text = "; ".join(f"{data['classes'][label - 1]} {score:.1%} at {box}" for label, score, box in named)
        return text or f"nothing of {LEAST:.0%} or more", drawn_detections(pixels, found, data["classes"])

    @override
    def result(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        instances = self.images.instances
        objects = instances.objects_of_classes()
        return {
            **super().result(records),
            "classes": len(self.classes),
            "classes_without_objects": int((objects == 0).sum()),
            "images": len(instances.names),
            "objects": int(objects.sum()),
            "left_out_of_annotations": instances.left_out,
        }


def forward_once(module: Any, size: int, channels: int, sampled: int) -> None:
    """Pass a training image of a side of ``size`` through a detector, with all proposals that are sampled.

    A quarter of the proposals, the most that may be positive, goes through the mask head.
    """
    heads = module.heads
    normed = heads.norms(module.encoder, torch.empty(1, 3, size, size))
    heads.rpn.head(list(heads.fpn(dict(zip("0123", normed, strict=True))).values()))
    heads.roi_heads.box_predictor(heads.roi_heads.box_head(torch.empty(sampled, channels, 7, 7)))
    heads.roi_heads.mask_predictor(heads.roi_heads.mask_head(torch.empty(sampled // 4, channels, 14, 14)))
