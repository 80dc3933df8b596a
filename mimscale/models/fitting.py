"""Which sizes go together: windows and images, heads and widths, windows now and at pre-training."""

from collections.abc import Sequence

from mimscale.models.windows import clip_window


def reference_windows(
    grid: tuple[int, int], window: int, pretrained: int | Sequence[int], stages: int
) -> list[tuple[int, int]]:
    """Work out the window, for each stage, that the position bias was trained in.

    One number for ``pretrained`` means windows that were clipped at pre-training wherever they are clipped now, and by
    the same share: at 224 px with window 14, 12 means 12-12-12-6.

    Raises:
        ValueError: not one number, nor one for each stage.
    """
    if not isinstance(pretrained, int) and len(pretrained) != stages:
        raise ValueError(f"pretrained_window_size takes one number or {stages}, one for each stage, not {pretrained!r}")
    references = []
    for i in range(stages):
        size = clip_window(-(-grid[0] // 2**i), -(-grid[1] // 2**i), window, shifted=False).size
        before = pretrained if isinstance(pretrained, int) else pretrained[i]
        if not before:
            references.append(size)
        elif isinstance(pretrained, int):
            references.append((max(1, round(before * size[0] / window)), max(1, round(before * size[1] / window))))
        else:
            references.append((before, before))
    return references


def windows_at(image: int, window: int, stages: int = 4, patch: int = 4) -> tuple[int, ...]:
    """The window of each stage for square images: at 192 px, 12 means 12-12-12-6, since the last map is no larger."""
    side = image // patch
    return tuple(clip_window(-(-side // 2**i), -(-side // 2**i), window, shifted=False).size[0] for i in range(stages))


def check_sizes(
    image: tuple[int, int],
    window: int,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    patch: int,
    pad_windows: bool,
) -> None:
    """Check that heads divide widths, and that patches, merging and windows divide the image.

    Raises:
        ValueError: naming what does not divide, and what would fit.
    """
    if len(depths) != len(num_heads):
        raise ValueError(f"depths {tuple(depths)} and num_heads {tuple(num_heads)} must have one entry a stage each")
    for i, heads in enumerate(num_heads):
        dim = embed_dim * 2**i
        if heads < 1 or dim % heads:
            fits = [h for h in range(1, dim + 1) if dim % h == 0 and dim // h >= 8]
            nearest = sorted(sorted(fits, key=lambda h: abs(h - heads))[:3])
            raise ValueError(f"{heads} heads do not divide the {dim} channels of stage {i + 1}; {nearest} would")
    if pad_windows:
        return
    stride = patch * 2 ** (len(depths) - 1)

    def fits_image(side: int, window: int) -> bool:
        maps = [side // patch // 2**i for i in range(len(depths))]
        return side > 0 and side % stride == 0 and all(m <= window or m % window == 0 for m in maps)

    for side in image:
        if not fits_image(side, window):
            sides = sorted(range(stride, 4 * side + 32 * stride, stride), key=lambda s: abs(s - side))
            windows = sorted(range(2, 4 * window), key=lambda w: abs(w - window))
            near_sides = sorted([s for s in sides if fits_image(s, window)][:2])
            near_windows = sorted([w for w in windows if fits_image(side, w)][:4])
            instead = f"; at img_size {side}, window_size {near_windows} would" if near_windows else ""
            raise ValueError(
                f"img_size {side} does not fit window_size {window} (patch {patch}, {len(depths)} stages: every "
                f"map must be whole windows, or fit inside one): img_size {near_sides} would{instead}; "
                "pad_windows=True pads"
            )
