"""Who is silent is named, whoever looks; a wish to stop is heard from the first moment on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import ENVIRONMENT, ROOT, TINY, launcher, write_config

from mimscale.commands.status import main as status_command
from mimscale.training.faults.preemption import REQUEUE_EXIT
from mimscale.training.faults.watchdog import Heartbeat, Watchdog, laggards, lost_rank, read_heartbeats, unreachable
from mimscale.training.ranks import Ranks
from mimscale.training.run_folder import saved_steps
from mimscale.training.status import status


def beat(rank: int, host: str = "alpha", step: int = 7, phase: str = "step", **changes) -> Heartbeat:
    now = time.time()
    fields = {
        "pid": os.getpid(),
        "since": now,
        "beat": now,
        "every": 5.0,
        "keys": ["a/1", "a/2"],
        "address": ("127.0.0.1", 9),
    }
    return Heartbeat(rank=rank, host=host, step=step, phase=phase, **{**fields, **changes})


def leave(folder: Path, *beats: Heartbeat) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for one in beats:
        (folder / f"rank_{one.rank:05d}.json").write_text(json.dumps(vars(one)))


def test_those_who_are_waited_for_are_named():
    now = time.time()
    told = lambda *beats: [(one.rank, what) for one, what in laggards(list(beats), now)]  # noqa: E731
    assert told(beat(0), beat(1, beat=now - 16)) == [(1, "shows no life")]
    assert told(beat(0), beat(1, phase="data")) == [(1, "is making no progress")]
    assert told(beat(0, step=8), beat(1, step=7)) == [(1, "is making no progress")]
    both = "waits in the same collective as all others"
    assert told(beat(0), beat(1)) == [(0, both), (1, both)]
    assert "rank 1 on beta (pid" in beat(1, "beta").place
    assert "in step 7, samples a/1, a/2)" in beat(1, "beta").place


def test_a_process_that_is_dead_but_not_taken_note_of_is_silent():
    here = socket.gethostname()
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        assert beat(0, here, pid=child.pid).is_silent(time.time())
    assert not beat(0, here).is_silent(time.time())
    assert not beat(0, "another host", pid=2**22).is_silent(time.time())


def test_a_host_that_does_not_answer_is_named():
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_server(("127.0.0.1", 0)) as closed:
        answering, silent = door.getsockname(), closed.getsockname()
        closed.close()
        beats = [
            beat(0, "alpha"),
            beat(1, "beta", address=answering),
            beat(2, "gamma", address=silent),
            beat(3, "gamma"),
        ]
        found = unreachable(beats, "alpha")
    assert [one.rank for one, _ in found] == [2]
    assert found[0][1].startswith("does not answer alpha at 127.0.0.1 (Connection refused")


def test_the_watchdog_says_once_who_is_silent(tmp_path):
    said: list[str] = []
    ranks = Ranks(0, 2, 0, 1, torch.device("cpu"))
    with Watchdog(tmp_path, ranks, 3, hang_minutes=0.01, end=said.append) as watch:
        leave(tmp_path, beat(1, "beta", beat=time.time() - 60))
        watch.note("step", 4, ["b/1"])
        while not said:
            time.sleep(0.01)
        time.sleep(0.5)
    assert len(said) == 1
    assert "train.hang_minutes=0.01): rank 1 on beta" in said[0]
    assert "shows no life" in said[0]
    assert [one.step for one in read_heartbeats(tmp_path)] == [4, 7]


def test_a_broken_collective_is_told_from_other_errors(tmp_path):
    leave(tmp_path, beat(0), beat(1, "beta", beat=time.time() - 60))
    assert "lost rank 1 on beta" in lost_rank(tmp_path, RuntimeError("gloo: Connection closed by peer"))
    assert lost_rank(tmp_path, RuntimeError("shapes do not match")) is None


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "recipe.yaml").write_text("train: {iterations: 100, global_batch: 8}\n")
    lines = [{"step": step, "loss": 0.5, "images_per_s": 4.0} for step in range(1, 51)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_status_says_how_a_run_is(run, capsys):
    assert status(run).state == "not started"
    leave(run / "heartbeat", beat(0, step=50), beat(1, "beta", step=50))
    now = status(run)
    assert (now.state, now.step, now.total) == ("running", 50, 100)
    assert "loss 0.5000 | 4.0 images/s | ETA 1 min 40 s | no checkpoint yet" in now.figures
    assert "2 ranks; rank 0 on alpha" in now.health
    assert status_command([str(run)]) == 0
    leave(run / "heartbeat", beat(1, "beta", step=50, beat=time.time() - 60))
    assert status(run).state == "stalled"
    assert "no life: rank 1 on beta" in status(run).health
    assert status_command([str(run.parent / run.name)]) == 1
    leave(run / "heartbeat", beat(0, step=50, beat=time.time() - 90), beat(1, "beta", step=50, beat=time.time() - 60))
    assert status(run).state == "died without reporting an error"
    assert status_command([str(run / "nothing")]) == 1
    assert "is no run folder" in capsys.readouterr().err


def test_a_signal_that_comes_while_a_run_starts_is_heard_at_the_first_step(tmp_path, shards):
    run, config = tmp_path / "run", write_config(tmp_path, zero_optimization={"stage": 1})
    command = [sys.executable, *launcher(run, config, *TINY, f"data.shards={shards}")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    heard = 0
    while not heard and process.poll() is None:
        text = Path(f"/proc/{process.pid}/status").read_text()
        caught = next(int(line.split()[1], 16) for line in text.splitlines() if line.startswith("SigCgt:"))
        heard = caught & 1 << signal.SIGUSR1 - 1
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == REQUEUE_EXIT, output
    assert "stopped by SIGUSR1 after step 1, which is saved" in output
    assert saved_steps(run) == [1]
