"""Class tars with ImageNet-22K's structure, built, listed and verified, with the time and memory that takes.

    python tests/imagenet_stand_in.py FOLDER [--share 0.1]

Not a test: it takes minutes and gigabytes. 21,841 class tars in FOLDER/tars hold ``share`` of ImageNet-22K's 14,197,122
images, in classes whose sizes spread as widely as its do: from empty ones to the largest, of 3,047. Images are 16 x 16
pixels, cut out of a photograph; in every hundredth class one cannot be decoded.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.cbook
import numpy as np
import simplejpeg
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from mimscale.data.shards.tar import END_OF_ARCHIVE, pack_header, padding  # noqa: E402 - the path comes first

CLASSES, IMAGES, LARGEST = 21_841, 14_197_122, 3_047


def class_sizes(share: float) -> np.ndarray:
    """Images in each class: some classes are empty, most hold fewer than the mean of 650, one 3,047."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.gamma(1.1, 600, CLASSES), 0, LARGEST)
    sizes = np.minimum(sizes * (IMAGES / sizes.sum()), LARGEST)
    whole = np.floor(sizes * share).astype(np.int64)
    whole[: CLASSES // 400] = 0
    missing = round(IMAGES * share) - int(whole.sum())
    chosen = rng.integers(CLASSES // 400, CLASSES, abs(missing))
    np.add.at(whole, chosen, np.sign(missing))
    return np.maximum(whole, 0)


def small_images(count: int) -> list[bytes]:
    """Different JPEGs of 16 x 16 pixels."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as opened:
        pixels = np.array(opened.convert("RGB"))
    height, width = pixels.shape[0] - 16, pixels.shape[1] - 16
    places = [(37 * n // width % height, 37 * n % width) for n in range(count)]
    return [simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[y : y + 16, x : x + 16]), 60) for y, x in places]


def write_tars(folder: Path, share: float) -> tuple[int, int]:
    """Write the class tars; returns how many images are whole and how many are not."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [data + bytes(padding(len(data))) for data in small_images(1000)]
    lengths = [len(data.rstrip(b"\0")) for data in images]
    whole = broken = 0
    for number, size in enumerate(class_sizes(share).tolist()):
        synset = f"n{number + 4:08}"
        pieces = []
        for image in range(size):
            which = (image + 31 * number) % len(images)
            length = lengths[which]
            if image == 0 and number % 100 == 0:
                length, broken = length - 10, broken + 1
            else:
                whole += 1
            pieces += [pack_header(b"%s_%d.JPEG" % (synset.encode(), image), length), images[which]]
        (folder / f"{synset}.tar").write_bytes(b"".join([*pieces, END_OF_ARCHIVE]))
    return whole, broken


def run(*arguments: object) -> str:
    """Run a command of ``shards/build.py``, and say what it took."""
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "shards" / "build.py"), *map(str, arguments)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"{said}== {arguments[0]}: {time.monotonic() - began:.0f} s, largest process so far {peak:.0f} MiB", flush=True
    )
    return said


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.1)
    options = parser.parse_args()
    tars, out = options.folder / "tars", options.folder / "out"
    whole, broken = write_tars(tars, options.share)
    print(
        f"{whole:,} images and {broken} that cannot be decoded in {len(list(tars.iterdir())):,} class tars", flush=True
    )
    said = run("build", "--source", tars, "--out", out)
    listed = {line.split()[0]: line.split()[1] for line in said.splitlines() if line[:1].isdigit() and "," in line}
    for percent in (10, 20, 50, 100):
        assert listed[str(percent)] == f"{round(whole * percent / 100):,}", (percent, listed)
    assert f"{broken} files could not be decoded" in said
    run("list", out)
    run("verify", out)


if __name__ == "__main__":
    main()
