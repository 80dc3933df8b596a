"""Fine-tuning recipes: what they all hold, and how a file's ``task`` finds its kind.

A recipe file says ``task: classification``, or another that is registered. Each task is a subclass of ``TransferTask`` (see
``mimscale.transfer.task``) whose ``schema`` is a subclass of :class:`FinetuneRecipe` with the sections of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from mimscale.models.settings import EncoderSettings
from mimscale.registry import RegistryError, encoders, tasks
from mimscale.resources import FINETUNE_RECIPES
from mimscale.schema import ChosenBy, Section, Share, apply_override, check_kind, key, parse_override
from mimscale.training.recipe import ANY_ENCODER, RecipeError, RunRecipe, load_recipe, recipe_values


class Finetune(Section):
    """Where the weights come from, and how the learning rate falls towards the input."""

    source: str | None = key(
        None,
        "RUN or RUN@STEP of a pre-training or fine-tuning, a safetensors file, or the authors' .pth file; null trains from "
        "scratch.",
        alias="from",
    )
    layer_decay: Share = key(
        1.0, "What a layer's learning rate is of the next layer's.", "ours; section 3.5 has one for each task and size"
    )
    layer_decay_of: Literal["peak", "rate"] = key(
        "peak",
        "What it multiplies: the peak alone, so that all layers share the first and the last rate; or the rate of every step, "
        "as MAE's and mmsegmentation's fine-tuning do.",
        "released code",
    )


def transfer_settings(name: str) -> type[EncoderSettings]:
    """The ``model`` section of a fine-tuning of that encoder.

    Raises:
        RegistryError: there is none.
    """
    section = encoders.settings(name)
    return section.transfer or section


class FinetuneRecipe(RunRecipe):
    """What the recipes of all fine-tuning tasks hold; each adds a ``data`` section and what else it needs.

    ``pad_windows``: the task's images may have any size, so SwinV2 pads maps that the window does not divide.
    """

    noun = "fine-tuning recipe"
    kind = "finetune"
    files = FINETUNE_RECIPES
    former: ClassVar[dict[str, Any]] = {
        f"model.{name}": value
        for name, value in {
            **ANY_ENCODER,
            "window_size": 14,
            "pretrained_image_size": None,
            "extra_norm_every": 0,
        }.items()
    }
    added = RunRecipe.added | {"finetune.layer_decay_of": "peak", "model.learned_positions": False}
    later = (*RunRecipe.later, "finetune.layer_decay_of")
    pad_windows: ClassVar[bool] = False

    task: str = key(..., "Which task.", "section 3.5")
    model: Annotated[EncoderSettings, ChosenBy("name", None, transfer_settings, encoders.names)]
    finetune: Finetune = Finetune()

    @property
    def scales_peak_alone(self) -> bool:
        """See :attr:`mimscale.training.recipe.RunRecipe.scales_peak_alone`."""
        return self.finetune.layer_decay_of == "peak"

    @classmethod
    def meant_then(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Runs multiplied every rate."""
        held = values.get("finetune")
        lacks = isinstance(held, dict) and "layer_decay_of" not in held
        return {"finetune.layer_decay_of": "rate"} if lacks else {}


def find_task(name: object) -> Any:
    """The class of the task of that name, a :class:`mimscale.transfer.task.TransferTask`.

    Raises:
        RecipeError: there is none (the nearest is named), or it needs a package that is not installed.
    """
    check_task(name)
    try:
        return tasks.get(str(name))
    except RegistryError as error:
        raise RecipeError(str(error)) from None


def schema_of(name: object) -> type[FinetuneRecipe]:
    """The kind of recipe of the task of that name.

    Raises:
        RecipeError: there is no such task; the nearest is named.
    """
    check_task(name)
    try:
        return tasks.settings(str(name))
    except RegistryError as error:
        raise RecipeError(str(error)) from None


def check_task(name: object) -> None:
    """Raise unless a task is named.

    Raises:
        RecipeError: saying which there are.
    """
    if name is None:
        raise RecipeError(f"a fine-tuning recipe says which 'task' it is for: {', '.join(tasks.names())}")


def task_schemas() -> list[type[FinetuneRecipe]]:
    """The kinds of recipe of all tasks."""
    return [schema_of(name) for name in tasks.names()]


# All tasks' recipes, told apart by their ``task``.
RECIPES = ChosenBy("task", None, schema_of, tasks.names)


def recipe_schema(path: str | Path, overrides: Sequence[str] = ()) -> type[FinetuneRecipe]:
    """The kind of recipe that a file holds.

    Raises:
        RecipeError: it cannot be read, is a file of another kind, or names no known task.
    """
    values = recipe_values(path, FINETUNE_RECIPES)
    check_kind(values, str(path), FinetuneRecipe)
    for override in overrides:
        name, _ = parse_override(override, FinetuneRecipe)
        if name in ("task", "plugins"):
            apply_override(values, override, FinetuneRecipe)
    FinetuneRecipe.prepare(values)  # a task may be a plug-in's
    try:
        return schema_of(values.get("task"))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def load_finetune_recipe(path: str | Path, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """Read a fine-tuning recipe of any task; see :func:`mimscale.training.recipe.load_recipe`."""
    return load_recipe(path, overrides, recipe_schema(path, overrides))
