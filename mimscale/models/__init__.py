"""Encoders: SwinV2 and ViT in the paper's sizes, their decoders, and weights in and out.

Names are imported on first use, so that listing encoders does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mimscale.models.sizes import encoder_names

if TYPE_CHECKING:
    from mimscale.models.factory import create_encoder
    from mimscale.models.weights.export import load
    from mimscale.models.weights.released import CheckpointMismatch, load_released

_HOME = {
    "CheckpointMismatch": "weights.released",
    "create_encoder": "factory",
    "load": "weights.export",
    "load_released": "weights.released",
}

__all__ = ["CheckpointMismatch", "create_encoder", "encoder_names", "load", "load_released"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
