"""What is damaged in a study's folder is named by ``study status`` and ``study report``, which show the rest."""

import json
import os
from pathlib import Path

import pytest
import yaml
from training_runs import ROOT

from mimscale.commands.study import main
from mimscale.study.folder import Record, StudyFolder
from mimscale.study.jobs import Job, build_graph
from mimscale.study.results.result import read_json
from mimscale.study.run.local import LocalRun
from mimscale.study.spec import load_study


@pytest.fixture
def study(tmp_path, monkeypatch) -> tuple[Path, StudyFolder, list[Job]]:
    """A study of which every pre-training has begun."""
    monkeypatch.chdir(ROOT)
    values = yaml.safe_load((ROOT / "launchers/studies/smoke.yaml").read_text())
    values["output"] = str(tmp_path / "study")
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    found = load_study(path)
    folder, jobs = StudyFolder(found), list(build_graph(found).values())
    for job in jobs:
        if job.launcher == "pretrain":
            run = folder.run(job)
            run.describe(job.recipe, {})
            run.metrics.write_text('{"step": 3, "loss": 0.5, "images_per_s": 4.0}\n')
            folder.write(job, Record(digest=job.digest, tries=1))
    return path, folder, jobs


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if path.exists() else b"[")


def other_types(path: Path) -> None:
    path.write_text('{"tries": "many", "state": "\\u001b[31m", "pid": -1, "rank": [], "time": "x"}')


def a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [not_utf8, half, other_types, a_pipe])
def test_status_and_report_name_what_is_damaged_and_show_the_rest(study, harm, capsys):
    path, folder, jobs = study
    first, second, third = [job for job in jobs if job.launcher == "pretrain"][:3]
    record = folder.path / "jobs" / f"{first.id}.json"
    harm(record)
    for file in (folder.run(second).recipe, folder.run(third).metrics):
        harm(file)
    ended = folder.run(third).heartbeat / "end.json"
    ended.parent.mkdir()
    harm(ended)

    assert main(["status", str(path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert f"{record} is no record of a job" in lines[first.id]
    assert str(folder.run(second).recipe) in lines[second.id] or harm is half
    assert str(folder.run(third).metrics) in lines[third.id] and str(ended) in lines[third.id]
    assert {"3/" in line for name, line in lines.items() if name in (first.id, second.id)} == {True}
    assert not any("\x1b" in line for line in lines.values())

    assert main(["report", str(path)]) == 0
    found = {result.cell: result for result in read_json(folder.results)}
    assert {found[job.id].status for job in (first, second, third)} == {"running"}
    assert "is no record of a job" in found[first.id].note
    assert found[first.id].curve

    assert main(["run", str(path)]) == 1  # to start something, the records must be known
    assert f"{record} is no record of a job" in capsys.readouterr().err


def test_a_job_behind_a_damaged_result_waits(study, capsys):
    path, folder, jobs = study
    job = next(job for job in jobs if job.start is not None)
    before = folder.run(next(one for one in jobs if one.id == job.start.job))
    before.result.write_text(json.dumps({"steps": [], "train_loss": 1, "validation": None}))
    assert main(["status", str(path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "half-written or damaged" in lines[job.start.job]
    assert lines[job.id].split()[1] in ("waiting", "not")


def test_links_in_the_place_of_files_are_not_written_through(study, shards, tmp_path, capsys):
    path, folder, jobs = study
    precious = tmp_path / "precious"
    precious.write_text("precious")
    names = ["plan.json", "graph.svg", "graph.png", "results.json", "report/index.html", "report/cells.csv"]
    for link in [*(folder.path / name for name in names), *(folder.log(job) for job in jobs)]:
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(precious)
    assert main(["plan", str(path)]) == main(["report", str(path)]) == 0
    assert not any((folder.path / name).is_symlink() for name in names[:4])
    values = yaml.safe_load(path.read_text()) | {"shards": {"photographs": str(shards)}}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert LocalRun(load_study(path), {jobs[0].id: jobs[0]}).run() == 1
    assert f"{jobs[0].id} failed: its log cannot be written: {folder.log(jobs[0])} is a link" in capsys.readouterr().out
    assert precious.read_text() == "precious"
