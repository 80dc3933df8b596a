"""What SimMIM learns to predict: pixels normalised by the mean and variance of their neighbourhood."""

import torch
import torch.nn.functional as F

EPSILON = 1e-6


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
    mean, deviation = local_statistics(images, window)
    return ((images - mean) / deviation).to(torch.promote_types(images.dtype, torch.float32))
