"""What mimscale uses of torch beside its public functions: each in one place, to be mended here when torch changes it.

The docstrings name the private thing and why no public one serves. ``tests/test_private_names.py`` calls each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor


def storage_key(tensor: Tensor) -> int:
    """What tells one storage from another (``UntypedStorage._cdata``): on the meta device all addresses are 0."""
    return tensor.untyped_storage()._cdata


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has units for bf16 products (``torch.cpu._is_avx512_bf16_supported``)."""
    return torch.cpu._is_avx512_bf16_supported()


def is_fake(tensor: Tensor) -> bool:
    """Whether it stands for a tensor while a graph is traced (``FakeTensor``), so that it must not be kept."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def allow_graphs(number: int) -> None:
    """Let ``torch.compile`` make so many graphs of one function (``torch._dynamo.config.recompile_limit``), and fail beyond.

    Its own limit is 8; what comes after runs uncompiled, in silence.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, number)
    config.fail_on_recompile_limit_hit = True


def assert_async(condition: Tensor, message: str) -> None:
    """Fail on the device where ``condition`` is false, without waiting for it (``torch._assert_async``)."""
    torch._assert_async(condition, message)


def softmax_backward(incoming: Tensor, shares: Tensor, out: Tensor) -> None:
    """Gradient of a softmax over the last dimension, into ``out``, which may be ``incoming``.

    ``aten::_softmax_backward_data``; autograd's own way would allocate another tensor of that size.
    """
    torch.ops.aten._softmax_backward_data.out(incoming, shares, -1, incoming.dtype, grad_input=out)


def antialiased_resize(interpolation: str) -> Callable[..., Tensor]:
    """What ``torch.nn.functional.interpolate(antialias=True)`` calls, "bilinear" or "bicubic", with a place for its result.

    ``aten::_upsample_bilinear2d_aa`` and ``aten::_upsample_bicubic2d_aa``; the public call costs a tenth of the work.
    """
    operators = torch.ops.aten
    return {"bilinear": operators._upsample_bilinear2d_aa.out, "bicubic": operators._upsample_bicubic2d_aa.out}[
        interpolation
    ]


def keep_signals_from(iterator: Any) -> None:
    """Have DataLoader's handler of SIGCHLD leave the workers of ``iterator`` alone: it would raise in any line of a step.

    ``torch.utils.data._utils.signal_handling._remove_worker_pids`` and ``_worker_pids_set``.
    """
    from torch.utils.data._utils.signal_handling import _remove_worker_pids

    assert iterator._worker_pids_set
    _remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False


def worker_processes(iterator: Any) -> list[BaseProcess]:
    """The processes behind a DataLoader's iterator (``_workers``)."""
    return iterator._workers


def end_workers(iterator: Any) -> None:
    """End them now (``_shutdown_workers``), and not when the iterator is collected."""
    iterator._shutdown_workers()


def allocation(event: Any) -> tuple[int, int] | None:
    """Bytes that a profiler's event allocated (freed: below 0), and the allocator's total then; ``None`` for other events.

    ``torch._C._profiler._ExtraFields_Allocation``; the public profiler shows no totals.
    """
    from torch._C._profiler import _ExtraFields_Allocation

    fields = event.extra_fields
    return (fields.alloc_size, fields.total_allocated) if isinstance(fields, _ExtraFields_Allocation) else None


def operator_arguments(operator: Any) -> tuple[str, list[str]]:
    """Name of an operator without its namespace, and the names of its arguments (``OpOverload._schema``)."""
    schema = operator._schema
    return schema.name.partition("::")[2], [argument.name for argument in schema.arguments]
