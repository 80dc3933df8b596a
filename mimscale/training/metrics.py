"""What a run writes while it trains: metrics.jsonl, TensorBoard, and the progress line with throughput, MFU and ETA."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mimscale.files import write_text
from mimscale.models.layers import widens
from mimscale.training.pretraining.module import build_objective
from mimscale.training.recipe import Recipe

# Dense peak TFLOP/s from the makers' data sheets, (bf16, fp32 without TF32); the first name found in the device's counts.
GPU_PEAKS = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "A40": (150, 37.4),
    "A10": (125, 31.2),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}
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


class MetricsLog:
    """``metrics.jsonl``: one object a line, in the order of the steps."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a line that a kill cut short is left out."""
        records = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and "step" in record:
                    records.append(record)
        return records

    def rewind(self, step: int) -> None:
        """Drop what was logged after ``step``: the resumed run will log those steps again."""
        kept = [record for record in self.read() if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def append(self, record: dict[str, Any]) -> None:
        """Add one line; it is with the operating system when this returns, so a kill does not lose it."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def duration(seconds: float) -> str:
    """Seconds as people read them: 45 s, 3 min 20 s, 5 h 07 min, 2 d 03 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600:02d} h"


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
