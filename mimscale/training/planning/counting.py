"""What a model takes, counted on the meta device before anything is allocated, and what this device has for it."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from mimscale.torch_private import storage_key
from mimscale.training.ds_config import wants_bf16
from mimscale.training.planning.memory import RankMemory, micro_batch_that_fits, plan_rank
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
