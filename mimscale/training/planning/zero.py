"""The ways to train a model on given GPUs, stage by stage of ZeRO: what each holds, and whether that fits."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale.training.ds_config import reconcile, split_batch
from mimscale.training.metrics import MetricsLog
from mimscale.training.planning.memory import RankMemory, micro_batch_that_fits, plan_rank
from mimscale.training.recipe import Recipe, RecipeError
from mimscale.wording import printable

# (ZeRO stage, what is offloaded), in the order of what they cost in communication.
WAYS = ((0, ()), (1, ()), (2, ()), (3, ()), (2, ("optimizer",)), (3, ("optimizer",)), (3, ("optimizer", "param")))
# Of a GPU's memory; CUDA, NCCL and fragmentation take the rest.
GPU_SHARE = 0.9
GB = 1e9


@dataclass(frozen=True)
class Way:
    """One ZeRO stage and offloading for one model: what a rank holds at the largest micro-batch that fits."""

    stage: int
    offload: tuple[str, ...]
    config: dict[str, Any]
    micro: int
    memory: RankMemory
    fits: bool

    @property
    def name(self) -> str:
        """As the table calls it."""
        if not self.stage:
            return "0 (as 1 in bf16)"
        return f"{self.stage}" + (f" + {' and '.join(self.offload)} offloaded" if self.offload else "")


def ds_config(stage: int, offload: tuple[str, ...], checkpointing: bool) -> dict[str, Any]:
    """A DeepSpeed configuration for GPUs in bf16; ``"auto"`` where the recipe or the plan decides."""
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 50_000_000}
    if stage == 3:
        # Weights that stay from the forward to the backward pass save half of the gathers; where they are offloaded, memory
        # is what counts.
        live = 300_000_000 if "param" in offload else 2_000_000_000
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000 if "param" in offload else 0,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
        }
    zero |= {f"offload_{what}": {"device": "cpu", "pin_memory": True} for what in offload}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }
    if checkpointing:
        config["activation_checkpointing"] = {"partition_activations": False, "cpu_checkpointing": False}
    return config


@dataclass(frozen=True)
class Load:
    """What is to be trained where: the elements of every parameter, activations in bytes an image, a GPU's budget in bytes."""

    recipe: Recipe
    sizes: list[int]
    activations: int
    gpus: int
    budget: float

    @classmethod
    def of(cls, recipe: Recipe, gpus: int, gpu_bytes: float) -> Load:
        """Count the recipe's model on the meta device."""
        from mimscale.training.planning.counting import activation_bytes, parameter_sizes

        return cls(recipe, parameter_sizes(recipe), activation_bytes(recipe, bf16=True), gpus, gpu_bytes * GPU_SHARE)


def plan_way(
    load: Load, stage: int, offload: tuple[str, ...], micro: int | None = None, changes: Mapping[str, int] | None = None
) -> Way:
    """Plan one ZeRO stage.

    Args:
        load: what is to be trained where.
        stage: ZeRO stage.
        offload: of "optimizer" and "param".
        micro: a fixed micro-batch, or ``None`` for the largest that fits.
        changes: to the configuration's ``zero_optimization``.

    Raises:
        DeepSpeedConfigError: the batch does not divide over the GPUs, or the micro-batch does not divide a GPU's share.
    """
    recipe, gpus = load.recipe, load.gpus
    config = ds_config(stage, offload, recipe.train.activation_checkpointing is True)
    config["zero_optimization"] |= changes or {}
    # Stage 0 in bf16 is computed at stage 1, so that is what has to fit.
    computed = config if stage else ds_config(1, offload, checkpointing=False)
    bound = micro_batch_that_fits(load.sizes, load.activations, computed, gpus, load.budget)
    config["train_micro_batch_size_per_gpu"] = micro or "auto"
    split = split_batch(config, recipe.train.global_batch, gpus, bound)
    resolved = reconcile(config, recipe, split, on_gpu=True)
    memory = plan_rank(load.sizes, split.micro * load.activations, resolved, gpus)
    written = copy.deepcopy(config) | {"train_micro_batch_size_per_gpu": split.micro}
    return Way(stage, offload, written, split.micro, memory, memory.total <= load.budget)


def measured_mfu(run: Path) -> float:
    """The median MFU of a run's steps, its first tenth left out.

    Raises:
        RecipeError: the run has logged no step.
    """
    logged = [record.get("mfu") for record in MetricsLog(run / "metrics.jsonl").read()]
    found = [mfu for mfu in logged if isinstance(mfu, int | float) and not isinstance(mfu, bool) and 0 < mfu <= 10]
    if not found:
        raise RecipeError(f"--measured {printable(run)}: there are no steps with an mfu in its metrics.jsonl")
    return statistics.median(found[len(found) // 10 :])
