"""ViT in the names of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mimscale.models.encoder import Part
from mimscale.models.weights.parts import encoder_parts, timm_usage


class VitTimm:
    """timm's VisionTransformer, which stores the positions that are worked out here."""

    def parts(self, model: Any, names: list[str]) -> list[Part]:
        """The encoder without its mask token, and its positions."""
        encoder = model.encoder
        parts = [part for part in encoder_parts(names) if part.name != "mask_token"]
        if encoder.pos_embed is None:
            parts.append(Part("pos_embed", encoder.fixed_positions()))
        return parts

    def config(self, model: Any) -> None:
        """None: timm is told by its caller."""

    def usage(self, output: Path, encoder: Any) -> str:
        """A call of ``timm.create_model``."""
        own = {"patch_size": encoder.patch_size, "depth": encoder.depth, "num_heads": encoder.num_heads}
        return timm_usage("vit_base_patch16_224", output, encoder, own)
