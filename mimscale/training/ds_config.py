"""The user's DeepSpeed configuration, read and reconciled with the recipe.

The file stays the user's: what it fixes is kept. What it leaves out or sets to ``"auto"`` is filled in from the recipe and
the machine, and a value that the recipe contradicts is an error that names both keys.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale.resources import DS_CONFIGS
from mimscale.training.recipe import RunRecipe


class DeepSpeedConfigError(ValueError):
    """A DeepSpeed configuration that cannot be used; the message names the file and the key."""


AUTO = "auto"
REDUCE_BUCKET = 50_000_000  # elements


@dataclass(frozen=True)
class BatchSplit:
    """How one global batch is split: ``micro * accumulation * world_size`` images."""

    micro: int
    accumulation: int
    world_size: int

    @property
    def local(self) -> int:
        """Images of one rank in one step."""
        return self.micro * self.accumulation


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """The configuration as plain values, of a file or of one that comes with mimscale and is given by its name.

    Raises:
        DeepSpeedConfigError: not there, not JSON (with line and column), or not an object.
    """
    path = DS_CONFIGS.find(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        keys = [key for key, _ in pairs]
        duplicate = next((key for key in keys if keys.count(key) > 1), None)
        if duplicate is not None:
            raise DeepSpeedConfigError(f"{path}: duplicate key '{duplicate}'; keep one")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise DeepSpeedConfigError(DS_CONFIGS.missing(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeepSpeedConfigError(f"cannot read the DeepSpeed configuration {path}: {error}") from None
    except json.JSONDecodeError as error:
        raise DeepSpeedConfigError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if not isinstance(config, dict):
        raise DeepSpeedConfigError(f"{path} must hold a JSON object, not {type(config).__name__}")
    for name in ("zero_optimization", "bf16", "fp16", "data_types", "optimizer"):
        if name in config and not isinstance(config[name], dict):
            raise DeepSpeedConfigError(f"{path}: '{name}' must be an object such as {{}}, not {config[name]!r}")
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a configuration, 0 when it has none."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise DeepSpeedConfigError(f"zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    return stage


def second_partition(config: dict[str, Any]) -> int:
    """Over how many ranks ZeRO-3 partitions the parameters a second time (ZeRO++'s hpZ); 1 for not at all.

    Raises:
        DeepSpeedConfigError: it is no number, or MiCS is asked for.
    """
    zero = config.get("zero_optimization", {})
    for key in ("mics_shard_size", "mics_hierarchical_params_gather"):
        if key in zero:
            raise DeepSpeedConfigError(
                f"zero_optimization.{key}: DeepSpeed has given up MiCS; to gather parameters inside nodes set "
                f"zero_hpz_partition_size to the GPUs of a node, and to send fewer bytes take stage 1"
            )
    size = zero.get("zero_hpz_partition_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise DeepSpeedConfigError(
            f"zero_optimization.zero_hpz_partition_size must be a number of ranks, such as the GPUs of a node, not {size!r}"
        )
    return size


def wants_bf16(config: dict[str, Any], on_gpu: bool) -> bool:
    """Whether to train in bf16; ``"auto"`` means on a GPU, since CPUs without bf16 units run it many times slower."""
    if config.get("fp16", {}).get("enabled") is True:
        raise DeepSpeedConfigError(
            "fp16.enabled: masked image modelling targets overflow in fp16; set bf16.enabled instead, or train in fp32"
        )
    enabled = config.get("bf16", {}).get("enabled", False)
    if enabled == AUTO:
        return on_gpu
    if not isinstance(enabled, bool):
        raise DeepSpeedConfigError(f'bf16.enabled must be true, false or "auto", not {enabled!r}')
    return enabled


def offloads_parameters(config: dict[str, Any]) -> bool:
    """Whether ZeRO-3 keeps the weights in host memory or on disk."""
    device = (config.get("zero_optimization", {}).get("offload_param") or {}).get("device", "none")
    return device not in (None, "none")


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether the optimizer's state lives in host memory or on disk."""
    device = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    return device not in (None, "none")


def split_batch(config: dict[str, Any], global_batch: int, world_size: int, largest_micro: int | None) -> BatchSplit:
    """Split the recipe's global batch over ranks and micro-batches.

    Args:
        config: ``train_micro_batch_size_per_gpu`` is taken from it; absent or ``"auto"`` it is the largest divisor of the
            rank's share that is at most ``largest_micro``.
        global_batch: images per optimizer step over all ranks (``train.global_batch``).
        world_size: number of ranks.
        largest_micro: bound for ``"auto"``; ``None`` for no bound.

    Raises:
        DeepSpeedConfigError: it does not divide, or the configuration fixes another batch; both keys are named.
    """
    _agree(config, "train_batch_size", "train.global_batch", global_batch)
    if global_batch % world_size:
        lower = global_batch // world_size * world_size
        fits = " or ".join(str(size) for size in (lower, lower + world_size) if size)
        raise DeepSpeedConfigError(
            f"train.global_batch={global_batch} does not divide over {world_size} ranks; {fits} would"
        )
    local = global_batch // world_size
    micro = config.get("train_micro_batch_size_per_gpu", AUTO)
    if micro == AUTO:
        bound = local if largest_micro is None else max(1, min(local, largest_micro))
        micro = max(size for size in range(1, bound + 1) if local % size == 0)
    if not isinstance(micro, int) or isinstance(micro, bool) or micro < 1:
        raise DeepSpeedConfigError(f'train_micro_batch_size_per_gpu must be a positive number or "auto", not {micro!r}')
    if local % micro:
        divisors = [size for size in range(1, local + 1) if local % size == 0]
        raise DeepSpeedConfigError(
            f"train.global_batch={global_batch} over {world_size} ranks is {local} images a rank, which "
            f"train_micro_batch_size_per_gpu={micro} does not divide; micro-batches that do: "
            f"{', '.join(map(str, divisors))}"
        )
    accumulation = local // micro
    _agree(
        config,
        "gradient_accumulation_steps",
        "train.global_batch",
        accumulation,
        f"{global_batch} (which makes it {accumulation} with micro-batches of {micro} on {world_size} ranks)",
    )
    return BatchSplit(micro, accumulation, world_size)


def _agree(config: dict, key: str, recipe_key: str, value: Any, shown: str | None = None) -> None:
    """Raise unless the configuration leaves dotted ``key`` open, or agrees with the recipe on it."""
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return
        found = found[part]
    same = list(found) == list(value) if isinstance(found, list) and isinstance(value, tuple) else found == value
    if found != AUTO and not same:
        shown = shown or str(value)
        raise DeepSpeedConfigError(
            f"the DeepSpeed configuration has {key}={found}, but the recipe has {recipe_key}={shown}; "
            f'make them agree, or set {key} to "auto"'
        )


def _check_second_partition(config: dict[str, Any], stage: int, world_size: int) -> None:
    """Raise unless every ``zero_hpz_partition_size`` ranks can hold the parameters once more among themselves."""
    size = second_partition(config)
    if size > 1 and stage < 3:
        raise DeepSpeedConfigError(
            f"zero_optimization.zero_hpz_partition_size={size} changes nothing at stage {stage}: remove it, or set stage 3"
        )
    if world_size % min(size, world_size):
        divisors = [number for number in range(1, world_size) if world_size % number == 0]
        raise DeepSpeedConfigError(
            f"zero_optimization.zero_hpz_partition_size={size} does not divide {world_size} ranks; these do: "
            f"{', '.join(map(str, divisors))}"
        )


def reconcile(config: dict[str, Any], recipe: RunRecipe, split: BatchSplit, on_gpu: bool) -> dict[str, Any]:
    """The configuration as DeepSpeed gets it, every ``"auto"`` that the recipe decides filled in.

    Raises:
        DeepSpeedConfigError: the two contradict each other; both keys are named.
    """
    resolved = copy.deepcopy(config)
    optimizer, train = recipe.optimizer, recipe.train
    _agree(config, "gradient_clipping", "optimizer.clip", optimizer.clip)
    if "optimizer" in config:
        kind = config["optimizer"].get("type", "AdamW")
        if kind.lower() not in ("adamw", AUTO):
            raise DeepSpeedConfigError(
                f"the DeepSpeed configuration has optimizer.type={kind}, but the recipe's optimizer section is AdamW "
                f"(the paper's); remove the optimizer block"
            )
        for key, name, value in (
            ("lr", "optimizer.lr", recipe.learning_rate),
            ("betas", "optimizer.betas", optimizer.betas),
            ("eps", "optimizer.eps", optimizer.eps),
            ("weight_decay", "optimizer.weight_decay", optimizer.weight_decay),
        ):
            _agree(config, f"optimizer.params.{key}", name, value)
        del resolved["optimizer"]
    if "scheduler" in config:
        raise DeepSpeedConfigError(
            "the DeepSpeed configuration has scheduler, but the learning rate follows the recipe's schedule section; "
            "remove the scheduler block"
        )
    if train.activation_checkpointing is False and "activation_checkpointing" in config:
        raise DeepSpeedConfigError(
            "the DeepSpeed configuration has activation_checkpointing, but the recipe has "
            "train.activation_checkpointing=false; remove one of the two"
        )
    bf16 = wants_bf16(config, on_gpu)
    stage = zero_stage(config)
    if bf16 and stage == 0:
        # At stage 0 DeepSpeed accumulates bf16 gradients in bf16 and loses Adam's state on a reload. Stage 1 computes the
        # same update from fp32 accumulation, with the state spread over the ranks.
        stage = 1
    zero = dict(resolved.get("zero_optimization", {}))
    if train.compile and stage == 3:
        raise DeepSpeedConfigError(
            "train.compile=true does not go with ZeRO stage 3, whose hooks cut every block into pieces that run uncompiled; take "
            "stage 1 or 2, or train.compile=false"
        )
    _check_second_partition(config, stage, split.world_size)
    if stage:
        # DeepSpeed allocates the whole bucket, 500 million elements unless told otherwise, however small the model.
        resolved["zero_optimization"] = {"reduce_bucket_size": REDUCE_BUCKET, **zero, "stage": stage}
    elif zero:
        resolved["zero_optimization"] = {**zero, "stage": 0}
    resolved["bf16"] = {**config.get("bf16", {}), "enabled": bf16}
    resolved.pop("fp16", None)
    if bf16:
        types = dict(config.get("data_types", {}))
        accumulate = types.get("grad_accum_dtype", AUTO)
        if accumulate in (AUTO, None):
            types["grad_accum_dtype"] = "fp32"
        elif accumulate != "fp32" and split.accumulation > 1:
            raise DeepSpeedConfigError(
                f"data_types.grad_accum_dtype={accumulate} with {split.accumulation} accumulated micro-batches drifts in "
                f"bf16; set it to fp32"
            )
        resolved["data_types"] = types
    resolved["train_batch_size"] = split.local * split.world_size
    resolved["train_micro_batch_size_per_gpu"] = split.micro
    resolved["gradient_accumulation_steps"] = split.accumulation
    resolved["gradient_clipping"] = optimizer.clip
    resolved["zero_allow_untested_optimizer"] = True
    # DeepSpeed's own reports would interleave with the progress line; a user who wants them sets the key.
    resolved.setdefault("steps_per_print", 2**31)
    return resolved
