"""A released weight's validation loss, measured here, beside the published one.

Centre crops and one fixed mask an image, in fp32, as every validation of mimscale; l1 and l2 both, for the paper names
l2 and the code that was released with it used l1. The authors' own protocol is unpublished.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimscale.data import ShardError, ShardIndex
from mimscale.models import load_released
from mimscale.models.decoders import DECODERS
from mimscale.models.weights.recognise import SwinShape, recognise_swin
from mimscale.models.weights.released import match_checkpoint, read_checkpoint, released_names
from mimscale.schema import resolve
from mimscale.study.results.published import published
from mimscale.study.results.release_names import read_name
from mimscale.training.metrics import duration
from mimscale.training.pretraining.module import build_objective
from mimscale.training.pretraining.validation import Validation, validate
from mimscale.training.recipe import Recipe, load_recipe
from mimscale.training.task import PlainEvaluator

# Section 3.4, for a file that kept no position tables.
WINDOW, IMAGE_SIZE = 12, 192


class _Progress(PlainEvaluator):
    """A model that says how many of its images are done."""

    def __init__(self, module: nn.Module, batch: int, images: int):
        super().__init__(module, batch)
        self.images, self.done = images, 0
        self.started = self.said = time.monotonic()

    def evaluate(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Losses (l1, l2), each (B,), and the prediction."""
        found = super().evaluate(*batch)
        self.done = min(self.images, self.done + len(batch[0]))
        now = time.monotonic()
        if now - self.said > 5:
            self.said = now
            rate = self.done / (now - self.started)
            left = duration((self.images - self.done) / rate)
            print(
                f"{self.done:,}/{self.images:,} images, {rate:.1f} images/s, {left} left", file=sys.stderr, flush=True
            )
        return found


def recipe_of(shape: SwinShape, source: str, image_size: int | None, window_size: int | None) -> Recipe:
    """The recipe under which weights of this shape can be validated.

    Args:
        shape: as recognised from the weights.
        source: of the weights, for the error.
        image_size: side in pixels, where the weights do not tell; ``None`` for the paper's.
        window_size: in tokens, likewise.

    Raises:
        ValueError: there is no decoder, or none of Table 4's.
    """
    if shape.decoder_blocks is None:
        raise ValueError(
            f"{source} holds an encoder without its decoder (no decoder.0.weight), so it can predict no pixels; "
            "give the pre-training checkpoint, not a fine-tuned or stripped one"
        )
    decoders = [name for name, blocks in DECODERS.items() if blocks == shape.decoder_blocks]
    if not decoders:
        raise ValueError(f"{source} has a decoder of {shape.decoder_blocks} blocks; Table 4 has {', '.join(DECODERS)}")
    model = {
        "name": shape.name or "swinv2_s",
        "embed_dim": shape.embed_dim,
        "depths": shape.depths,
        "num_heads": shape.num_heads,
        "window_size": shape.window_size or window_size or WINDOW,
        "drop_path": 0.0,
    }
    size = shape.image_size or image_size or IMAGE_SIZE
    return resolve({"data": {"image_size": size}, "model": model, "mim": {"decoder": decoders[0]}}, source, Recipe)


def measure(path: Path, shards: Path, recipe: Recipe, extra_norm_every: int, batch: int) -> tuple[Validation, int]:
    """Validation of a weight in the released names, and the encoder's parameters.

    Raises:
        ValueError: the file does not fit the recipe's model; nothing is measured by halves.
        ShardError: no usable shards, or none held out.
    """
    index = ShardIndex.load(shards)
    if "val" not in index.fractions:
        raise ShardError(f"{shards} has no split 'val'; build it with: mimscale shards build ... --val SRC")
    images = min(len(index.samples("val")), recipe.data.validation_images or sys.maxsize)
    norms = {"extra_norm_every": extra_norm_every} if extra_norm_every else {}
    # On the meta device first: what the file tells of must be there before memory is taken for it.
    with torch.device("meta"):
        model = build_objective(recipe, **norms).model
    match_checkpoint(model, released_names(read_checkpoint(path)), str(path))
    objective = build_objective(recipe, **norms)
    load_released(objective.model, path)
    found = validate(_Progress(objective, batch, images), recipe, index)
    if found is None:
        raise ShardError(f"{shards} has no validation image that can be read; see: mimscale shards verify {shards}")
    return found, sum(parameter.numel() for parameter in objective.encoder.parameters())


def published_loss(model: str | None, dataset: str | None, iterations: int | None) -> float | None:
    """What the authors released of this run; ``None`` where it is not among theirs."""
    for result in published():
        if (result.kind, result.model, result.dataset, result.iterations) == ("pretrain", model, dataset, iterations):
            return result.val_loss
    return None


def verify(
    file: Path,
    shards: Path,
    recipe_file: Path | None = None,
    dataset: str | None = None,
    iterations: int | None = None,
    images: int | None = None,
    batch: int = 32,
) -> dict[str, Any]:
    """Measure, and look up what was published.

    Args:
        file: weights in the released names.
        shards: a shard folder with a split "val".
        recipe_file: of their model and objective; recognised from the weights where it is ``None``.
        dataset: that they were pre-trained on; from the file's name where it is ``None``.
        iterations: that they were pre-trained for, likewise.
        images: of the validation set, at most.
        batch: images at once.

    Raises:
        ValueError: (RecipeError, ShardError, CheckpointMismatch among them) the message says what does not fit.
    """
    for name, value in (("images", images), ("batch", batch), ("iterations", iterations)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    said = read_name(file)
    state = read_checkpoint(file)
    every, shape = 0, None
    if recipe_file is None:
        try:
            shape = recognise_swin(state)
        except ValueError as error:
            raise ValueError(f"{file}: {error}; for another objective give --recipe") from None
        recipe = recipe_of(shape, str(file), said.image_size, said.window_size)
        model, every = shape.name, shape.extra_norm_every
    else:
        recipe = load_recipe(recipe_file)
        resized = any(recipe.model.model_dump(include=set(recipe.model.shape_keys)).values())
        model = recipe.model.name if not resized else None
    del state
    if said.model and model and said.model != model and not (dataset and iterations):
        raise ValueError(
            f"the name {file.name} says {said.model}, but its weights are {model}'s, so the rest of the name cannot "
            "be believed either; say what it is with --dataset and --iterations"
        )
    values = recipe.model_dump(mode="json")
    values["data"]["validation_images"] = images
    values["train"] |= {"validate_batch": batch, "reconstructions": 0}
    recipe = resolve(values, str(recipe_file or file), Recipe)
    found, parameters = measure(file, shards, recipe, every, batch)
    dataset, iterations = dataset or said.dataset, iterations or said.iterations
    return {
        "file": str(file),
        "model": model,
        "encoder_parameters": parameters,
        "image_size": recipe.data.image_size,
        "window_size": getattr(recipe.model, "window_size", None),
        "dataset": dataset,
        "iterations": iterations,
        "validation_images": found.images,
        "val_loss_l1": found.l1,
        "val_loss_l2": found.l2,
        "baseline_l1": found.baseline_l1,
        "baseline_l2": found.baseline_l2,
        "published_val_loss": published_loss(model, dataset, iterations),
    }
