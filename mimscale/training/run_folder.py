"""The run folder: what belongs to one run, and whether a second start may go on with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimscale.schema import differences, read_yaml
from mimscale.training.errors import CheckpointError
from mimscale.training.recipe import AnyRecipe, RecipeError, RunRecipe, stored_recipe
from mimscale.training.schedule import learning_rate

if TYPE_CHECKING:
    from mimscale.training.checkpoint import Checkpoint

MANIFEST = "checkpoint.json"  # of a checkpoint that is whole
_STEP = re.compile(r"step_(\d{8,})")


def write_beside(path: Path, text: str) -> None:
    """Replace a text file as a whole: readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    beside.replace(path)


def step_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` updates."""
    return f"step_{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint folder in a run, ascending; whether they are whole is not looked at."""
    folder = run / "checkpoints"
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def read_recipe_value(path: Path, key: str) -> Any:
    """One dotted key of a written recipe, of whatever kind; ``None`` where it has no such key."""
    value: Any = read_yaml(path, "recipe", RecipeError)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


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
            RecipeError: the file was changed into something that is no recipe.
        """
        if not self.recipe.exists():
            return None
        try:
            values = read_yaml(self.recipe, "recipe", RecipeError)
        except RecipeError as error:
            raise RecipeError(f"{error}; restore it, or choose another --output") from None
        return stored_recipe(values, str(self.recipe), schema)

    def describe(self, recipe: RunRecipe, ds_config: dict[str, Any]) -> None:
        """Write the resolved recipe and DeepSpeed configuration."""
        head = "# The resolved recipe of this run; a second start with the same one resumes it.\n"
        write_beside(self.recipe, head + recipe.to_yaml())
        write_beside(self.ds_config, json.dumps(ds_config, indent=2) + "\n")

    def finished(self) -> dict[str, Any] | None:
        """The result of a run that has ended, else ``None``."""
        try:
            return json.loads(self.result.read_text())
        except (FileNotFoundError, ValueError):
            return None


def same_past(old: RunRecipe, new: RunRecipe, step: int) -> bool:
    """Whether two runs that differ only in length had the same learning rates in their first ``step`` updates."""
    return all(
        learning_rate(old.schedule, old.learning_rate, old.train.iterations, s)
        == learning_rate(new.schedule, new.learning_rate, new.train.iterations, s)
        for s in range(step)
    )


def check_resumable(folder: RunFolder, recipe: RunRecipe, step: int) -> None:
    """Raise unless ``recipe`` continues the run that is in the folder.

    Raises:
        RecipeError: it differs in something that changes losses; each key is listed with both values.
    """
    saved = folder.saved_recipe(type(recipe))
    if saved is None:
        return
    differing = differences(saved, recipe, recipe.free_keys)
    longer = not differences(saved, recipe, recipe.free_keys | {"train.iterations"})
    if differing and not (longer and same_past(saved, recipe, step)):
        hint = "choose another --output"
        if longer:
            hint += f", with train.branch_from={folder.path}@STEP for a step before the learning rates part"
        raise RecipeError(
            f"{folder.path} holds a run of another recipe ({'; '.join(differing)}: there against here); {hint}"
        )


def check_branch(source: Checkpoint, recipe: RunRecipe) -> None:
    """Raise unless a run of ``recipe`` has the same past as the checkpoint it branches from.

    Raises:
        RecipeError: the trunk was another recipe, or had other learning rates up to the branch.
    """
    trunk = stored_recipe(source.manifest["recipe"], str(source.path), type(recipe))
    differing = differences(trunk, recipe, recipe.branch_keys)
    if differing:
        raise RecipeError(
            f"train.branch_from={recipe.train.branch_from}: the trunk is of another recipe "
            f"({'; '.join(differing)}: there against here)"
        )
    if source.step > recipe.train.iterations:
        raise RecipeError(
            f"train.branch_from={recipe.train.branch_from} lies behind train.iterations={recipe.train.iterations}"
        )
    if not same_past(trunk, recipe, source.step):
        raise RecipeError(
            f"train.branch_from={recipe.train.branch_from}: a run of {recipe.train.iterations} iterations has other "
            f"learning rates before step {source.step} than its trunk of {trunk.train.iterations}; branch from an "
            f"earlier step"
        )


def check_data(source: Checkpoint, build: str, shards: str) -> None:
    """Raise unless the shards are the ones that the checkpoint was trained on.

    Raises:
        CheckpointError: they are of another build, so the order of samples would silently change.
    """
    trained_on = source.manifest["data"]["build"]
    if trained_on != build:
        raise CheckpointError(
            f"{source.path} was trained on shards of build {trained_on}, but data.shards={shards} is build {build}; "
            f"point data.shards at the same build, or choose another --output"
        )
