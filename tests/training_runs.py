"""Small runs on real photographs, for the tests of training and fine-tuning."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "launchers/recipes/demo.yaml"
# Narrow and 96 px, but all the parts: four stages, shifted and clipped windows, drop path.
TINY = [
    "model.embed_dim=16",
    "model.depths=[2,1,1,1]",
    "model.num_heads=[1,2,4,8]",
    "model.window_size=6",
    "model.drop_path=0.2",
    "data.image_size=96",
    "data.workers=0",
    "data.validation_images=20",
    "optimizer.lr=1e-3",
    "optimizer.lr_batch=8",
    "schedule.warmup=4",
    "train.global_batch=8",
    "train.iterations=20",
    "train.checkpoint_every=10",
    "train.validate_every=10",
    "train.reconstructions=2",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` fills, the same one for all processes that test side by side; not to be changed."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    made = folder.with_name(f"{name}.made")
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs of the `elpv-dataset` package as shards with a validation split."""

    def make(folder: Path) -> None:
        source = ["--source", folder / "train", "--val", folder / "val"]
        for command in (
            ["shards/solar_cells.py", folder],
            ["shards/build.py", "build", *source, "--out", folder / "shards"],
        ):
            subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)

    return made_once(tmp_path_factory, "solar_cells", make) / "shards"


def records(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that carry ``key``."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if key in line]


def losses(run: Path) -> list[float]:
    """The training losses of a run, in the order of the steps."""
    lines = records(run)
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], lines[0]["step"] + len(lines)))
    return [line["loss"] for line in lines]


def write_config(folder: Path, **config: Any) -> Path:
    """A DeepSpeed configuration in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ds_{len(list(folder.glob('ds_*.json')))}.json"
    path.write_text(json.dumps(config))
    return path


def launcher(output: Path, config: Path, *overrides: str, recipe: Path = RECIPE) -> list[str]:
    """The launcher's arguments, as a user types them after ``deepspeed``."""
    named = ["--deepspeed_config", str(config), "--recipe", str(recipe), "--output", str(output)]
    return ["launchers/pretrain.py", *named, *overrides]


def run_ranks(ranks: int, cells: list[dict[str, Any]], timeout: float = 500) -> None:
    """Run several trainings one after the other in one launch of ``ranks`` processes.

    Args:
        ranks: processes, started by torchrun.
        cells: each {"output": RUN, "config": a DeepSpeed configuration, "overrides": [key=value, ...]}, and a "recipe" where
            it is not the demo's.
        timeout: seconds for all of them.
    """
    script = [str(Path(__file__).with_name("pretrain_cells.py")), json.dumps(cells, default=str)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *script]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of TINY on two ranks at ZeRO stage 2 that nothing has happened to; not to be changed."""
    config, overrides = {"zero_optimization": {"stage": 2}}, [*TINY, f"data.shards={shards}"]

    def make(run: Path) -> None:
        run_ranks(2, [{"output": run, "config": config, "overrides": overrides}])

    return made_once(tmp_path_factory, "undisturbed", make)


def kill_after_a_checkpoint(command: list[str], run: Path, step: int) -> None:
    """Start a training and kill it with all its processes as soon as a checkpoint of ``step`` or later is there."""
    from mimscale.training.run_folder import saved_steps

    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 300
    while max(saved_steps(run), default=0) < step:
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "result.json").exists(), "it was killed too late"


def go_on(command: list[str]) -> None:
    """Start a killed training again, and see it resume from a checkpoint to its end."""
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone():
    """A process group of one, in this process, so that many short runs pay for one start."""
    from mimscale.training.engine import start_ranks, stop_ranks

    before = dict(os.environ)
    start_ranks()
    yield
    stop_ranks()
    os.environ.clear()
    os.environ.update(before)
