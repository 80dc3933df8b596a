"""One start of a fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from mimscale.training.launch.start import Start, launch
from mimscale.training.recipe import RunRecipe


def launch_finetuning(start: Start) -> NoReturn:
    """Fine-tune as ``start`` says, and exit."""

    def schema() -> type[RunRecipe]:
        from mimscale.transfer.recipe import recipe_schema

        return recipe_schema(start.recipe, start.overrides)

    def trainer() -> Callable[[Any, dict[str, Any], str], Any]:
        from mimscale.transfer.task import finetune

        return finetune

    launch(start, schema, trainer)
