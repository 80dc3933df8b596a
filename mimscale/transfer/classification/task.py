"""Classification: the encoder, its features' mean, and a linear head, trained as the paper trains it (section 3.5)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from typing_extensions import override

from mimscale.data import CropSpec, EvaluationStream, LabelledStream, ShardError
from mimscale.data.stream.augment import resize_and_centre_crop, shorter_side
from mimscale.data.stream.labelled import LabelledBatch
from mimscale.training.checkpoint import Checkpoint
from mimscale.training.errors import read_here
from mimscale.training.faults.recovery import check_data
from mimscale.training.planning.throughput import training_flops
from mimscale.training.pretraining.module import normalise
from mimscale.training.pretraining.task import data_position, few_images, open_shards, rank_workers, reading
from mimscale.training.ranks import Ranks, gather
from mimscale.training.recipe import RecipeError
from mimscale.training.task import Evaluator, TaskBatch, ValidationResult
from mimscale.transfer.classification.labels import ClassCounts, check_labels
from mimscale.transfer.classification.mixing import Mixing
from mimscale.transfer.classification.pictures import PredictionSheet, confusion_picture
from mimscale.transfer.classification.recipe import ClassificationRecipe
from mimscale.transfer.classification.scores import TOP, predict, read_ahead
from mimscale.transfer.task import TransferTask, classes_in
from mimscale.transfer.weights import task_encoder
from mimscale.wording import counted, printable


class Classifier(nn.Module):
    """An encoder with its head, on normalised images."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder
        self.loss = SoftTargetCrossEntropy()

    def set_grad_checkpointing(self, enable: bool = True, **options: Any) -> None:
        """Recompute the encoder's blocks in the backward pass; ``options`` as in the encoder."""
        self.encoder.set_grad_checkpointing(enable, **options)

    def forward(self, images: Tensor, targets: Tensor | None = None, draw_keys: Tensor | None = None):
        """Loss of one micro-batch, or logits.

        Args:
            images: (B, 3, S, S) normalised.
            targets: (B, classes), rows sum to 1; needed while training.
            draw_keys: (B,) int64 that drop path is keyed to.

        Returns:
            While training, the mean cross-entropy (a scalar), in eval mode the logits (B, classes) in a tuple, in fp32.
        """
        logits = self.encoder(images, draw_keys=draw_keys).float()
        return self.loss(logits, targets) if self.training else (logits,)


class Classification(TransferTask):
    """Classification on labelled shards.

    Raises:
        RecipeError, ShardError: the shards cannot be used, lack the fraction, or have images without a class.
    """

    schema = ClassificationRecipe
    metric = "top1"

    recipe: ClassificationRecipe

    def __init__(self, recipe: ClassificationRecipe):
        super().__init__(recipe)
        data = recipe.data
        self.index = open_shards(recipe)
        self.counts = ClassCounts.of(self.index, data.fraction)
        if len(self.index.classes) < 2:
            raise ShardError(
                f"{data.shards} has one class, {self.index.classes[0]!r}: there is nothing to tell apart; build it from a folder "
                "with a subfolder for each class"
            )
        self.validated = data.validation in self.index.fractions
        if self.validated:
            check_labels(self.index, data.validation)
        elif data.validation != "val":
            self.index.samples(data.validation)  # an unknown fraction is an error
        self.mixing = Mixing(len(self.index.classes), **recipe.mix.model_dump(), erasing=data.erasing)
        self.average_decay = recipe.finetune.ema
        ranks, batch = len(gather(None)), recipe.train.global_batch
        if recipe.mix.mixes and batch % (2 * ranks):
            raise RecipeError(
                f"train.global_batch={batch} over {ranks} ranks does not give each an even number of images, which mixing in "
                f"pairs takes; choose a multiple of {2 * ranks}, or mix.mixup=0 mix.cutmix=0"
            )
        size = data.image_size
        self.flops_per_image = training_flops(self.build, lambda module: module(torch.empty(1, 3, size, size)))

    @override
    def build(self) -> nn.Module:
        return Classifier(self.encoder(len(self.index.classes)))

    @classmethod
    @override
    def module_of(cls, recipe: ClassificationRecipe, data: dict[str, Any]) -> nn.Module:
        return Classifier(task_encoder(recipe, len(classes_in(data))))

    @classmethod
    @override
    def say(
        cls, recipe: ClassificationRecipe, data: dict[str, Any], module: Any, pixels: np.ndarray
    ) -> tuple[str, Image.Image | None]:
        size, settings = recipe.data.image_size, recipe.data
        shorter = shorter_side(size, settings.resize_shorter)
        crop = resize_and_centre_crop(pixels, shorter, size, settings.interpolation)
        with torch.no_grad():
            chances = module(normalise(crop[None], settings.mean, settings.std))[0][0].softmax(0)
        best = chances.topk(min(TOP, len(chances)))
        named = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return ", ".join(f"{data['classes'][index]} {chance:.1%}" for chance, index in named), None

    @override
    def check_same_classes(self, data: dict[str, Any]) -> None:
        if list(self.index.classes) != data["classes"]:
            raise ShardError(
                f"data.shards={self.recipe.data.shards} has {len(self.index.classes)} classes ("
                f"{', '.join(self.index.classes[:3])}, ...), but the run was trained on {len(data['classes'])} ("
                f"{', '.join(data['classes'][:3])}, ...)"
            )

    @override
    def describe(self) -> str:
        data = self.recipe.data
        return (
            f"{self.recipe.model.name} from {self.recipe.finetune.source or 'scratch'}, "
            f"{self.flops_per_image / 3e9:.2f} GFLOPs an image forward; {counted(self.counts.images.sum(), 'image')} "
            f"({data.fraction}) of {len(self.index.classes)} classes"
            + (f", {len(self.counts.empty)} of them without an image" if self.counts.empty else "")
        )

    @override
    def notices(self) -> list[str]:
        data, batch = self.recipe.data, self.recipe.train.global_batch
        said, images = [], int(self.counts.images.sum())
        if images < batch:
            said.append(few_images(images, batch))
        if self.counts.empty:
            names = [self.index.classes[label] for label in self.counts.empty[:10]]
            more = ", ..." if len(self.counts.empty) > 10 else ""
            said.append(
                f"{counted(len(self.counts.empty), 'class')} without a training image, never to be predicted: "
                f"{', '.join(map(printable, names))}{more}"
            )
        if not self.validated:
            said.append(
                f"{data.shards} holds no images out: nothing will be validated (mimscale shards build --val-share 5%, or "
                "--val SOURCE)"
            )
        return said

    @override
    def example(self, images: int) -> tuple[Tensor, ...]:
        size, classes = self.recipe.data.image_size, len(self.index.classes)
        return torch.empty(images, 3, size, size), torch.empty(images, classes), torch.zeros(images, dtype=torch.int64)

    @override
    def batches(self, step: int, ranks: Ranks) -> Iterator[TaskBatch]:
        data = self.recipe.data
        stream = LabelledStream(
            self.index,
            **reading(self.recipe, ranks, step),
            crops=CropSpec.of(data),
            rand_augment=data.rand_augment,
        )
        for batch in read_here(stream):
            images, targets = self.mixing(
                self.normalised(batch, ranks.device), batch.labels.to(ranks.device), batch.draw_keys
            )
            yield TaskBatch((images, targets, batch.draw_keys), batch.keys, batch.skipped)

    def normalised(self, batch: LabelledBatch, device: torch.device) -> Tensor:
        """A batch's images (b, 3, S, S) fp32 on the device, with the recipe's mean and deviation taken out."""
        if device.type == "cuda":
            batch = batch.pin_memory()
        images = batch.images.to(device, non_blocking=True)
        return normalise(images, self.recipe.data.mean, self.recipe.data.std)

    def held_out(self, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0) -> EvaluationStream:
        """One pass over the held-out images."""
        data = self.recipe.data
        return EvaluationStream(
            self.index,
            data.validation,
            data.image_size,
            batch_size,
            rank,
            world_size,
            resize_shorter=data.resize_shorter,
            workers=workers,
            interpolation=data.interpolation,
            max_damaged=data.max_damaged,
            limit=data.validation_images,
        )

    @override
    def validate(self, engine: Evaluator, step: int) -> ValidationResult | None:
        if not self.validated:
            return None
        ranks = engine.ranks
        size = self.recipe.train.validate_batch or 2 * engine.micro
        stream = self.held_out(size, ranks.rank, ranks.world_size, rank_workers(self.recipe.data.workers, ranks))
        sheet = PredictionSheet(self.index.classes)

        def logits(batch: LabelledBatch) -> Tensor:
            found = engine.evaluate(self.normalised(batch, ranks.device))[0]
            if ranks.is_first:
                sheet.add(batch, found)
            return found

        found = predict(read_ahead(stream, logits), ranks.device)
        if found is None:
            return None
        record = found.figures(self.counts.shots())
        text = (
            f"top-1 {record['val_top1']:.2f} %, top-5 {record['val_top5']:.2f} %, loss {record['val_loss']:.4f} "
            f"on {counted(len(found.labels), 'image')}"
        )
        if not ranks.is_first:
            return ValidationResult(record, text)
        pictures = {"predictions": sheet.draw(), "confusion": confusion_picture(found, self.index.classes)}
        return ValidationResult(record, text, pictures)

    @override
    def data_state(self, step: int) -> dict[str, Any]:
        data, train = self.recipe.data, self.recipe.train
        position = data_position(self.index, data.fraction, train.seed, step * train.global_batch)
        return {**position, "classes": list(self.index.classes)}

    @override
    def check_data(self, source: Checkpoint) -> None:
        assert self.recipe.data.shards is not None
        check_data(source, self.index.content.build, self.recipe.data.shards)

    @override
    def result(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        found = super().result(records)
        last = found["validation"] or {}
        tail = {
            name: {
                "classes": int(classes.sum()),
                "training_images": int(self.counts.images[classes].sum()),
                "top1": last[f"val_top1_{name}"],
            }
            for name, classes in self.counts.shots().items()
            if f"val_top1_{name}" in last
        }
        return {
            **found,
            "classes": len(self.index.classes),
            "classes_without_images": len(self.counts.empty),
            "long_tail": tail or None,
        }
