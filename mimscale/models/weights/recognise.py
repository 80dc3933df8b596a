"""Which SwinV2 a file of weights belongs to, told from the weights themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mimscale.models.sizes import SWIN_SIZES

_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.")
_STRIDE = 32  # pixels a token of the last stage


@dataclass(frozen=True)
class SwinShape:
    """A SwinV2 as its weights show it.

    ``name`` is the size of Table 1 with this width, depth and heads (``None``: none of them). ``window_size`` and
    ``image_size`` are ``None`` where the file has no position tables to tell them from. ``decoder_blocks`` is ``None``
    without a SimMIM decoder, 0 for the linear one.
    """

    name: str | None
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    extra_norm_every: int
    window_size: int | None
    image_size: int | None
    decoder_blocks: int | None


def recognise_swin(state: Mapping[str, Tensor]) -> SwinShape:
    """The SwinV2 in a file's weights, tables included.

    Args:
        state: as ``read_checkpoint`` gives it: an encoder's names, or a SimMIM's with its encoder under "encoder.".

    Raises:
        ValueError: they are no SwinV2's; the message says what is missing.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    has_decoder = "decoder.0.weight" in state
    head = {name.removeprefix("encoder."): value for name, value in state.items() if not name.startswith("decoder.")}
    blocks = sorted({(int(m[1]), int(m[2])) for name in head if (m := _BLOCK.match(name))})
    stages = sorted({stage for stage, _ in blocks})
    projection = head.get("patch_embed.proj.weight")
    scales = [head.get(f"layers.{stage}.blocks.0.attn.logit_scale") for stage in stages]
    missing = (
        [] if projection is not None and projection.ndim == 4 and projection.numel() else ["patch_embed.proj.weight"]
    )
    missing += [] if stages == list(range(len(stages))) and stages else ["layers.0.blocks.0"]
    missing += [
        f"layers.{s}.blocks.0.attn.logit_scale" for s, v in zip(stages, scales, strict=True) if v is None or not v.ndim
    ]
    if missing:
        raise ValueError(f"not the weights of a SwinV2: there is no usable {', '.join(missing)}")
    assert projection is not None
    embed_dim = len(projection)
    depths = tuple(sum(s == stage for s, _ in blocks) for stage in stages)
    heads = tuple(len(scale) for scale in scales if scale is not None)
    named = [n for n, s in SWIN_SIZES.items() if (s.embed_dim, s.depths, s.num_heads) == (embed_dim, depths, heads)]
    windows = [_window(head, stage) for stage in stages]
    first, last = windows[0], windows[-1]
    return SwinShape(
        name=named[0] if named else None,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=heads,
        extra_norm_every=_extra_norm_every(blocks, head),
        window_size=first,
        # The last stage's window shows its side only where it was clipped to it.
        image_size=_STRIDE * last if first is not None and last is not None and last < first else None,
        decoder_blocks=_decoder_blocks(state) if has_decoder else None,
    )


def _window(head: Mapping[str, Tensor], stage: int) -> int | None:
    """Side of a stage's window, from whichever table the file kept."""
    index = head.get(f"layers.{stage}.blocks.0.attn.relative_position_index")
    if index is not None and index.ndim == 2 and len(index) == index.shape[1] > 0:
        return math.isqrt(len(index))
    table = head.get(f"layers.{stage}.blocks.0.attn.relative_coords_table")
    return (table.shape[1] + 1) // 2 if table is not None and _is_table(table) else None


def _is_table(table: Tensor) -> bool:
    """Whether it is a table of offsets, (1, 2w - 1, 2w - 1, 2)."""
    return table.ndim == 4 and table.shape[1] == table.shape[2] > 0 and table.shape[3] == 2


def _extra_norm_every(blocks: list[tuple[int, int]], head: Mapping[str, Tensor]) -> int:
    """After how many blocks of a stage one more norm stands; 0 for none."""
    places = [j + 1 for stage, j in blocks if f"layers.{stage}.blocks.{j}.norm3.weight" in head]
    return min(places, default=0)


def _decoder_blocks(state: Mapping[str, Tensor]) -> int:
    found = {m[1] for name in state if (m := re.match(r"decoder\.blocks\.(\d+)\.", name))}
    return len(found)


def stored_windows(state: Mapping[str, Tensor]) -> list[int] | None:
    """The windows that the tables of a released SwinV2 were made for, one for each stage; ``None`` where none are stored.

    A table's last entry is that of the largest offset, w - 1: log2(1 + 8 (w - 1) / (r - 1)) / 3 for a bias that was trained
    in windows of r.
    """
    windows = []
    for name, table in sorted(state.items()):
        if name.endswith(".blocks.0.attn.relative_coords_table"):
            last = float(table[0, -1, -1, -1]) if _is_table(table) and len(table) else 0.0
            reach = 2 ** (3 * last) - 1 if 0 < last < 10 else 0
            if reach <= 0:
                return None
            windows.append(1 + round(8 * ((table.shape[1] + 1) // 2 - 1) / reach))
    return windows or None
