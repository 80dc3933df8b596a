"""The run folder: what belongs to one run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mimscale.files import read_json, set_aside, write_text
from mimscale.schema import differences, read_yaml
from mimscale.training.recipe import AnyRecipe, RecipeError, RunRecipe, stored_recipe
from mimscale.wording import printable

# What a checkpoint says of itself; a folder without it is none.
MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step_([0-9]{8,13})")
# No run is longer; a name with a larger number is somebody else's.
MOST_STEPS = 10**12


def step_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` updates."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder name; ``None`` for any other name."""
    match = _NAME.fullmatch(name)
    step = int(match[1]) if match else None
    return step if step is not None and step <= MOST_STEPS and step_name(step) == name else None


def saved_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint folder in a run, ascending; whether they are whole is not looked at.

    What has such a name and holds nothing of a checkpoint is somebody else's, and is left out.
    """
    folder = run / "checkpoints"
    named = ((step_of(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(step for step, path in named if step is not None and _holds_parts(path))


def _holds_parts(folder: Path) -> bool:
    """Whether there is something of a checkpoint; where that cannot be seen, it counts as one, and as damaged."""
    try:
        return any(path.name == MANIFEST or path.suffix == ".safetensors" for path in folder.iterdir())
    except NotADirectoryError:
        return False
    except OSError:
        return True


def read_recipe_value(path: Path, key: str) -> Any:
    """One dotted key of a written recipe, of whatever kind; ``None`` where it has no such key."""
    value: Any = read_yaml(path, "recipe", RecipeError)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


class DamagedRecipe(RecipeError):
    """A run's ``recipe.yaml`` that is no YAML of sections."""


class RunFolder:
    """Paths of a run's files."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.ds_config = self.path / "ds_config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.heartbeat = self.path / "heartbeat"
        self.curves = self.path / "curves.png"
        self.result = self.path / "result.json"

    def saved_recipe(self, schema: type[AnyRecipe]) -> AnyRecipe | None:
        """The recipe that the run was started with, or ``None`` for a new run.

        Raises:
            DamagedRecipe: the file holds no recipe of any kind.
            RecipeError: it is one of another kind, or was changed into something that is none.
        """
        if not os.path.lexists(self.recipe):
            return None
        values = read_yaml(self.recipe, "recipe", DamagedRecipe)
        return stored_recipe(values, str(self.recipe), schema)

    def describe(self, recipe: RunRecipe, ds_config: dict[str, Any]) -> list[str]:
        """Write the resolved recipe and DeepSpeed configuration.

        Returns:
            What was damaged and where it is kept, for people.

        Raises:
            OSError: a file cannot be written.
        """
        damaged = []
        if why := self._unfit(recipe):
            damaged.append(f"{why}; kept as {printable(set_aside(self.recipe))}")
        head = "# The resolved recipe of this run; a second start with the same one resumes it.\n"
        write_text(self.recipe, head + recipe.to_yaml())
        write_text(self.ds_config, json.dumps(ds_config, indent=2) + "\n")
        return damaged

    def _unfit(self, recipe: RunRecipe) -> str:
        """Why ``recipe.yaml`` is not that of a run which ``recipe`` continues; empty where it is, or is not there."""
        try:
            saved = self.saved_recipe(type(recipe))
        except RecipeError as error:
            return printable(" ".join(str(error).split()), 600)
        differing = differences(saved, recipe, recipe.free_keys | {"train.iterations"}) if saved else []
        where = f"{printable(self.recipe)} is not what the checkpoint was trained with"
        return f"{where} ({'; '.join(differing)}: there against here)" if differing else ""

    def finished(self) -> dict[str, Any] | None:
        """The result of a run that has ended, else ``None``, also where the file is damaged."""
        try:
            found = read_json(self.result)
        except OSError:
            return None
        return found if isinstance(found, dict) else None

    def finish(self, result: dict[str, Any]) -> str:
        """Write the result.

        Returns:
            What was damaged in its place and where that is kept; empty where nothing was.

        Raises:
            OSError: it cannot be written.
        """
        damaged = ""
        if os.path.lexists(self.result) and self.finished() is None:
            damaged = f"{printable(self.result)} is damaged; kept as {printable(set_aside(self.result))}"
        write_text(self.result, json.dumps(result, indent=2) + "\n")
        return damaged
