"""Fine-tuning recipes: what they all hold, and how a file's ``task`` finds its kind.

A recipe file says ``task: classification`` (or another of ``TASKS``). Each task is a subclass of ``TransferTask`` (see
``mimscale.transfer.task``) whose ``schema`` is a subclass of :class:`FinetuneRecipe` with the sections of its own.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mimscale.resources import FINETUNE_RECIPES
from mimscale.schema import ChosenBy, Positive, Section, check_kind, key, parse_override
from mimscale.training.recipe import Model, RecipeError, RunRecipe, load_recipe, recipe_values

# task -> (package, the class in its ``task``, the one in its ``recipe``); imported only when it is the one that is asked for,
# and its recipe alone where nothing is trained.
TASKS = {
    "classification": ("mimscale.transfer.classification", "Classification", "ClassificationRecipe"),
    "detection": ("mimscale.transfer.detection", "Detection", "DetectionRecipe"),
    "segmentation": ("mimscale.transfer.segmentation", "Segmentation", "SegmentationRecipe"),
}


class TransferModel(Model):
    """The encoder, at the task's image size."""

    window_size: Positive = key(14, "SwinV2: side of the attention windows, tokens.", "section 3.5")
    pretrained_image_size: Positive | None = key(
        None, "Side of the images that its positions were trained at, pixels; null for the task's own."
    )
    extra_norm_every: Annotated[int, Field(ge=0)] = key(
        0, "SwinV2: k, for released weights with one more norm after every k-th block of a stage; 0 for none."
    )


class Finetune(Section):
    """Where the weights come from, and how the learning rate falls towards the input."""

    source: str | None = key(
        None,
        "RUN or RUN@STEP of a pre-training or fine-tuning, a safetensors file, or the authors' .pth file; null trains from "
        "scratch.",
        alias="from",
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = key(
        1.0, "What a layer's learning rate is of the next layer's.", "ours; section 3.5 has one for each task and size"
    )


class FinetuneRecipe(RunRecipe):
    """What the recipes of all fine-tuning tasks hold; each adds a ``data`` section and what else it needs.

    ``pad_windows``: the task's images may have any size, so SwinV2 pads maps that the window does not divide.
    """

    noun = "fine-tuning recipe"
    kind = "finetune"
    files = FINETUNE_RECIPES
    pad_windows: ClassVar[bool] = False

    task: str = key(..., "Which task.", "section 3.5")
    model: TransferModel
    finetune: Finetune = Finetune()


def find_task(name: object) -> Any:
    """The class of the task of that name, a :class:`mimscale.transfer.task.TransferTask`.

    Raises:
        RecipeError: there is none (the nearest is named), or it needs a package that is not installed.
    """
    package, attribute, _ = _entry(name)
    try:
        return getattr(import_module(f"{package}.task"), attribute)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mimscale"):
            raise
        raise RecipeError(
            f"task {name} needs {error.name}, which is not installed: pip install 'mimscale[dense]'"
        ) from None


def schema_of(name: object) -> type[FinetuneRecipe]:
    """The kind of recipe of the task of that name.

    Raises:
        RecipeError: there is no such task; the nearest is named.
    """
    package, _, attribute = _entry(name)
    return getattr(import_module(f"{package}.recipe"), attribute)


def _entry(name: object) -> tuple[str, str, str]:
    if name is None:
        raise RecipeError(f"a fine-tuning recipe says which 'task' it is for: {', '.join(TASKS)}")
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), list(TASKS), n=1, cutoff=0.6)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise RecipeError(f"unknown task '{name}'; {hint}There are {', '.join(TASKS)}")
    return TASKS[str(name)]


def task_schemas() -> list[type[FinetuneRecipe]]:
    """The kinds of recipe of all tasks."""
    return [schema_of(name) for name in TASKS]


# All tasks' recipes, told apart by their ``task``.
RECIPES = ChosenBy("task", None, schema_of, lambda: list(TASKS))


def recipe_schema(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> type[FinetuneRecipe]:
    """The kind of recipe that a file holds.

    Raises:
        RecipeError: it cannot be read, is a file of another kind, or names no known task.
    """
    values = recipe_values(path, FINETUNE_RECIPES)
    check_kind(values, str(path), FinetuneRecipe)
    name = values.get("task")
    for override in overrides:
        path_set, text = parse_override(override, FinetuneRecipe)
        name = text if path_set == "task" else name
    try:
        return schema_of(name)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def load_finetune_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> FinetuneRecipe:
    """Read a fine-tuning recipe of any task; see :func:`mimscale.training.recipe.load_recipe`."""
    return load_recipe(path, overrides, recipe_schema(path, overrides))
