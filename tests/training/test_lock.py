"""One start a run folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import ENVIRONMENT, TINY, launcher, write_config

from mimscale.training.faults.lock import LOCK, RunInUseError, local_only, only_start

HOLD = """
import sys, time
from pathlib import Path
from mimscale.training.faults.lock import only_start
with only_start(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_start_says_who_has_the_folder_and_touches_nothing(tmp_path, shards, holder):
    run = tmp_path / "run"
    command = launcher(run, write_config(tmp_path), *TINY, f"data.shards={shards}")
    second = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert second.returncode == 1
    assert f"in use by process {holder.pid} on " in second.stderr
    assert "since 20" in second.stderr
    assert f"waiting for process {holder.pid}" in second.stdout
    assert "Traceback" not in second.stderr
    assert [path.name for path in run.iterdir()] == [LOCK]


def test_a_killed_start_leaves_no_lock(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with only_start(tmp_path / "run", wait=0):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_start_waits_for_one_that_is_ending(tmp_path, holder):
    holder.stdin.close()
    began = time.monotonic()
    with only_start(tmp_path / "run", wait=30):
        pass
    assert time.monotonic() - began < 20


def test_one_process_does_not_start_a_folder_twice(tmp_path):
    with only_start(tmp_path / "run"), pytest.raises(RunInUseError, match="this process"), only_start(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists(), "it was made for the lock alone"


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_a_planted_lock_file_harms_nothing(tmp_path, kind):
    outside, run = tmp_path / "outside.txt", tmp_path / "run"
    outside.write_text("precious")
    run.mkdir()
    planted = run / LOCK
    if kind == "link":
        planted.symlink_to(outside)
    elif kind == "hard link":
        os.link(outside, planted)
    elif kind == "pipe":
        os.mkfifo(planted)
    else:
        planted.mkdir()
    with pytest.raises(RunInUseError, match=r"\.lock is no plain file.*remove it"), only_start(run, wait=0):
        pass
    assert outside.read_text() == "precious"


@pytest.mark.parametrize(
    "mount, said",
    [
        ("nfs4 server:/x rw,vers=4.2", None),
        ("nfs server:/x rw,vers=3,nolock", "NFS"),
        ("lustre 10.0.0.1@tcp:/x rw,localflock", "Lustre"),
        ("lustre 10.0.0.1@tcp:/x rw,flock", None),
        ("fuse.sshfs host: rw", "fuse.sshfs"),
        ("ext4 /dev/sda1 rw", None),
    ],
)
def test_it_says_where_another_host_is_not_seen(tmp_path, mount, said):
    table = tmp_path / "mountinfo"
    table.write_text(
        f"1 0 0:1 / / rw - ext4 /dev/root rw\n2 1 0:2 / /data/big\\040disk rw,relatime shared:1 - {mount}\n"
    )
    assert local_only(Path("/data/big diskette/run"), table) is None
    found = local_only(Path("/data/big disk/run"), table)
    assert found is None if said is None else said in found
