"""Submit the paper's study, scaled down, to a real Slurm, kill jobs at random, and compare its report with an undisturbed run's.

    python tests/study_on_slurm.py --kills 40
    python tests/study_on_slurm.py --kills 8 --models vit_b --datasets in1k_10 --tasks in1k

Every cell of ``paper.yaml`` that the options leave is there, with its model's, dataset's and task's name and what it starts from;
models are a few channels wide, images are photographs of 64 px, and 125K iterations are 40. Needs root, Slurm and munge.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Runs from a clone, too.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import composed_scenes  # noqa: E402
import yaml  # noqa: E402
from slurm_cluster import SlurmCluster, missing, slurm_cluster  # noqa: E402
from training_runs import ROOT  # noqa: E402

from mimscale.commands.study import main as launch  # noqa: E402
from mimscale.study.jobs import build_graph  # noqa: E402
from mimscale.study.results.result import read_json  # noqa: E402
from mimscale.study.spec import load_study  # noqa: E402

PAPER = ROOT / "launchers/studies/paper.yaml"
SCALE = 3125  # of the paper's iterations, one is made here
CHANNELS = {"swinv2_s": 8, "swinv2_b": 12, "swinv2_l": 16, "swinv2_h": 24, "swinv2_g": 32}
WIDTHS = {"vit_b": 16, "vit_l": 24, "vit_h": 32}
TRAINING = {
    "data.image_size": 64,
    "data.workers": 0,
    "data.validation_images": 8,
    "train.global_batch": 8,
    "train.checkpoint_every": 10,
    "train.validate_every": 20,
    "schedule.warmup": 4,
}
SWIN = {"model.depths": [1, 1, 1, 1], "model.num_heads": [1, 2, 4, 8], "model.window_size": 4}
VIT = {
    "model.name": "vit_b",  # patches of ViT-H do not fit images of 64 px
    "model.depth": 2,
    "model.num_heads": 2,
    "mim.decoder_dim": 16,
    "mim.decoder_depth": 1,
    "mim.decoder_heads": 2,
}
TUNING = {
    **TRAINING,
    "train.iterations": 12,
    "train.checkpoint_every": 4,
    "train.validate_every": 12,
    "train.global_batch": 4,
}
# Keys of SwinV2 alone, so they cannot be overrides of a task for every model.
WINDOWS = {"window_size": 4, "pretrained_window_size": 0}
OF_TASK: dict[str, dict[str, Any]] = {
    "in1k": {"data.resize_shorter": 64},
    "inat18": {"data.resize_shorter": 64},
    "coco": {
        "data.test_size": [64, 96],
        "detector.channels": 16,
        "detector.hidden": 32,
        "detector.anchors": [16, 24, 32, 48, 64],
        "detector.anchors_sampled": 32,
        "detector.proposals": 40,
        "detector.proposals_sampled": 32,
        "detector.detections": 8,
    },
    "ade20k": {
        "data.test_size": [64, 256],
        "data.stride": 48,
        "decoder.channels": 16,
        "decoder.auxiliary_channels": 8,
    },
}
ON_SCENES = ("coco", "ade20k")
KINDS = ("process", "process that has saved", "running job", "queued job")


def scaled_paper(
    folder: Path,
    models: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
) -> Path:
    """``paper.yaml`` at a size for this machine, and what its cells are trained on, in ``folder``.

    Args:
        folder: gets the study and its data.
        models: leave out the others; likewise ``datasets`` and ``tasks``. By default all stay.

    Returns:
        The study, without an output.
    """
    values = yaml.safe_load(PAPER.read_text())
    values |= {"resources": {"deepspeed": "ds_configs/cpu.json", "nodes": 1, "gpus": 0}}
    # One thread a run, as on Slurm: sums of other numbers of threads round otherwise.
    values["local"] = {"parallel": len(os.sched_getaffinity(0))}
    values["shards"] = dict.fromkeys(values["shards"], str(_photographs(folder)))
    for name, model in values["models"].items():
        model.pop("resources", None)
        size = (
            SWIN | {"model.embed_dim": CHANNELS[name]} if name in CHANNELS else VIT | {"model.embed_dim": WIDTHS[name]}
        )
        model["overrides"] = TRAINING | size
    grids = []
    for grid in values["pretrain"]:
        grid["lengths"] = [length // SCALE for length in grid["lengths"]]
        grid["models"] = [name for name in grid["models"] if models is None or name in models]
        grid["datasets"] = [name for name in grid["datasets"] if datasets is None or name in datasets]
        grids += [grid] if grid["models"] and grid["datasets"] else []
    values["pretrain"] = grids
    values["finetune"] = {name: task for name, task in values["finetune"].items() if tasks is None or name in tasks}
    on_scenes = [name for name in ON_SCENES if name in values["finetune"]]
    scenes = composed_scenes.write(folder / "scenes", training=12, validation=4) if on_scenes else folder
    for name, task in values["finetune"].items():
        task["overrides"] = TUNING | OF_TASK[name] | (_of_scenes(scenes, name) if name in ON_SCENES else {})
        task["recipe"] = _with_windows(folder, name, task["recipe"], values["models"])
    path = folder / "paper.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def _with_windows(folder: Path, task: str, recipe: str, models: Sequence[str]) -> str:
    """The task's recipes as ``folder/TASK_{model}.yaml``, those of SwinV2 with windows that fit 64 px."""
    for model in models:
        shipped = ROOT / recipe.format(model=model)
        if shipped.exists():
            values = yaml.safe_load(shipped.read_text())
            values["model"] |= WINDOWS if model in CHANNELS else {}
            (folder / f"{task}_{model}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return str(folder / f"{task}_{{model}}.yaml")


def _photographs(folder: Path) -> Path:
    source, out = folder / "photographs", folder / "shards"
    build = ["build", "--source", source / "train", "--val", source / "val", "--out", out]
    for command in (
        ["shards/solar_cells.py", source],
        ["shards/build.py", *build, "--resize-shorter", "72", "--subset", "in100=4"],
    ):
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)
    return out


def _of_scenes(scenes: Path, task: str) -> dict[str, Any]:
    found = {"data.images": scenes / "images/training", "data.validation": scenes / "images/validation"}
    if task == "coco":
        found["data.annotations"] = scenes / "instances_training.json"
        found["data.validation_annotations"] = scenes / "instances_validation.json"
    else:
        found["data.annotations"] = scenes / "annotations/training"
        found["data.validation_annotations"] = scenes / "annotations/validation"
        found["data.classes"] = scenes / "classes.txt"
    return {key: str(path) for key, path in found.items()}


def study(*words: object) -> str:
    """What a command of the study prints; it must succeed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = launch([*map(str, words)])
    assert status == 0, said.getvalue()
    return said.getvalue().strip()


@dataclass
class Disturbed:
    """A study on Slurm, submitted again and again while its jobs are killed.

    Args:
        path: the study.
        out: its output.
        kills: how many jobs to kill in all.
        pause: seconds between kills, on average.
        say: takes a line for each thing that happens.
    """

    path: Path
    out: Path
    cluster: SlurmCluster
    rng: random.Random
    kills: int
    pause: float
    say: Callable[[str], None] = print
    submitted: list[int] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)
    waiting: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.jobs = build_graph(load_study(self.path, [f"output={self.out}"]))

    @property
    def done(self) -> int:
        """Jobs that have a result."""
        return sum(job.run(self.out).joinpath("result.json").exists() for job in self.jobs.values())

    @property
    def gone_on(self) -> int:
        """Starts that went on from a checkpoint of their own run."""
        logs = self.out.resolve().glob("runs/*/slurm.log")
        return sum(log.read_text().count(f"resuming from {log.parent}/checkpoints/") for log in logs)

    def run(self, seconds: float) -> None:
        """Submit, kill and submit again until every job is done.

        Raises:
            AssertionError: it takes longer than ``seconds``, or a job fails again and again without being killed.
        """
        deadline = time.monotonic() + seconds
        after_the_last = 0
        while self.done < len(self.jobs):
            assert after_the_last < 3, f"jobs that nobody killed are not done:\n{study('status', *self.words)}"
            after_the_last += sum(self.killed.values()) >= self.kills
            self._submit()
            strike = time.monotonic() + self._wait()
            while queue := self._queue():
                assert time.monotonic() < deadline, self.cluster.run("squeue")
                time.sleep(0.2)
                if sum(self.killed.values()) >= self.kills or time.monotonic() < strike:
                    continue
                if (what := self._strike(queue)) is not None:
                    self.killed[what] += 1
                    strike = time.monotonic() + self._wait()
                    if self.rng.random() < 0.3:
                        self._submit()

    @property
    def words(self) -> tuple[str, str]:
        """The study and its output, as its commands take them."""
        return str(self.path), f"output={self.out}"

    def _wait(self) -> float:
        return self.rng.uniform(0, 2 * self.pause)

    def _submit(self) -> None:
        said = study("submit", *self.words)
        self.submitted.append(int(said.partition(" ")[0]))
        self.say(f"{self.done}/{len(self.jobs)} done; submit: {said}")

    def _queue(self) -> dict[str, list[str]]:
        """Numbers of Slurm's jobs by state."""
        found: dict[str, list[str]] = {}
        for line in self.cluster.run("squeue", "--noheader", "--format=%i %T").splitlines():
            number, state = line.split()
            found.setdefault(state, []).append(number)
        return found

    def _strike(self, queue: dict[str, list[str]]) -> str | None:
        """Kill something of a kind whose turn it is; what it was, or ``None`` where there was none of it."""
        self.waiting = self.waiting or list(KINDS)
        kind = self.rng.choice(self.waiting)
        if "process" in kind:
            found = self._processes(with_checkpoint="saved" in kind)
            if not found:
                return None
            try:
                os.kill(self.rng.choice(found), signal.SIGKILL)
            except ProcessLookupError:
                return None  # it has just ended
        else:
            numbers = queue.get("RUNNING" if kind == "running job" else "PENDING")
            if not numbers:
                return None
            self.cluster.run("scancel", self.rng.choice(numbers))
        self.waiting.remove(kind)
        self.say(f"{self.done}/{len(self.jobs)} done; killed: a {kind}")
        return kind

    def _processes(self, with_checkpoint: bool) -> list[int]:
        """Processes that train and that start those; where asked, only of unended runs that have a checkpoint."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if "--output" not in command or f"{self.out}/runs/" not in (run := command[command.index("--output") + 1]):
                continue
            saved = any(Path(run).glob("checkpoints/step_*")) and not Path(run, "result.json").exists()
            found += [int(path.name)] if saved or not with_checkpoint else []
        return found


def differences(calm: Path, wild: Path, words: Sequence[object]) -> list[str]:
    """What two outputs of one study differ in: results, the report's page and its tables."""
    for out in (calm, wild):
        study("report", *words, f"output={out}")
    theirs, mine = ({r.cell: replace(r, run=None) for r in read_json(out / "results.json")} for out in (calm, wild))
    found = [
        f"results.json: {cell}: {theirs[cell]}\n{mine.get(cell)}" for cell in theirs if theirs[cell] != mine.get(cell)
    ]
    names = {path.name for out in (calm, wild) for path in (out / "report").iterdir() if path.suffix != ".png"}
    for name in sorted(names):
        texts = [(out / "report" / name).read_text().replace(str(out), "OUT") for out in (calm, wild)]
        found += [name] if texts[0] != texts[1] else []
    return found


def main(argv: list[str] | None = None) -> int:
    """Run both and compare them; status 1 when they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--pause", type=float, default=6.0, help="seconds between two kills, on average")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed and when")
    parser.add_argument("--models", nargs="+", help="of paper.yaml; by default all")
    parser.add_argument("--datasets", nargs="+", help="of paper.yaml; by default all")
    parser.add_argument("--tasks", nargs="+", help="of paper.yaml; by default all")
    parser.add_argument("--jobs-at-once", type=int, default=2)
    asked = parser.parse_args(argv)
    absent = missing() or composed_scenes.missing()
    if absent:
        print(absent, file=sys.stderr)
        return 2
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="study_") as name, slurm_cluster() as cluster:
        folder = Path(name)
        path = scaled_paper(folder, asked.models, asked.datasets, asked.tasks)
        os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
        one_at_a_time = ["OverSubscribe=NO", f"MaxCPUsPerNode={-(-asked.jobs_at_once // 2)}"]
        cluster.run("scontrol", "update", "PartitionName=main", *one_at_a_time)
        began = time.monotonic()
        print(study("run", path, f"output={folder / 'calm'}").splitlines()[-1], flush=True)
        wild = Disturbed(path, folder / "wild", cluster, random.Random(asked.seed), asked.kills, asked.pause)
        wild.say = lambda line: print(f"{time.monotonic() - began:6.0f} s: {line}", flush=True)
        wild.run(seconds=24 * 3600)
        struck = ", ".join(f"{count} x a {what}" for what, count in sorted(wild.killed.items()))
        print(f"{len(wild.jobs)} jobs submitted {len(wild.submitted)} times; killed: {struck}")
        print(f"{sum(wild.submitted)} jobs in all, {wild.gone_on} starts went on from a checkpoint of their own")
        found = differences(folder / "calm", folder / "wild", [path])
        print("\n".join(found) or "results.json, the page and all tables are those of the undisturbed run")
        return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
