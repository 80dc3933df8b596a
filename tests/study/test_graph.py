"""A study is a graph of jobs that shares what can be shared, and every mistake in it has a name before anything runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from training_runs import ROOT

from mimscale.commands.study import main
from mimscale.study.jobs import build_graph, decoder_of
from mimscale.study.results.published import published
from mimscale.study.spec import load_study

PAPER = ROOT / "launchers/studies/paper.yaml"
SMOKE = ROOT / "launchers/studies/smoke.yaml"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def paper():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return build_graph(load_study(PAPER))


@pytest.fixture
def study(tmp_path):
    """Write a changed smoke.yaml; returns its path."""

    def write(**changes) -> Path:
        values = yaml.safe_load(SMOKE.read_text()) | {"output": str(tmp_path / "out")} | changes
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def test_three_lengths_of_the_paper_take_546875_iterations(paper):
    trunks: dict[tuple, list] = {}
    for job in paper.values():
        if job.launcher == "pretrain":
            trunks.setdefault((job.model, job.dataset, decoder_of(job.recipe)), []).append(job)
    triples = [jobs for jobs in trunks.values() if len(jobs) == 3]
    assert len(triples) == 21 + 12
    for jobs in triples:
        assert [(job.length, job.first, job.steps) for job in jobs] == [
            (125_000, 0, 125_000),
            (250_000, 109_375, 140_625),
            (500_000, 218_750, 281_250),
        ]
        assert sum(job.steps for job in jobs) == 546_875


def test_the_paper_has_its_63_released_runs_and_what_its_tables_add(paper):
    ran = {(job.model, job.dataset, job.length) for job in paper.values() if job.launcher == "pretrain"}
    released = {(r.model, r.dataset, r.iterations) for r in published() if r.kind == "pretrain"}
    assert len(released) == 63 and released < ran
    assert {model for model, _, _ in ran - released} == {"vit_b", "vit_l", "vit_h", "swinv2_l"}
    decoders = Counter(decoder_of(j.recipe) for j in paper.values() if j.launcher == "pretrain")
    assert (decoders["4-blocks"], decoders["8-blocks"]) == (1, 1)
    assert ("swinv2_l", "in100", 500_000) in ran


def test_every_job_starts_from_one_before_it_that_leaves_what_it_needs(paper):
    seen = set()
    for job in paper.values():
        if job.start is not None:
            before = paper[job.start.job]
            assert before.id in seen
            assert (before.model, before.dataset, before.seed) == (job.model, job.dataset, job.seed)
            if job.launcher == "pretrain":
                assert job.start.step in before.pinned
                assert f"train.pinned_steps={list(before.pinned)}" in before.arguments(load_study(PAPER))
            else:
                assert before.launcher == "pretrain" and job.start.step is None
        seen.add(job.id)
    tuned = Counter(job.task for job in paper.values() if job.task)
    assert tuned["in1k"] == sum(job.launcher == "pretrain" for job in paper.values())
    assert set(tuned) == {"in1k", "inat18", "coco", "ade20k"}


def test_a_plan_counts_jobs_hours_and_savings_and_draws_the_graph(study, capsys):
    path = study(speed={"gpu": "H100", "price": 2.0})
    assert main(["plan", str(path)]) == 0
    said = capsys.readouterr().out
    assert "10 jobs: 8 pre-trainings and 2 fine-tunings" in said
    assert "68 pre-training iterations instead of 96" in said  # 4 trunks of 8 + 16 - 7
    assert re.search(r"^swinv2_16-cells_20-16 +swinv2_16-cells_20-8 at 7 +9 ", said, re.M)
    rows = json.loads((path.parent / "out/plan.json").read_text())
    assert sum(row["iterations"] for row in rows if row["kind"] == "pretrain") == 68
    assert all(row["gpu_hours"] > 0 for row in rows)
    for name in ("graph.png", "graph.svg"):
        assert (path.parent / "out" / name).stat().st_size > 5_000


def test_a_run_stands_behind_the_shorter_one_that_a_later_grid_describes(study):
    grid = yaml.safe_load(SMOKE.read_text())["pretrain"][0]
    jobs = build_graph(load_study(study(pretrain=[grid | {"lengths": [16]}, grid | {"lengths": [8]}], finetune={})))
    names = list(jobs)
    started = [job for job in jobs.values() if job.start]
    assert started and all(names.index(job.start.job) < names.index(job.id) for job in started)


def test_schedules_that_follow_their_length_share_nothing(study):
    grid = yaml.safe_load(SMOKE.read_text())["pretrain"][0]
    grid["overrides"]["schedule.kind"] = "cosine"
    jobs = build_graph(load_study(study(pretrain=[grid])))
    assert all(job.start is None for job in jobs.values() if job.launcher == "pretrain")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"pretrain": [{"models": ["swinv2_8"], "datasets": ["cell_20"], "lengths": [8]}]},
            "unknown dataset 'cell_20'",
        ),
        ({"pretrain": [{"models": ["swinv2_9"], "datasets": ["cells_20"], "lengths": [8]}]}, "did you mean 'swinv2_8'"),
        ({"pretrain": [{"models": ["swinv2_8"], "datasets": ["cells_20"], "length": [8]}]}, "pretrain.0.lengths"),
        ({"speed": {"gpus": "H100"}}, "did you mean 'speed.gpu'"),
        ({"speed": {"gpu": "H1000"}}, "did you mean 'H100'"),
        (
            {"finetune": {n: {"recipe": "x.yaml", "after": b} for n, b in (("a", "b"), ("b", "c"), ("c", "a"))}},
            "a after b after c after a, which is a circle",
        ),
        ({"finetune": {"a": {"recipe": "x.yaml", "of": {"lengths": [7]}}}}, "finetune.a.of selects no pre-training"),
        ({"finetune": {"a": {"recipe": "x.yaml"}}}, "there is no recipe x.yaml"),
        ({"models": {"swinv2_8": {"recipe": "launchers/recipes/mini_swinv2.yaml"}}}, "unknown model 'swinv2_16'"),
        ({"slurm": {"account": "a\ntouch x #"}}, r"slurm.account in"),
        ({"slurm": {"qos": "high low"}}, "'high low' is not a name of Slurm's"),
        ({"resources": {"time": "1 hour"}}, "'1 hour' is not a time limit of Slurm, such as 24:00:00"),
        ({"resources": {"time": "1\ntouch x"}}, r"holds the character '\n', which no job file may hold"),
        ({"output": "a\0b"}, "output in"),
        ({"datasets": {"d" * 65: {"shards": "photographs"}}}, "should match pattern"),
    ],
)
def test_mistakes_in_a_study_are_named(study, changes, says, capsys):
    path = study(**changes)
    assert main(["plan", str(path)]) == 1
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert not (path.parent / "out").exists()


def test_a_recipe_key_in_a_study_is_checked_as_in_a_recipe(study, capsys):
    models = {
        "swinv2_8": {"recipe": "launchers/recipes/mini_swinv2.yaml", "overrides": {"model.embeddim": 8}},
        "swinv2_16": {"recipe": "launchers/recipes/mini_swinv2.yaml"},
    }
    assert main(["plan", str(study(models=models))]) == 1
    assert "unknown key 'model.embeddim'" in capsys.readouterr().err
