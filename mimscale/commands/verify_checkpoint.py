"""``mimscale verify-checkpoint``: a released weight's validation loss, measured here, beside the published one.

Centre crops and one fixed mask an image, in fp32, as every validation of mimscale; l1 and l2 both, for the paper names
l2 and the code that was released with it used l1. The authors' own protocol is unpublished.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimscale.data import ShardError, ShardIndex
from mimscale.models import load_released
from mimscale.models.decoders import DECODERS
from mimscale.models.weights.recognise import SwinShape, recognise_swin
from mimscale.models.weights.released import read_checkpoint
from mimscale.schema import resolve
from mimscale.study.results.published import DATASETS, published
from mimscale.study.results.release_names import read_name
from mimscale.training.metrics import duration
from mimscale.training.pretraining.module import MIMModule, build_objective
from mimscale.training.pretraining.validation import Validation, validate
from mimscale.training.recipe import Recipe, RecipeError, load_recipe

# Section 3.4, for a file that kept no position tables.
WINDOW, IMAGE_SIZE = 12, 192


@dataclass(frozen=True)
class _Alone:
    """One process, on the first GPU or the CPU."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    is_first: bool = True


class PlainEvaluator:
    """A model by itself, as :func:`mimscale.training.pretraining.validation.validate` wants it, saying how far it is."""

    def __init__(self, objective: MIMModule, batch: int, images: int):
        on_gpu = torch.cuda.is_available()
        self.ranks = _Alone(torch.device("cuda" if on_gpu else "cpu"))
        self.module: nn.Module = objective.eval().to(self.ranks.device)
        self.micro = batch
        self.images, self.done = images, 0
        self.started = self.said = time.monotonic()

    def evaluate(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Losses (l1, l2), each (B,), and the prediction."""
        with torch.no_grad():
            found = self.module(*(tensor.to(self.ranks.device) for tensor in batch))
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
    objective = build_objective(recipe, extra_norm_every)
    load_released(objective.model, path)
    found = validate(PlainEvaluator(objective, batch, images), recipe, index)
    if found is None:
        raise ShardError(f"{shards} has no validation image that can be read; see: mimscale shards verify {shards}")
    return found, sum(parameter.numel() for parameter in objective.encoder.parameters())


def published_loss(model: str | None, dataset: str | None, iterations: int | None) -> float | None:
    """What the authors released of this run; ``None`` where it is not among theirs."""
    for result in published():
        if (result.kind, result.model, result.dataset, result.iterations) == ("pretrain", model, dataset, iterations):
            return result.val_loss
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mimscale verify-checkpoint", description=__doc__)
    parser.add_argument("file", type=Path, help="weights in the released names (.pth or .safetensors)")
    parser.add_argument("--shards", type=Path, required=True, metavar="VAL", help="shards with a split 'val'")
    parser.add_argument("--recipe", type=Path, help="model and objective (default: recognised from the weights)")
    parser.add_argument("--dataset", choices=list(DATASETS), help="pre-trained on (default: from the file's name)")
    parser.add_argument("--iterations", type=int, help="pre-trained for (default: from the file's name)")
    parser.add_argument("--images", type=int, help="of the validation set, at most (default: all)")
    parser.add_argument("--batch", type=int, default=32, help="images at once (default: 32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def verify(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and look up what was published.

    Raises:
        ValueError: (RecipeError, ShardError, CheckpointMismatch among them) the message says what does not fit.
    """
    for name in ("images", "batch", "iterations"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    said = read_name(options.file)
    state = read_checkpoint(options.file)
    every, shape = 0, None
    if options.recipe is None:
        try:
            shape = recognise_swin(state)
        except ValueError as error:
            raise ValueError(f"{options.file}: {error}; for another objective give --recipe") from None
        recipe = recipe_of(shape, str(options.file), said.image_size, said.window_size)
        model, every = shape.name, shape.extra_norm_every
    else:
        recipe = load_recipe(options.recipe)
        sizes: tuple[object, ...] = (
            recipe.model.embed_dim,
            recipe.model.depths,
            recipe.model.num_heads,
            recipe.model.depth,
        )
        model = recipe.model.name if not any(sizes) else None
    del state
    if said.model and model and said.model != model and not (options.dataset and options.iterations):
        raise ValueError(
            f"the name {options.file.name} says {said.model}, but its weights are {model}'s, so the rest of the name cannot "
            "be believed either; say what it is with --dataset and --iterations"
        )
    values = recipe.model_dump(mode="json")
    values["data"]["validation_images"] = options.images
    values["train"] |= {"validate_batch": options.batch, "reconstructions": 0}
    recipe = resolve(values, str(options.recipe or options.file), Recipe)
    found, parameters = measure(options.file, options.shards, recipe, every, options.batch)
    dataset = options.dataset or said.dataset
    iterations = options.iterations or said.iterations
    return {
        "file": str(options.file),
        "model": model,
        "encoder_parameters": parameters,
        "image_size": recipe.data.image_size,
        "window_size": recipe.model.window_size,
        "dataset": dataset,
        "iterations": iterations,
        "validation_images": found.images,
        "val_loss_l1": found.l1,
        "val_loss_l2": found.l2,
        "baseline_l1": found.baseline_l1,
        "baseline_l2": found.baseline_l2,
        "published_val_loss": published_loss(model, dataset, iterations),
    }


def table(found: dict[str, Any]) -> str:
    """The figures as a person reads them."""
    published_value = found["published_val_loss"]
    about = [
        found["model"] or "a SwinV2 of none of Table 1's sizes",
        f"{found['encoder_parameters'] / 1e6:.2f} M parameters",
    ]
    about += [f"{found['image_size']} px", f"{found['validation_images']:,} validation images"]
    lines = [f"{found['file']}: {', '.join(about)}"]
    lines += [f"{'':<4}{'measured':>10}{'published':>11}{'difference':>12}{'predicting the mean':>21}"]
    for loss in ("l1", "l2"):
        value = found[f"val_loss_{loss}"]
        beside = f"{published_value:.4f}" if published_value is not None else "unknown"
        apart = f"{value - published_value:+.4f}" if published_value is not None else ""
        lines.append(f"{loss:<4}{value:>10.4f}{beside:>11}{apart:>12}{found[f'baseline_{loss}']:>21.4f}")
    if published_value is not None:
        near = min(("l1", "l2"), key=lambda loss: abs(found[f"val_loss_{loss}"] - published_value))
        lines.append(
            f"published: {found['dataset']}, {found['iterations']:,} iterations. {near} is the nearer. The authors' crop and "
            "masks are unpublished, so the last digits can differ."
        )
    else:
        lines.append(f"nothing published to compare with: {_why_unknown(found)}")
    return "\n".join(lines)


def _why_unknown(found: dict[str, Any]) -> str:
    named = {"model": found["model"], "--dataset": found["dataset"], "--iterations": found["iterations"]}
    unknown = [name for name, value in named.items() if value is None]
    if found["model"] is None:
        return "the weights are of none of Table 1's sizes"
    if unknown:
        return f"neither the file's name nor the command line says {' and '.join(unknown)}"
    return f"{found['model']} on {found['dataset']} for {found['iterations']:,} iterations is not among the 63 released runs"


def main(argv: list[str] | None = None) -> int:
    """Run ``mimscale verify-checkpoint``."""
    options = _parser().parse_args(argv)
    try:
        found = verify(options)
        if options.json is not None:
            beside = options.json.with_name(f".{options.json.name}.part")
            beside.write_text(json.dumps(found, indent=1) + "\n")
            beside.replace(options.json)
    except (RecipeError, ShardError, ValueError, OSError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    print(table(found))
    return 0
