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
from mimscale.schema import Positive, Section, apply_override
from mimscale.training.recipe import FREE_KEYS, Model, RecipeError, RunRecipe, load_recipe, recipe_values

# task -> (package, the class in its ``task``, the one in its ``recipe``); imported only when it is the one that is asked for,
# and its recipe alone where nothing is trained.
TASKS = {
    "classification": ("mimscale.transfer.classification", "Classification", "ClassificationRecipe"),
    "detection": ("mimscale.transfer.detection", "Detection", "DetectionRecipe"),
    "segmentation": ("mimscale.transfer.segmentation", "Segmentation", "SegmentationRecipe"),
}


class TransferModel(Model):
    """The encoder at the task's size.

    ``pretrained_image_size`` is the side of the images that its positions were trained at (ViT: ``null`` is the task's own).
    SwinV2's position bias was trained in windows of ``pretrained_window_size``, clipped to the maps of those images; four
    numbers give the windows of the stages themselves, 0 the task's own. ``extra_norm_every`` is for released weights that
    have such norms.
    """

    window_size: Positive = 14
    pretrained_image_size: Positive | None = None
    extra_norm_every: Annotated[int, Field(ge=0)] = 0


class Finetune(Section):
    """Where the weights come from, and how the learning rate falls towards the input.

    ``from``: ``RUN`` or ``RUN@STEP``, a pre-training or fine-tuning run of mimscale; or a FILE, safetensors or the
    authors' ``.pth``; ``null`` trains from scratch. A layer's learning rate is ``layer_decay`` times that of the next.
    """

    source: str | None = Field(default=None, alias="from")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0


class FinetuneRecipe(RunRecipe):
    """What the recipes of all fine-tuning tasks hold; each adds a ``data`` section and what else it needs.

    ``pad_windows``: the task's images may have any size, so SwinV2 pads maps that the window does not divide.
    """

    noun = "fine-tuning recipe"
    free_keys = FREE_KEYS
    files = FINETUNE_RECIPES
    pad_windows: ClassVar[bool] = False

    task: str
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
        near = difflib.get_close_matches(str(name), list(TASKS), n=1, cutoff=0.0)[0]
        raise RecipeError(f"unknown task '{name}'; did you mean '{near}'? There are {', '.join(TASKS)}")
    return TASKS[str(name)]


def recipe_schema(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> type[FinetuneRecipe]:
    """The kind of recipe that a file holds.

    Raises:
        RecipeError: it cannot be read, or names no known task.
    """
    name = recipe_values(path, FINETUNE_RECIPES).get("task")
    for override in overrides:
        if override.partition("=")[0] == "task":
            values: dict = {}
            apply_override(values, override, FinetuneRecipe)
            name = values["task"]
    return schema_of(name)


def load_finetune_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> FinetuneRecipe:
    """Read a fine-tuning recipe of any task; see :func:`mimscale.training.recipe.load_recipe`."""
    return load_recipe(path, overrides, recipe_schema(path, overrides))
