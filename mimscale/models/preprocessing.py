"""How pictures become the images that an encoder was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

# Pixels of a side.
LARGEST = 1 << 15
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side, cut the centre, take out the mean and the deviation.

    Attributes:
        image_size: side of the centre crop, pixels.
        resize_shorter: shorter side before it, pixels.
        mean: of each channel, of values in [0, 1].
        std: of each channel, likewise.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    image_size: int
    resize_shorter: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From JSON's lists and numbers.

        Raises:
            ValueError: a size, mean, deviation or interpolation that there is none of; the message names it.
        """
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        known = [field.name for field in fields(cls)]
        if unknown := sorted(plain.keys() - set(known)):
            raise ValueError(f"there is no {unknown[0]!r} among {', '.join(known)}")
        for key in ("image_size", "resize_shorter"):
            if type(plain.get(key)) is not int or not 1 <= plain[key] <= LARGEST:
                raise ValueError(f"{key} is no number of pixels from 1 to {LARGEST:,}")
        for key in plain.keys() & {"mean", "std"}:
            colours = plain[key]
            if not isinstance(colours, tuple) or not colours or not all(_plain(v, key == "std") for v in colours):
                raise ValueError(f"{key} is no list of numbers of colours" + (" above 0" if key == "std" else ""))
        if plain.get("interpolation", "bilinear") not in ("bilinear", "bicubic"):
            raise ValueError("interpolation is neither bilinear nor bicubic")
        return cls(**plain)

    def at(self, image_size: int) -> Preprocessing:
        """The same for images of another size: of a picture, as much is seen."""
        shorter = round(self.resize_shorter * image_size / self.image_size)
        return replace(self, image_size=image_size, resize_shorter=shorter)


def _plain(value: Any, least: bool) -> bool:
    """Whether it is a number, above 0 where ``least`` is set."""
    return type(value) in (int, float) and abs(value) < 1e6 and (value > 0 or not least)


def preprocessing_of(encoder: Any) -> Preprocessing:
    """What an encoder's run or file says, kept as its ``preprocessing``; without one, its own size and ImageNet's colours."""
    said: Preprocessing | None = getattr(encoder, "preprocessing", None)
    return said or Preprocessing(encoder.img_size[0], encoder.img_size[0])
