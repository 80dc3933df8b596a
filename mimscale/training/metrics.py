"""What a run shows while it trains: the progress line, and the FLOPs by which its MFU is told."""

from __future__ import annotations

import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mimscale.models.layers import widens
from mimscale.training.metrics_log import duration
from mimscale.training.planning.gpus import GPU_PEAKS
from mimscale.training.pretraining.module import build_objective
from mimscale.training.recipe import Recipe

LOG_SECONDS = 10.0
BAR = "{n_fmt}/{total_fmt} {bar:12} {postfix} | {elapsed} < {remaining}"


def flops_per_image(recipe: Recipe) -> int:
    """Floating-point operations of one training image: the forward pass counted on the meta device, times three."""
    with torch.device("meta"):
        objective = build_objective(recipe)
        size, grid = recipe.data.image_size, recipe.mask_grid
        images = torch.empty(1, 3, size, size, dtype=torch.uint8)
        mask = torch.zeros(1, grid, grid, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            objective.eval()(images, mask)
    return 3 * counter.get_total_flops()


def device_peak(device: torch.device, bf16: bool) -> float:
    """Peak FLOP/s of one device: the data sheet's for a known GPU, else what a matrix product reaches here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (low, full) in GPU_PEAKS.items():
            if known in name:
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


class Progress:
    """A moving bar on a terminal; elsewhere one plain line every ten seconds."""

    def __init__(self, done: int, total: int, shown: bool):
        self.total, self.shown = total, shown
        self.start_step, self.start_time = done, time.monotonic()
        self.last_line = 0.0
        self.bar = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, dynamic_ncols=True, smoothing=0.1, bar_format=BAR)

    def step(self, step: int, text: str) -> None:
        """Say that ``step`` updates are done; ``text`` holds the figures to show."""
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if now - self.last_line >= LOG_SECONDS or step == self.total:
            self.last_line = now
            pace = (now - self.start_time) / max(1, step - self.start_step)
            self._print(f"step {step}/{self.total} | {text} | ETA {duration(pace * (self.total - step))}")

    def say(self, message: str) -> None:
        """A line of its own, above the bar."""
        if self.shown:
            self._print(message)

    def _print(self, message: str) -> None:
        if self.bar is not None:
            self.bar.write(message)
        else:
            print(message, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self.bar is not None:
            self.bar.close()
