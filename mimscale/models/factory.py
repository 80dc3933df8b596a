"""Make encoders by name."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import asdict, is_dataclass
from typing import Any

from mimscale.models.encoder import Encoder
from mimscale.registry import encoders


def create_encoder(
    name: str,
    img_size: int | tuple[int, int] | None = None,
    window_size: int | None = None,
    pretrained_window_size: int | tuple[int, ...] | None = None,
    drop_path: float | None = None,
    num_classes: int = 0,
    **overrides: Any,
) -> Encoder:
    """Make an encoder of the paper's Table 1 or of its MAE runs, one of a plug-in, or any of them at another size.

    Args:
        name: "swinv2_s", "swinv2_b", "swinv2_l", "swinv2_h", "swinv2_g"; "vit_b", "vit_l" (patch 16), "vit_h" (patch
            14); or any other that is registered.
        img_size: side of the images, or (height, width); by default 192 for SwinV2, 224 for ViT.
        window_size: SwinV2 only: of the attention, in tokens; by default 12.
        pretrained_window_size: SwinV2 only: window at pre-training, where it differed (12 for 192 to 224 px).
        drop_path: drop rate of the last block; by default the paper's at pre-training, 0.1 for SwinV2, 0 for ViT.
        num_classes: outputs of the classifier; 0 for none.
        **overrides: ``embed_dim``, ``depths`` (ViT: ``depth``), ``num_heads`` and whatever else the encoder's class
            takes.

    Returns:
        The encoder, freshly initialised from torch's generator. Its ``made_from`` are the arguments that make it again.

    Raises:
        ValueError: an unknown name or override (the nearest is named), sizes that do not divide (what fits is named), or an
            encoder that does not keep its contract (what it lacks is named).
    """
    kind = encoders.get(name)
    size = kind.sizes.get(name, {})
    given = {
        "img_size": img_size,
        "window_size": window_size,
        "pretrained_window_size": pretrained_window_size,
        "drop_path": drop_path,
    }
    settings = {
        **(asdict(size) if is_dataclass(size) else size),  # type: ignore[arg-type]
        **{key: value for key, value in given.items() if value is not None},
        **overrides,
    }
    known = inspect.signature(kind).parameters
    for key in settings:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(f'"{name}" has no "{key}"; the nearest is "{"".join(nearest)}"')
    encoder = kind(num_classes=num_classes, **settings)
    encoder.check()
    if "mask_token" in settings and settings["mask_token"] == known["mask_token"].default:
        del settings["mask_token"]  # an objective says it of every encoder; a file says it where it matters
    encoder.made_from = {"name": name, "num_classes": num_classes, **settings}
    return encoder
