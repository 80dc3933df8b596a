"""How much memory a rank needs, counted before anything is allocated."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from mimscale.torch_private import storage_key
from mimscale.training.ds_config import (
    REDUCE_BUCKET,
    offloads_optimizer,
    offloads_parameters,
    second_partition,
    wants_bf16,
    zero_stage,
)
from mimscale.training.pretraining.module import build_objective
from mimscale.training.ranks import Ranks
from mimscale.training.recipe import Recipe

# Share of the free memory that "auto" plans with; the rest is for buffers, fragmentation and the data pipeline.
PLANNED_SHARE = 0.7


def peak_bytes(device: torch.device) -> int:
    """What this process has held at most until now: of its GPU's memory, or of the host's where it trains on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def parameter_sizes(recipe: Recipe) -> list[int]:
    """Elements of every parameter of the whole MIM model."""
    with torch.device("meta"):
        return [p.numel() for p in build_objective(recipe).parameters()]


def recomputed_blocks(recipe: Recipe) -> list[range]:
    """The blocks that activation checkpointing runs again, each as the range of its parameters in `parameter_sizes`."""
    with torch.device("meta"):
        module = build_objective(recipe)
    place = {parameter: index for index, parameter in enumerate(module.parameters())}
    blocks = _recomputed(module)
    own = [[place[parameter] for parameter in block.parameters()] for block in blocks]
    return [range(min(places), max(places) + 1) for places in own]


def _recomputed(module: Any) -> list[nn.Module]:
    """Set a module to run blocks again in its backward pass; which ones it does."""
    module.set_grad_checkpointing(True)
    return [part for part in module.modules() if getattr(part, "checkpoint", None)]


def activation_bytes(recipe: Recipe, bf16: bool, batch: int = 2) -> int:
    """Bytes that the forward pass keeps for the backward pass at most, per image, counted on the meta device."""

    def example() -> tuple[Tensor, ...]:
        images = torch.empty(batch, 3, recipe.data.image_size, recipe.data.image_size, dtype=torch.uint8)
        mask = torch.zeros(batch, *recipe.mask.grid, dtype=torch.bool)
        return images, mask, torch.zeros(batch, dtype=torch.int64)

    recompute = bool(recipe.train.activation_checkpointing)
    return kept_bytes(lambda: build_objective(recipe), example, recompute, bf16)


def kept_bytes(
    build: Callable[[], nn.Module], example: Callable[[], tuple[Tensor, ...]], recompute: bool, bf16: bool
) -> int:
    """Bytes that a module keeps from its forward for its backward pass at most, per image, counted on the meta device.

    Where blocks are computed again, the one that is being so keeps all of its own beside what those before it have kept.

    Args:
        build: makes the module, whose ``set_grad_checkpointing`` has its blocks computed again.
        example: makes a batch of two images or more.
        recompute: whether they are.
        bf16: whether the module is in bf16.
    """
    with torch.device("meta"):
        module = build().train()
        if bf16:
            module = module.bfloat16()
        batch = example()
        if not recompute:
            return _kept(module, batch, [])[0] // len(batch[0])
        blocks = _recomputed(module)
        total, before = _kept(module, batch, blocks)
        module.set_grad_checkpointing(False)  # type: ignore[operator]
        _, around = _kept(module, batch, blocks)
    summits = [kept + after - at for (kept, _), (at, after) in zip(before, around, strict=True)]
    return max(total, *summits) // len(batch[0])


def _kept(module: nn.Module, batch: tuple[Tensor, ...], blocks: list[nn.Module]) -> tuple[int, list[tuple[int, int]]]:
    """Bytes kept after a forward pass, and before and after each block in it."""
    own = {storage_key(p) for p in [*module.parameters(), *module.buffers()]}
    kept: dict[int, Tensor] = {}
    total = 0
    entered, seen = [], []

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        key = storage_key(tensor)
        if key not in own and key not in kept:
            kept[key] = tensor
            total += tensor.untyped_storage().nbytes()
        return tensor

    hooks = [block.register_forward_pre_hook(lambda *_: entered.append(total)) for block in blocks]
    hooks += [block.register_forward_hook(lambda *_: seen.append((entered[-1], total))) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*batch)
    for hook in hooks:
        hook.remove()
    return total, seen


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank's device holds at the moment of a step when it holds the most.

    ``optimizer`` is the fp32 master and both moments; ``buffers`` what communication and flattening take; ``host`` what
    offloading puts into host memory, which ``total`` leaves out.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


def plan_rank(sizes: list[int], activations: int, config: dict[str, Any], world_size: int) -> RankMemory:
    """Count what one rank holds, from what DeepSpeed 0.19 allocates at each stage.

    A step has two summits: the backward pass, which starts with all activations and fills buckets on its way, and the
    update, when the gradients are there twice. The higher one is returned.

    Args:
        sizes: elements of every parameter.
        activations: bytes of one micro-batch that the forward pass keeps.
        config: the reconciled DeepSpeed configuration.
        world_size: ranks that share what is partitioned.
    """
    stage, zero = zero_stage(config), config.get("zero_optimization", {})
    unit = 2 if config["bf16"]["enabled"] is True else 4
    accumulated = 4 if config.get("data_types", {}).get("grad_accum_dtype", "fp32") == "fp32" else unit
    count, share = sum(sizes), sum(sizes) / world_size
    bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET) * unit * (2 if zero.get("overlap_comm") else 1)
    if stage == 0:
        # The gradients are reduced as one flat copy.
        weights, optimizer = float(count * unit), float(count * 8)
        backward = (0.0, float(activations), 0.0)
        update = (float(count * unit), 0.0, float(count * unit))
    else:
        weights, optimizer = float(count * unit), share * 12
        # The first full bucket has all of this rank's gradients allocated at once. The wide early maps of a hierarchical
        # encoder hold most activations and few parameters, so that many are still there when it is full.
        filled = min(1.0, bucket / (count * unit))
        sent = min(bucket, count * unit) if world_size > 1 else 0
        left = activations * (1 - filled**2)
        start = float(max(activations, count * unit if stage == 1 else 0))
        backward = max((0.0, start, float(bucket)), (share * accumulated, left, float(bucket + sent)), key=sum)
        update = (share * accumulated, 0.0, share * 4)
    if stage == 3:
        small = sum(size for size in sizes if size <= zero.get("stage3_param_persistence_threshold", 100_000))
        weights = share * unit + small * unit * (1 - 1 / world_size)
        if (group := second_partition(config)) > 1:
            weights += count * unit / group  # ZeRO++'s second partition
        live = zero.get("stage3_max_live_parameters", 10**9) + zero.get("stage3_prefetch_bucket_size", 5 * 10**7)
        gathered = min(count - small, live) * unit
        # A full bucket is laid out by rank, summed in a copy of that, and this rank's part taken out.
        scattered = min(bucket, count * unit) * (2 + 1 / world_size) if world_size > 1 else 0
        backward = (share * accumulated, float(activations), bucket + gathered + scattered)
        update = (share * accumulated, 0.0, bucket + 4 * min(share, zero.get("sub_group_size", 10**9)))
    host = 0.0
    if offloads_optimizer(config):
        host, optimizer = optimizer + share * accumulated, 0.0
        backward, update = (0.0, *backward[1:]), (0.0, 0.0, float(bucket))
    if stage == 3 and offloads_parameters(config):
        host, weights = host + weights, 0.0
    gradients, kept, buffers = max(backward, update, key=sum)
    return RankMemory(*(int(part) for part in (weights, gradients, optimizer, kept, buffers, host)))


def rank_memory(recipe: Recipe, config: dict[str, Any], world_size: int, micro: int) -> RankMemory:
    """What one rank of a run holds at most; ``config`` is reconciled."""
    bf16 = config["bf16"]["enabled"] is True
    return plan_rank(parameter_sizes(recipe), micro * activation_bytes(recipe, bf16), config, world_size)


def largest_micro_batch(
    sizes: list[int], activations: Callable[[bool], int], config: dict[str, Any], ranks: Ranks
) -> int:
    """The micro-batch that ``"auto"`` may use at most: what fits the free memory of this rank's device.

    Args:
        sizes: elements of every parameter.
        activations: says, for bf16 or not, how many bytes one image keeps.
        config: the DeepSpeed configuration.
        ranks: where this rank stands.
    """
    bf16 = wants_bf16(config, ranks.device.type == "cuda")
    if ranks.device.type == "cuda":
        free = torch.cuda.mem_get_info(ranks.device)[0]
    else:
        free = psutil.virtual_memory().available // ranks.local_world_size
    settled = {**config, "bf16": {"enabled": bf16}}
    return micro_batch_that_fits(sizes, activations(bf16), settled, ranks.world_size, free * PLANNED_SHARE)


def micro_batch_that_fits(
    sizes: list[int], activations: int, config: dict[str, Any], world_size: int, budget: float
) -> int:
    """The largest micro-batch, at least 1, whose summit stays within ``budget`` bytes.

    Args:
        sizes: elements of every parameter.
        activations: bytes that one image keeps.
        config: the DeepSpeed configuration, with ``bf16.enabled`` settled.
        world_size: ranks that share what is partitioned.
        budget: bytes.
    """
    micro = 1
    while plan_rank(sizes, (micro + 1) * activations, config, world_size).total <= budget:
        micro += 1
    return micro
