"""What the formats of exported weights are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mimscale.models.encoder import Part
from mimscale.wording import Escaped


class ExportError(Escaped, ValueError):
    """A model that the wanted format cannot hold, or a place that cannot be written; the message says which."""


def encoder_parts(names: list[str]) -> list[Part]:
    """List an encoder's own names, of a model's parameter names."""
    return [Part(name.removeprefix("encoder."), name) for name in names if name.startswith("encoder.")]


def timm_usage(name: str, output: Path, encoder: Any, own: dict[str, Any]) -> str:
    """A call of ``timm.create_model``; ``own`` are a family's arguments beside the common ones."""
    settings = {"num_classes": 0, "img_size": encoder.img_size, "embed_dim": encoder.embed_dim, **own}
    given = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f'model = timm.create_model("{name}", {given}, checkpoint_path="{output}")'
