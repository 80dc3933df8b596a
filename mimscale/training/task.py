"""What the loop can train: a task brings its model, its data and its validation; the loop brings everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from mimscale.training.pictures import loss_curves
from mimscale.training.ranks import Ranks
from mimscale.training.recipe import RunRecipe

if TYPE_CHECKING:
    from mimscale.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class TaskBatch:
    """One rank's share of a global batch.

    ``tensors`` are the module's arguments; the first dimension of each is this rank's images. ``skipped`` are damaged
    samples that others stand in for, with the reason.
    """

    tensors: tuple[Tensor, ...]
    keys: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class ValidationResult:
    """A validation: the figures for ``metrics.jsonl`` (keys ``val_...``), one line to report, pictures by name."""

    record: dict[str, float]
    text: str
    pictures: dict[str, Image.Image] = field(default_factory=dict)


class Evaluator(Protocol):
    """Who runs a module on batches: the engine in training, or a plain model.

    ``ranks`` says which of how many it is (``rank``, ``world_size``, ``is_first``) and its ``device``; ``micro`` is the
    batch it trains with; ``evaluate`` gives the module's eval-mode outputs, each on ``device``.
    """

    ranks: Ranks
    micro: int
    module: nn.Module

    def evaluate(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """The module's outputs in eval mode for one batch."""


class PlainEvaluator:
    """A module by itself, as an :class:`Evaluator`.

    Args:
        module: goes to the ranks' device, in eval mode.
        batch: images of one rank's batch.
        ranks: who evaluates together; by default this process alone, on the first GPU or the CPU.
    """

    def __init__(self, module: nn.Module, batch: int, ranks: Ranks | None = None):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.ranks = ranks or Ranks(0, 1, 0, 1, device)
        self.module, self.micro = module.to(self.ranks.device).eval(), batch

    def evaluate(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """The module's outputs in eval mode for one batch."""
        with torch.no_grad():
            return self.module(*(tensor.to(self.ranks.device) for tensor in batch))


class Task(ABC):
    """One kind of training, for one recipe.

    All methods are called on every rank; those that are collective say so.
    """

    recipe: RunRecipe
    # Floating-point operations of one image, forward and backward.
    flops_per_image: int
    # Of a moving average of the weights, which validation then uses; None for none.
    average_decay: float | None = None

    @abstractmethod
    def build(self) -> nn.Module:
        """The module to train, called where its parameters shall live.

        In training mode it maps a batch's tensors to the mean loss (a scalar tensor), in eval mode to a tuple of tensors.
        Its ``encoder`` speaks timm's dialect. ``set_grad_checkpointing(enable, **options)`` has all blocks recomputed in the
        backward pass; they say so by an attribute ``checkpoint`` that is not ``None``.
        """

    @abstractmethod
    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """AdamW's parameter groups; ``lr_scale`` in one is of the schedule's rate."""

    @abstractmethod
    def batches(self, step: int, ranks: Ranks) -> Iterator[TaskBatch]:
        """This rank's share of every global batch from ``step`` on, the first one after ``step`` updates.

        Raises:
            RankLocalError: reading failed on this rank.
        """

    @abstractmethod
    def validate(self, engine: Evaluator, step: int) -> ValidationResult | None:
        """Figures on held-out data; ``None`` where there is none. Collective; only the first rank's answer is used."""

    @abstractmethod
    def describe(self) -> str:
        """What is trained on what, in a few words, for the first line of the log."""

    def notices(self) -> list[str]:
        """What is odd about the data or the settings, a line each, for the log's first lines; none by default."""
        return []

    @abstractmethod
    def data_state(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of the data after ``step`` updates: which, and how far into it."""

    @abstractmethod
    def check_data(self, source: Checkpoint) -> None:
        """Raise unless the data is the one that ``source`` was trained on.

        Raises:
            CheckpointError: it is other data, so the order of samples would silently change.
        """

    def starting_weights(self) -> Callable[[str], Tensor | None] | None:
        """Weights that a new run begins with, by parameter name (``None`` keeps the initial one); ``None`` for none."""
        return None

    def largest_micro_batch(self, config: dict[str, Any], ranks: Ranks) -> int | None:
        """Bound for a micro-batch of ``"auto"``: what fits this rank's free memory; ``None`` for no bound."""
        return None

    def result(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """The task's own entries of ``result.json``, from all lines of ``metrics.jsonl``."""
        validations = [record for record in records if any(key.startswith("val_") for key in record)]
        return {"validation": validations[-1] if validations else None}

    def draw_curves(self, records: list[dict[str, Any]], path: Path) -> None:
        """Draw the run's curves."""
        loss_curves(records, path)
