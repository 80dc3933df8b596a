"""A study runs from nothing to a report, resumes where it was killed, and mixes nothing that does not belong together."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageOps
from training_runs import ENVIRONMENT, ROOT, losses, records

from mimscale.commands.study import main
from mimscale.data.build import writer
from mimscale.data.build.sources.image_folder import ImageFolder
from mimscale.study.jobs import build_graph
from mimscale.study.results.collect import collect
from mimscale.study.results.result import read_json
from mimscale.study.spec import load_study
from mimscale.training.pretraining.task import pretrain
from mimscale.training.recipe import load_recipe

SMOKE = "launchers/studies/smoke.yaml"
CPU = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def command(*words: object) -> list[str]:
    return [sys.executable, "launchers/study.py", *map(str, words)]


def study(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def smoke(solar_shards, tmp_path_factory):
    """smoke.yaml, killed once its first run was done, and run again; one of its models diverges at once."""
    out = tmp_path_factory.mktemp("smoke")
    bad = {"recipe": "launchers/recipes/mini_swinv2.yaml", "overrides": {"optimizer.lr": 1e6, "schedule.warmup": 0}}
    values = yaml.safe_load((ROOT / SMOKE).read_text())
    values["models"]["swinv2_bad"] = bad
    values["pretrain"].append({"models": ["swinv2_bad"], "datasets": ["cells_20"], "lengths": [40, 80]})
    values |= {"output": str(out / "study"), "shards": {"photographs": str(solar_shards)}}
    values["local"] = {"parallel": 2, "retries": 0}
    path = out / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    first = subprocess.Popen(command("run", path), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    try:
        said = first.stdout.readline()
        while said and "training loss" not in said:
            said = first.stdout.readline()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    done = {p: p.stat().st_mtime_ns for p in (out / "study/runs").glob("*/result.json")}
    assert done, said
    second = study("run", path)
    return path, out / "study", done, second


def test_a_killed_study_goes_on_and_keeps_what_was_done(smoke):
    _, out, done, second = smoke
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert len(list((out / "runs").glob("*/result.json"))) == 10, second.stdout + second.stderr


def test_a_cell_that_fails_stops_no_other_and_says_why(smoke):
    path, _, _, second = smoke
    assert second.returncode == 1
    assert "10 of 12 jobs done" in second.stdout
    assert "failed: swinv2_bad-cells_20-40" in second.stdout
    assert re.search(
        r"swinv2_bad-cells_20-40 failed 1 time: step \d+: .*loss.*; 1 job behind it cannot start", second.stdout
    )
    status = study("status", path)
    assert re.search(r"^swinv2_bad-cells_20-40 +failed", status.stdout, re.M)
    assert re.search(r"^swinv2_bad-cells_20-80 +waiting", status.stdout, re.M)
    assert "10 done" in status.stdout


def test_from_nothing_to_a_report_whose_numbers_can_be_traced(smoke):
    path, out, _, _ = smoke
    said = study("report", path)
    assert said.returncode == 0, said.stderr
    assert (out / "report/report.html").stat().st_size > 10_000
    results = {result.cell: result for result in read_json(out / "results.json")}
    assert len(results) == 12
    for cell, result in results.items():
        if result.status != "done":
            assert cell.startswith("swinv2_bad")
            continue
        found = json.loads((Path(result.run) / "result.json").read_text())
        if result.kind == "pretrain":
            assert result.val_loss == found["validation"]["val_loss"]
            assert result.train_loss == found["train_loss"]
            assert [step for step, _, _ in result.curve] == list(range(4, result.iterations + 1, 4))
            assert result.images == (216 if result.dataset == "cells_100" else 43)
        else:
            assert result.scores["top1"] == found["value"]
            assert results[result.start].kind == "pretrain"
    assert results["swinv2_bad-cells_20-40"].status == "failed"
    assert results["swinv2_bad-cells_20-80"].status == "missing"


def test_a_branch_equals_the_straight_run_to_the_last_digit(smoke, alone, tmp_path):
    path, out, _, _ = smoke
    found = load_study(path)
    job = build_graph(found)["swinv2_16-cells_20-16"]
    assert job.start.step == 7
    straight = load_recipe(job.recipe_file, (*job.overrides, f"data.shards={found.shards['photographs']}"))
    threads = torch.get_num_threads()
    # As many as the study gave each of its runs: sums of other numbers of threads round otherwise.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // found.local.parallel))
    pretrain(straight, CPU, tmp_path)
    torch.set_num_threads(threads)
    branch = out / "runs" / job.id
    assert losses(branch) == losses(tmp_path)[7:]
    assert len(losses(branch)) == 9
    assert [r["val_loss"] for r in records(branch, "val_loss")] == [
        r["val_loss"] for r in records(tmp_path, "val_loss") if r["step"] > 7
    ]
    trunk = out / "runs" / job.start.job
    assert losses(trunk)[:7] == losses(tmp_path)[:7]


def everything(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("order", ["run", "report", "submit"])
def test_a_cell_whose_recipe_changed_is_not_mixed_with_old_results(smoke, order, capsys):
    path, out, _, _ = smoke
    before = everything(out)
    assert main([order, str(path), "models.swinv2_8.overrides.optimizer.weight_decay=0.1"]) == 1
    said = capsys.readouterr().err
    assert f"{out}/runs/swinv2_8-cells_20-8 holds a run of another recipe" in said
    assert "optimizer.weight_decay: 0.05 against 0.1: there against here" in said
    assert "swinv2_16" not in said.replace("swinv2_16-", "") and "Traceback" not in said
    assert everything(out) == before


def test_other_shards_are_refused(smoke, photo_shards, capsys):
    path, out, _, _ = smoke
    before = everything(out)
    assert main(["run", str(path), f"shards.photographs={photo_shards}"]) == 1
    assert "was trained on shards of build" in capsys.readouterr().err
    assert main(["run", str(path), "shards.photographs=null"]) == 1
    assert "shards.photographs is not set" in capsys.readouterr().err
    assert everything(out) == before


def test_half_written_results_are_named_and_left_alone(smoke, capsys):
    path, out, _, _ = smoke
    result = out / "runs/swinv2_8-cells_20-8/result.json"
    whole = result.read_text()
    try:
        for text in (whole[: len(whole) // 2], '{"steps": 8}', whole.replace('"steps": 8', '"steps": 5')):
            result.write_text(text)
            before = everything(out)
            for order in ("run", "report"):
                assert main([order, str(path)]) == 1
                assert f"{result} is half-written or damaged" in capsys.readouterr().err
            assert everything(out) == before
    finally:
        result.write_text(whole)


def test_a_second_run_of_the_same_study_is_refused(smoke, capsys):
    from mimscale.training.faults.lock import only_start

    path, out, _, _ = smoke
    with only_start(out):
        assert main(["run", str(path)]) == 1
    assert f"{out} is in use by" in capsys.readouterr().err


def test_an_interrupt_saves_what_was_done_and_says_so(solar_shards, tmp_path):
    words = (
        SMOKE,
        f"shards.photographs={solar_shards}",
        f"output={tmp_path / 'study'}",
        "local.parallel=1",
        "finetune={}",
    )
    grid = "{models: [swinv2_8], datasets: [cells_20], lengths: [4000], overrides: {train.global_batch: 8}}"
    first = subprocess.Popen(
        command("run", *words, f"pretrain=[{grid}]"), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    run = tmp_path / "study/runs/swinv2_8-cells_20-4000"
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGINT)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 1
    assert "stopping at SIGINT: waiting for 1 run to save and end" in said and "the same command resumes" in said
    saved = max(int(p.name[5:]) for p in (run / "checkpoints").iterdir())
    assert 0 < saved < 4000
    results = collect(*_graph(*words, f"pretrain=[{grid}]"))
    assert [result.status for result in results] == ["running"]


def test_a_training_whose_curve_turns_is_ended_and_nothing_is_started_behind_it(solar_folders, tmp_path, capsys):
    """ValidationResult on negatives of photographs, it gets worse by learning what photographs look like."""
    for path in (solar_folders / "val").glob("*/*.png"):
        negative = tmp_path / "negatives" / path.relative_to(solar_folders / "val")
        negative.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.invert(Image.open(path).convert("L")).save(negative)
    shards = tmp_path / "shards"
    writer.build(ImageFolder(solar_folders / "train"), shards, val=ImageFolder(tmp_path / "negatives"))
    grid = "{models: [swinv2_8], datasets: [cells_100], lengths: [4000, 8000], overrides: {train.global_batch: 8, "
    grid += "train.validate_every: 10, data.validation_images: 8, schedule.warmup: 2, optimizer.lr: 1.0e-3}}"
    out = tmp_path / "study"
    words = (SMOKE, f"shards.photographs={shards}", f"output={out}", "finetune.cells.of.lengths=[4000]")
    done = study("run", *words, f"pretrain=[{grid}]", "stop_overfitting=true")
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["swinv2_8-cells_100-4000", "swinv2_8-cells_100-8000", "swinv2_8-cells_100-4000-cells"]
    assert re.search(
        f"{names[0]}, {names[1]}: will overfit: validation loss rose from .* while training loss fell; ", done.stdout
    )
    assert done.stdout.rstrip().splitlines()[-1].startswith("0 of 3 jobs done; 3 stopped in")
    share = float(re.search(r"3 jobs are stopped, which saves ([\d.]+)% of the study's compute", done.stdout)[1])
    assert [path.name for path in (out / "runs").iterdir()] == names[:1]
    (saved,) = (int(path.name.removeprefix("step_")) for path in (out / "runs" / names[0] / "checkpoints").iterdir())
    results = {result.cell: result for result in collect(*_graph(*words, f"pretrain=[{grid}]"))}
    assert [results[name].status for name in names] == ["stopped"] * 3
    assert all("validation loss rose" in results[name].note for name in names)
    # What is left of 8,000 steps but for the fine-tuning, which is hundreds of times cheaper
    assert 0 < saved < 1000 and share == pytest.approx(100 * (1 - saved / 7500), abs=2)
    assert main(["run", *words, f"pretrain=[{grid}]", "stop_overfitting=true"]) == 0
    assert capsys.readouterr().out.startswith("0 of 3 jobs done; 3 stopped in")


def _graph(path: str, *overrides: str):
    found = load_study(path, overrides)
    return found, build_graph(found)
