"""What runs and studies leave behind: figures, heartbeats, results, records."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import yaml

from fuzzing.case import Case, Reader, kind, material
from fuzzing.mutations import clutter, file_mutated, json_mutated, json_text, lines_mutated, odd_value, tree_mutated
from fuzzing.recipes import yaml_mutated
from mimscale.commands import status as status_command
from mimscale.study.folder import StudyFolder
from mimscale.study.jobs import build_graph
from mimscale.study.results.collect import collect, thin
from mimscale.study.results.result import Result, ResultsError, read_json, write_json
from mimscale.study.run.status import status_text
from mimscale.study.spec import StudyError, load_study
from mimscale.training.errors import CheckpointError
from mimscale.training.faults.spikes import LeftOut
from mimscale.training.faults.watchdog import laggards, read_heartbeats
from mimscale.training.launch.job_file import SlurmError
from mimscale.training.metrics import MetricsLog
from mimscale.training.recipe import Recipe, RecipeError
from mimscale.training.run_folder import RunFolder
from mimscale.training.status import status

ROOT = Path(__file__).resolve().parents[2]


def figures_mutated(data: bytes, rng: random.Random) -> bytes:
    """``metrics.jsonl`` with other lines, values or bytes."""
    if rng.random() < 0.4:
        return lines_mutated(data, rng)
    lines = data.splitlines()
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        try:
            lines[at] = json_text(tree_mutated(json.loads(lines[at]), rng, 2), rng).replace(b"\n", b" ")
        except (ValueError, RecursionError):
            lines[at] = json_text(odd_value(rng), rng)
    return b"\n".join(lines) + b"\n"


def _status(run: Path) -> None:
    print(status(run))


@kind("metrics", RecipeError, FileNotFoundError, needs=("run",))
def metrics(case: Case) -> Reader:
    """The lines of a run's figures."""
    run = case.copy("run")
    path = run / "metrics.jsonl"
    file_mutated(path, figures_mutated, case, strange=0.15)

    rewinds = case.rng.random() < 0.5 and path.is_file() and not path.is_symlink()
    if rewinds:
        shutil.copytree(run, case.out / "run", copy_function=os.link)  # of any size

    def read() -> None:
        records = MetricsLog(path).read()
        thin(records)
        _status(run)
        if rewinds:
            MetricsLog(case.out / "run/metrics.jsonl").rewind(5)

    return read


@kind("heartbeats", RecipeError, FileNotFoundError, needs=("run",))
def heartbeats(case: Case) -> Reader:
    """Where the ranks are, and how the last start ended."""
    run, rng = case.copy("run"), case.rng
    folder = run / "heartbeat"
    if rng.random() < 0.6:
        (folder / "end.json").unlink()
    for path in rng.sample(sorted(folder.iterdir()), 1):
        file_mutated(path, json_mutated, case, strange=0.15)
    if rng.random() < 0.15:
        clutter(folder, case)
    if rng.random() < 0.1:
        shutil.rmtree(folder)
        folder.symlink_to(rng.choice(("/dev", case.victim, folder)))

    def read() -> None:
        laggards(read_heartbeats(folder), 1.7e9)
        _status(run)

    return read


@kind("run-folder", RecipeError, CheckpointError, FileNotFoundError, needs=("run",))
def run_folder(case: Case) -> Reader:
    """Any file of a run's folder, as a resumed start and ``status`` read it."""
    run, rng = case.copy("run"), case.rng
    (run / "result.json").write_text(
        json.dumps({"steps": 20, "train_loss": 0.1, "validation": {"step": 20, "val_loss": 0.2}})
    )
    for name in rng.sample(("recipe.yaml", "left_out.json", "result.json", "ds_config.json"), rng.randint(1, 2)):
        file_mutated(run / name, yaml_mutated if name.endswith("yaml") else json_mutated, case, strange=0.12)
    if rng.random() < 0.3:
        clutter(run, case)

    def read() -> None:
        folder = RunFolder(run)
        folder.finished()
        if rng.random() < 0.5:
            LeftOut(run / "left_out.json", writes=False)
        if rng.random() < 0.5:
            folder.saved_recipe(Recipe)
        _status(run)
        status_command._runs([run, run.parent])

    return read


@material("study", "recipes", "shards")
def make_study(folder: Path) -> None:
    """A study, of which some runs are done."""
    folder.mkdir()
    values = yaml.safe_load((ROOT / "launchers/studies/smoke.yaml").read_text())
    values |= {"output": str(folder / "out"), "shards": {"photographs": str(folder.parent / "shards")}}
    (folder / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    study = load_study(folder / "study.yaml")
    jobs = build_graph(study)
    about = StudyFolder(study)
    for number, job in enumerate(jobs.values()):
        if number % 3 == 2:
            continue
        run = about.run(job)
        run.describe(job.recipe, {})
        steps = job.recipe.train.iterations
        last = {"step": steps, "val_loss": 0.3, "val_loss_l1": 0.2, "val_loss_l2": 0.1}
        lines = [{"step": step, "loss": 1 / step, "images_per_s": 5.0} for step in range(1, steps + 1)] + [last]
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if number % 3 == 0:
            found = {"steps": steps, "train_loss": 0.3, "validation": last}
            if job.launcher == "finetune":
                found |= {"metric": "top1", "value": 50.0, "validation": {"val_top1": 50.0}}
            run.result.write_text(json.dumps(found))
        record = about.record(job)
        record.digest, record.tries = job.digest, 1
        about.write(job, record)


@kind("study-folder", StudyError, ResultsError, SlurmError, needs=("study",), share=0.5)
def study_folder(case: Case) -> Reader:
    """A study's records, results and runs."""
    whole, rng = case.copy("study"), case.rng
    text = (whole / "study.yaml").read_text().replace(str(case.material / "study"), str(whole))
    (whole / "study.yaml").write_text(text)
    out = whole / "out"
    choices = [
        *out.glob("jobs/*.json"),
        *out.glob("runs/*/result.json"),
        *out.glob("runs/*/metrics.jsonl"),
        *out.glob("runs/*/recipe.yaml"),
    ]
    for path in rng.sample(sorted(choices), 2):
        how = {".json": json_mutated, ".jsonl": figures_mutated, ".yaml": yaml_mutated}[path.suffix]
        file_mutated(path, how, case, strange=0.15)
    if rng.random() < 0.1:
        clutter(rng.choice((out, out / "runs", out / "jobs")), case)
    case.outputs.append(out / "results.json")
    case.outputs.append(out / ".results.json")

    def read() -> None:
        study = load_study(whole / "study.yaml")
        jobs = build_graph(study)
        print(status_text(study, jobs))
        if rng.random() < 0.7:
            collect(study, jobs)

    return read


@material("results")
def make_results(folder: Path) -> None:
    """Results of a study in a file."""
    folder.mkdir()
    found = [
        Result(
            f"cell-{n}",
            "pretrain",
            "swinv2_b",
            "in1k_10",
            1000 * (n + 1),
            90_000_000,
            val_loss=0.4 - n / 100,
            train_loss=0.3,
            images=1000,
            flops_per_image=1e9,
            global_batch=64,
            curve=((1, 0.5, None), (2, 0.4, 0.45)),
        )
        for n in range(4)
    ]
    found.append(
        Result("tuned", "finetune", "swinv2_b", "in1k_10", 1000, task="in1k", scores={"top1": 80.0}, start="cell-0")
    )
    write_json(found, folder / "results.json")


@kind("results.json", ResultsError, needs=("results",))
def results(case: Case) -> Reader:
    """A study's results in a file."""
    path = case.copy("results/results.json")
    file_mutated(path, json_mutated, case)
    return lambda: [(one.compute, one.epochs) for one in read_json(path)]
