"""mimscale: masked image modelling at scale, on DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from mimscale.models.swin_v2 import SwinTransformerV2
    from mimscale.models.vit import VisionTransformer

__version__ = "0.1.0"


def load(path: str | Path, **overrides: Any) -> SwinTransformerV2 | VisionTransformer:
    """The encoder of a file that ``mimscale export RUN --to safetensors`` wrote; see ``mimscale.models.load``."""
    from mimscale.models.weights.export import load as load_encoder

    return load_encoder(path, **overrides)
