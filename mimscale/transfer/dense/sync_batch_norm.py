"""Batch norm whose statistics are those of all ranks' images."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimscale.training.recipe import RecipeError


class _MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over ranks; so is its gradient, since DeepSpeed takes the mean of the ranks' losses."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _mean(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _mean(grads[0])


def _mean(value: Tensor) -> Tensor:
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class SyncedBatchNorm2d(nn.Module):
    """Batch norm over the micro-batches of all ranks, in fp32, on any device.

    torch's own takes only GPUs for more than one rank. The running statistics stay in fp32 whatever the module is cast to:
    in bf16 a tenth of a small change would be lost.

    Args:
        channels: of the maps.
        eps: added to the variance.
        momentum: share of a batch in the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        # .float(), because DeepSpeed's partitioning makes whatever a constructor makes in the model's precision.
        self.register_buffer("running_mean", torch.zeros(channels).float())
        self.register_buffer("running_var", torch.ones(channels).float())

    def _apply(self, fn: Any, recurse: bool = True) -> SyncedBatchNorm2d:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalise maps (B, C, H, W).

        Raises:
            RecipeError: while training, a channel has one value only.
        """
        wide = x.float()
        mean, variance = self.running_mean, self.running_var
        if self.training:
            alone = (
                not dist.is_initialized() or x.is_meta
            )  # on the meta device memory is counted, by each rank for itself
            ranks = 1 if alone else dist.get_world_size()
            count = ranks * x.numel() // x.shape[1]
            if count < 2:
                raise RecipeError(
                    "a batch norm takes two images or more at a time: a larger train.global_batch, or in the DeepSpeed "
                    "configuration a larger train_micro_batch_size_per_gpu"
                )
            mean = wide.mean((0, 2, 3))
            mean = _MeanOverRanks.apply(mean) if ranks > 1 else mean
        centred = wide - mean[:, None, None]
        if self.training:
            variance = centred.square().mean((0, 2, 3))
            variance = _MeanOverRanks.apply(variance) if ranks > 1 else variance
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight.float() * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias.float()[:, None, None]).to(x.dtype)


def synced(module: nn.Module) -> nn.Module:
    """Put a :class:`SyncedBatchNorm2d` in the place of every batch norm inside ``module``; returns it."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, SyncedBatchNorm2d(child.num_features, child.eps, child.momentum or 0.1))
    return module
