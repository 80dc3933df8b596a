"""A fine-tuned model on held-out data, once more or on other data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mimscale.data import ShardError
from mimscale.files import write_text
from mimscale.models.weights.released import load_released
from mimscale.schema import apply_override, find, parse_override
from mimscale.training.engine import start_ranks, stop_ranks
from mimscale.training.pictures import save_png
from mimscale.training.recipe import RecipeError
from mimscale.training.run_folder import step_name
from mimscale.training.task import PlainEvaluator
from mimscale.transfer.load import is_run, load_run
from mimscale.transfer.recipe import FinetuneRecipe, find_task, load_finetune_recipe, task_schemas


def evaluate(
    source: str, overrides: list[str], recipe_file: Path | None, batch: int, output: Path
) -> dict[str, Any] | None:
    """Validate a run's or a file's model as its training would.

    Args:
        source: RUN, RUN@STEP, or a released FILE, which takes a recipe.
        overrides: ``data.KEY=VALUE``.
        recipe_file: for a FILE: a fine-tuning recipe that describes it.
        batch: images of one rank's batch.
        output: folder for ``result.json`` and pictures.

    Returns:
        What was written to ``result.json``; ``None`` on other ranks than the first.

    Raises:
        RecipeError, CheckpointError, ShardError, ValueError: what does not fit.
    """
    values = _data_section(overrides)
    if is_run(source):
        run = load_run(source, data=values)
        task, module, step = run.task(run.recipe), run.module(), run.checkpoint.step
        task.check_same_classes(run.checkpoint.manifest["data"])
    else:
        if recipe_file is None:
            raise RecipeError(
                f"{source} is no run: a file of weights takes --recipe, a fine-tuning recipe of its model"
            )
        recipe = load_finetune_recipe(recipe_file, overrides)
        task, step = find_task(recipe.task)(recipe), 0
        module = task.build()
        load_released(module.encoder, source)
    ranks = start_ranks()
    try:
        found = task.validate(PlainEvaluator(module, batch, ranks), step)
        if found is None:
            raise ShardError("there are no held-out images; data.validation=FRACTION names other ones")
        if not ranks.is_first:
            return None
        record = {"step": step, **found.record}
        result = {"source": source, **task.result([record])}
        write_text(output / "result.json", json.dumps(result, indent=2) + "\n")
        for name, picture in found.pictures.items():
            save_png(picture, output / name / f"{step_name(step)}.png")
        print(found.text)
        print(f"{output / 'result.json'}, and pictures beside it")
        return result
    finally:
        stop_ranks()


def _data_section(overrides: list[str]) -> dict[str, Any]:
    """``data.KEY=VALUE`` pairs as a mapping.

    Raises:
        RecipeError: a pair of another form, or a key that no task has.
    """
    values: dict[str, Any] = {}
    schemas = task_schemas()
    for text in overrides:
        path, _ = parse_override(text, FinetuneRecipe)
        if not path.startswith("data."):
            raise RecipeError(
                f"'{text}' is not data.KEY=VALUE: an evaluation changes what is evaluated on, not the model"
            )
        apply_override(values, text, next((schema for schema in schemas if find(schema, path)), schemas[0]))
    return values.get("data", {})
