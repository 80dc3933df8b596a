"""What one installs: the wheel alone, in a folder that is no clone, does the main job."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "data.shards=shards",
    "data.validation_images=4",
    "data.image_size=96",
    "model.window_size=3",
    "train.iterations=2",
    "train.global_batch=4",
    "train.reconstructions=0",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a source distribution that was built from the clone, with what is installed here."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, unpacked where Python finds it before the clone."""
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def mimscale(installed: Path, folder: Path, *words: str) -> str:
    """What ``python -m mimscale WORDS`` prints in ``folder``, with the installed package."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "SLURM_PROCID")}
    environment = kept | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "mimscale", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_wheel_has_all_that_a_clone_runs_on(wheel):
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if name.startswith("mimscale/carried/")}
        about = next(name for name in archive.namelist() if name.endswith("METADATA"))
        description = archive.read(about).decode()
    kinds = {"launchers": ("*.py", "*.yaml", "*.sbatch"), "ds_configs": ("*.json",), "shards": ("*.py",)}
    for folder, patterns in kinds.items():
        for pattern in patterns:
            for path in (ROOT / folder).rglob(pattern):
                assert f"mimscale/carried/{path.relative_to(ROOT).as_posix()}" in carried
    assert "](docs/" not in description and "](CONTRIBUTING" not in description


def test_photographs_become_a_trained_encoder_in_an_empty_folder(installed, photographs, tmp_path):
    listing = mimscale(installed, tmp_path, "shards", "build", "--source", str(photographs), "--val", str(photographs),
                       "--out", "shards", "--samples-per-shard", "8")  # fmt: skip
    assert "100 " in listing and "val" in listing
    began = mimscale(installed, tmp_path, "pretrain", "--recipe", "demo", "--output", "run", *SHORT)
    assert "mimscale: 1 rank on the CPU; --ranks N starts N" in began
    assert "mimscale: --deepspeed_config cpu, since there is no GPU" in began
    assert "run: finished, step 2/2" in mimscale(installed, tmp_path, "status", "run")
    assert (tmp_path / "run/result.json").exists() and (tmp_path / "run/checkpoints/step_00000002").is_dir()
