"""How much memory a rank needs, by arithmetic: what DeepSpeed allocates at each stage for parameters of given sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimscale.training.ds_config import (
    REDUCE_BUCKET,
    offloads_optimizer,
    offloads_parameters,
    second_partition,
    zero_stage,
)

# Images of a micro-batch.
MOST = 2**40


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

    def fits(micro: int) -> bool:
        return plan_rank(sizes, micro * activations, config, world_size).total <= budget

    low, high = 1, 2
    while high < MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
