"""Scenes with true masks: cut-out pictures on real photographs, written as COCO and as ADE20K lay theirs out.

    python tests/composed_scenes.py DEST [--train N] [--val N] [--size PX] [--seed N]

The cut-outs are those of Debian's ``tuxpaint-stamps-default`` (pictures with alpha), the photographs those of the package
``elpv-dataset`` (held-out scenes lie on other photographs than training scenes). DEST gets, for "training" and "validation":

- ``images/SPLIT/NAME.jpg``;
- ``instances_SPLIT.json`` as COCO's, with polygons and run-lengths, and numbers of categories that leave gaps;
- ``annotations/SPLIT/NAME.png`` as ADE20K's: the class of each pixel from 1 on, 0 where the edge of a cut-out leaves it open;
  ``classes.txt`` names them, the photograph itself first.

Nothing of this may be committed: the photographs are not free for that.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "shards")]

STAMPS = Path("/usr/share/tuxpaint/stamps")
PACKAGE = "tuxpaint-stamps-default"
# Names of classes, and which folders of cut-outs are theirs.
CLASSES = {
    "fish": ("animals/fish",),
    "fruit": ("food/fruit/cartoon",),
    "flower": ("plants/flowers",),
    "sign": ("town/roadsigns",),
    "planet": ("space/planets",),
    "train": ("vehicles/locomotive/cartoon",),
}
# As COCO's, the numbers of categories are not 1, 2, 3, ...
CATEGORY_IDS = {name: 3 + 4 * place for place, name in enumerate(CLASSES)}
SPLITS = ("training", "validation")
EDGE = (64, 192)  # alpha between these belongs to neither side
OPEN = 0


def missing() -> str | None:
    """Why scenes cannot be composed here; ``None`` where they can."""
    return None if STAMPS.is_dir() else f"needs the cut-out pictures of Debian's {PACKAGE} (apt-get install {PACKAGE})"


@lru_cache(maxsize=1)
def cutouts() -> dict[str, list[Image.Image]]:
    """Cut-outs (RGBA, cropped to what is opaque) by class."""
    found: dict[str, list[Image.Image]] = {}
    for name, folders in CLASSES.items():
        found[name] = []
        for path in sorted(path for folder in folders for path in (STAMPS / folder).glob("*.png")):
            with Image.open(path) as file:
                picture = file.convert("RGBA")
            alpha = picture.getchannel("A").point(lambda value: 255 * (value > 127))
            box = alpha.getbbox()
            if box is None or alpha.getextrema() != (0, 255) or min(box[2] - box[0], box[3] - box[1]) < 40:
                continue
            found[name].append(picture.crop(box))
    return found


def photographs() -> list[Path]:
    """The photographs that scenes lie on, in a fixed order."""
    import solar_cells

    return sorted(path for paths in solar_cells.photographs().values() for path in paths)


def compose(
    rng: np.random.Generator, photograph: Path, size: tuple[int, int]
) -> tuple[Image.Image, list[dict], np.ndarray]:
    """One scene.

    Args:
        rng: draws everything.
        photograph: what lies behind.
        size: (width, height), pixels.

    Returns:
        The picture; its objects, each {"name", "mask" (bool, what is visible)}; the class of each pixel, uint8.
    """
    with Image.open(photograph) as file:
        scene = file.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    labels = np.full((size[1], size[0]), 1, np.uint8)
    objects: list[dict] = []
    names = list(CLASSES)
    for _ in range(rng.integers(1, 5)):
        name = names[rng.integers(len(names))]
        picture = cutouts()[name][rng.integers(len(cutouts()[name]))]
        longest = min(size) * rng.uniform(0.25, 0.6)
        scale = longest / max(picture.size)
        picture = picture.resize(tuple(max(4, round(side * scale)) for side in picture.size), Image.Resampling.BILINEAR)
        left = int(rng.integers(-picture.width // 8, size[0] - 7 * picture.width // 8))
        top = int(rng.integers(-picture.height // 8, size[1] - 7 * picture.height // 8))
        canvas = Image.new("L", size)
        canvas.paste(picture.getchannel("A"), (left, top))
        alpha = np.asarray(canvas)
        mask = alpha > 127
        if any((mask & there["mask"]).sum() > 0.4 * there["mask"].sum() for there in objects):
            continue
        scene.paste(picture.convert("RGB"), (left, top), picture.getchannel("A"))
        for there in objects:
            there["mask"] = there["mask"] & ~mask
        objects.append({"name": name, "mask": mask})
        labels[(alpha > EDGE[0]) & (alpha < EDGE[1])] = OPEN
        labels[alpha >= EDGE[1]] = 2 + names.index(name)
    return scene, objects, labels


def annotation(mask: np.ndarray, number: int, image: int, name: str) -> dict[str, Any]:
    """An object as COCO writes it: as a polygon where one outline tells all, else as run-lengths."""
    from contourpy import contour_generator

    padded = np.pad(mask, 1).astype(float)
    lines = contour_generator(z=padded).lines(0.5)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
    segmentation: Any
    if len(lines) == 1:
        # Points between the centres of pixels; pixel (0, 0) spans 0 to 1, and the padding moved all by one.
        segmentation = [(lines[0][:-1] - 0.5).round(2).ravel().tolist()]
    else:
        flat = np.concatenate(([0], mask.ravel(order="F").astype(np.int8), [0]))
        edges = np.flatnonzero(np.diff(flat))
        counts = np.diff(np.concatenate(([0], edges, [mask.size]))).tolist()
        segmentation = {"size": list(mask.shape), "counts": counts[:-1] if counts[-1] == 0 else counts}
    return {
        "id": number,
        "image_id": image,
        "category_id": CATEGORY_IDS[name],
        "bbox": box,
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def write(folder: Path, training: int = 48, validation: int = 16, size: int = 160, seed: int = 0) -> Path:
    """Write both splits; the same arguments give the same scenes.

    Args:
        folder: to write in.
        training: scenes of the split "training".
        validation: scenes of the split "validation".
        size: shorter side of the scenes, pixels; the longer one is up to half as long again.
        seed: draws them.
    """
    behind = photographs()
    held_out = len(behind) // 4
    for split, count, pool in zip(SPLITS, (training, validation), (behind[held_out:], behind[:held_out]), strict=True):
        images, annotations = [], []
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = np.random.default_rng([seed, SPLITS.index(split), number])
            longer = round(size * rng.uniform(1, 1.5))
            shape = (longer, size) if rng.random() < 0.7 else (size, longer)
            scene, objects, labels = compose(rng, pool[rng.integers(len(pool))], shape)
            name = f"scene_{number:05d}"
            scene.save(folder / "images" / split / f"{name}.jpg", quality=92)
            Image.fromarray(labels).save(folder / "annotations" / split / f"{name}.png")
            images.append({"id": 100 + 7 * number, "file_name": f"{name}.jpg", "width": shape[0], "height": shape[1]})
            for there in objects:
                if there["mask"].sum() >= 32:
                    entry = annotation(there["mask"], len(annotations) + 1, images[-1]["id"], there["name"])
                    annotations.append(entry)
        categories = [{"id": number, "name": name} for name, number in CATEGORY_IDS.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in ("photograph", *CLASSES)))
    return folder


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    print(write(args.folder, args.train, args.val, args.size, args.seed))


if __name__ == "__main__":
    main()
