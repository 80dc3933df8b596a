"""Activation checkpointing: which blocks are computed again in the backward pass instead of being stored."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils.checkpoint

Checkpoint = Callable[..., torch.Tensor]


class _Last(torch.autograd.Function):
    """What a recomputed function ends in, which so comes first in its backward pass and sets off the recomputation.

    ZeRO-3 gathers a module's parameters when the gradient reaches it, and lets go of them when its forward pass ends. Were
    the recomputation set off by a module's own backward pass, it would let go of what was just gathered for that.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        _ = ctx.saved_tensors
        return grad


def checkpoint_whole(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Recompute ``function`` in the backward pass, from beginning to end.

    torch would stop the recomputation at the last tensor it needs; ZeRO-3 has to see every module through, or it
    keeps parameters gathered.
    """

    def whole(*tensors: torch.Tensor) -> torch.Tensor:
        return _Last.apply(function(*tensors))

    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return torch.utils.checkpoint.checkpoint(whole, *tensors, use_reentrant=False, preserve_rng_state=False)


def set_checkpoints(
    blocks: Iterable[Any],
    enable: bool = True,
    every: int = 1,
    attention_only: bool = False,
    checkpoint_fn: Checkpoint | None = None,
) -> None:
    """Choose what of which blocks is recomputed.

    Args:
        blocks: that have ``checkpoint`` and ``checkpoint_attention``.
        enable: False stores everything.
        every: recompute every k-th block only.
        attention_only: recompute only the attention branch of those blocks.
        checkpoint_fn: called as ``checkpoint_fn(function, *tensors)``; by default torch's, run to the end.

    Raises:
        ValueError: ``every`` below 1.
    """
    if every < 1:
        raise ValueError(f"every must be 1 or more, not {every}")
    for index, block in enumerate(blocks):
        chosen = (checkpoint_fn or checkpoint_whole) if enable and index % every == 0 else None
        block.checkpoint = None if attention_only else chosen
        block.checkpoint_attention = chosen if attention_only else None
