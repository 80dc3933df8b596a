"""``mimscale bench step --engine``: steps as training makes them, through DeepSpeed, against timm's SwinV2 as it is trained."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mimscale.commands.bench.step import LEARNING_RATE, TimmSimMIM
from mimscale.files import write_text
from mimscale.masking import SIMMIM_RATIO, masked_up
from mimscale.training.ds_config import reconcile, split_batch
from mimscale.training.engine import Engine, start_ranks, stop_ranks
from mimscale.training.optimizer import decay_groups
from mimscale.training.planning.counting import rank_memory
from mimscale.training.planning.throughput import device_peak, flops_per_image
from mimscale.training.pretraining.module import build_objective, normalise
from mimscale.training.ranks import Ranks
from mimscale.training.recipe import Recipe, load_recipe

# What waits for the device, by the names that a profiler gives to the calls.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass
class Contender:
    """One of those that take turns.

    Attributes:
        step: makes one optimizer step.
        close: frees what it holds.
        seconds: a step took in each round.
    """

    step: Callable[[], object]
    close: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    wanted = [
        f"data.image_size={arguments.image}",
        f"model.window_size={arguments.window}",
        f"train.global_batch={arguments.batch}",
        f"train.compile={str(arguments.compile).lower()}",
        f"train.activation_checkpointing={str(arguments.recompute).lower()}",
    ]
    return load_recipe(arguments.model, wanted)


def _config(arguments: argparse.Namespace, recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    config: dict[str, Any] = {
        "zero_optimization": {"stage": arguments.zero},
        "bf16": {"enabled": arguments.dtype == "bf16"},
        "train_micro_batch_size_per_gpu": arguments.micro or "auto",
    }
    split = split_batch(config, recipe.train.global_batch, ranks.world_size, None)
    return reconcile(config, recipe, split, ranks.device.type == "cuda")


def _batch(images: int, image: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """8-bit noise (B, 3, H, W), masks of the paper's ratio (B, H/32, W/32), and a key an image, as a loader gives them."""
    generator = torch.Generator().manual_seed(0)
    cells = (image // 32) ** 2
    order = torch.rand(images, cells, generator=generator).argsort(1)
    mask = (order < masked_up(cells, SIMMIM_RATIO)).view(images, image // 32, image // 32)
    pixels = torch.randint(0, 256, (images, 3, image, image), dtype=torch.uint8, generator=generator)
    batch = (pixels, mask, torch.arange(images))
    return tuple(t.pin_memory() for t in batch) if device.type == "cuda" else batch


def _ours(recipe: Recipe, config: dict[str, Any], ranks: Ranks, batch: tuple[torch.Tensor, ...]) -> Contender:
    engine = Engine(lambda: build_objective(recipe), lambda m: decay_groups(m, recipe), recipe, config, ranks)

    def step() -> None:
        engine.forward_backward(batch)
        engine.apply(lambda scale: LEARNING_RATE * scale)

    return Contender(step, engine.close)


def _timm(
    arguments: argparse.Namespace, recipe: Recipe, ranks: Ranks, batch: tuple[torch.Tensor, ...], compiled: bool
) -> Contender:
    """timm's SwinV2 as its users train it: fp32 weights, autocast, fused AdamW, the gradient's norm clipped."""
    device = ranks.device
    model: Any = TimmSimMIM(arguments.model, True, arguments.image, arguments.window).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)
    run = torch.compile(model) if compiled else model
    micro = arguments.micro or len(batch[0])

    def step() -> None:
        for start in range(0, len(batch[0]), micro):
            images, mask, _ = (t[start : start + micro].to(device, non_blocking=True) for t in batch)
            normalised = normalise(images, recipe.data.mean, recipe.data.std)
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.dtype == "bf16"):
                loss = run(normalised, mask)
            (loss * micro / len(batch[0])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # as a loop does that logs it

    return Contender(step)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(contenders: dict[str, Contender], rounds: int, steps: int, device: torch.device) -> None:
    for contender in contenders.values():
        for _ in range(3):  # a compiler's graphs, ZeRO-3's trace of the order of modules, the allocator's pools
            contender.step()
    for _ in range(rounds):
        for contender in contenders.values():
            _wait(device)
            start = time.perf_counter()
            for _ in range(steps):
                contender.step()
            _wait(device)
            contender.seconds.append((time.perf_counter() - start) / steps)


@dataclass(frozen=True)
class Profile:
    """One step as a profiler saw it: kernels, seconds the device was busy, calls that wait for it, and a table by time."""

    kernels: int
    busy: float
    waits: dict[str, int]
    table: str


def profiled(step: Callable[[], object], device: torch.device) -> Profile:
    """Profile one step on a GPU; on a CPU, operators stand for kernels."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        step()
        _wait(device)
    averages = profiler.key_averages()
    wanted = "CUDA" if on_gpu else "CPU"
    events = [e for e in averages if e.device_type.name == wanted]
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    waits = {e.key: e.count for e in averages if e.key in WAITS}
    table = averages.table(sort_by=spent, row_limit=60, max_name_column_width=100)
    busy = sum(getattr(e, spent) for e in events) / 1e6
    return Profile(sum(e.count for e in events), busy, waits, table)


def bench_engine(arguments: argparse.Namespace) -> dict[str, float]:
    """Time steps in interleaved rounds, print them, and return what was printed."""
    ranks = start_ranks()
    device = ranks.device
    recipe = _recipe(arguments)
    config = _config(arguments, recipe, ranks)
    batch = _batch(arguments.batch // ranks.world_size, arguments.image, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    contenders = {"mimscale": _ours(recipe, config, ranks, batch)}
    found: dict[str, float] = {}
    if device.type == "cuda":
        contenders["mimscale"].step()
        contenders["mimscale"].step()
        found["peak, GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    found["planned, GB"] = (
        rank_memory(recipe, config, ranks.world_size, config["train_micro_batch_size_per_gpu"]).total / 1e9
    )
    if not arguments.alone:
        contenders["timm"] = _timm(arguments, recipe, ranks, batch, compiled=False)
        contenders["timm, compiled"] = _timm(arguments, recipe, ranks, batch, compiled=True)
    _time(contenders, arguments.rounds, arguments.steps, device)
    flops = flops_per_image(recipe) * arguments.batch / ranks.world_size
    peak = device_peak(device, arguments.dtype == "bf16")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if ranks.is_first:
        print(
            f"{arguments.model}, {arguments.image} px, batch {arguments.batch} on {ranks.world_size} x {name}, "
            f"{arguments.dtype}, ZeRO stage {arguments.zero}, micro-batches of {config['train_micro_batch_size_per_gpu']}"
            f"{', compiled' if arguments.compile else ''}{', blocks recomputed' if arguments.recompute else ''}; "
            f"torch {torch.__version__}; peak {peak / 1e12:.1f} TFLOP/s"
        )
        memory = f"{found['peak, GB']:.1f} GB held at most, " if "peak, GB" in found else ""
        print(f"memory: {memory}{found['planned, GB']:.1f} GB planned")
        print(f"{'':20}{'ms a step':>11}{'images/s':>10}{'mimscale is':>13}{'of peak':>9}")
    for label, contender in contenders.items():
        median = statistics.median(contender.seconds)
        pairs = zip(contender.seconds, contenders["mimscale"].seconds, strict=True)
        ratio = statistics.median(theirs / mine for theirs, mine in pairs)
        share = flops / median / peak
        found |= {
            f"{label}, images/s": arguments.batch / median,
            f"faster than {label}": ratio,
            f"{label}, of peak": share,
        }
        if ranks.is_first:
            print(f"{label:20}{median * 1e3:11.1f}{arguments.batch / median:10.0f}{ratio:12.2f}x{share:9.1%}")
    if arguments.profile:
        seen = profiled(contenders["mimscale"].step, device)
        found |= {"kernels": seen.kernels, "busy, ms": seen.busy * 1e3}
        if ranks.is_first:
            waits = ", ".join(f"{count} {name}" for name, count in seen.waits.items()) or "none"
            print(f"profile of a step: {seen.kernels} kernels, busy {seen.busy * 1e3:.1f} ms; waits: {waits}")
            write_text(Path(arguments.profile), seen.table)
    for contender in contenders.values():
        contender.close()
    stop_ranks()
    return found
