"""Where a start of a run begins: the checkpoint that it resumes or branches from, and whether it may."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from mimscale.schema import differences
from mimscale.training import checkpoint as checkpoints
from mimscale.training.checkpoint import Checkpoint
from mimscale.training.errors import CheckpointError
from mimscale.training.recipe import RecipeError, RunRecipe, stored_recipe
from mimscale.training.run_folder import DamagedRecipe, RunFolder
from mimscale.training.schedule import rate_of


@dataclass(frozen=True)
class StartingPoint:
    """What a start begins with.

    Attributes:
        source: the checkpoint; ``None`` for a new run.
        resumed: whether it is one of this run, and not of the trunk that the run branches from.
        damaged: what is wrong with newer checkpoints of the run, by step.
    """

    source: Checkpoint | None
    resumed: bool
    damaged: dict[int, list[str]]

    @property
    def step(self) -> int:
        """Batches behind it."""
        return self.source.step if self.source else 0

    @property
    def updates(self) -> int:
        """Updates behind it: fewer than batches where some were left out."""
        return self.source.manifest.get("updates", self.step) if self.source else 0


def starting_point(folder: RunFolder, recipe: RunRecipe) -> StartingPoint:
    """The newest whole checkpoint of the run, else the one that it branches from. Collective.

    Raises:
        CheckpointError: none is whole, or there is no such branch.
    """
    source, damaged = checkpoints.newest_whole(folder.path)
    if source is not None or recipe.train.branch_from is None:
        return StartingPoint(source, source is not None, damaged)
    source, problems = checkpoints.check(checkpoints.branch_source(recipe.train.branch_from))
    if source is None:
        raise CheckpointError(f"train.branch_from: {'; '.join(problems)}")
    return StartingPoint(source, False, {})


def same_past(old: RunRecipe, new: RunRecipe, step: int) -> bool:
    """Whether two runs that differ only in length had the same learning rates in their first ``step`` updates."""
    return all(rate_of(old, s) == rate_of(new, s) for s in range(step))


def _saved(folder: RunFolder, kind: type[RunRecipe], start: StartingPoint) -> RunRecipe | None:
    """The recipe of the run in the folder, if there is one.

    A checkpoint says more surely than ``recipe.yaml`` what was trained; without one, a damaged ``recipe.yaml`` is no run.
    Whoever has removed ``recipe.yaml`` wants no such check.

    Raises:
        RecipeError: it is one of another kind.
    """
    if start.source is not None and start.resumed and os.path.lexists(folder.recipe):
        return _recipe_of(start.source, kind)
    with contextlib.suppress(DamagedRecipe):
        return folder.saved_recipe(kind)
    return None


def _recipe_of(source: Checkpoint, kind: type[RunRecipe]) -> RunRecipe:
    return stored_recipe(source.manifest["recipe"], str(source.path), kind)


def continued(folder: RunFolder, recipe: RunRecipe, start: StartingPoint) -> RunRecipe:
    """``recipe``, but of the keys that have come since (``later``) those that it does not give are as in the run it continues.

    Raises:
        RecipeError: the run is one of another kind.
    """
    before = _recipe_of(start.source, type(recipe)) if start.source else _saved(folder, type(recipe), start)
    for name, leaf in (path.split(".") for path in recipe.later):
        section = getattr(recipe, name)
        if before is not None and leaf not in section.model_fields_set:
            kept = section.model_copy(update={leaf: getattr(getattr(before, name), leaf)})
            recipe = recipe.model_copy(update={name: kept})
    return recipe


def check_resumable(folder: RunFolder, recipe: RunRecipe, start: StartingPoint) -> None:
    """Raise unless ``recipe`` continues the run that is in the folder.

    Raises:
        RecipeError: it differs in something that changes losses; each key is listed with both values.
    """
    saved = _saved(folder, type(recipe), start)
    if saved is None:
        return
    step = start.step
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
    trunk = _recipe_of(source, type(recipe))
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
