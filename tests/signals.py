"""How a run on two ranks ends when a signal comes: under each launcher, at each phase, once and twice.

    python tests/signals.py
    python tests/signals.py --launchers ranks torchrun --signals INT --phases save

Each cell starts a small run, waits for the phase, sends the signal (INT and HUP to the launcher's whole process group, as a
terminal does; TERM to the launcher alone, as ``kill`` does) and reports: the exit status, the last message, the seconds to the
end, the processes that are left 15 s later, and whether every checkpoint is whole. Status 1 where a process is left, a checkpoint
is torn, a traceback is shown, the status is 0, or a start that follows does not resume. ``srun`` needs Debian's slurm-wlm and
munge, and root.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import slurm_cluster  # noqa: E402
from fault_kinds import whole_steps  # noqa: E402
from faults import make_shards  # noqa: E402
from training_runs import ENVIRONMENT, ROOT, TINY, launcher, write_config  # noqa: E402

from mimscale.training.faults.watchdog import read_heartbeats  # noqa: E402
from mimscale.training.run_folder import saved_steps  # noqa: E402

MARK = "SIGNALS_OF_RUN"
LAUNCHERS = ("ranks", "deepspeed", "torchrun", "srun")
SIGNALS = ("INT", "TERM", "HUP")
PHASES = ("start", "step", "save", "validation")
SETTINGS = ["train.iterations=2000", "train.checkpoint_every=3", "train.validate_every=4", "train.reconstructions=0"]
PATIENCE = 120.0
LEFT_SECONDS = 15.0
GAP_SECONDS = 1.5  # from the first signal to the second; a launcher passes one on within less


@dataclass(frozen=True)
class Cell:
    """One way to be ended."""

    launcher: str
    signal: str
    phase: str
    times: int


@dataclass(frozen=True)
class End:
    """How it ended: ``problems`` is empty where it was as it should be."""

    status: int | None
    message: str
    seconds: float
    left: int
    problems: list[str]


@dataclass(frozen=True)
class Bench:
    """What all cells share."""

    folder: Path
    shards: Path
    config: Path
    cluster: slurm_cluster.SlurmCluster | None

    def command(self, name: str, run: Path, *overrides: str) -> list[str]:
        """What a user types to start two ranks."""
        script = launcher(run, self.config, *TINY, *SETTINGS, f"data.shards={self.shards}", *overrides)
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = str(server.getsockname()[1])
        here = str(Path(sys.executable).parent)
        if name == "ranks":
            return [sys.executable, "-m", "mimscale", "pretrain", "--ranks", "2", *script[1:]]
        if name == "deepspeed":
            return [f"{here}/deepspeed", "--num_accelerators", "2", "--master_port", port, *script]
        if name == "torchrun":
            return [f"{here}/torchrun", "--standalone", "--nproc_per_node", "2", *script]
        return ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", sys.executable, *script]

    def start(self, name: str, run: Path, log: Path, *overrides: str) -> subprocess.Popen[bytes]:
        """Start it, its output in ``log``."""
        slurm = self.cluster.environment if self.cluster is not None and name == "srun" else {}
        environment = {**ENVIRONMENT, **slurm, MARK: str(run), "MASTER_ADDR": "127.0.0.1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        with log.open("wb") as out:
            return subprocess.Popen(
                self.command(name, run, *overrides),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_hear_all,
            )


def _hear_all() -> None:
    # As at a terminal: a shell's background job would ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def processes_of(run: Path) -> list[int]:
    """Processes that were started for a run, Slurm's own aside."""
    mark, found = f"{MARK}={run}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes().split(b"\0") and not (path / "comm").read_text().startswith(
                "slurm"
            ):
                found.append(int(path.name))
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Wait for it; ``False`` when the run ended before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def reached(phase: str, run: Path, process: subprocess.Popen[bytes]) -> bool:
    """Wait for a phase of a run."""
    if phase == "start":
        time.sleep(3)
        return process.poll() is None
    if phase == "step":
        return wait_until(lambda: bool(saved_steps(run)), process)
    wanted = {"save": "save", "validation": "validate"}[phase]
    if not wait_until(lambda: bool(saved_steps(run)), process):
        return False
    if phase == "save":
        return wait_until(lambda: any((run / "checkpoints").glob(".saving_*")), process)
    return wait_until(lambda: any(beat.phase == wanted for beat in read_heartbeats(run / "heartbeat")), process)


def send(process: subprocess.Popen[bytes], name: str) -> None:
    """As a terminal (INT, HUP) or ``kill`` (TERM) sends it."""
    number = signal.Signals[f"SIG{name}"]
    with contextlib.suppress(ProcessLookupError):
        if name == "TERM":
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)


def end(bench: Bench, cell: Cell, number: int) -> End:
    """Run one cell."""
    run, log = bench.folder / f"run{number}", bench.folder / f"run{number}.log"
    process = bench.start(cell.launcher, run, log)
    problems: list[str] = []
    try:
        if not reached(cell.phase, run, process):
            problems.append(f"it never came to {cell.phase}")
        began = time.monotonic()
        send(process, cell.signal)
        if cell.times == 2:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GAP_SECONDS)
            send(process, cell.signal)
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = None
            problems.append(f"it still runs {PATIENCE:.0f} s later")
        seconds = time.monotonic() - began
        while (left := processes_of(run)) and time.monotonic() - began < seconds + LEFT_SECONDS:
            time.sleep(0.2)
    finally:
        for pid in processes_of(run):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
    output = log.read_text(errors="replace")
    # Python's own of a launcher that is not ours, under a signal, are no concern of the run.
    if re.search(r'^  File ".*/mimscale/', output, re.MULTILINE):
        problems.append("a traceback of mimscale is shown")
    if left:
        problems.append(f"{len(left)} processes are left")
    if status == 0:
        problems.append("its status is 0")
    if saved_steps(run) != whole_steps(run):
        problems.append(f"of {saved_steps(run)} only {whole_steps(run)} are whole")
    problems += resumes(bench, cell, run, log.with_suffix(".again"))
    said = [line for line in output.splitlines() if line.startswith(("mimscale: ", "0: mimscale: "))]
    return End(status, said[-1].replace(str(run), "RUN") if said else "", seconds, len(left), problems)


def resumes(bench: Bench, cell: Cell, run: Path, log: Path) -> list[str]:
    """Whether the next start goes on from the newest checkpoint; what is wrong where it does not."""
    saved = saved_steps(run)
    process = bench.start("ranks", run, log)
    wanted = f"resuming from {run / 'checkpoints'}/step_{saved[-1]:08d}" if saved else "ZeRO stage"
    came = wait_until(lambda: wanted in log.read_text(errors="replace"), process)
    for pid in [process.pid, *processes_of(run)]:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return [] if came else [f"the next start did not say '{wanted}': {log.read_text(errors='replace')[-300:]}"]


def main(argv: list[str] | None = None) -> int:
    """Run the cells and print them as a table; status 1 when one was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=list(SIGNALS))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--times", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--shards", type=Path, help="built before; by default made of photographs")
    asked = parser.parse_args(argv)
    os.chdir(ROOT)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="signals_") as name, contextlib.ExitStack() as stack:
        folder, cluster = Path(name), None
        if "srun" in asked.launchers:
            if reason := slurm_cluster.missing():
                print(f"srun is left out: it {reason}")
                asked.launchers.remove("srun")
            else:
                cluster = stack.enter_context(slurm_cluster.slurm_cluster())
        shards = asked.shards.resolve() if asked.shards else make_shards(folder)
        bench = Bench(folder, shards, write_config(folder, zero_optimization={"stage": 2}), cluster)
        print("| launcher | signal | phase | status | seconds | processes left | last message |\n" + "| --- " * 7 + "|")
        cells = itertools.product(asked.launchers, asked.signals, asked.phases, asked.times)
        for number, cell in enumerate(itertools.starmap(Cell, cells)):
            found = end(bench, cell, number)
            twice = " twice" if cell.times == 2 else ""
            print(
                f"| {cell.launcher} | {cell.signal}{twice} | {cell.phase} | {found.status} | {found.seconds:.1f} "
                f"| {found.left} | {found.message} |",
                flush=True,
            )
            for problem in found.problems:
                failed += 1
                print(f"{cell}: {problem}", file=sys.stderr, flush=True)
    print(f"\n{failed} of the cells' ends were not as they should be" if failed else "\nall ended as they should")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
