"""Fixtures: real photographs, and small shard folders made of them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

pytest_plugins = ["training_runs"]

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "shards"))
# Where there is no GPU, Triton's interpreter runs the kernels; Triton reads this when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module", autouse=True)
def _own_environment():
    """Whoever trains in this process says in its environment where ranks meet, which no other file's processes shall hear."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def solar_folders(tmp_path_factory) -> Path:
    """``train`` and ``val`` folders of 8 classes, 240 photographs of solar cells in all (PNG, 300 x 300)."""
    import solar_cells

    folder = tmp_path_factory.mktemp("solar")
    solar_cells.lay_out(folder, limit=30)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """Four classes of 8 JPEGs each, cut out of a colour photograph at various sizes; no two are alike."""
    import matplotlib.cbook
    import numpy as np
    import simplejpeg
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        pixels = np.array(image.convert("RGB"))
    for number in range(32):
        top, left = 8 * (number % 8), 12 * (number // 8)
        height, width = 300 + 9 * (number % 7), 350 + 11 * (number % 5)
        target = folder / f"class_{number // 8}" / f"photo_{number:02}.JPEG"
        target.parent.mkdir(exist_ok=True)
        crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        target.write_bytes(simplejpeg.encode_jpeg(crop, quality=90, colorsubsampling="420"))
    return folder


@pytest.fixture(scope="session")
def solar_shards(solar_folders, tmp_path_factory) -> Path:
    """Shards of ``solar_folders``, at most 20 photographs in a tar; read only."""
    from mimscale.data.build import writer
    from mimscale.data.build.sources.image_folder import ImageFolder

    out = tmp_path_factory.mktemp("solar_shards") / "out"
    source, val = ImageFolder(solar_folders / "train"), ImageFolder(solar_folders / "val")
    writer.build(source, out, val=val, options=writer.Options(samples_per_shard=20))
    return out


@pytest.fixture(scope="session")
def photo_shards(photographs, tmp_path_factory) -> Path:
    """Shards of ``photographs``, at most 5 in a tar; read only."""
    from mimscale.data.build import writer
    from mimscale.data.build.sources.image_folder import ImageFolder

    out = tmp_path_factory.mktemp("photo_shards") / "out"
    writer.build(ImageFolder(photographs), out, options=writer.Options(samples_per_shard=5))
    return out


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Composed scenes with true masks, 48 for training and 16 for validation (see composed_scenes.py); read only."""
    import composed_scenes

    if reason := composed_scenes.missing():
        pytest.skip(reason)
    return composed_scenes.write(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def own_photo_shards(photo_shards, tmp_path) -> Path:
    """A copy of ``photo_shards`` that a test may damage."""
    return Path(shutil.copytree(photo_shards, tmp_path / "shards"))
