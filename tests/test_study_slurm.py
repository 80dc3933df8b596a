"""A study on a real Slurm: its whole graph is queued, killed jobs are picked up, and the report comes out the same."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from slurm_cluster import missing, slurm_cluster
from training_runs import ROOT

from mimscale.study.graph import build_graph
from mimscale.study.grid import load_study
from mimscale.study.launch import main
from mimscale.study.results import read_json

pytestmark = [pytest.mark.root, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
SMOKE = "launchers/studies/smoke.yaml"
PAPER = "launchers/studies/paper.yaml"


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster() as found:
        yield found


@pytest.fixture(autouse=True)
def _here(cluster, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])


def study(capsys, *words: object) -> str:
    assert main([*map(str, words)]) == 0
    return capsys.readouterr().out.strip()


def test_the_whole_paper_is_queued_with_its_dependencies(cluster, solar_shards, tmp_path, capsys):
    """Scaled down to what two nodes without GPUs take; the partition is closed, so that nothing begins."""
    values = yaml.safe_load((ROOT / PAPER).read_text())
    values |= {"output": str(tmp_path / "paper"), "resources": {"nodes": 1, "gpus": 0}}
    values["shards"] = dict.fromkeys(values["shards"], str(solar_shards))
    for model in values["models"].values():
        model.pop("resources", None)
    for task in values["finetune"].values():
        task["overrides"] = {key: "somewhere" for key in task.get("overrides", {})}
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump(values))
    jobs = build_graph(load_study(path))
    cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        assert study(capsys, "submit", path) == f"{len(jobs)} submitted"
        lines = cluster.run("squeue", "--noheader", "--format=%i|%j|%E").splitlines()
        numbers = {name: number for number, name, _ in (line.split("|") for line in lines)}
        assert set(numbers) == set(jobs)
        for line in lines:
            _, name, waits = line.split("|")
            start = jobs[name].start
            assert re.findall(r"afterok:(\d+)", waits) == ([numbers[start.job]] if start else []), line
        assert study(capsys, "submit", path) == f"0 submitted, {len(jobs)} queued before"
    finally:
        cluster.run("scancel", "--user=root")
        cluster.run("scontrol", "update", "PartitionName=main", "State=UP")


def test_jobs_killed_at_random_are_picked_up_and_the_report_is_an_undisturbed_ones(
    cluster, solar_shards, tmp_path, capsys
):
    grid = "{models: [swinv2_8], datasets: [cells_20], lengths: [150, 300], overrides: {train.global_batch: 8, "
    grid += "train.validate_every: 50, train.checkpoint_every: 10, data.validation_images: 8, schedule.warmup: 2}}"
    words = [SMOKE, f"shards.photographs={solar_shards}", f"pretrain=[{grid}]", "finetune.cells.of.lengths=[300]"]
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    study(capsys, "run", *words, f"output={calm}")
    draw, killed, submitted = random.Random(0), 0, []
    deadline = time.monotonic() + 400
    while len(list(wild.glob("runs/*/result.json"))) < 3:
        submitted.append(study(capsys, "submit", *words, f"output={wild}"))
        while cluster.run("squeue", "--noheader", "--format=%i").split():
            assert time.monotonic() < deadline, cluster.run("squeue")
            time.sleep(0.1)
            victims = _in_the_midst(wild)
            if killed < 3 and victims:
                time.sleep(draw.uniform(0, 0.5))
                killed += _kill(draw.choice(victims))
    assert killed >= 2 and len(submitted) >= 2  # a kill can meet a run that has just ended
    assert submitted[0] == "3 submitted"
    assert "going on from" in "".join(log.read_text() for log in wild.glob("runs/*/slurm.log"))
    assert "3 jobs: 3 done" in study(capsys, "status", *words, f"output={wild}")
    assert study(capsys, "submit", *words, f"output={wild}") == "0 submitted, 3 done"
    pages = []
    for out in (calm, wild):
        study(capsys, "report", *words, f"output={out}")
        pages.append((out / "report/report.html").read_text().replace(str(out), "OUT"))
    results = [[replace(r, run=None) for r in read_json(out / "results.json")] for out in (calm, wild)]
    assert results[0] == results[1]
    assert pages[0] == pages[1]


def _in_the_midst(out: Path) -> list[int]:
    """Processes that train, and have saved something by now."""
    found = []
    for beat in out.glob("runs/*/heartbeat/rank_00000.json"):
        run, said = beat.parents[1], json.loads(beat.read_text())
        command = Path(f"/proc/{said['pid']}/cmdline")
        if not (run / "result.json").exists() and list(run.glob("checkpoints/step_*")) and command.exists():
            found += [said["pid"]] if str(run) in command.read_text() else []
    return found


def _kill(pid: int) -> int:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1
