"""How much memory a rank needs, counted before anything is allocated."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from mimscale.training.ds_config import offloads_optimizer, wants_bf16, zero_stage
from mimscale.training.engine import Ranks
from mimscale.training.objective import build_objective
from mimscale.training.recipe import Recipe

# Share of the free memory that "auto" plans with; the rest is for buffers, fragmentation and the data pipeline.
PLANNED_SHARE = 0.7


def parameters(recipe: Recipe) -> int:
    """Number of parameters of the whole MIM model."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_objective(recipe).parameters())


def activation_bytes(recipe: Recipe, bf16: bool, batch: int = 2) -> int:
    """Bytes that the forward pass keeps for the backward pass, per image, counted on the meta device."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.device("meta"):
        objective = build_objective(recipe).train()
        if bf16:
            objective = objective.bfloat16()
        if recipe.train.activation_checkpointing:
            objective.model.encoder.set_grad_checkpointing(True)
        own = {p.untyped_storage()._cdata for p in [*objective.parameters(), *objective.buffers()]}
        images = torch.empty(batch, 3, recipe.data.image_size, recipe.data.image_size, dtype=torch.uint8)
        mask = torch.zeros(batch, recipe.mask_grid, recipe.mask_grid, dtype=torch.bool)
        keys = torch.zeros(batch, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective(images, mask, keys)
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    return total // batch


def state_bytes(count: int, stage: int, world_size: int, bf16: bool, offload: bool) -> int:
    """Bytes of weights, gradients and optimizer state of one rank's device.

    Args:
        count: parameters of the model.
        stage: ZeRO stage.
        world_size: ranks that share what is partitioned.
        bf16: 2-byte weights and gradients beside an fp32 master.
        offload: the master and the moments live in host memory.
    """
    unit = 2 if bf16 else 4
    weights = count * unit / (world_size if stage == 3 else 1)
    gradients = count * unit / (world_size if stage >= 2 else 1)
    accumulated = count * 4 / (world_size if stage >= 1 else 1) if bf16 else 0
    master = count * 4 / world_size if stage >= 1 else 0
    moments = count * 8 / (world_size if stage >= 1 else 1)
    return int(weights + gradients + accumulated + (0 if offload else master + moments))


def largest_micro_batch(recipe: Recipe, config: dict, ranks: Ranks) -> int:
    """The micro-batch that ``"auto"`` may use at most: what fits the free memory of this rank's device."""
    bf16 = wants_bf16(config, ranks.device.type == "cuda")
    if ranks.device.type == "cuda":
        free = torch.cuda.mem_get_info(ranks.device)[0]
    else:
        free = psutil.virtual_memory().available // ranks.local_world_size
    needed = state_bytes(parameters(recipe), zero_stage(config), ranks.world_size, bf16, offloads_optimizer(config))
    return max(1, int((free * PLANNED_SHARE - needed) // activation_bytes(recipe, bf16)))
