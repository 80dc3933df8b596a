"""What the engine uses of DeepSpeed beside its public functions: each in one place, to be mended here when DeepSpeed changes it.

The docstrings name the private thing and why no public one serves. ``tests/test_private_names.py`` calls each of them. Only
``engine.py`` imports this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import nn


def inner_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer that was given to ``deepspeed.initialize`` (``basic_optimizer``), inside of ZeRO's own."""
    return engine.basic_optimizer


def masters(engine: deepspeed.DeepSpeedEngine, stage: int) -> Iterable[torch.Tensor]:
    """What the inner optimizer updates: under ZeRO-3 it holds these only in a step (``fp32_partitioned_groups_flat``)."""
    if stage == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [master for group in inner_optimizer(engine).param_groups for master in group["params"]]


def link_state(engine: deepspeed.DeepSpeedEngine, stage: int) -> None:
    """Let parameters find their part of the optimizer's state (``_lazy_init_hp_params_optimizer_state``).

    ZeRO-1 and 2 do so once, after the first group's first step; ``safe_get_full_optimizer_state`` needs it before.
    """
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def norm_in_few_calls(engine: deepspeed.DeepSpeedEngine, stage: int) -> None:
    """Have ZeRO-1 and 2 take the norm of all gradients together (``get_grad_norm_direct``), as torch does it on a GPU.

    Theirs launches kernels for every parameter, while the GPU waits. The sum's order differs, so a CPU keeps theirs.
    """
    optimizer = engine.optimizer
    if stage not in (1, 2) or engine.device.type != "cuda":
        return
    assert callable(optimizer.get_grad_norm_direct)

    def norm(gradients: Iterable[torch.Tensor], params: Iterable[torch.Tensor], norm_type: float = 2) -> torch.Tensor:
        kept = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        return whole_norm(kept, optimizer.dp_process_group, engine.device)

    optimizer.get_grad_norm_direct = norm


def whole_norm(gradients: list[torch.Tensor], group: Any, device: torch.device) -> torch.Tensor:
    """2-norm of this rank's parts of gradients together with those of the other ranks in ``group``; -1 where it is not finite."""
    own = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
    total = own.float().square()
    deepspeed.comm.all_reduce(total, group=group)
    return torch.where(total.isfinite(), total.sqrt(), -1.0)


def own_part(parameter: nn.Parameter) -> int:
    """Elements of a parameter's part on each rank under ZeRO-3, padding included (``ds_tensor.ds_numel``)."""
    return parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]


def drop_second_partition() -> None:
    """Take down ZeRO++'s process group (``groups._get_zero_param_intra_parallel_group``).

    DeepSpeed keeps it for ever, and the next engine of this process could not make its own.
    """
    if (group := groups._get_zero_param_intra_parallel_group()) is not None:
        deepspeed.comm.destroy_process_group(group)
