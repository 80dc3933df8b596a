"""What a start finds around it: a home it cannot write, a port in use, operators to compile, a build that was killed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import ENVIRONMENT, ROOT, TINY, launcher, records, write_config

from mimscale.training.errors import TrainingError
from mimscale.training.launch.extensions import built_alone, extension_folder


@pytest.fixture(autouse=True)
def nowhere_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_the_folder_is_the_users_own_and_one_a_processor(tmp_path, monkeypatch):
    first = extension_folder()
    assert first.is_relative_to(tmp_path / "home/.cache/mimscale")
    monkeypatch.setattr("mimscale.training.launch.extensions._processor", lambda: "another")
    assert extension_folder() != first
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "chosen"))
    assert extension_folder() == tmp_path / "chosen"


def test_a_home_that_cannot_be_written_is_stood_in_for(tmp_path):
    (tmp_path / "home").write_text("a file")
    assert extension_folder().is_relative_to(tmp_path / "tmp")


def test_nobody_elses_folder_is_taken(tmp_path):
    (tmp_path / "home").write_text("a file")
    (tmp_path / "planted").mkdir()
    (tmp_path / f"tmp/mimscale-{os.getuid()}").symlink_to(tmp_path / "planted")
    with pytest.raises(TrainingError, match="TORCH_EXTENSIONS_DIR"):
        extension_folder()


def test_what_a_killed_build_left_is_waited_for_by_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam/lock").touch()
    with built_alone("cpu_adam", first=False):
        assert not (tmp_path / "cpu_adam/lock").exists()


def test_a_port_in_use_is_named_with_what_to_do(tmp_path, shards):
    command = launcher(tmp_path / "run", write_config(tmp_path), *TINY, f"data.shards={shards}")
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = str(server.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env={**ENVIRONMENT, **place}, capture_output=True, text=True
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"127.0.0.1:{port}, is in use" in done.stderr and "--master_port" in done.stderr


def test_a_home_that_cannot_be_written_does_not_matter(tmp_path, shards):
    command = launcher(
        tmp_path / "run",
        write_config(tmp_path),
        *TINY,
        f"data.shards={shards}",
        "train.iterations=2",
        "schedule.warmup=1",
    )
    home = {**ENVIRONMENT, "HOME": "/proc/1/task"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in records(tmp_path / "run") if "loss" in record] == [1, 2]
    assert list((tmp_path / "run/reconstructions").glob("*.png"))


def test_no_compiler_is_one_clear_message(tmp_path):
    code = """
import torch
from mimscale.training.launch.extensions import built_alone
from deepspeed.ops.adam import DeepSpeedCPUAdam
try:
    with built_alone("cpu_adam", first=True):
        DeepSpeedCPUAdam([torch.nn.Parameter(torch.ones(3))])
except Exception as error:
    print(type(error).__name__, error)
"""
    there = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/bin/false", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True)
    said, problem = [line for line in done.stdout.splitlines() if "cpu_adam" in line]
    assert said.startswith("mimscale: DeepSpeed compiles cpu_adam")
    assert problem.startswith("TrainingError") and "C++ compiler" in problem and "offload_optimizer" in problem
    assert Path(tmp_path / "cpu_adam.building").exists()
