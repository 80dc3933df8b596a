"""Semantic segmentation: UPerNet on data in ADE20K's form, trained as the paper trains it (section 3.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from mimscale.training.planning.throughput import training_flops
from mimscale.training.ranks import gather
from mimscale.training.recipe import RecipeError
from mimscale.training.task import Evaluator, ValidationResult
from mimscale.transfer.dense.scaling import fill
from mimscale.transfer.dense.task import DenseTask
from mimscale.transfer.segmentation.images import SegmentationImages, at_test_size
from mimscale.transfer.segmentation.label_maps import LabelPictures, read_classes
from mimscale.transfer.segmentation.pictures import SegmentationSheet, coloured, with_legend
from mimscale.transfer.segmentation.recipe import SegmentationRecipe
from mimscale.transfer.segmentation.scores import Confusion, slide
from mimscale.transfer.segmentation.upernet import UPerNet, UPerNetHeads
from mimscale.wording import counted, printable


class Segmentation(DenseTask):
    """Semantic segmentation."""

    schema = SegmentationRecipe
    metric = "miou"

    recipe: SegmentationRecipe
    images: SegmentationImages
    held_out: SegmentationImages | None

    def __init__(self, recipe: SegmentationRecipe):
        super().__init__(recipe)
        data = recipe.data
        recipe.check_data_places()
        assert data.images is not None and data.annotations is not None and data.classes is not None
        self.classes = read_classes(Path(data.classes))
        self.images = self._split(data.images, data.annotations)
        self.held_out = None
        if data.validation is not None and data.validation_annotations is not None:
            self.held_out = self._split(data.validation, data.validation_annotations)
        elif data.validation is not None or data.validation_annotations is not None:
            raise RecipeError("data.validation=FOLDER and data.validation_annotations=FOLDER go together")
        crop = (1, 3, data.image_size, data.image_size)
        self.flops_per_image = training_flops(self.build, lambda module: module(torch.empty(crop, dtype=torch.uint8)))
        # Of the last validation.
        self.last: Confusion | None = None
        self.damaged: dict[str, str] = {}

    def _split(self, images: str, labels: str) -> SegmentationImages:
        data = self.recipe.data
        pictures = LabelPictures.find(
            Path(images), Path(labels), len(self.classes), data.first_label, data.ignored_labels
        )
        return SegmentationImages(
            pictures,
            data.image_size,
            data.jitter,
            data.flip,
            data.photometric_distortion,
            data.one_class,
            data.test_size,
            fill(data.mean),
        )

    @classmethod
    @override
    def heads(cls, recipe: SegmentationRecipe, classes: int) -> UPerNetHeads:
        decoder = recipe.decoder
        widths = recipe.model.pyramid
        return UPerNetHeads(widths, classes, decoder.channels, decoder.auxiliary_channels, decoder.dropout)

    @classmethod
    @override
    def join(cls, recipe: SegmentationRecipe, encoder: nn.Module, heads: nn.Module) -> UPerNet:
        return UPerNet(encoder, heads, recipe.data.mean, recipe.data.std, recipe.decoder.auxiliary_weight)  # type: ignore[arg-type]

    @override
    def describe(self) -> str:
        alone = self.images.pictures.alone
        return (
            f"UPerNet on {self.recipe.model.name} from {self.recipe.finetune.source or 'scratch'}, "
            f"{self.flops_per_image / 3e9:.2f} GFLOPs an image forward; {counted(len(self.classes), 'class')} in "
            f"{counted(len(self.images.keys), 'image')}"
            + (
                f"; left out, since one of image and labels is not there: {len(alone)} ({printable(alone[0], 100)}, ...)"
                if alone
                else ""
            )
        )

    @override
    def example(self, images: int) -> tuple[Tensor, ...]:
        size = self.recipe.data.image_size
        labels = torch.zeros(images, size, size, dtype=torch.int16)
        return torch.empty(images, 3, size, size, dtype=torch.uint8), labels, torch.zeros(images, dtype=torch.int64)

    @override
    def validate(self, engine: Evaluator, step: int) -> ValidationResult | None:
        if self.held_out is None:
            return None
        data, ranks = self.recipe.data, engine.ranks
        sheet = SegmentationSheet(self.classes)
        mine, images = Confusion.none(len(self.classes)), 0
        skipped: dict[str, str] = {}
        for held in self.held_out_stream(ranks):
            skipped.update(held.skipped)
            image, labels = held.tensors
            size = (labels.shape[0], labels.shape[1])
            said = slide(engine.evaluate, image, data.image_size, data.stride, fill(data.mean), size)
            if not held.valid:
                continue
            mine, images = mine.and_image(labels, said), images + 1
            if ranks.is_first and not sheet.full:
                sheet.add(self.held_out.pictures.read(held.number)[0], labels.numpy(), said.numpy())
        parts = gather((mine.pixels, images, skipped))
        if not ranks.is_first:
            return ValidationResult({}, "")
        images = sum(count for _, count, _ in parts)
        self.damaged = {key: reason for _, _, part in parts for key, reason in part.items()}
        self.last = Confusion(sum((pixels for pixels, *_ in parts), np.zeros_like(mine.pixels)))
        record = {**self.last.figures(), "val_images": images}
        text = (
            f"mIoU {record['val_miou']:.2f}, {record['val_pixel_accuracy']:.2f} % of the pixels right, "
            f"{record['val_class_accuracy']:.2f} % of a class's, on {counted(images, 'image')}"
            + "".join(f"; left out {printable(key, 100)}: {reason}" for key, reason in list(self.damaged.items())[:3])
        )
        return ValidationResult(record, text, {"segmentations": sheet.draw()})

    @classmethod
    @override
    def say(
        cls, recipe: SegmentationRecipe, data: dict[str, Any], module: Any, pixels: np.ndarray
    ) -> tuple[str, Image.Image | None]:
        settings, classes = recipe.data, data["classes"]
        tested = at_test_size(pixels, settings.test_size)
        with torch.no_grad():
            said = slide(module, tested, settings.image_size, settings.stride, fill(settings.mean), pixels.shape[:2])
        numbers, counts = np.unique(said.numpy(), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        text = ", ".join(f"{classes[numbers[i]]} {counts[i] / said.numel():.1%}" for i in order)
        return text, with_legend(coloured(pixels, said.numpy(), len(classes)), numbers[order].tolist(), classes)

    @override
    def result(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        found = {
            **super().result(records),
            "classes": len(self.classes),
            "images": len(self.images.keys),
            "left_out_without_pair": self.images.pictures.alone[:100],
            "left_out_of_validation": self.damaged,
        }
        if self.last is not None:
            ious = zip(self.classes, self.last.ious().tolist(), strict=True)
            found["iou"] = {name: None if np.isnan(iou) else iou for name, iou in ious}
        return found
