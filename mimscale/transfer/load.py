"""Trained models of runs and files, in one process, to evaluate, predict and probe with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimscale.models.weights.export import load
from mimscale.models.weights.released import load_released
from mimscale.training.checkpoint import Checkpoint, open_newest
from mimscale.training.engine import saved_buffers
from mimscale.training.errors import CheckpointError
from mimscale.training.pretraining.module import build_objective
from mimscale.training.ranks import Ranks
from mimscale.training.recipe import Recipe, RecipeError, load_recipe, recipe_values, stored_recipe
from mimscale.transfer.recipe import FinetuneRecipe, load_finetune_recipe
from mimscale.transfer.task import TransferTask, task_class
from mimscale.transfer.weights import open_run, task_encoder


class Standing:
    """A module that stands still, with the part of :class:`mimscale.training.engine.Engine` that a validation uses."""

    def __init__(self, module: nn.Module, ranks: Ranks, batch: int):
        self.module, self.ranks, self.micro = module.to(ranks.device).eval(), ranks, batch

    def evaluate(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """The module's eval-mode outputs for one batch."""
        with torch.no_grad():
            return self.module(*(tensor.to(self.ranks.device) for tensor in batch))


def fill(module: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Set all weights of a module to a checkpoint's, to their moving average where one was kept.

    Raises:
        CheckpointError: it is one of another model.
    """
    parts = dict(module.named_parameters()) | saved_buffers(module)
    checkpoint.check_shapes({name: tuple(part.shape) for name, part in parts.items()})
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(checkpoint.trained(name))
    return module.eval()


@dataclass(frozen=True)
class FinetunedRun:
    """A fine-tuning run's checkpoint: its kind of task, its recipe, and what it was trained on."""

    checkpoint: Checkpoint
    kind: type[TransferTask]
    recipe: FinetuneRecipe

    @classmethod
    def open(cls, source: str, step: int | None = None, overrides: dict[str, Any] | None = None) -> FinetunedRun:
        """Open RUN or RUN@STEP.

        Args:
            source: RUN or RUN@STEP.
            step: which checkpoint of a RUN; the newest if ``None``.
            overrides: keys of the ``data`` section to change.

        Raises:
            CheckpointError, RecipeError: there is no such run, or it is a pre-training.
        """
        checkpoint = open_newest(Path(source), step) if step is not None else open_run(source)
        if checkpoint is None:
            raise CheckpointError(f"{source} is no run folder")
        values = checkpoint.manifest["recipe"]
        if "task" not in values:
            raise RecipeError(
                f"{source} is a pre-training, which has no head: probe it (mimscale probe), or fine-tune from it"
            )
        kind = task_class(values["task"])
        values = {**values, "data": {**values["data"], **(overrides or {})}}
        return cls(checkpoint, kind, stored_recipe(values, str(checkpoint.path), kind.schema))

    def module(self) -> nn.Module:
        """The trained module, in eval mode on the CPU."""
        return fill(self.kind.module_of(self.recipe, self.checkpoint.manifest["data"]), self.checkpoint)


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder that gives pooled features (B, C) of normalised images, and how its images are made.

    ``name`` tells its weights from others'.
    """

    encoder: Any
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str


def frozen_encoder(source: str, recipe_file: Path | None = None) -> FrozenEncoder:
    """The encoder of a run of any kind, of an exported file, or of a released one.

    Args:
        source: RUN, RUN@STEP or FILE.
        recipe_file: for a file that does not say what it holds: a recipe, of pre-training or fine-tuning, whose ``model`` and
            ``data`` describe it.

    Raises:
        CheckpointError, RecipeError, ValueError: it cannot be read, or does not fit its recipe.
    """
    checkpoint = open_run(source)
    if checkpoint is not None:
        values, where = checkpoint.manifest["recipe"], str(checkpoint.path)
        if "mim" in values:
            recipe: Any = stored_recipe(values, where)
            encoder = fill(build_objective(recipe), checkpoint).model.encoder  # type: ignore[union-attr]
        else:
            run = FinetunedRun.open(source)
            recipe, encoder = run.recipe, run.module().encoder
        return _frozen(
            encoder, recipe.data.image_size, recipe, f"{checkpoint.path.resolve()} {checkpoint.manifest['files']}"
        )
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"{source}: there is no such run or file")
    name = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
    if recipe_file is None:
        if path.suffix != ".safetensors":
            raise RecipeError(f"{source} does not say what it holds: give --recipe with its model and image size")
        encoder = load(path)
        return FrozenEncoder(encoder, encoder.img_size[0], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), name)
    if "task" in recipe_values(recipe_file):
        recipe = load_finetune_recipe(recipe_file)
        encoder = task_encoder(recipe)
    else:
        recipe = load_recipe(recipe_file, (), Recipe)
        encoder = build_objective(recipe).model.encoder
    load_released(encoder, path)
    return _frozen(encoder, recipe.data.image_size, recipe, name)


def _frozen(encoder: Any, image_size: int, recipe: Any, name: str) -> FrozenEncoder:
    if encoder.num_classes:
        encoder.head = nn.Identity()  # what goes into the head is what is wanted; a ViT's pooling norm belongs to it
    return FrozenEncoder(encoder.eval(), image_size, recipe.data.mean, recipe.data.std, name)
