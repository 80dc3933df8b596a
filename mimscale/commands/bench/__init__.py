"""``mimscale bench``: what this machine reaches, against named rivals and against mimscale's own plans."""

from __future__ import annotations

import argparse
import re
import sys
from importlib import import_module
from pathlib import Path

from mimscale.commands import Parser
from mimscale.commands.numbers import whole
from mimscale.models.sizes import SWIN_SIZES
from mimscale.wording import printable


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(prog="mimscale bench", description=__doc__, allow_abbrev=False)
    kinds = top.add_subparsers(dest="kind", required=True, metavar="step|memory|data|communication|save")
    for kind, (add, text) in KINDS.items():
        add(kinds.add_parser(kind, help=text, description=text, allow_abbrev=False))
    return top


def main(argv: list[str]) -> int:
    """Run one bench; returns its exit status."""
    if not argv or argv[0] not in KINDS:
        parser().parse_args(argv)  # shows the help or what is wrong, and exits
    kind, *words = argv
    add, text = KINDS[kind]
    made = Parser(prog=f"mimscale bench {kind}", description=text, allow_abbrev=False)
    add(made)
    # With subparsers argparse would not take key=value between options.
    asked = made.parse_intermixed_args(words)
    if kind in ("step", "memory") and (problem := _misfit(asked)):
        print(f"mimscale: error: {problem}", file=sys.stderr)
        return 1
    return import_module(f"mimscale.commands.bench.{kind}").run(asked)


def _misfit(asked: argparse.Namespace) -> str | None:
    """Why the encoder that is asked for cannot be, if so."""
    import torch

    from mimscale.models import create_encoder

    try:
        with torch.device("meta"):
            create_encoder(asked.model, img_size=asked.image, window_size=asked.window)
    except ValueError as error:
        return f"--image {asked.image} --window {asked.window}: {error}"
    return None


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"'{printable(text, 60)}' is not cpu, cuda or cuda:N")
    return text


def _model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", default="swinv2_s", choices=list(SWIN_SIZES))
    sub.add_argument("--batch", type=whole(1, 65_536), default=8, help="images a step")
    sub.add_argument("--image", type=whole(1, 32_768), default=192, help="side of the images")
    sub.add_argument("--window", type=whole(1, 64), default=12)


def _step(sub: argparse.ArgumentParser) -> None:
    _model(sub)
    sub.add_argument("--rounds", type=whole(1, 10**6), default=5)
    sub.add_argument("--threads", type=whole(1, 4096), default=1, help="CPU threads")
    sub.add_argument("--gemms", type=whole(1, 10**6), default=8, help="matrix products a round")
    sub.add_argument("--device", type=_device, help="cpu or cuda; by default what is there")
    sub.add_argument("--compile", action="store_true", help="compile every block of mimscale's encoder")
    sub.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, on a busy machine")
    sub.add_argument("--alone", action="store_true", help="leave out the rivals")
    sub.add_argument(
        "--engine",
        action="store_true",
        help="train through DeepSpeed, as a run does, which a GPU always does; the options below say how",
    )
    sub.add_argument("--zero", type=int, default=1, choices=(0, 1, 2, 3), help="stage, with --engine (1)")
    sub.add_argument("--dtype", choices=("bf16", "fp32"), help="with --engine; by default bf16 on a GPU, fp32 on a CPU")
    sub.add_argument(
        "--micro",
        type=whole(1, 65_536),
        help="images of a micro-batch, with --engine; by default the whole batch of a rank",
    )
    sub.add_argument(
        "--recompute", action="store_true", help="with --engine: compute blocks again in the backward pass"
    )
    sub.add_argument("--steps", type=whole(1, 10**6), default=3, help="a round, with --engine (3)")
    sub.add_argument(
        "--profile", type=Path, metavar="FILE", help="with --engine: write the time of each kernel of one step"
    )


def _memory(sub: argparse.ArgumentParser) -> None:
    _model(sub)
    sub.add_argument("--allocated", action="store_true", help="train, and compare with mimscale plan-memory")
    sub.add_argument("--ranks", type=whole(1, 1024), default=1, help="with --allocated")
    sub.add_argument("--zero", type=whole(0, 3), nargs="+", default=[0, 1, 2, 3], help="stages, with --allocated")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, with --allocated")


def _data(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("out", type=Path, nargs="+", help="shard folders; a pixel store is compared to the first")
    sub.add_argument("--batch", type=whole(1, 65_536), default=128, help="images a turn (128)")
    sub.add_argument("--rounds", type=whole(1, 10**6), default=12, help="turns (12)")
    sub.add_argument(
        "--images",
        type=whole(),
        metavar="N",
        help="different images that the competitors get (500); with --build: images that are stored (12,000, or all there are)",
    )
    sub.add_argument("--build", action="store_true", help="measure building, not reading")
    sub.add_argument("--soak", type=whole(), metavar="N", help="measure the workers' memory over N samples instead")
    sub.add_argument("--workers", type=whole(1, 1024), default=2, help="worker processes for --soak (2)")
    sub.add_argument("--scratch", type=Path, help="folder for copies; best in memory (/dev/shm where there is one)")
    sub.add_argument("--json", type=Path, help="write the figures here, too")


def _communication(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--recipe", default="demo", metavar="FILE|NAME", help="(demo)")
    sub.add_argument("--ranks", type=whole(1, 1024), nargs="+", default=[2, 4], help="processes on this host")
    sub.add_argument("--zero", type=whole(0, 3), nargs="+", default=[0, 1, 2, 3], help="stages")
    sub.add_argument("--accumulate", type=whole(1, 4096), nargs="+", default=[1, 2], help="micro-batches a step")
    sub.add_argument("--bf16", action="store_true")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys")


def _save(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--recipe", default="swinv2_b", metavar="FILE|NAME", help="(swinv2_b)")
    sub.add_argument("--deepspeed_config", metavar="FILE|NAME", help="by default ZeRO stage 2, as it comes")
    sub.add_argument("--batch", type=whole(1, 65_536), default=8, help="images a step")
    sub.add_argument("--steps", type=whole(1, 10**6), default=3, help="that say how long one takes")
    sub.add_argument("--folder", type=Path, help="on the disk to measure; by default that of temporary files")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys")


# Each is a module of this package with ``run(arguments)``.
KINDS = {
    "step": (_step, "time pre-training steps against timm's SwinV2 and the machine's matrix products"),
    "memory": (_memory, "count activation memory, bytes an image"),
    "data": (_data, "read and decode against ImageFolder, webdataset and the decoder's limit"),
    "communication": (
        _communication,
        "count bytes between ranks in real steps, against docs/results/communication.md",
    ),
    "save": (_save, "time how long a step waits for a checkpoint, beside training and in line"),
}
