"""``mimscale bench step``: a pre-training step against timm's SwinV2 and the machine's matrix products.

Contenders take turns within a round, so that a busy machine is busy for all of them.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mimscale.masking import SIMMIM_RATIO, masked_up
from mimscale.mim import SimMIM, local_normalise
from mimscale.models import create_encoder
from mimscale.models.sizes import SWIN_SIZES
from mimscale.training.planning.throughput import count_flops

LEARNING_RATE = 4e-4


class TimmSimMIM(nn.Module):
    """SimMIM as the released code has it, on timm's SwinV2: the rival.

    Args:
        name: of the encoder, "swinv2_s" and so on.
        fast_target: normalise the target as mimscale does, instead of a plain 47-wide ``avg_pool2d``.
        image: side of the images.
        window: of the attention.
    """

    def __init__(self, name: str, fast_target: bool, image: int = 192, window: int = 12):
        super().__init__()
        from timm.models.swin_transformer_v2 import SwinTransformerV2

        size = SWIN_SIZES[name]
        self.encoder = SwinTransformerV2(
            img_size=image,
            window_size=window,
            embed_dim=size.embed_dim,
            depths=size.depths,
            num_heads=size.num_heads,
            num_classes=0,
            drop_path_rate=0.1,
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, size.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        width = size.embed_dim * 2 ** (len(size.depths) - 1)
        self.decoder = nn.Sequential(nn.Conv2d(width, 32 * 32 * 3, 1), nn.PixelShuffle(32))
        self.fast_target = fast_target

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Give the loss of images (B, 3, H, W), hidden where mask (B, H/32, W/32) is True."""
        tokens = self.encoder.patch_embed(images)
        weight = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(-1).to(tokens.dtype)
        tokens = tokens * (1 - weight) + self.mask_token * weight
        features = self.encoder.norm(self.encoder.layers(tokens)).permute(0, 3, 1, 2)
        prediction = self.decoder(features)
        target = local_normalise(images, 47) if self.fast_target else plain_target(images, 47)
        hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1).to(target.dtype)
        return (F.mse_loss(prediction.float(), target, reduction="none") * hidden).sum() / (hidden.sum() * 3)


def plain_target(images: torch.Tensor, window: int) -> torch.Tensor:
    """Normalise the target by ``avg_pool2d``, the released code's way: (B, 3, H, W) to the same."""
    options = {"kernel_size": window, "stride": 1, "padding": window // 2}
    mean = F.avg_pool2d(images, **options, count_include_pad=False)  # type: ignore[arg-type]
    square = F.avg_pool2d(images**2, **options, count_include_pad=False)  # type: ignore[arg-type]
    count = F.avg_pool2d(torch.ones_like(images), **options, count_include_pad=True) * window**2  # type: ignore[arg-type]
    variance = ((square - mean**2) * (count / (count - 1))).clamp(min=0)
    return (images - mean) / (variance + 1e-6) ** 0.5


def _inputs(batch: int, image: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of noise (B, 3, H, W), and masks of the paper's ratio (B, H/32, W/32)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, image, image, generator=generator)
    cells = (image // 32) ** 2
    order = torch.rand(batch, cells, generator=generator).argsort(1)
    mask = (order < masked_up(cells, SIMMIM_RATIO)).view(batch, image // 32, image // 32)
    return images.to(device), mask.to(device)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], torch.Tensor]) -> None:
    loss_of().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed.

    A process that trains one model reuses its memory after the first steps. With several models that take turns, glibc
    would give pages back and fetch them anew at every step, up to a seventh of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation has a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gemm(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A large matrix product, and its floating-point operations."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * side**3


def step_flops(model: nn.Module, batch: int, image: int) -> float:
    """Count the floating-point operations of forward and backward for a batch, by the products alone."""
    images, mask = _inputs(batch, image, torch.device("cpu"))
    model.eval()  # so that nothing is left out by drop path
    flops = count_flops(lambda: model(images, mask).loss.backward())
    model.train()
    model.zero_grad(set_to_none=True)
    return float(flops)


def bench_step(arguments: argparse.Namespace) -> dict[str, float]:
    """Time steps in interleaved rounds and print them; returns what was printed.

    Returns:
        Median images/s of each contender, their ratios, and the share of the measured matrix-product peak.
    """
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
        _keep_freed_memory()
    images, mask = _inputs(arguments.batch, arguments.image, device)
    torch.manual_seed(0)
    encoder: Any = create_encoder(arguments.model, img_size=arguments.image, window_size=arguments.window)
    ours = SimMIM(encoder).to(device, dtype)
    if arguments.compile:
        ours.encoder.compile_blocks()

    def run_ours() -> torch.Tensor:
        return ours(images, mask, torch.randint(2**62, (arguments.batch,))).loss

    contenders: dict[str, tuple[nn.Module, Callable[[], torch.Tensor]]] = {"mimscale": (ours, run_ours)}
    for label, fast in (("timm", False), ("timm, fast target", True)):
        if not arguments.alone:
            rival = TimmSimMIM(arguments.model, fast, arguments.image, arguments.window).to(device, dtype)

            def run(rival: nn.Module = rival) -> torch.Tensor:
                return rival(images.to(dtype), mask)

            contenders[label] = (rival, run)
    actions: dict[str, Callable[[], object]] = {}
    for label, (model, loss_of) in contenders.items():
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)

        def act(
            model: nn.Module = model,
            optimizer: torch.optim.Optimizer = optimizer,
            loss_of: Callable[[], torch.Tensor] = loss_of,
        ) -> None:
            _step(model, optimizer, loss_of)

        actions[label] = act
    gemm, gemm_flops = _gemm(device, dtype)
    actions["gemm"] = lambda: [gemm() for _ in range(arguments.gemms)]
    flops = step_flops(ours, arguments.batch, arguments.image) if device.type == "cpu" else float("nan")
    times: dict[str, list[float]] = {label: [] for label in actions}
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    for turn in range(arguments.rounds + 1):
        for label, action in actions.items():
            _synchronise(device)
            start = clock()
            action()
            _synchronise(device)
            if turn:  # the first round warms up
                times[label].append(clock() - start)
    return _report(times, arguments, flops, gemm_flops)


def _report(
    times: dict[str, list[float]], arguments: argparse.Namespace, flops: float, gemm_flops: float
) -> dict[str, float]:
    peak = gemm_flops * arguments.gemms / min(times.pop("gemm"))
    results = {"gemm peak, GFLOP/s": peak / 1e9}
    print(
        f"{arguments.model}, batch {arguments.batch}, {arguments.image} px, {arguments.rounds} rounds, "
        f"GEMM peak {peak / 1e9:.1f} GFLOP/s"
    )
    print(f"{'':20}{'images/s':>10}{'slowest':>10}{'fastest':>10}{'mimscale is':>13}{'of peak':>9}")
    for label, taken in times.items():
        # Ratios are taken within a round, where both met the same machine.
        ratio = statistics.median(theirs / mine for theirs, mine in zip(taken, times["mimscale"], strict=True))
        median = statistics.median(taken)
        share = flops / median / peak
        results |= {f"{label}, images/s": arguments.batch / median, f"faster than {label}": ratio}
        results[f"{label}, of peak"] = share
        print(
            f"{label:20}{arguments.batch / median:10.3f}{arguments.batch / max(taken):10.3f}"
            f"{arguments.batch / min(taken):10.3f}{ratio:12.2f}x{share:9.1%}"
        )
    return results


def run(arguments: argparse.Namespace) -> int:
    """Run ``mimscale bench step``; returns the exit status."""
    on_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    if arguments.engine or on_gpu:
        from mimscale.commands.bench.engine_step import bench_engine

        arguments.dtype = arguments.dtype or ("bf16" if on_gpu else "fp32")
        bench_engine(arguments)
    else:
        bench_step(arguments)
    return 0
