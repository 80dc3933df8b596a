"""Signal a training of two ranks under every launcher and in every phase, look at how it ends, and resume it.

    python tests/signals.py
    python tests/signals.py --launcher deepspeed torchrun --signal INT --times 2 --phase save

SIGINT and SIGHUP reach the launcher's process group, as from a terminal; SIGTERM the launcher alone, as from ``kill``. After the
end of the launcher every process that it has left is counted for 15 seconds. Then the run is started again, and has to arrive
with the losses of one that nobody has signalled, digit for digit. Status 1 when a cell of the table is not as it should be.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Runs from a clone, too.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import slurm_cluster  # noqa: E402
from fault_kinds import Start  # noqa: E402
from faults import make_shards  # noqa: E402
from training_runs import ENVIRONMENT, ROOT, TINY, launcher, losses, records, write_config  # noqa: E402

LAUNCHERS = ("ranks", "deepspeed", "torchrun", "srun")
PHASES = ("start", "step", "save", "validation")
SETTINGS = [
    *TINY,
    "train.iterations=24",
    "train.checkpoint_every=5",
    "train.keep_checkpoints=2",
    "train.validate_every=8",
    "train.reconstructions=0",
    "data.workers=1",
    "data.validation_images=200",
]
MARK = "MIMSCALE_SIGNALS_TEST"
LEFT_SECONDS = 15.0
PATIENCE = 120.0


@dataclass(frozen=True)
class Seen:
    """How one start has ended."""

    status: int
    message: str
    seconds: float
    left: int
    traceback: bool


@dataclass
class Bench:
    """Where trainings are started, and with what."""

    folder: Path
    config: Path
    shards: Path
    slurm: dict[str, str] | None

    @property
    def settings(self) -> list[str]:
        """Overrides of every start."""
        return [*SETTINGS, f"data.shards={self.shards}"]

    def command(self, name: str, run: Path) -> list[str]:
        """What starts a run under a launcher."""
        program = launcher(run, self.config, *self.settings)
        port = str(20000 + random.randrange(12000))
        return {
            "ranks": [sys.executable, *program, "--ranks", "2"],
            "deepspeed": [_beside("deepspeed"), "--num_accelerators", "2", "--master_port", port, *program],
            "torchrun": [_beside("torchrun"), "--master-port", port, "--nproc-per-node=2", *program],
            # Without the option, srun answers the first SIGINT itself and tells its tasks nothing.
            "srun": ["srun", "--disable-status", "--nodes=2", "--ntasks-per-node=1", sys.executable, *program],
        }[name]

    def signalled(self, name: str, run: Path, number: int, times: int, gap: float, phase: str) -> Seen:
        """Start a run, signal it in a phase, and see how it ends."""
        mark = uuid.uuid4().hex
        environment = ENVIRONMENT | (self.slurm or {}) | {MARK: mark}
        log = run.with_suffix(".log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                self.command(name, run), cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        try:
            _wait(lambda: _is_in(phase, run, mark), process, log)
            began = time.monotonic()
            for again in range(times):
                if again:
                    time.sleep(gap)
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number) if number == signal.SIGTERM else os.killpg(process.pid, number)
            status = process.wait(PATIENCE)
            seconds = time.monotonic() - began
            ended = time.monotonic()
            while _marked(mark) and time.monotonic() - ended < LEFT_SECONDS:
                time.sleep(0.05)
            left = len(_marked(mark))
        finally:
            for pid in _marked(mark):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()
        text = log.read_text(errors="replace")
        said = [line for line in text.splitlines() if line.startswith("mimscale: ")]
        own = re.search(r"Traceback(?:(?!Traceback).)*?/mimscale/(?:(?!Traceback).)*", text, re.DOTALL)
        return Seen(status, said[-1].removeprefix("mimscale: ") if said else "", seconds, left, own is not None)

    def resumed(self, run: Path) -> str:
        """Start a run again, with ranks of this process's own; what is wrong with its end."""
        start = Start(run, self.config, self.settings, 5, self.shards, random.Random(0), None)
        start.begin()
        try:
            start.ended_by_itself(0, 1, within=PATIENCE)
            statuses = [rank.exitcode for rank in start.processes]
            return f"ranks ended with {statuses}" if any(statuses) else ""
        finally:
            start.end()


def _beside(program: str) -> str:
    return str(Path(sys.executable).with_name(program))


def _wait(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the phase did not come:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.002)


def _marked(mark: str, ranks: bool = False) -> list[int]:
    """Processes of one start: what stands in their environment tells them; ``ranks``: those that hear signals."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            state = dict(line.split(":", 1) for line in (path / "status").read_text().splitlines())
        except OSError:
            continue
        if f"{MARK}={mark}".encode() not in environment or state["State"].split()[0] in "ZX":
            continue
        is_rank = any(one.startswith((b"RANK=", b"SLURM_PROCID=")) for one in environment)
        hears = int(state["SigCgt"], 16) >> (signal.SIGUSR1 - 1) & 1
        if not ranks or (is_rank and hears):
            found.append(int(path.name))
    return found


def _is_in(phase: str, run: Path, mark: str) -> bool:
    if phase == "start":
        return len(_marked(mark, ranks=True)) >= 2
    if phase == "save":
        return any((run / "checkpoints").glob(".saving_*"))
    lines = records(run, "loss") if (run / "metrics.jsonl").exists() else []
    step = lines[-1]["step"] if lines else 0
    if phase == "step":
        return step >= 3
    return step == 8 and not records(run, "val_loss")


@contextmanager
def _slurm(wanted: bool) -> Iterator[dict[str, str] | None]:
    if not wanted:
        yield None
        return
    with slurm_cluster.slurm_cluster() as cluster:
        yield {"SLURM_CONF": cluster.environment["SLURM_CONF"]}


def main(argv: list[str] | None = None) -> int:
    """Print the table; status 1 when a start ended badly, left something behind, or could not be resumed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--signal", nargs="+", choices=("INT", "TERM", "HUP"), default=["INT", "TERM", "HUP"])
    parser.add_argument("--times", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--gap", type=float, default=0.3, help="seconds between two signals")
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--shards", type=Path, help="built before; by default made of photographs")
    asked = parser.parse_args(argv)
    os.chdir(ROOT)
    names = list(asked.launcher)
    if "srun" in names and (missing := slurm_cluster.missing()):
        print(f"srun is left out: {missing}")
        names.remove("srun")
    cells = [
        (name, phase, sig, times)
        for name in names
        for phase in asked.phase
        for sig in asked.signal
        for times in asked.times
    ]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="signals_") as place, _slurm("srun" in names) as slurm:
        folder = Path(place)
        config = write_config(folder, zero_optimization={"stage": 2})
        bench = Bench(folder, config, asked.shards or make_shards(folder), slurm)
        if wrong := bench.resumed(folder / "undisturbed"):
            raise RuntimeError(f"undisturbed, {wrong}")
        undisturbed = losses(folder / "undisturbed"), records(folder / "undisturbed", "val_loss")
        print("| launcher | phase | signal | rc | last message | s | left | resumed, same losses |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for number, (name, phase, sig, times) in enumerate(cells):
            run = folder / f"run{number}"
            seen = bench.signalled(name, run, signal.Signals[f"SIG{sig}"], times, asked.gap, phase)
            problem = bench.resumed(run)
            if not problem and (losses(run), records(run, "val_loss")) != undisturbed:
                problem = "other losses"
            wrong = seen.left or seen.traceback or problem or seen.status == 0
            bad += bool(wrong)
            message = seen.message.replace(str(folder), "").replace("|", "/")[:110] + (
                " TRACEBACK" if seen.traceback else ""
            )
            row = (
                name,
                phase,
                sig if times == 1 else f"{sig} {sig}",
                seen.status,
                message,
                f"{seen.seconds:.1f}",
                seen.left,
            )
            print("|", " | ".join(map(str, row)), "|", f"NO: {problem} |" if problem else "yes |", flush=True)
    print(f"\n{len(cells)} starts, {bad} not as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
