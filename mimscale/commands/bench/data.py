"""``mimscale bench data OUT``: how fast this machine makes training crops, and how fast others make the same.

All pipelines are measured in one process, on one core, in turns of one batch, in CPU time; each yields a batch of
augmented 192 x 192 crops from files that are in memory already. So a busy machine slows all alike, and the ratios hold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from mimscale.data import draws, pool
from mimscale.data.build import writer
from mimscale.data.decode import opened
from mimscale.data.errors import ShardError
from mimscale.data.shards.index import ShardIndex
from mimscale.data.shards.store import PIXELS
from mimscale.data.stream import augment
from mimscale.data.stream.crops import CropSpec
from mimscale.data.stream.mim import MIMStream
from mimscale.files import write_text

SIZE = 192
SCALE, RATIO = (0.67, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_IMAGEFOLDER, _DECODE = "ImageFolder + PIL", "libjpeg-turbo decode alone"

Batches = Iterator[Any]


def _transform() -> Any:
    """What SimMIM's own pipeline does to an image, mask apart."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, RATIO),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def unpack(index: ShardIndex, samples: np.ndarray, folder: Path) -> None:
    """Write samples as an image folder for others to read."""
    for sample in samples.tolist():
        data = index.read(sample)
        suffix = {b"\xff\xd8": "jpg", b"\x89P": "png", b"P6": "ppm"}.get(data[:2], "jpg")
        path = folder / f"{index.label(sample):05}" / f"{sample}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def imagefolder_batches(folder: Path, batch: int) -> Batches:
    """torchvision's ImageFolder, decoded and augmented through Pillow."""
    from torchvision.datasets import ImageFolder

    files = ImageFolder(str(folder), _transform())
    while True:
        order = torch.randperm(len(files)).tolist()
        for start in range(0, len(order) - batch + 1, batch):
            yield torch.stack([files[number][0] for number in order[start : start + batch]])


def webdataset_batches(shards: list[Path], batch: int) -> Batches:
    """webdataset as its documentation shows it: shards, shuffle buffer, decode to Pillow, augment, batch."""
    import webdataset

    data = webdataset.WebDataset([str(path) for path in shards], shardshuffle=False).shuffle(100).decode("pil")
    while True:
        yield from data.to_tuple("jpg;png;ppm").map_tuple(_transform()).batched(batch, partial=False)


def decode_batches(index: ShardIndex, samples: np.ndarray, batch: int) -> Batches:
    """libjpeg-turbo alone, JPEGs in memory to RGB: what no pipeline that decodes whole images can pass."""
    stored = [data for data in map(index.read, samples.tolist()) if data[:2] == b"\xff\xd8"]
    if not stored:
        return
    while True:
        for start in range(0, max(len(stored) - batch + 1, 1), batch):
            for data in stored[start : start + batch]:
                simplejpeg.decode_jpeg(data, "RGB")
            yield None


def stream_batches(index: ShardIndex, batch: int) -> Batches:
    """mimscale's own batches, without worker processes."""
    return iter(MIMStream(index, index.largest_fraction, image_size=SIZE, global_batch=batch))


def quality(index: ShardIndex, count: int = 64) -> tuple[float, float]:
    """PSNR of our crops to Pillow's antialiased bilinear resize of the same boxes, dB.

    Returns:
        The mean over images, and the least.
    """
    stream = MIMStream(index, index.largest_fraction, image_size=SIZE, global_batch=count, crops=CropSpec(flip=0.0))
    batch = stream.batch(0)
    numbers = draws.uniforms(0, draws.CROP, np.arange(count), augment.DRAWS_PER_CROP)
    found = []
    for row, sample in enumerate(stream.order.indices(0, count).tolist()):
        with opened(index.read(sample)) as found_image:
            image = found_image.convert("RGB")
        top, left, height, width = augment.crop_box(numbers[row], image.height, image.width, SCALE, RATIO)
        reference = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        error = np.square(batch.images[row].permute(1, 2, 0).numpy().astype(float) - np.asarray(reference)).mean()
        # Identical crops would be infinitely good; half a grey level of one channel in one pixel is as far as it is
        # told.
        found.append(10 * np.log10(255**2 / max(error, 1e-6)))
    return float(np.mean(found)), float(np.min(found))


def seconds(pipelines: dict[str, Batches], rounds: int) -> dict[str, np.ndarray]:
    """CPU seconds of each pipeline for one batch, (rounds,), taken in turns."""
    spent: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(rounds + 1):
        for name, batches in pipelines.items():
            began = time.process_time()
            next(batches)
            if number:  # the first batch pays for imports and caches
                spent[name].append(time.process_time() - began)
    return {name: np.asarray(times) for name, times in spent.items()}


def compared(spent: dict[str, np.ndarray], batch: int) -> dict[str, dict[str, float]]:
    """Each pipeline's images per second, and how it compares to ImageFolder and to decoding alone on the same files.

    Comparisons are medians over rounds of the ratio within a round: whatever else the machine does slows neighbours in
    time alike. A pixel store is compared to the first folder's ImageFolder.
    """
    first = next(iter(spent)).partition(": ")[0]
    result = {}
    for name, times in spent.items():
        folder = name.partition(": ")[0]
        figures = {"images_per_s": batch / float(np.median(times))}
        base = spent.get(f"{folder}: {_IMAGEFOLDER}", spent.get(f"{first}: {_IMAGEFOLDER}"))
        for what, other in (("x_imagefolder", base), ("of_decode_limit", spent.get(f"{folder}: {_DECODE}"))):
            if other is not None:
                figures[what] = float(np.median(other / times))
        result[name] = figures
    return result


def measure(outs: list[Path], batch: int, rounds: int, images: int, scratch: Path) -> dict[str, Any]:
    """Measure each shard folder and its competitors.

    Args:
        outs: shard folders; the first is what pixel stores among the others are compared to.
        batch: images a turn.
        rounds: turns.
        images: how many different images the competitors get.
        scratch: folder for their copies.

    Raises:
        ShardError: a folder cannot be used.
    """
    indices = [ShardIndex.load(out) for out in outs]
    pipelines: dict[str, Batches] = {}
    for index in indices:
        name = index.root.name
        pipelines[f"{name}: mimscale"] = stream_batches(index, batch)
        if index.content.store == PIXELS:
            continue
        samples = index.samples(index.largest_fraction)
        samples = samples[:: max(1, len(samples) // images)]
        unpack(index, samples, scratch / name)
        pipelines[f"{name}: {_IMAGEFOLDER}"] = imagefolder_batches(scratch / name, min(batch, len(samples)))
        pipelines[f"{name}: webdataset"] = webdataset_batches(index.shard_files(index.largest_fraction), batch)
        limit = decode_batches(index, samples, batch)
        if next(limit, _NONE) is not _NONE:
            pipelines[f"{name}: {_DECODE}"] = limit
    return {
        "pipelines": compared(seconds(pipelines, rounds), batch),
        "psnr_db": {index.root.name: quality(index) for index in indices},
    }


_NONE = object()


def measure_build(index: ShardIndex, images: int, rounds: int, scratch: Path) -> dict[str, dict]:
    """How fast our build and webdataset's ShardWriter store the same images, out of a folder and out of class tars.

    Both are run in turns. ShardWriter has one process; ours is run with one for "images_per_core_s" and with one a core
    for "images_per_s".

    Returns:
        By (source: writer): images per second of CPU time of one process, and of wall time.
    """
    import webdataset

    from mimscale.data.build.sources.image_folder import ImageFolder
    from mimscale.data.build.sources.imagenet_archives import ClassTars

    samples = index.samples(index.largest_fraction)[:images]
    folder, tars = scratch / "folder", scratch / "tars"
    unpack(index, samples, folder)
    tars.mkdir()
    for class_folder in sorted(folder.iterdir()):
        with tarfile.open(tars / f"{class_folder.name}.tar", "w") as archive:
            archive.add(class_folder, "")

    def from_folder() -> Iterator[tuple[str, str, bytes]]:
        for path in sorted(folder.glob("*/*")):
            yield path.parent.name, path.name, path.read_bytes()

    def from_tars() -> Iterator[tuple[str, str, bytes]]:
        for path in sorted(tars.iterdir()):
            with tarfile.open(path) as archive:
                for member in archive:
                    if content := archive.extractfile(member):
                        yield path.stem, member.name, content.read()

    def ours(make: Callable[[Path], writer.Source], path: Path, workers: int, out: Path) -> None:
        writer.build(make(path), out, workers=workers)

    def theirs(read: Callable[[], Iterator[tuple[str, str, bytes]]], out: Path) -> None:
        out.mkdir()
        with webdataset.ShardWriter(str(out / "%06d.tar"), maxcount=1000, verbose=0) as writes:
            for name, file, content in read():
                stem, _, suffix = file.rpartition(".")
                writes.write({"__key__": f"{name}/{stem}", suffix: content, "cls": name})

    cores = pool.usable_cores()
    runs: list[tuple[str, tuple[str, ...], Callable[[Path], None]]] = [
        ("folder: mimscale", ("cpu",), partial(ours, ImageFolder, folder, 1)),
        ("folder: mimscale", ("wall",), partial(ours, ImageFolder, folder, cores)),
        ("folder: webdataset.ShardWriter", ("cpu", "wall"), partial(theirs, from_folder)),
        ("class tars: mimscale", ("cpu",), partial(ours, ClassTars, tars, 1)),
        ("class tars: mimscale", ("wall",), partial(ours, ClassTars, tars, cores)),
        ("class tars: webdataset.ShardWriter", ("cpu", "wall"), partial(theirs, from_tars)),
    ]
    times: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds + 1):
        for name, kinds, build in runs:
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                cpu, wall = time.process_time(), time.perf_counter()
                build(Path(out) / "out")
                spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            if number:  # the first round pays for imports and caches
                for kind in kinds:
                    times.setdefault(name, {}).setdefault(kind, []).append(spent[kind])
    return {
        name: {
            "images_per_core_s": len(samples) / statistics.median(kept["cpu"]),
            "images_per_s": len(samples) / statistics.median(kept["wall"]),
        }
        for name, kept in times.items()
    }


def soak(index: ShardIndex, images: int, workers: int) -> list[tuple[int, float]]:
    """Private memory of all worker processes together while ``images`` samples go through.

    Returns:
        (samples so far, MiB), twenty times.
    """
    import psutil

    batch = 64
    steps = max(20, images // batch)
    seen = []
    stream = MIMStream(index, index.largest_fraction, 0, SIZE, batch, workers=workers, stop_step=steps)
    for made in stream:
        if (made.step + 1) % (steps // 20) == 0:
            children = psutil.Process().children(recursive=True)
            held = sum(child.memory_full_info().uss for child in children if child.is_running())
            seen.append(((made.step + 1) * batch, held / 2**20))
    return seen


def _print(result: dict[str, Any]) -> None:
    print(f"{'pipeline':<52}{'images/s/core':>14}{'x ImageFolder':>15}{'of decode limit':>17}")
    for name, figures in result["pipelines"].items():
        ratio = f"{figures['x_imagefolder']:.2f}" if "x_imagefolder" in figures else ""
        share = f"{figures['of_decode_limit']:.0%}" if "of_decode_limit" in figures else ""
        print(f"{name:<52}{figures['images_per_s']:>14,.0f}{ratio:>15}{share:>17}")
    for name, (mean, least) in result["psnr_db"].items():
        print(f"{name}: {mean:.1f} dB to Pillow's antialiased bilinear on average, {least:.1f} dB at least")


def run(options: argparse.Namespace) -> int:
    """Run ``mimscale bench data``; returns the exit status."""
    memory = Path("/dev/shm")
    base = options.scratch or (memory if memory.is_dir() else None)
    try:
        with tempfile.TemporaryDirectory(dir=base) as folder, _one_core(pin=options.soak is None and not options.build):
            result = _measure(options, Path(folder))
    except (ShardError, OSError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    if options.json:
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    return 0


def _measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    if options.soak is not None:
        seen = soak(ShardIndex.load(options.out[0]), options.soak, options.workers)
        for samples, mib in seen:
            print(f"{samples:>9,} samples: {mib:8.1f} MiB in {options.workers} workers")
        return {"workers_mib": seen}
    if options.build:
        index = ShardIndex.load(options.out[0])
        figures = measure_build(index, options.images or 12_000, options.rounds, scratch)
        print(f"{'from a source: writer':<40}{'images/s/core':>15}{f'images/s, {pool.usable_cores()} cores':>20}")
        for name, figure in figures.items():
            print(f"{name:<40}{figure['images_per_core_s']:>15,.0f}{figure['images_per_s']:>20,.0f}")
        return {"build": figures}
    result = measure(options.out, options.batch, options.rounds, options.images or 500, scratch)
    _print(result)
    return result


@contextmanager
def _one_core(pin: bool) -> Iterator[None]:
    """Keep this process and torch on one core for a while."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    if pin:
        os.sched_setaffinity(0, {max(cores)})
        torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
