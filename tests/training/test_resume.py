"""A killed, damaged or moved run resumes as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training_runs import ENVIRONMENT, ROOT, TINY, launcher, losses, records, run_ranks, write_config

from mimscale.training.faults.preemption import REQUEUE_EXIT
from mimscale.training.faults.watchdog import read_heartbeats
from mimscale.training.run_folder import saved_steps
from mimscale.training.status import status

ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.fixture(scope="module")
def base(shards) -> list[str]:
    return [*TINY, f"data.shards={shards}", "train.checkpoint_every=4", "train.keep_checkpoints=2"]


def deepspeed_command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", *arguments]


def start(run: Path, config: Path, base: list[str]) -> subprocess.Popen:
    port = str(20000 + os.getpid() % 20000)
    command = deepspeed_command("--master_port", port, *launcher(run, config, *base))
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def kill_everything(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            kill_everything(process)
            raise AssertionError(process.stdout.read().decode()[-3000:])
        time.sleep(0.01)


def rank_pids(run: Path, process: subprocess.Popen) -> list[int]:
    """The ranks' processes, once all of them train."""
    pids: list[int] = []

    def training() -> bool:
        own = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        beats = read_heartbeats(run / "heartbeat")
        pids[:] = [beat.pid for beat in beats if beat.pid in own and beat.phase != "start"]
        return len(pids) == 2

    wait_for(training, process)
    return pids


def test_a_run_killed_at_any_point_writes_the_same_losses(tmp_path, base, undisturbed):
    """Killed in a step, then during a save, then a rank frozen, then asked to stop: not a digit differs."""
    run, config = tmp_path / "run", write_config(tmp_path, **ZERO2)
    base = [*base, "train.hang_minutes=0.1"]
    logged = lambda: records(run)[-1]["step"] if (run / "metrics.jsonl").exists() and records(run) else 0  # noqa: E731
    process = start(run, config, base)
    wait_for(lambda: logged() >= 6, process)
    kill_everything(process)
    assert saved_steps(run) == [4]

    process = start(run, config, base)
    wait_for(lambda: any(path.name.startswith(".saving") for path in (run / "checkpoints").iterdir()), process)
    kill_everything(process)

    process = start(run, config, base)
    os.kill(rank_pids(run, process)[1], signal.SIGSTOP)
    said = b""
    while b"no progress for" not in said:
        line = process.stdout.readline()
        assert line, said.decode()[-3000:]
        said += line
    kill_everything(process)
    assert b"rank 1 on" in line
    assert b"shows no life" in line
    assert status(run).state == "failed"

    process = start(run, config, base)
    os.kill(rank_pids(run, process)[1], signal.SIGUSR1)
    output = process.communicate(timeout=100)[0].decode()
    assert process.returncode == REQUEUE_EXIT, output[-3000:]
    assert f"after step {saved_steps(run)[-1]}, which is saved" in output
    assert saved_steps(run)[-1] == logged()
    assert status(run).state == "preempted"

    process = start(run, config, base)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output[-3000:]
    assert "resuming from" in output
    assert losses(run) == losses(undisturbed)
    assert records(run, "val_loss") == records(undisturbed, "val_loss")
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert status(run).state == "finished"


def test_a_run_goes_on_at_another_stage_world_size_and_precision(tmp_path, base, undisturbed):
    """One life: 1 rank at stage 2, 2 at 3, 4 at 3 in two groups, 1 at 0; then two steps in bf16, and fp32 again."""
    run = tmp_path / "run"
    settings = [*base, "train.keep_checkpoints=9"]
    kept = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    groups = {"stage": 3, "zero_hpz_partition_size": 2, **kept}
    life = ((1, {"stage": 2}, 4), (2, {"stage": 3}, 8), (4, groups, 16), (1, {"stage": 0}, 20))
    for ranks, zero, until in life:
        config = {"zero_optimization": zero}
        run_ranks(ranks, [{"output": run, "config": config, "overrides": settings}])
        cut(run, until)
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)

    cut(run, 16)
    in_bf16 = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    changed = [*settings, "train.checkpoint_every=2"]
    run_ranks(2, [{"output": run, "config": in_bf16, "overrides": changed}])
    cut(run, 18)
    run_ranks(2, [{"output": run, "config": ZERO2, "overrides": changed}])
    assert losses(run)[:16] == pytest.approx(losses(undisturbed)[:16], rel=1e-5)
    assert losses(run)[16:] == pytest.approx(losses(undisturbed)[16:], rel=0.02)
    assert losses(run)[16:18] != pytest.approx(losses(undisturbed)[16:18], rel=1e-5)  # bf16 was in use


def test_a_resumed_run_repeats_every_digit_at_every_stage(tmp_path, base):
    cells = [
        {"output": tmp_path / f"zero{stage}", "config": {"zero_optimization": {"stage": stage}}, "overrides": base}
        for stage in (0, 1, 3)
    ]
    bf16 = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 2}
    short = [*base, "train.iterations=5", "train.checkpoint_every=3", "train.validate_every=100"]
    cells.append({"output": tmp_path / "bf16", "config": bf16, "overrides": short})
    run_ranks(2, cells)
    uncut = {cell["output"]: losses(cell["output"]) for cell in cells}
    for run in uncut:
        cut(run, saved_steps(run)[0])
    run_ranks(2, cells)
    assert {run: losses(run) for run in uncut} == uncut


def cut(run: Path, step: int) -> None:
    """Leave of a run what a kill soon after ``step`` would have left."""
    for later in (later for later in saved_steps(run) if later > step):
        shutil.rmtree(run / "checkpoints" / f"step_{later:08d}")
        (run / "result.json").unlink(missing_ok=True)


def test_a_branch_is_the_straight_run(tmp_path, base):
    """Lengths that differ only in where the rate steps down share a trunk: 16 steps branch off a trunk of 32 at 14."""
    cells = [
        {"output": tmp_path / "straight", "config": ZERO2, "overrides": [*base, "train.iterations=16"]},
        {
            "output": tmp_path / "trunk",
            "config": ZERO2,
            "overrides": [*base, "train.iterations=32", "train.pinned_steps=[14]", "train.keep_checkpoints=1"],
        },
        {
            "output": tmp_path / "branch",
            "config": ZERO2,
            "overrides": [*base, "train.iterations=16", f"train.branch_from={tmp_path / 'trunk'}@14"],
        },
    ]
    run_ranks(2, cells)
    assert losses(tmp_path / "trunk")[:14] == losses(tmp_path / "straight")[:14]
    assert losses(tmp_path / "branch") == losses(tmp_path / "straight")[14:]
    assert records(tmp_path / "branch")[0]["step"] == 15
    assert saved_steps(tmp_path / "trunk") == [14, 32]


def test_a_finished_run_is_left_alone(undisturbed, base):
    before = (undisturbed / "result.json").read_text()
    run_ranks(2, [{"output": undisturbed, "config": ZERO2, "overrides": base}])
    assert (undisturbed / "result.json").read_text() == before
