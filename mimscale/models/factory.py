"""Make encoders by name."""

import difflib
import inspect
from dataclasses import asdict
from typing import Any

import torch.nn as nn

from mimscale.models.sizes import SWIN_SIZES
from mimscale.models.swin_v2 import SwinTransformerV2


def _nearest(word: str, known: list[str]) -> str:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


def encoder_names() -> list[str]:
    """List the names that ``create_encoder`` takes."""
    return [*SWIN_SIZES]


def create_encoder(
    name: str,
    img_size: int | tuple[int, int] = 192,
    window_size: int = 12,
    pretrained_window_size: int | tuple[int, ...] = 0,
    drop_path: float = 0.1,
    num_classes: int = 0,
    **overrides: Any,
) -> nn.Module:
    """Make an encoder of the paper's Table 1, or of any size by override.

    Args:
        name: "swinv2_s", "swinv2_b", "swinv2_l", "swinv2_h", "swinv2_g".
        img_size: side of the images, or (height, width).
        window_size: SwinV2 only: of the attention, in tokens.
        pretrained_window_size: SwinV2 only: window at pre-training, where it differed (12 for 192 to 224 px).
        drop_path: drop rate of the last block.
        num_classes: outputs of the classifier; 0 for none.
        **overrides: ``embed_dim``, ``depths``, ``num_heads`` and whatever else the encoder's class takes.

    Returns:
        The encoder, freshly initialised from torch's generator.

    Raises:
        ValueError: an unknown name or override (the nearest is named), or sizes that do not divide (what fits is
            named).
    """
    if name not in SWIN_SIZES:
        raise ValueError(f'unknown encoder "{name}"; the nearest is "{_nearest(name, encoder_names())}"')
    settings: dict[str, Any] = {
        "window_size": window_size,
        "pretrained_window_size": pretrained_window_size,
        **asdict(SWIN_SIZES[name]),
    }
    known = [key for key in inspect.signature(SwinTransformerV2).parameters]
    for key in overrides:
        if key not in known:
            raise ValueError(f'"{name}" has no "{key}"; the nearest is "{_nearest(key, known)}"')
    settings.update(overrides)
    return SwinTransformerV2(img_size=img_size, drop_path=drop_path, num_classes=num_classes, **settings)
