"""What the fine-tuning tasks share: where weights come from, how rates fall, and the shape of ``result.json``.

A task is a subclass with

- ``schema``: its kind of recipe, a subclass of ``FinetuneRecipe``; ``metric``: the validation figure that counts, of which
  ``validate`` gives ``val_METRIC``, larger being better;
- ``build()``: a module whose ``encoder`` comes from ``self.encoder(num_classes)``; all other modules are new;
- ``module_of(recipe, data)``: the same module without the data, to be filled with a checkpoint's weights, and
  ``say(recipe, data, module, pixels)``: what it makes of one image, for ``mimscale predict``;
- ``example(images)``, where a batch of any content keeps the same memory, so that a micro-batch of "auto" can be bounded;
- ``batches``, ``validate``, ``describe``, ``data_state`` and ``check_data`` of :class:`mimscale.training.task.Task`.

Everything in the encoder but a head starts from ``finetune.from``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from mimscale.models.weights.released import CheckpointMismatch
from mimscale.training.errors import CheckpointError
from mimscale.training.loop import run
from mimscale.training.planning.counting import kept_bytes, largest_micro_batch
from mimscale.training.ranks import Ranks
from mimscale.training.task import Task
from mimscale.transfer.layer_decay import layer_decay_groups
from mimscale.transfer.recipe import FinetuneRecipe, find_task
from mimscale.transfer.weights import encoder_weights, task_encoder


def classes_in(data: dict[str, Any]) -> list[str]:
    """The classes that a checkpoint was trained on, from what it says of its data.

    Raises:
        CheckpointError: it names none.
    """
    classes = data.get("classes")
    if not classes:
        raise CheckpointError("the checkpoint does not say which classes it was trained on; choose another with --step")
    return list(classes)


class TransferTask(Task):
    """One fine-tuning task, for one recipe."""

    schema: ClassVar[type[FinetuneRecipe]]
    metric: ClassVar[str]

    recipe: FinetuneRecipe

    def __init__(self, recipe: FinetuneRecipe):
        self.recipe = recipe

    def encoder(self, num_classes: int = 0) -> Any:
        """The recipe's encoder, with a classifier of ``num_classes`` outputs where that is not 0."""
        return task_encoder(self.recipe, num_classes)

    @classmethod
    @abstractmethod
    def module_of(cls, recipe: Any, data: dict[str, Any]) -> nn.Module:
        """The module of a run, from its recipe and what its checkpoint says of the data (``data_state``)."""

    @classmethod
    @abstractmethod
    def say(cls, recipe: Any, data: dict[str, Any], module: Any, pixels: np.ndarray) -> tuple[str, Image.Image | None]:
        """What a trained module makes of an image, uint8 (height, width, 3): in words, and as a picture where one helps."""

    def check_same_classes(self, data: dict[str, Any]) -> None:
        """Raise unless this task's data has the classes that a checkpoint was trained on.

        Raises:
            ShardError: it has others, so that labels would mean something else.
        """

    def example(self, images: int) -> tuple[Tensor, ...] | None:
        """A batch of the module's arguments, to count memory with; ``None`` where its work depends on what is in them."""
        return None

    @override
    def largest_micro_batch(self, config: dict[str, Any], ranks: Ranks) -> int | None:
        with torch.device("meta"):
            if self.example(1) is None:
                return None
            sizes = [p.numel() for p in self.build().parameters()]
        recompute = bool(self.recipe.train.activation_checkpointing)
        return largest_micro_batch(
            sizes, lambda bf16: kept_bytes(self.build, lambda: self.example(2) or (), recompute, bf16), config, ranks
        )

    @override
    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        return layer_decay_groups(module, self.recipe.finetune.layer_decay, self.recipe.optimizer.weight_decay)

    @override
    def starting_weights(self) -> Callable[[str], Tensor | None] | None:
        source = self.recipe.finetune.source
        if source is None:
            return None
        with torch.device("meta"):
            encoder: Any = self.build().encoder
        try:
            weights = encoder_weights(source, encoder)
        except CheckpointMismatch as error:
            raise CheckpointError(f"finetune.from: {error}") from None
        return lambda name: weights(name.removeprefix("encoder.")) if name.startswith("encoder.") else None

    @override
    def result(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        last = super().result(records)["validation"]
        return {
            "task": self.recipe.task,
            "metric": self.metric,
            "value": last.get(f"val_{self.metric}") if last else None,
            "from": self.recipe.finetune.source,
            "validation": last,
        }


def finetune(recipe: FinetuneRecipe, ds_config: dict[str, Any], output: str) -> dict[str, Any]:
    """Fine-tune, or resume fine-tuning, in the run folder ``output``; see :func:`mimscale.training.loop.run`."""
    kind = find_task(recipe.task)
    return run(lambda: kind(recipe), ds_config, output)
