"""What the engine uses of DeepSpeed beside its public functions: each in one place, to be mended here when DeepSpeed changes it.

The docstrings name the private thing and why no public one serves. ``tests/test_private_names.py`` calls each of them. Only
``engine.py`` imports this.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

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


def own_part(parameter: nn.Parameter) -> int:
    """Elements of a parameter's part on each rank under ZeRO-3, padding included (``ds_tensor.ds_numel``)."""
    return parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]


def drop_second_partition() -> None:
    """Take down ZeRO++'s process group (``groups._get_zero_param_intra_parallel_group``).

    DeepSpeed keeps it for ever, and the next engine of this process could not make its own.
    """
    if (group := groups._get_zero_param_intra_parallel_group()) is not None:
        deepspeed.comm.destroy_process_group(group)


def without_compiled_reductions() -> None:
    """Keep DeepSpeed from compiling its reductions over shared memory at every start on a CPU (``comm.torch.build_shm_op``).

    Only ``inference_all_reduce`` calls them. They would take minutes in silence the first time, need a compiler, and wait for
    ever for the lock of a start that was killed in them.
    """
    backend = import_module("deepspeed.comm.torch")  # as an attribute, that name is torch itself
    if not callable(backend.build_shm_op):
        raise AttributeError("deepspeed.comm.torch.build_shm_op")
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
