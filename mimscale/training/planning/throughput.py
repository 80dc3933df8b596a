"""Floating-point operations: how many a training takes, and how many a device makes in a second."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mimscale.training.recipe import Recipe

# Dense peak TFLOP/s from the makers' data sheets, (bf16, fp32 without TF32), by words of the device's name; the first counts.
GPU_PEAKS = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "A40": (150, 37.4),
    "A10": (125, 31.2),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of whatever ``work`` computes: its matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def training_flops(build: Callable[[], Any], forward: Callable[[Any], object]) -> int:
    """Floating-point operations of one image, forward and backward: the forward pass counted on the meta device, times three.

    Args:
        build: makes the module.
        forward: passes one image through it, made where torch makes tensors by default; the module is in eval mode.
    """
    import torch

    with torch.device("meta"), torch.no_grad():
        module = build().eval()
        return 3 * count_flops(lambda: forward(module))


def flops_per_image(recipe: Recipe) -> int:
    """Floating-point operations of one pre-training image; see :func:`training_flops`."""
    import torch

    from mimscale.training.pretraining.module import build_objective

    size = recipe.data.image_size

    def forward(objective: Any) -> object:
        return objective(
            torch.empty(1, 3, size, size, dtype=torch.uint8), torch.zeros(1, *recipe.mask.grid, dtype=torch.bool)
        )

    return training_flops(lambda: build_objective(recipe), forward)


def device_peak(device: torch.device, bf16: bool) -> float:
    """Peak FLOP/s of one device: the data sheet's for a known GPU, else what a matrix product reaches here."""
    import torch

    from mimscale.models.layers import widens

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (low, full) in GPU_PEAKS.items():
            if re.search(rf"\b{re.escape(known)}\b", name):
                return (low if bf16 else full) * 1e12
    size = 4096 if device.type == "cuda" else 768
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    if widens(matrix):
        matrix = matrix.float()  # as the model's own products
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
