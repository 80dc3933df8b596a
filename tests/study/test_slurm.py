"""A study on a real Slurm: its whole graph is queued, killed jobs are picked up, and the report comes out the same."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import yaml
from slurm_cluster import missing, slurm_cluster
from study_on_slurm import KINDS, Disturbed, differences, scaled_paper, study
from training_runs import ROOT

from mimscale.study.jobs import build_graph
from mimscale.study.spec import load_study
from mimscale.training.launch.job_file import SlurmError
from mimscale.training.launch.slurm import SlurmJob, submit, write_script

pytestmark = [pytest.mark.root, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
PAPER = "launchers/studies/paper.yaml"


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster() as found:
        yield found


@pytest.fixture(autouse=True)
def _here(cluster, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_the_whole_paper_is_queued_with_its_dependencies(cluster, solar_shards, tmp_path):
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
        assert study("submit", path) == f"{len(jobs)} submitted"
        lines = cluster.run("squeue", "--noheader", "--format=%i|%j|%E").splitlines()
        numbers = {name: number for number, name, _ in (line.split("|") for line in lines)}
        assert set(numbers) == set(jobs)
        for line in lines:
            _, name, waits = line.split("|")
            start = jobs[name].start
            assert re.findall(r"afterok:(\d+)", waits) == ([numbers[start.job]] if start else []), line
        assert study("submit", path) == f"0 submitted, {len(jobs)} queued before"
    finally:
        cluster.run("scancel", "--user=root")
        cluster.run("scontrol", "update", "PartitionName=main", "State=UP")


def test_texts_with_odd_characters_reach_slurm_as_they_are(cluster, tmp_path):
    """Each that a job file may hold, in its name and its paths; the partition is closed, so that nothing begins."""
    cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    told = 0
    try:  # of a file's name it shows %% where it will write %
        for sign in (*map(chr, range(32, 127)), "ß", "\u3000", "\U0001f600", "%%", "\t", "\n", "\x85"):
            run = tmp_path / f"a{sign.replace('/', '_')}b"
            job = SlurmJob(Path("demo"), Path("cpu"), run, ("a=b",), name=f"a{sign}b", gpus_per_node=0)
            try:
                script = tmp_path / "job"
                script.write_text(write_script(job))
            except SlurmError:
                assert sign in '"\\\t\n\x85', sign
                continue
            cluster.run("sbatch", "--test-only", str(script))
            shown = cluster.run("scontrol", "show", "job", submit(script))
            assert f" JobName=a{sign}b\n" in shown and f" StdOut={run}/slurm.log\n" in shown.replace("%%", "%"), shown
            told += 1
    finally:
        cluster.run("scancel", "--user=root")
        cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    assert told == 93 + 4


def test_jobs_killed_at_random_are_picked_up_and_the_report_is_an_undisturbed_ones(cluster, tmp_path):
    """A trunk of the paper's study with its three lengths and their fine-tunings; ``study_on_slurm.py`` does it with more."""
    path = scaled_paper(tmp_path, ["vit_b"], ["in1k_10"], ["in1k"])
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    study("run", path, f"output={calm}")
    disturbed = Disturbed(path, wild, cluster, random.Random(0), kills=4, pause=2.0)
    disturbed.run(seconds=900)
    assert len(disturbed.jobs) == 6 and disturbed.submitted[0] == 6
    assert set(disturbed.killed) == set(KINDS) and len(disturbed.submitted) >= 2
    assert disturbed.gone_on >= 1
    assert "6 jobs: 6 done" in study("status", *disturbed.words)
    assert study("submit", *disturbed.words) == "0 submitted, 6 done"
    assert differences(calm, wild, [path]) == []
