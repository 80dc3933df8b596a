"""Real photographs as the models take them: normalised fp32 tensors."""

from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch
from PIL import Image


@lru_cache(maxsize=8)
def photographs(count: int, side: int, first: int = 1) -> torch.Tensor:
    """Photographs of solar cells, (count, 3, side, side)."""
    folder = files("elpv_dataset") / "data" / "images"
    images = []
    for number in range(first, first + count):
        with (folder / f"cell{number:04d}.png").open("rb") as file:
            image = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.stack(images) - mean[:, None, None]) / deviation[:, None, None]


def random_mask(batch: int, rows: int, columns: int, hidden: int, seed: int = 0) -> torch.Tensor:
    """Masks (batch, rows, columns) with ``hidden`` cells hidden in each."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, rows * columns, generator=generator).argsort(1)
    return (order < hidden).view(batch, rows, columns)
