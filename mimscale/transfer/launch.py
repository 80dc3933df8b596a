"""The command line of the fine-tuning launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from mimscale.training.launch import arguments, launch
from mimscale.training.recipe import RunRecipe


def main(argv: list[str] | None = None) -> NoReturn:
    """Fine-tune, as ``launchers/finetune.py`` says."""
    args = arguments("finetune.py", "Fine-tune an encoder on a task.", argv)

    def schema() -> type[RunRecipe]:
        from mimscale.transfer.recipe import recipe_schema

        return recipe_schema(args.recipe, args.overrides)

    def trainer() -> Callable[[Any, dict[str, Any], str], Any]:
        from mimscale.transfer.task import finetune

        return finetune

    launch(args, schema, trainer)
