"""What SimMIM learns to predict: pixels normalised by the mean and variance of their neighbourhood."""

from functools import lru_cache

import numpy as np
import torch

EPSILON = 1e-6


@lru_cache(maxsize=64)
def _window_ends(length: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel of each position's window and the first one after it, cut at the image's edges."""
    position = np.arange(length)
    return np.maximum(position - window // 2, 0), np.minimum(position + window // 2 + 1, length)


def _box_sum(x: torch.Tensor, window: int, dim: int) -> torch.Tensor:
    """Sum ``x`` along ``dim`` over the window around each position: a running sum and one difference."""
    first, after = _window_ends(x.shape[dim], window)
    edge = list(x.shape)
    edge[dim] = 1
    running = torch.cat((x.new_zeros(edge), x.cumsum(dim)), dim)
    ends = (torch.as_tensor(ends, device=x.device) for ends in (after, first))
    return running.index_select(dim, next(ends)) - running.index_select(dim, next(ends))


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
    (top, bottom), (left, right) = (_window_ends(length, window) for length in images.shape[-2:])
    count = torch.as_tensor(np.outer(bottom - top, right - left), dtype=torch.float64, device=images.device)
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
    mean, deviation = local_statistics(images, window)
    return ((images - mean) / deviation).to(torch.promote_types(images.dtype, torch.float32))
