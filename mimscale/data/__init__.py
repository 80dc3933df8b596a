"""Shards of images: what is in them, in which order they come, and the batches made of them.

Stands alone: no DeepSpeed, no models. Names are imported on first use, so that building shards does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mimscale.data.errors import DamagedSample, ShardError

if TYPE_CHECKING:
    from mimscale.data.shards.index import ShardIndex
    from mimscale.data.stream.crops import CropSpec
    from mimscale.data.stream.labelled import Erasing, EvaluationStream, LabelledBatch, LabelledStream
    from mimscale.data.stream.mim import MIMBatch, MIMStream
    from mimscale.data.stream.order import SampleOrder
    from mimscale.data.stream.validation import ValidationStream

_HOME = {
    "CropSpec": "stream.crops",
    "Erasing": "stream.labelled",
    "EvaluationStream": "stream.labelled",
    "LabelledBatch": "stream.labelled",
    "LabelledStream": "stream.labelled",
    "MIMBatch": "stream.mim",
    "MIMStream": "stream.mim",
    "SampleOrder": "stream.order",
    "ShardIndex": "shards.index",
    "ValidationStream": "stream.validation",
}

__all__ = [
    "CropSpec",
    "DamagedSample",
    "Erasing",
    "EvaluationStream",
    "LabelledBatch",
    "LabelledStream",
    "MIMBatch",
    "MIMStream",
    "SampleOrder",
    "ShardError",
    "ShardIndex",
    "ValidationStream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
