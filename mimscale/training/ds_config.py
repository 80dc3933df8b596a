"""The user's DeepSpeed configuration, read and reconciled with the recipe.

The file stays the user's: what it fixes is kept. What it leaves out or sets to ``"auto"`` is filled in from the recipe and
the machine, and a value that the recipe contradicts is an error that names both keys.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale.files import UnfitFile, parse_json, read_text
from mimscale.resources import DS_CONFIGS
from mimscale.schema import nearest, some
from mimscale.training.recipe import RunRecipe
from mimscale.wording import Escaped, printable


class DeepSpeedConfigError(Escaped, ValueError):
    """A DeepSpeed configuration that cannot be used; the message names the file and the key."""


AUTO = "auto"
REDUCE_BUCKET = 50_000_000  # elements
# Of a file: bytes, and how deep values lie.
LARGEST, DEEPEST = 2**20, 40
MOST = 10**15
_ABSENT = object()


@dataclass(frozen=True)
class Kind:
    """What a value of a configuration has to be.

    Attributes:
        what: it is, for messages.
        types: of it.
        least: of a number.
        words: texts that it may be, besides.
    """

    what: str
    types: tuple[type, ...] = ()
    least: float = -MOST
    words: tuple[Any, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is of this kind."""
        if isinstance(value, str | None):
            return value in self.words or (str in self.types and isinstance(value, str))
        if isinstance(value, bool):
            return bool in self.types
        return isinstance(value, self.types) and (not isinstance(value, int | float) or self.least <= value <= MOST)


SECTIONS = (
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "bf16",
    "fp16",
    "data_types",
    "optimizer",
    "optimizer.params",
    "scheduler",
    "activation_checkpointing",
)
MAY_BE_NULL = SECTIONS[1:3]
# Other names that DeepSpeed has for keys below: no typing errors.
OTHER_NAMES = ("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
_IMAGES = Kind('a positive number or "auto"', (int,), 1, (AUTO,))
_NUMBER = Kind('a number or "auto"', (int, float), 0, (AUTO,))
_ELEMENTS = Kind("a number of elements", (int, float), 0)
_BUCKET = Kind("a number of elements, at least 1", (int, float), 1)
_SWITCH = Kind('true, false or "auto"', (bool,), 0, (AUTO,))
_DEVICE = Kind('"cpu", "nvme" or "none"', words=("cpu", "nvme", "none", None))
KINDS = {
    "train_batch_size": _IMAGES,
    "train_micro_batch_size_per_gpu": _IMAGES,
    "gradient_accumulation_steps": _IMAGES,
    "gradient_clipping": _NUMBER,
    "steps_per_print": Kind("a number of steps, or null", (int,), 1, (None,)),
    "bf16.enabled": _SWITCH,
    "fp16.enabled": _SWITCH,
    "data_types.grad_accum_dtype": Kind('"fp32", "bf16", "fp16" or "auto"', words=("fp32", "bf16", "fp16", AUTO, None)),
    "optimizer.type": Kind("a name", (str,)),
    "zero_optimization.stage": Kind("0, 1, 2 or 3", (int,), 0),
    "zero_optimization.overlap_comm": Kind("true, false or null", (bool,), words=(None,)),
    "zero_optimization.contiguous_gradients": Kind("true or false", (bool,)),
    "zero_optimization.reduce_bucket_size": _BUCKET,
    "zero_optimization.allgather_bucket_size": _BUCKET,
    "zero_optimization.sub_group_size": _BUCKET,
    "zero_optimization.stage3_prefetch_bucket_size": _ELEMENTS,
    "zero_optimization.stage3_param_persistence_threshold": _ELEMENTS,
    "zero_optimization.stage3_max_live_parameters": _ELEMENTS,
    "zero_optimization.stage3_max_reuse_distance": _ELEMENTS,
    "zero_optimization.zero_hpz_partition_size": Kind("a number of ranks, such as the GPUs of a node", (int,), 1),
    "zero_optimization.offload_optimizer.device": _DEVICE,
    "zero_optimization.offload_param.device": _DEVICE,
}


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
    shown = printable(path)
    try:
        config = parse_json(read_text(path, LARGEST), strict=True)
    except FileNotFoundError:
        raise DeepSpeedConfigError(DS_CONFIGS.missing(path)) from None
    except UnfitFile as error:
        raise DeepSpeedConfigError(f"cannot read the DeepSpeed configuration {shown}: {error}") from None
    except OSError as error:
        raise DeepSpeedConfigError(f"cannot read the DeepSpeed configuration {shown}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise DeepSpeedConfigError(
            f"{shown} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError as error:
        raise DeepSpeedConfigError(f"{shown}: {error}") from None
    if not isinstance(config, dict):
        raise DeepSpeedConfigError(f"{shown} must hold a JSON object, not {type(config).__name__}")
    try:
        check_kinds(config)
    except DeepSpeedConfigError as error:
        raise DeepSpeedConfigError(f"{shown}: {error}") from None
    return config


def check_kinds(config: dict[str, Any]) -> None:
    """Raise unless what mimscale reads of a configuration is of the kind that it takes it for.

    Raises:
        DeepSpeedConfigError: something is not; the message names its key.
    """
    depth = 0
    level: list[Any] = [config]
    while level:
        depth += 1
        if depth > DEEPEST:
            raise DeepSpeedConfigError(f"it is nested more than {DEEPEST} deep")
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
    for section in SECTIONS:
        found = _at(config, section)
        null = found is None and section in MAY_BE_NULL
        if found is not _ABSENT and not null and not isinstance(found, dict):
            raise DeepSpeedConfigError(f"'{section}' must be an object such as {{}}, not {_shown(found)}")
    for key, kind in KINDS.items():
        found = _at(config, key)
        if found is not _ABSENT and not kind.holds(found):
            raise DeepSpeedConfigError(f"'{key}' must be {kind.what}, not {_shown(found)}")
    for known, given in ((SECTIONS, config), (KINDS, config), (KINDS, _at(config, "zero_optimization"))):
        inside = "zero_optimization." if given is not config else ""
        names = [
            key.removeprefix(inside) for key in known if key.startswith(inside) and "." not in key.removeprefix(inside)
        ]
        for key in given if isinstance(given, dict) else ():
            near = None if key in (*names, *OTHER_NAMES) or len(key) < 5 else nearest(key, names, 0.85)
            if near is not None and near not in given:
                raise DeepSpeedConfigError(
                    f"unknown key '{inside}{printable(key, 100)}'; did you mean '{inside}{near}'?"
                )


def _at(config: Any, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return _ABSENT
        found = found[part]
    return found


def _shown(value: Any) -> str:
    return printable(repr(value), 200)


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a configuration, 0 when it has none."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise DeepSpeedConfigError(f"zero_optimization.stage must be 0, 1, 2 or 3, not {_shown(stage)}")
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
            f"zero_optimization.zero_hpz_partition_size must be a number of ranks, such as the GPUs of a node, not {_shown(size)}"
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
        raise DeepSpeedConfigError(f'bf16.enabled must be true, false or "auto", not {_shown(enabled)}')
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
        micro = max(size for size in divisors(local) if size <= bound)
    if not isinstance(micro, int) or isinstance(micro, bool) or micro < 1:
        raise DeepSpeedConfigError(
            f'train_micro_batch_size_per_gpu must be a positive number or "auto", not {_shown(micro)}'
        )
    if local % micro:
        raise DeepSpeedConfigError(
            f"train.global_batch={global_batch} over {world_size} ranks is {local} images a rank, which "
            f"train_micro_batch_size_per_gpu={micro} does not divide; micro-batches that do: "
            f"{some(list(map(str, divisors(local))))}"
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


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, rising."""
    low = [part for part in range(1, math.isqrt(number) + 1) if number % part == 0]
    return low + [number // part for part in reversed(low) if part * part != number]


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
            f"the DeepSpeed configuration has {key}={printable(found, 200)}, but the recipe has {recipe_key}={shown}; "
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
        raise DeepSpeedConfigError(
            f"zero_optimization.zero_hpz_partition_size={size} does not divide {world_size} ranks; these do: "
            f"{some(list(map(str, divisors(world_size)[:-1])))}"
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
        if str(kind).lower() not in ("adamw", AUTO):
            raise DeepSpeedConfigError(
                f"the DeepSpeed configuration has optimizer.type={printable(kind, 200)}, but the recipe's optimizer section is "
                f"AdamW (the paper's); remove the optimizer block"
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
                f"data_types.grad_accum_dtype={printable(accumulate, 200)} with {split.accumulation} accumulated micro-batches "
                f"drifts in bf16; set it to fp32"
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
