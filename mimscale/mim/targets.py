"""What is predicted of masked patches: pixels normalised by their neighbourhood, by their patch, or as they are."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F

from mimscale.registry import targets

EPSILON = 1e-6


class Target(ABC):
    """What an objective predicts of an image: a map.

    Attributes:
        stride: side in pixels of the square that one place of the map describes.
        channels: numbers that describe it.
    """

    stride: int = 1
    channels: int

    def __init__(self, in_chans: int = 3):
        """``in_chans`` is the number of channels of the images; other arguments are a recipe's ``mim.target_options``."""
        self.channels = in_chans

    @abstractmethod
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Describe normalised images (B, C, H, W): (B, channels, H / stride, W / stride), in fp32 at least."""

    def pixels(self, prediction: torch.Tensor, images: torch.Tensor) -> torch.Tensor | None:
        """Draw a prediction, so that a person can look at it.

        Args:
            prediction: (B, channels, H / stride, W / stride).
            images: (B, C, H, W), the true ones, normalised.

        Returns:
            (B, C, H, W), in the space of ``images``; ``None`` where there is no way back to pixels.
        """
        return None


def create_target(name: str, in_chans: int = 3, **options: Any) -> Target:
    """Make a target by name.

    Raises:
        ValueError: an unknown name, or options that it does not take.
    """
    kind = targets.get(name)
    known = list(inspect.signature(kind).parameters)[1:]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"the target {name} has no option {unknown[0]}; it has {', '.join(known) or 'none'}")
    return kind(in_chans, **options)


def _box_sum(x: torch.Tensor, window: int, dim: int) -> torch.Tensor:
    """Sum ``x`` along ``dim`` (-1 or -2) over the window around each position: a running sum and one difference."""
    half = window // 2
    running = F.pad(x, (half + 1, half) if dim == -1 else (0, 0, half + 1, half)).cumsum(dim)
    length = x.shape[dim]
    return running.narrow(dim, window, length) - running.narrow(dim, 0, length)


def _inside(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Count the pixels of each position's window that lie inside a line of ``length`` pixels, in fp64."""
    position = torch.arange(length, device=device, dtype=torch.float64)
    return (position + window // 2 + 1).clamp(max=length) - (position - window // 2).clamp(min=0)


def local_statistics(images: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every pixel's neighbourhood, for each channel.

    Only pixels inside the image count; the variance is unbiased with their true number, and clamped at 0. Computed in
    fp64: the difference of two large sums cancels.

    Args:
        images: (B, C, H, W).
        window: side of the neighbourhood, odd.

    Returns:
        Mean and sqrt(variance + 1e-6), each (B, C, H, W) in fp64.

    Raises:
        ValueError: an even window, or one that holds a single pixel.
    """
    if window % 2 == 0 or window < 3:
        raise ValueError(f"the target window must be odd and at least 3, not {window}")
    x = images.double()
    rows, columns = (_inside(length, window, images.device) for length in images.shape[-2:])
    count = rows[:, None] * columns
    sums = _box_sum(_box_sum(torch.stack((x, x * x)), window, -1), window, -2)
    mean, square = (sums / count).unbind(0)
    variance = (square - mean * mean) * (count / (count - 1))
    return mean, (variance.clamp(min=0) + EPSILON).sqrt()


def local_normalise(images: torch.Tensor, window: int) -> torch.Tensor:
    """Normalise every pixel by its neighbourhood (the paper, section 3.1: a sliding window of 47 x 47).

    Args:
        images: (B, C, H, W).
        window: side of the neighbourhood, odd.

    Returns:
        (B, C, H, W) in fp32, or fp64 for fp64 images.

    Raises:
        ValueError: an even window.
    """
    if images.is_cuda and images.dtype != torch.float64:
        return local_normalise_in_fp32(images, window)
    mean, deviation = local_statistics(images, window)
    return ((images - mean) / deviation).to(torch.promote_types(images.dtype, torch.float32))


@functools.lru_cache(maxsize=16)
def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """A matrix (length, length) that sums a line over the window around each position."""
    place = torch.arange(length, device=device)
    return ((place[:, None] - place[None, :]).abs() <= window // 2).float()


def local_normalise_in_fp32(images: torch.Tensor, window: int) -> torch.Tensor:
    """``local_normalise`` for a GPU, where fp64 is slow: sums by products with banded matrices, of images that are centred first.

    Shapes and errors as in :func:`local_normalise`; the norm of the difference is some 1e-6 of theirs.
    """
    if window % 2 == 0 or window < 3:
        raise ValueError(f"the target window must be odd and at least 3, not {window}")
    height, width = images.shape[-2:]
    x = images.float()
    x = x - x.mean((-2, -1), keepdim=True)
    with torch.autocast(x.device.type, enabled=False):
        sums = torch.stack((x, x * x)) @ _band(width, window, x.device)
        sums = _band(height, window, x.device) @ sums
    rows, columns = (_inside(length, window, x.device) for length in (height, width))
    count = rows[:, None] * columns
    mean, square = (sums * (1 / count).float()).unbind(0)
    variance = (square - mean * mean) * (count / (count - 1)).float()
    return (x - mean) * (variance.clamp(min=0) + EPSILON).rsqrt()


def cut(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Cut maps (B, C, H, W) into cells (B, L, side * side * C), row by row; in a cell, place by place."""
    batch, channels, height, width = maps.shape
    cells = maps.view(batch, channels, height // side, side, width // side, side).permute(0, 2, 4, 3, 5, 1)
    return cells.reshape(batch, -1, side * side * channels)


def join(cells: torch.Tensor, size: torch.Size, side: int) -> torch.Tensor:
    """Put cells, as ``cut`` makes them, together to maps of ``size`` (B, C, H, W)."""
    batch, channels, height, width = size
    places = cells.view(batch, height // side, width // side, side, side, channels)
    return places.permute(0, 5, 1, 3, 2, 4).reshape(size)


class RawPixels(Target):
    """The images as they are."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Give them in fp32 at least."""
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def pixels(self, prediction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Give the prediction."""
        return prediction.to(images.dtype)


class NormalisedPixels(Target):
    """Pixels normalised by their neighbourhood (section 3.1).

    Args:
        in_chans: channels of the images.
        window: side of the neighbourhood in pixels, odd.

    Raises:
        ValueError: an even window.
    """

    def __init__(self, in_chans: int = 3, window: int = 47):
        super().__init__(in_chans)
        if window % 2 == 0 or window < 3:
            raise ValueError(f"target_window must be odd and at least 3, or None, not {window}")
        self.window = window

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See :func:`local_normalise`."""
        return local_normalise(images, self.window)

    def pixels(self, prediction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Turn back with the mean and deviation of the true image's own neighbourhoods, which the model never saw.

        Colour and contrast are the image's, structure is the model's.
        """
        mean, deviation = local_statistics(images, self.window)
        return (prediction.double() * deviation + mean).to(images.dtype)


class PatchNormalisedPixels(Target):
    """Pixels normalised by the mean and variance of their own patch (MAE's ``norm_pix``).

    Args:
        in_chans: channels of the images.
        patch: side of the patches, pixels.
    """

    def __init__(self, in_chans: int = 3, patch: int = 16):
        super().__init__(in_chans)
        self.patch = patch

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise; the variance is unbiased."""
        patches = cut(images.to(torch.promote_types(images.dtype, torch.float32)), self.patch)
        mean, deviation = _patch_statistics(patches)
        return join((patches - mean) / deviation, images.shape, self.patch)

    def pixels(self, prediction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Turn back with the mean and deviation of the true image's own patches, which the model never saw.

        Colour and contrast are the image's, structure is the model's.
        """
        mean, deviation = _patch_statistics(cut(images.double(), self.patch))
        filled = cut(prediction.double(), self.patch) * deviation + mean
        return join(filled, images.shape, self.patch).to(images.dtype)


def _patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of patches (B, L, D), each (B, L, 1); the variance is unbiased."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, unbiased=True)
    return mean, (variance + EPSILON).sqrt()
