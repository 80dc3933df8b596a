"""Encoders: SwinV2 and ViT in the paper's sizes, their decoders, and weights in and out.

Names are imported on first use, so that listing encoders does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mimscale.registry import encoders

if TYPE_CHECKING:
    from mimscale.models.encoder import Encoder, spread_mask
    from mimscale.models.factory import create_encoder
    from mimscale.models.recompute import set_checkpoints
    from mimscale.models.settings import EncoderSettings
    from mimscale.models.weights.export import load
    from mimscale.models.weights.released import CheckpointMismatch, load_released

_HOME = {
    "CheckpointMismatch": "weights.released",
    "Encoder": "encoder",
    "EncoderSettings": "settings",
    "create_encoder": "factory",
    "load": "weights.export",
    "load_released": "weights.released",
    "set_checkpoints": "recompute",
    "spread_mask": "encoder",
}

__all__ = [
    "CheckpointMismatch",
    "Encoder",
    "EncoderSettings",
    "create_encoder",
    "encoder_names",
    "load",
    "load_released",
    "set_checkpoints",
    "spread_mask",
]


def encoder_names() -> list[str]:
    """List the names that ``create_encoder`` takes."""
    return encoders.names()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
