"""Make encoders by name."""

import difflib
import inspect
from dataclasses import asdict
from typing import Any

from mimscale.models.sizes import SWIN_SIZES, VIT_SIZES, encoder_names
from mimscale.models.swin_v2 import SwinTransformerV2
from mimscale.models.vit import VisionTransformer


def _nearest(word: str, known: list[str]) -> str:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


def create_encoder(
    name: str,
    img_size: int | tuple[int, int] | None = None,
    window_size: int | None = None,
    pretrained_window_size: int | tuple[int, ...] | None = None,
    drop_path: float | None = None,
    num_classes: int = 0,
    **overrides: Any,
) -> SwinTransformerV2 | VisionTransformer:
    """Make an encoder of the paper's Table 1 or of its MAE runs, or of any size by override.

    Args:
        name: "swinv2_s", "swinv2_b", "swinv2_l", "swinv2_h", "swinv2_g"; "vit_b", "vit_l" (patch 16), "vit_h" (patch
            14).
        img_size: side of the images, or (height, width); by default 192 for SwinV2, 224 for ViT.
        window_size: SwinV2 only: of the attention, in tokens; by default 12.
        pretrained_window_size: SwinV2 only: window at pre-training, where it differed (12 for 192 to 224 px).
        drop_path: drop rate of the last block; by default the paper's at pre-training, 0.1 for SwinV2, 0 for ViT.
        num_classes: outputs of the classifier; 0 for none.
        **overrides: ``embed_dim``, ``depths`` (ViT: ``depth``), ``num_heads`` and whatever else the encoder's class
            takes.

    Returns:
        A ``SwinTransformerV2`` or ``VisionTransformer``, freshly initialised from torch's generator. Its ``made_from``
        are the arguments that make it again.

    Raises:
        ValueError: an unknown name or override (the nearest is named), or sizes that do not divide (what fits is
            named).
    """
    kind: Any = SwinTransformerV2 if name in SWIN_SIZES else VisionTransformer
    size: Any = SWIN_SIZES.get(name) or VIT_SIZES.get(name)
    if size is None:
        raise ValueError(f'unknown encoder "{name}"; the nearest is "{_nearest(name, encoder_names())}"')
    given = {
        "img_size": img_size,
        "window_size": window_size,
        "pretrained_window_size": pretrained_window_size,
        "drop_path": drop_path,
    }
    settings = {**asdict(size), **{key: value for key, value in given.items() if value is not None}, **overrides}
    known = list(inspect.signature(kind).parameters)
    for key in settings:
        if key not in known:
            raise ValueError(f'"{name}" has no "{key}"; the nearest is "{_nearest(key, known)}"')
    encoder = kind(num_classes=num_classes, **settings)
    encoder.made_from = {"name": name, "num_classes": num_classes, **settings}
    return encoder
