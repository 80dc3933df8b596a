"""Runs that will end as overfitting are told before they have ended, from their curve or from cheaper runs."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from training_runs import ROOT

from mimscale.study.analysis.overfitting import overfitting
from mimscale.study.analysis.verdict import forecast_cells, judge_curve
from mimscale.study.folder import StudyFolder
from mimscale.study.jobs import build_graph
from mimscale.study.results.cells import cells
from mimscale.study.results.published import published
from mimscale.study.run.early_stopping import Judge
from mimscale.study.spec import load_study


def forecast_of_the_published(length: int) -> tuple[set, set]:
    """Cells of a length (forecast, overfitting in truth), each judged with the shorter and smaller runs alone."""
    results = published()
    truth = overfitting(cells(results))
    forecast, overfit = set(), set()
    for cell in truth:
        this = cell.first
        if this.iterations != length:
            continue
        later = [
            r
            for r in results
            if (r.iterations, r.parameters) >= (this.iterations, this.parameters) or r.iterations > this.iterations
        ]
        known = [replace(r, val_loss=None) if r in later else r for r in results]
        forecast |= {cell for c in forecast_cells(cells(known)) if c == cell}
        overfit |= {cell} if truth[cell] else set()
    return forecast, overfit


def test_six_of_nine_published_runs_that_overfit_at_500k_are_forecast_and_no_other():
    forecast, overfit = forecast_of_the_published(500_000)
    assert forecast < overfit
    assert (len(forecast), len(overfit)) == (6, 9)


def test_at_250k_no_published_run_is_forecast_in_error():
    forecast, overfit = forecast_of_the_published(250_000)
    assert forecast and forecast < overfit


def falling(steps: int, noise: float = 0.0, seed: int = 0) -> list[tuple[int, float, float]]:
    """A healthy curve: both losses fall, validation with noise."""
    draw = random.Random(seed)
    return [
        (s, 0.4 + 0.6 * math.exp(-s / 300), 0.5 + 0.5 * math.exp(-s / 300) + draw.gauss(0, noise))
        for s in range(50, steps, 50)
    ]


def overfitted(steps: int, noise: float = 0.0, seed: int = 0) -> list[tuple[int, float, float]]:
    """Validation loss turns at about step 600 while training loss falls on."""
    return [(s, t, v + 0.00015 * max(0, s - 500)) for s, t, v in falling(steps, noise, seed)]


@pytest.mark.parametrize(("noise", "alarms"), [(0.0, 0), (0.002, 0), (0.01, 1)])
def test_a_healthy_curve_is_hardly_ever_condemned_however_often_one_looks(noise, alarms):
    said = 0
    for seed in range(50):
        curve = falling(2000, noise, seed)
        said += any(judge_curve(curve[:end]) for end in range(1, len(curve)))
    assert said <= alarms


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_a_curve_that_turns_is_stopped_long_before_its_end(noise):
    for seed in range(20):
        curve = overfitted(4000, noise, seed)
        first = next(s for end, (s, _, _) in enumerate(curve, 1) if judge_curve(curve[:end]))
        assert 600 < first < 2000
        assert "rose from" in judge_curve(curve).reason


def test_where_both_losses_rise_it_is_no_overfitting():
    diverging = [(s, t + 0.0005 * max(0, s - 500), v) for s, t, v in overfitted(2000)]
    assert judge_curve(diverging) is None


def test_what_comes_after_the_rate_steps_down_does_not_acquit():
    curve = overfitted(2000)
    last = curve[-1]
    curve += [(last[0] + 50 * n, last[1] - 0.05, last[2] - 0.2) for n in range(1, 5)]
    assert judge_curve(curve) is None
    assert judge_curve(curve, until=last[0]) is not None


@pytest.mark.parametrize("stop", [True, False])
def test_a_run_bound_to_overfit_is_stopped_with_all_that_would_start_from_it_where_the_study_says_so(
    tmp_path, monkeypatch, stop
):
    monkeypatch.chdir(ROOT)
    grid = "{models: [swinv2_8, swinv2_16], datasets: [cells_20], lengths: [2000, 4000, 8000]}"
    words = (f"pretrain=[{grid}]", f"output={tmp_path}", f"stop_overfitting={stop}", "finetune.cells.of.lengths=[4000]")
    study = load_study("launchers/studies/smoke.yaml", words)
    jobs, folder = build_graph(study), StudyFolder(study)
    running = jobs["swinv2_8-cells_20-4000"]
    for job, first, last in ((jobs["swinv2_8-cells_20-2000"], 0, 800), (running, 800, 3000)):
        log = folder.run(job).metrics
        log.parent.mkdir(parents=True)
        points = [point for point in overfitted(3050) if first < point[0] <= last]
        lines = [{"step": s, "loss": t} for s, t, _ in points] + [{"step": s, "val_loss": v} for s, _, v in points]
        log.write_text("".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"])))
    judge = Judge(folder, jobs)
    (ruling,) = judge.by_curves([running])
    longer = "swinv2_8-cells_20-8000"
    assert ruling.marked == (running.id, longer)
    records = {name: folder.record(job) for name, job in jobs.items()}
    assert {name for name, record in records.items() if record.verdict} == {running.id, longer}
    stopped = {name for name, record in records.items() if record.state == "stopped"}
    assert stopped == ({running.id, longer, f"{running.id}-cells"} if stop else set())
    if stop:
        left = (
            judge.flops[running.id] * (4000 - 3000) / running.steps
            + judge.flops[longer]
            + judge.flops[f"{running.id}-cells"]
        )
        assert ruling.saved == pytest.approx(left)
        assert f"3 jobs are stopped, which saves {left / sum(judge.flops.values()):.1%}" in str(ruling)
    assert judge.by_curves([running]) == []
