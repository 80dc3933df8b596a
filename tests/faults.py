"""Strike a run with faults at random moments, start it again each time, and hold what comes out against an undisturbed run.

    python tests/faults.py --rounds 100

Two ranks pre-train a small SwinV2 on photographs. Every round is one start of a run, with one fault (``fault_kinds.py``). After
it the newest whole checkpoint must be no more than one interval old, the next start must resume from just that one and name
what was damaged, and a run that has arrived at its end must have the losses of the undisturbed run, digit for digit.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # nothing is compiled, and a pool of workers would not survive a fork

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# Runs from a clone, too.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

# What every rank needs, imported once; most of it when DeepSpeed sets up its optimizers.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
from fault_kinds import KINDS, PATIENCE, Outcome, Start, Violation, whole_steps  # noqa: E402
from training_runs import ROOT, TINY, losses, records, write_config  # noqa: E402

import mimscale.training.pretraining.task  # noqa: E402, F401
from mimscale.training.run_folder import saved_steps, step_name  # noqa: E402

INTERVAL = 4
SETTINGS = [
    *TINY,
    "train.iterations=24",
    f"train.checkpoint_every={INTERVAL}",
    "train.keep_checkpoints=3",
    f"train.pinned_steps=[{INTERVAL}]",
    "train.validate_every=12",
    "train.reconstructions=0",
    "train.hang_minutes=0.2",
]
DISK_BYTES = 96 << 20


@dataclass
class Tally:
    """What one kind of fault has led to."""

    rounds: int = 0
    redone: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.rounds:>7}{max(self.redone, default=0):>16}"


@dataclass
class Trial:
    """A run in the course of its faults.

    Args:
        folder: for runs; a small disk of its own where ``disk_full`` is given.
        disk_full: fills the disk up to some room; returns what frees it again.
    """

    folder: Path
    config: Path
    shards: Path
    rng: random.Random
    reference: Path | None = None
    disk_full: Callable[[int], Callable[[], None]] | None = None
    lives: int = 0
    named: str | None = None
    resume_at: int = 0

    @property
    def run(self) -> Path:
        """The run folder of this life."""
        return self.folder / f"run{self.lives}"

    def start(self, kind: str = "") -> Start:
        """Start the run, or resume it; with data workers where one of them is to be struck."""
        workers = int(kind == "kill a data worker")
        overrides = [*SETTINGS, f"data.shards={self.shards}", f"data.workers={workers}"]
        start = Start(self.run, self.config, overrides, INTERVAL, self.shards, self.rng, self.disk_full)
        start.begin()
        return start

    def strike(self, kind: str) -> tuple[Outcome, int] | None:
        """One round: what the fault did and how many steps it cost; ``None`` when the run had ended before."""
        start = self.start(kind)
        try:
            outcome = KINDS[kind](start)
            if outcome is None:
                self.finish(start)
                return None
        finally:
            start.end()
        return outcome, self.check(start, outcome)

    def finish(self, start: Start) -> None:
        """Let the run come to its end, compare it with the undisturbed one, and begin another life."""
        start.ended_by_itself(*range(start.ranks), within=PATIENCE)
        self.check_start(start)
        if any(process.exitcode for process in start.processes):
            raise Violation(f"undisturbed, the start ended with an error\n{start.output()[-3000:]}")
        if self.reference is not None:
            for key in ("loss", "val_loss"):
                mine, theirs = records(self.run, key), records(self.reference, key)
                if [(r["step"], r[key]) for r in mine] != [(r["step"], r[key]) for r in theirs]:
                    raise Violation(f"{key} differs from the undisturbed run's:\n{mine}\n{theirs}")
            left = [path.name for path in (self.run / "checkpoints").iterdir() if path.name.startswith(".")]
            if left:
                raise Violation(f"left behind: {left}")
            shutil.rmtree(self.run)
        self.lives += 1
        self.named, self.resume_at = None, 0

    def check_start(self, start: Start) -> None:
        """What this start should have said of those before it."""
        output = start.output()
        if "ZeRO stage" not in output:
            return  # struck before it had got so far
        source = f"resuming from {self.run / 'checkpoints' / step_name(self.resume_at)}"
        if self.resume_at and source not in output and "is finished" not in output:
            raise Violation(f"it did not say '{source}'\n{output[-3000:]}")
        if not self.resume_at and "resuming from" in output:
            raise Violation(f"it resumes from a checkpoint that is not whole\n{output[-3000:]}")
        if self.named is not None and self.named not in output:
            raise Violation(f"it did not say '{self.named}'\n{output[-3000:]}")
        self.named = None

    def check(self, start: Start, outcome: Outcome) -> int:
        """Hold the trainer to its promises; how many steps will be made again."""
        self.check_start(start)
        output = start.output()
        if outcome.said is not None and outcome.said not in output:
            raise Violation(f"'{outcome.said}' was not said\n{output[-3000:]}")
        ended = [process.exitcode for process in start.processes if (process.exitcode or 0) >= 0]
        if outcome.status is not None and set(ended) != {outcome.status}:
            raise Violation(f"ended with status {ended}, not {outcome.status}\n{output[-3000:]}")
        whole = max(whole_steps(self.run), default=0)
        # One that has not come to train has lost nothing of its own.
        made = max(start.logged(), self.resume_at) if "ZeRO stage" in output else self.resume_at
        beside = [int(path.name[-8:]) for path in (self.run / "checkpoints").glob(".saving_*")]
        # A checkpoint that was being written when the fault struck is lost, with what was trained meanwhile.
        bound = INTERVAL + made - min(beside, default=made) if outcome.redo is None else outcome.redo
        if made - whole > bound:
            raise Violation(f"of {made} steps {made - whole} are lost; saved {saved_steps(self.run)}\n{output[-3000:]}")
        if outcome.named is not None:
            self.named = outcome.named
        self.resume_at = whole
        return made - whole


@contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, Callable[[int], Callable[[], None]] | None]]:
    """A file system of DISK_BYTES and what fills it; needs root, else ``folder`` and ``None``."""
    if os.geteuid() != 0:
        print("not root: no small disk to fill, that kind of fault is left out")
        yield folder, None
        return
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], check=True)

    def fill(room: int) -> Callable[[], None]:
        filler = disk / "filler"
        with filler.open("wb") as file:
            free = shutil.disk_usage(disk).free
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, free - room))
            except OSError:  # the run has taken some of it meanwhile: all is full, then
                file.truncate(0)
        return lambda: filler.unlink()

    try:
        yield disk, fill
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def make_shards(folder: Path) -> Path:
    """Photographs of the `elpv-dataset` package as shards."""
    for command in (
        ["shards/solar_cells.py", folder],
        ["shards/build.py", "build", "--source", folder / "train", "--val", folder / "val", "--out", folder / "shards"],
    ):
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)
    return folder / "shards"


def main(argv: list[str] | None = None) -> int:
    """Run the rounds; status 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=list(KINDS), help="by default all")
    parser.add_argument("--shards", type=Path, help="built before; by default made of photographs")
    asked = parser.parse_args(argv)
    os.chdir(ROOT)
    rng = random.Random(asked.seed)
    tally = {kind: Tally() for kind in asked.kinds}
    with tempfile.TemporaryDirectory(prefix="faults_") as name, small_disk(Path(name)) as (disk, fill):
        if fill is None:
            tally.pop("full disk", None)
        folder = Path(name)
        shards = make_shards(folder) if asked.shards is None else folder / "shards"
        if asked.shards is not None:
            shutil.copytree(asked.shards, shards)
        config = write_config(folder, zero_optimization={"stage": 2})
        undisturbed = Trial(folder, config, shards, rng)
        undisturbed.finish(undisturbed.start())
        assert len(losses(folder / "run0")) == 24
        trial = Trial(disk, config, shards, rng, folder / "run0", fill)
        waiting: list[str] = []
        done, began = 0, time.monotonic()
        try:
            while done < asked.rounds:
                waiting = waiting or rng.sample(sorted(tally), len(tally))
                struck = trial.strike(waiting[-1])
                if struck is None:
                    print(f"{'':12}a run has arrived, with the losses of the undisturbed one", flush=True)
                    continue
                outcome, redone = struck
                done += 1
                tally[kind := waiting.pop()].rounds += 1
                tally[kind].redone.append(redone)
                print(f"{done:>4}/{asked.rounds}: {kind}: {outcome.what}; {redone} steps to make again", flush=True)
            trial.finish(trial.start())
        except Violation as broken:
            print(f"after {done} rounds, in '{waiting[-1] if waiting else 'the end'}': {broken}", file=sys.stderr)
            return 1
    print(f"\n{'fault':22}{'rounds':>7}{'most made again':>16}")
    for kind, one in tally.items():
        print(f"{kind:22}{one}")
    print(
        f"{done} faults in {trial.lives} runs, {time.monotonic() - began:.0f} s: every run ended with the losses of the "
        f"undisturbed one"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
