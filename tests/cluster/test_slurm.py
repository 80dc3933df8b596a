"""On a real Slurm of two nodes: jobs are cut, requeued and chained, and nothing is lost or done twice."""

import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import pytest
import slurm_cluster
from training_runs import RECIPE, ROOT, TINY, losses, records, write_config

from mimscale.cli import main as mimscale
from mimscale.training.faults.watchdog import read_heartbeats

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or ""),
]
ZERO2 = {"zero_optimization": {"stage": 2}}
# The encoder of TINY, four steps.
TUNED = [
    *(
        setting
        for setting in TINY
        if setting.startswith(("model.", "data.image_size", "data.workers", "train.global_batch"))
    ),
    "schedule.warmup=1",
    "train.iterations=4",
    "train.checkpoint_every=4",
    "train.validate_every=100",
]


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster.slurm_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def life(cluster, tmp_path_factory, shards) -> Path:
    """Several jobs at once: one requeued in the middle, one cut by its time limit with a fine-tuning behind it, an array."""
    folder = tmp_path_factory.mktemp("jobs")
    config = write_config(folder, **ZERO2)

    def submit(name: str, *arguments: str, recipe: Path = RECIPE) -> str:
        where = ["--nodes=2", "--gpus-per-node=0", "--tasks-per-node=1", f"--output={folder / name}"]
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as shown:
            patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
            assert mimscale(["submit", str(recipe), f"--deepspeed_config={config}", *where, *arguments]) == 0
        assert (folder / name / "submit.sbatch").read_text() in shown.getvalue()
        return shown.getvalue().splitlines()[-1].split()[1].rstrip(";")

    base = [*TINY, f"data.shards={shards}"]
    limited = submit("limited", "--time=30", "--signal=75", "--sbatch=--hold", *base)
    tuned = submit("tuned", f"--after={limited}", *TUNED, f"finetune.from={folder / 'limited'}", f"data.shards={shards}",
                   recipe=ROOT / "launchers/recipes/finetune/demo.yaml")  # fmt: skip
    array = submit_array(cluster, folder, shards)
    requeued = submit("requeued", *base)
    cluster.wait(lambda: step_of(folder / "requeued") >= 3, "the job trains")
    with frozen(ranks_of(folder / "requeued")):
        cluster.run("scontrol", "requeue", requeued)
        cluster.run("scontrol", "release", limited)
    cluster.wait(lambda: step_of(folder / "limited") >= 3, "the job trains")
    with frozen(ranks_of(folder / "limited")) as pids:
        # Frozen, so that it is still in the middle when Slurm signals: it looks at time limits every half minute only.
        minutes = int(cluster.job(limited)["RunTime"].split(":")[1])
        cluster.run("scontrol", "update", f"JobId={limited}", f"TimeLimit={minutes + 2}")
        cluster.wait(lambda: all(map(is_signalled, pids)), "the time limit comes near")
        cluster.run("scontrol", "update", f"JobId={limited}", "TimeLimit=30")  # once is enough
    for job in (requeued, limited, tuned):
        cluster.wait_for_end(job)
    cluster.wait(lambda: array not in cluster.run("squeue", "-h", "-o", "%A %F"), "the array ends")
    jobs = {"requeued": requeued, "limited": limited, "tuned": tuned}
    (folder / "jobs.json").write_text(json.dumps({name: cluster.job(job) for name, job in jobs.items()}))
    return folder


def submit_array(cluster: slurm_cluster.SlurmCluster, folder: Path, shards: Path) -> str:
    """Submit ``shards.sbatch`` with its head edited."""
    settings = {
        "COMMAND": f"({sys.executable} {ROOT}/shards/build.py build)",
        "SOURCE": shards.parent / "train",
        "OUT": folder / "shards",
        "OPTIONS": f"(--val {shards.parent / 'val'})",
    }
    lines = (ROOT / "launchers/slurm/shards.sbatch").read_text().splitlines()
    edited = [f"{name}={settings[name]}" if (name := line.partition("=")[0]) in settings else line for line in lines]
    (folder / "shards.sbatch").write_text("\n".join(edited) + "\n")
    options = ["--array=1-3", "--cpus-per-task=1", f"--output={folder}/shards_%a.log", "--time=10"]
    return cluster.run("sbatch", "--parsable", *options, str(folder / "shards.sbatch")).strip()


def ranks_of(run: Path) -> list[int]:
    return [beat.pid for beat in read_heartbeats(run / "heartbeat")]


@contextmanager
def frozen(pids: list[int]) -> Iterator[list[int]]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def is_signalled(pid: int) -> bool:
    """Whether SIGUSR1 waits for a frozen process, or has set it going."""
    try:
        state = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return True
    pending = int(state["ShdPnd"], 16) & 1 << signal.SIGUSR1 - 1
    return bool(pending) or not state["State"].strip().startswith("T")


def step_of(run: Path) -> int:
    found = records(run) if (run / "metrics.jsonl").exists() else []
    return found[-1]["step"] if found else 0


def ended(life: Path, name: str) -> tuple[str, str]:
    """(state, number of restarts) of a job when all had ended."""
    job = json.loads((life / "jobs.json").read_text())[name]
    return job["JobState"], job["Restarts"]


def test_a_requeued_job_writes_the_losses_of_the_uninterrupted_run(life, undisturbed):
    log = (life / "requeued" / "slurm.log").read_text()
    assert ended(life, "requeued") == ("COMPLETED", "1"), log
    assert "stopped by SIGTERM" in log
    assert "resuming from" in log
    assert losses(life / "requeued") == pytest.approx(losses(undisturbed), rel=1e-5)  # another number of threads


def test_a_job_cut_by_its_time_limit_goes_on_by_itself_and_writes_the_same_losses(life, undisturbed):
    log = (life / "limited" / "slurm.log").read_text()
    assert ended(life, "limited") == ("COMPLETED", "1"), log
    assert "stopped by SIGUSR1" in log
    assert "resuming from" in log
    assert losses(life / "limited") == pytest.approx(losses(undisturbed), rel=1e-5)


def test_a_chained_fine_tuning_waits_for_a_pre_training_that_was_cut(life):
    log = (life / "tuned" / "slurm.log").read_text()
    assert ended(life, "tuned") == ("COMPLETED", "0"), log
    jobs = json.loads((life / "jobs.json").read_text())
    assert jobs["tuned"]["StartTime"] >= jobs["limited"]["EndTime"]
    assert len(losses(life / "tuned")) == 4
    assert f"{life / 'limited'}" in (life / "tuned" / "recipe.yaml").read_text()


def test_an_array_of_jobs_builds_the_bytes_of_one_build(life, shards):
    digest = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.iterdir()}
    logs = "".join((life / f"shards_{number}.log").read_text() for number in (1, 2, 3))
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (life / "shards").iterdir()} == digest, logs


@pytest.fixture
def job(cluster, tmp_path):
    """Submit ``pretrain.sbatch`` with a shell script in the trainer's place; ``$start`` counts its starts from 1."""

    def submit(script: str) -> str:
        trainer = tmp_path / "trainer.sh"
        count = f'start=$(($(cat "{tmp_path}/starts" 2>/dev/null) + 1)); echo $start > "{tmp_path}/starts"'
        trainer.write_text(f"{count}\nmkdir -p {tmp_path}/run/checkpoints\n{script}\n")
        settings = {"COMMAND": f"(bash {trainer})", "OUTPUT": tmp_path / "run"}
        lines = (ROOT / "launchers/slurm/pretrain.sbatch").read_text().splitlines()
        edited = [
            f"{name}={settings[name]}" if (name := line.partition("=")[0]) in settings else line for line in lines
        ]
        file = tmp_path / "job.sbatch"
        file.write_text("\n".join(line for line in edited if not line.startswith("#SBATCH --ntasks")) + "\n")
        options = ["--nodes=1", "--ntasks=1", f"--output={tmp_path}/log", "--time=10"]
        return cluster.run("sbatch", "--parsable", *options, str(file)).strip()

    return submit


def test_a_job_that_failed_goes_on_as_long_as_it_gets_on(cluster, job, tmp_path):
    """It saves a checkpoint and fails, then it fails before the next one."""
    number = job(f"[ $start -le 1 ] && mkdir {tmp_path}/run/checkpoints/step_0000000$start; exit 1")
    assert cluster.wait_for_end(number, 60) == "FAILED"
    assert (tmp_path / "starts").read_text() == "2\n"


def test_a_cancelled_job_stays_so_though_it_saves_and_asks_to_be_queued_again(cluster, job, tmp_path):
    number = job(f"trap 'mkdir {tmp_path}/run/checkpoints/step_00000001; exit 75' TERM; sleep 100 & wait")
    cluster.wait(lambda: (tmp_path / "starts").exists(), "the job starts", 60)
    cluster.run("scancel", number)
    cluster.wait(lambda: (tmp_path / "run/checkpoints/step_00000001").exists(), "the job saves", 60)
    assert cluster.wait_for_end(number, 60) == "CANCELLED"
    cluster.wait(lambda: not cluster.run("squeue", "-h"), "the queue is empty", 60)
    assert (tmp_path / "starts").read_text() == "1\n"
