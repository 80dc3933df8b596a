"""The encoders of the paper's Table 1, and the ViTs of its MAE runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SwinSize:
    """A SwinV2's width, depth and heads (Table 1)."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


@dataclass(frozen=True)
class VitSize:
    """A ViT's patch, width, depth and heads."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int


SWIN_SIZES = {
    "swinv2_s": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swinv2_b": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swinv2_l": SwinSize(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "swinv2_h": SwinSize(352, (2, 2, 18, 2), (11, 22, 44, 88)),
    "swinv2_g": SwinSize(448, (2, 2, 18, 2), (14, 28, 56, 112)),
}

VIT_SIZES = {
    "vit_b": VitSize(16, 768, 12, 12),
    "vit_l": VitSize(16, 1024, 24, 16),
    "vit_h": VitSize(14, 1280, 32, 16),
}
