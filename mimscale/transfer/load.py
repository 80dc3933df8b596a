"""Trained runs, of any kind, in one process: their modules, their encoders, and how their images are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimscale.data.decode import rgb_of
from mimscale.data.stream.augment import resize_and_centre_crop, shorter_side
from mimscale.models.encoder import Encoder
from mimscale.models.preprocessing import Preprocessing, preprocessing_of
from mimscale.models.weights.export import load, remade, without_head
from mimscale.models.weights.released import all_weights
from mimscale.training.checkpoint import Checkpoint, open_newest
from mimscale.training.errors import CheckpointError
from mimscale.training.pretraining.module import build_objective, normalise
from mimscale.training.recipe import RecipeError, RunRecipe, stored_recipe
from mimscale.training.run_folder import MANIFEST
from mimscale.transfer.recipe import find_task
from mimscale.wording import counted, printable

Picture = Image.Image | np.ndarray


@dataclass(frozen=True)
class LoadedRun:
    """One checkpoint of a run.

    Attributes:
        checkpoint: seen to be whole.
        recipe: the run's, of pre-training or of its task.
        kind: the class of its fine-tuning task; ``None`` for a pre-training.
    """

    checkpoint: Checkpoint
    recipe: Any
    kind: Any

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.checkpoint.path.parent.parent

    @property
    def task(self) -> Any:
        """The class of its fine-tuning task.

        Raises:
            RecipeError: it is a pre-training.
        """
        if self.kind is None:
            raise RecipeError(
                f"{self.folder} is a pre-training, which has no head: probe it (mimscale probe), or fine-tune from it"
            )
        return self.kind

    @property
    def preprocessing(self) -> Preprocessing:
        """How the run makes the images that it validates on; for a task on images of any size, its training images' size."""
        data = self.recipe.data
        size, says = data.image_size, hasattr(data, "resize_shorter")
        shorter = shorter_side(size, data.resize_shorter) if says else size
        return Preprocessing(size, shorter, data.mean, data.std, getattr(data, "interpolation", "bilinear"))

    def build(self) -> Any:
        """What was trained, with fresh weights, wherever torch makes them; it has an ``encoder``.

        Raises:
            RecipeError: its recipe does not build.
        """
        if self.kind is None:
            module: Any = build_objective(self.recipe)
        else:
            module = self.kind.module_of(self.recipe, self.checkpoint.manifest["data"])
        module.encoder.preprocessing = self.preprocessing
        return module

    def module(self) -> Any:
        """What was trained, as a whole, in eval mode on the CPU: weights, or their moving average, and statistics.

        Raises:
            CheckpointError: the checkpoint is one of another model.
            RecipeError: its recipe does not build.
        """
        # On the meta device first: a recipe may ask for a model that the checkpoint does not hold, and no memory could.
        shapes = {name: tuple(part.shape) for name, part in all_weights(self.meta_module).items()}
        self.checkpoint.check_shapes(shapes)
        needed = 4 * sum(math.prod(shape) for shape in shapes.values())
        held = sum(entry["bytes"] for entry in self.checkpoint.manifest["files"].values())
        if needed > held:
            raise CheckpointError(
                f"{printable(self.checkpoint.path)} holds {counted(held, 'byte')}, and its weights need {needed:,}"
            )
        module = self.build()
        with torch.no_grad():
            for name, part in all_weights(module).items():
                stored = self.checkpoint.trained(name)
                if stored.shape != part.shape:
                    raise CheckpointError(
                        f"{printable(self.checkpoint.path)}: {printable(name)} has the shape {tuple(stored.shape)}, not "
                        f"{tuple(part.shape)} as its {MANIFEST} says"
                    )
                part.copy_(stored)
        return module.eval()

    @cached_property
    def meta_module(self) -> Any:
        """What was trained, on the meta device: names and shapes alone."""
        with torch.device("meta"):
            return self.build()

    def encoder(self) -> Encoder:
        """The trained encoder, with its classifier where it has one."""
        return self.module().encoder

    @property
    def prefix(self) -> str:
        """What the names of the encoder's tensors begin with in the checkpoint."""
        module = self.meta_module
        return next(f"{name}." for name, part in module.named_modules() if part is module.encoder)


def is_run(source: str | Path) -> bool:
    """Whether ``source`` is RUN or RUN@STEP, rather than a file."""
    return _run_and_step(str(source)) is not None


def _run_and_step(source: str) -> tuple[Path, int | None] | None:
    run, at, step = source.rpartition("@")
    if at and step.isdigit() and Path(run).is_dir():
        return Path(run), int(step)
    return (Path(source), None) if Path(source).is_dir() else None


def folder_of(source: str | Path) -> Path:
    """Where what is made of a run or a file goes: its run folder, or the file's."""
    run = _run_and_step(str(source))
    return run[0] if run else Path(source).parent


def load_run(source: str | Path, step: int | None = None, data: dict[str, Any] | None = None) -> LoadedRun:
    """Open a pre-training or a fine-tuning.

    Args:
        source: RUN or RUN@STEP.
        step: which checkpoint of a RUN; the newest if ``None``.
        data: keys of the recipe's ``data`` section to change.

    Raises:
        CheckpointError: the run has no such checkpoint, or it is damaged.
        RecipeError: there is no such run, or its recipe is none.
    """
    found = _run_and_step(str(source))
    if found is None:
        raise RecipeError(f"there is no run {source}")
    checkpoint = open_newest(found[0], found[1] if step is None else step)
    values, where = checkpoint.manifest.get("recipe"), str(checkpoint.path)
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        raise CheckpointError(f"{printable(where)} holds no recipe with a section 'data'; choose another with --step")
    values = {**values, "data": {**values["data"], **(data or {})}}
    RunRecipe.prepare(values)  # a task may be a plug-in's
    if "mim" in values:
        return LoadedRun(checkpoint, stored_recipe(values, where), None)
    kind = find_task(values.get("task"))
    trained_on = checkpoint.manifest.get("data")
    classes = trained_on.get("classes", ()) if isinstance(trained_on, dict) else None
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(
            f"{printable(where)} does not say what data it was trained on; choose another with --step"
        )
    return LoadedRun(checkpoint, stored_recipe(values, where, kind.schema), kind)


def load_encoder(source: str | Path, **overrides: Any) -> Encoder:
    """The encoder of a run or of an exported file; see :func:`mimscale.load`."""
    if not is_run(source):
        if not Path(source).exists():
            raise ValueError(f"there is no run or file {source}")
        return load(source, **overrides)
    run = load_run(source)
    trained = run.encoder()
    if not overrides:
        return without_head(trained)
    return remade(trained.made_from, overrides, all_weights(trained), str(source), run.preprocessing)


class Transform:
    """Pictures to images for an encoder, made as its run or file says.

    Args:
        encoder: as :func:`mimscale.load` gives it.
    """

    def __init__(self, encoder: Any):
        self.preprocessing = preprocessing_of(encoder)

    def __call__(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """Resize, cut and normalise.

        Args:
            pictures: a Pillow image of any mode, or pixels, uint8 (height, width, 3); or several of them.

        Returns:
            fp32 (3, S, S); of several (N, 3, S, S).

        Raises:
            ValueError: pixels of another kind or shape.
        """
        if isinstance(pictures, Image.Image | np.ndarray):
            return self([pictures])[0]
        how = self.preprocessing
        crops = [
            resize_and_centre_crop(_pixels(picture), how.resize_shorter, how.image_size, how.interpolation)
            for picture in pictures
        ]
        return normalise(torch.stack(crops), how.mean, how.std)


def _pixels(picture: Any) -> np.ndarray:
    if isinstance(picture, Image.Image):
        return rgb_of(picture)
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        what = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise ValueError(f"a picture is a Pillow image, or an array of uint8 (height, width, 3), not {what}")
    return picture
