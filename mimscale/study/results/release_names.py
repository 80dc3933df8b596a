"""What a released checkpoint's file name says: ``swinv2_base_1kper50_250k.pth`` and its like."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_MODELS = {
    "small": "swinv2_s",
    "base": "swinv2_b",
    "large": "swinv2_l",
    "huge": "swinv2_h",
    "giant": "swinv2_g",
}
_MODEL = re.compile(rf"swinv2_({'|'.join(_MODELS)}|[sblhg])(?![a-z])")
_DATASET = re.compile(r"(?<![a-z0-9])(?:in)?(?:(22k)|1k(?:[_-]?(?:per)?(10|20|50|100))?)(?![a-z0-9])")
_LENGTH = re.compile(r"(?<![a-z0-9])(\d{3,})(k?)(?![a-z0-9])")
_WINDOW = re.compile(r"window(\d+)")
_IMAGE = re.compile(r"img(\d+)")


@dataclass(frozen=True)
class ReleaseName:
    """The parts of a name, each ``None`` where the name does not say it."""

    model: str | None = None
    dataset: str | None = None
    iterations: int | None = None
    image_size: int | None = None
    window_size: int | None = None


def read_name(path: str | Path) -> ReleaseName:
    """What the name of a checkpoint says of it.

    Understands the names of the paper's released weights (``swinv2_small_1kper10_125k``: model, ImageNet-1K or 22K and
    the percentage of it, length), of SimMIM's recipes (``simmim_pretrain__swinv2_base__img192_window12__800ep``), and
    mimscale's own words (``swinv2_b-in1k_10-125000``).
    """
    name = Path(path).stem.lower()
    model = _MODEL.search(name)
    # Behind the model, so that no number of another meaning is read as a length.
    rest = name[model.end() :] if model else name
    dataset = _DATASET.search(rest)
    length = _LENGTH.search(rest, dataset.end() if dataset else 0)
    image, window = _IMAGE.search(rest), _WINDOW.search(rest)
    return ReleaseName(
        model=_MODELS.get(model[1], f"swinv2_{model[1]}") if model else None,
        dataset=("in22k" if dataset[1] else f"in1k_{dataset[2] or 100}") if dataset else None,
        iterations=int(length[1]) * (1000 if length[2] else 1) if length and dataset else None,
        image_size=int(image[1]) if image else None,
        window_size=int(window[1]) if window else None,
    )
