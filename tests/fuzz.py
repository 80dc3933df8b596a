"""Change the files that mimscale reads in every way one can think of, and see that each is read or refused, and nothing else.

    python tests/fuzz.py --rounds 100
    python tests/fuzz.py --replay index:17

Every input is made of a sound file by its kind and seed alone, in a folder of its own, and read in a process that is watched:
it passes when the reader takes it, or refuses it with an error of mimscale's own whose message can be printed, in 5 seconds and
1 GiB, without writing anything outside of the output folder and without starting a program. ``docs/security.md`` has the kinds.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a pool of workers would not survive a fork
os.environ["MPLBACKEND"] = "agg"

import argparse
import importlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

# Runs from a clone, too.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import psutil  # noqa: E402
from fuzzing.case import KINDS, MATERIAL, needed  # noqa: E402
from fuzzing.worker import work  # noqa: E402

MODULES = ("recipes", "data", "weights", "runs", "annotations", "commands")
# Of processor time, and, for what waits for ever, by the clock: other processes may keep this machine busy.
SECONDS, CLOCK_SECONDS = 5.0, 20.0
PREPARE_SECONDS = 60.0
GROWTH = 2**30
BATCH = 250
COLUMNS = ("refused", "accepted", "traceback", "hang", "memory", "write")
FAULTS = COLUMNS[2:]
_FORK = multiprocessing.get_context("fork")


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))
    slowest: float = 0.0
    largest: int = 0

    @property
    def inputs(self) -> int:
        """All of them."""
        return sum(self.counts.values())

    def add(self, outcome: str, seconds: float, grown: int) -> None:
        """One more."""
        self.counts[outcome] += 1
        self.slowest, self.largest = max(self.slowest, seconds), max(self.largest, grown)


@dataclass
class Batch:
    """Inputs of one kind in a process of their own."""

    kind: str
    seeds: list[int]
    place: Path
    material: Path
    keep: bool = False

    def begin(self) -> None:
        """Start the process."""
        self.ear, mouth = _FORK.Pipe(duplex=False)
        self.process = _FORK.Process(
            target=work, args=(self.kind, self.seeds, self.place, self.material, mouth, self.keep)
        )
        self.process.start()
        mouth.close()
        self.seed, self.phase, self.since, self.used, self.resident = self.seeds[0], "prepare", time.monotonic(), 0.0, 0
        self.done: list[tuple[int, str, str, float, int]] = []
        self.ended = False

    def hear(self) -> None:
        """Take what the process has to say."""
        while self.ear.poll():
            try:
                what, *rest = self.ear.recv()
            except (EOFError, OSError):
                self._died()
                return
            self.since = time.monotonic()
            if what == "prepare":
                self.seed, self.phase = rest[0], "prepare"
            elif what == "read":
                self.phase, self.used = "read", self._processor()
                self.resident = rest[1]
            elif what == "done":
                seed, outcome, about, seconds, grown = rest
                if outcome in ("accepted", "refused") and (seconds > SECONDS or grown > GROWTH):
                    outcome = "hang" if seconds > SECONDS else "memory"
                    about = f"{seconds:.1f} s of processor time, {grown / 2**20:.0f} MiB more\n{about}"
                self.done.append((seed, outcome, about, seconds, grown))
            else:
                self.ended = True
                self.process.join()
                return

    def look(self) -> None:
        """End the process where its input takes too long or too much."""
        if self.ended:
            return
        waited = time.monotonic() - self.since
        if self.phase == "prepare":
            if waited > PREPARE_SECONDS:
                self._kill("traceback", "the fuzzer itself does not come to an end")
            return
        used = self._processor() - self.used
        if used > SECONDS or waited > CLOCK_SECONDS:
            self._kill("hang", f"{used:.1f} s of processor time, {waited:.1f} s by the clock")
        elif (grown := self._memory() - self.resident) > GROWTH:
            self._kill("memory", f"{grown / 2**20:.0f} MiB more")

    def _family(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            mother = psutil.Process(self.process.pid)
            return [mother, *mother.children(recursive=True)] if KINDS[self.kind].starts else [mother]
        return []

    def _processor(self) -> float:
        used = 0.0
        for process in self._family():
            with suppress(psutil.Error):
                times = process.cpu_times()
                used += times.user + times.system + times.children_user + times.children_system
        return used

    def _memory(self) -> int:
        held = 0
        for process in self._family():
            with suppress(psutil.Error):
                held += process.memory_info().rss
        return held

    def _kill(self, outcome: str, about: str) -> None:
        for process in self._family():
            with suppress(psutil.Error):
                process.kill()
        self.process.join()
        self._failed(outcome, about, time.monotonic() - self.since)

    def _died(self) -> None:
        self.process.join()
        self._failed("traceback", f"the process ended with status {self.process.exitcode}", 0.0)

    def _failed(self, outcome: str, about: str, seconds: float) -> None:
        log = self.place / "log"
        said = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        self.done.append((self.seed, outcome, f"{about}\n{said}", seconds, 0))
        self.ended = True

    def rest(self) -> list[int]:
        """Seeds that no word has come of."""
        heard = {seed for seed, *_ in self.done}
        return [seed for seed in self.seeds if seed not in heard]


def prepare(names: Sequence[str], folder: Path) -> None:
    """Make the sound files that some kinds need; each in a process of its own, so that this one stays as it is."""
    for name in needed(tuple(names)):
        process = _FORK.Process(target=_make, args=(name, folder))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"the material '{name}' cannot be made")


def _make(name: str, folder: Path) -> None:
    os.chdir(Path(__file__).resolve().parents[1])
    make, _ = MATERIAL[name]
    make(folder / name)


def tried(batches: list[Batch], jobs: int) -> Iterator[tuple[str, int, str, str, float, int]]:
    """Run batches side by side; (kind, seed, outcome, about, seconds, bytes grown) of every input."""
    waiting, active = batches[::-1], []
    while waiting or active:
        while waiting and len(active) < jobs:
            active.append(waiting.pop())
            active[-1].begin()
        wait([batch.ear for batch in active], timeout=0.05)
        for batch in list(active):
            batch.hear()
            batch.look()
            for one in batch.done:
                yield batch.kind, *one
            if batch.ended:
                active.remove(batch)
                batch.ear.close()
                if left := batch.rest():
                    waiting.append(Batch(batch.kind, left, batch.place, batch.material, batch.keep))
            else:
                batch.seeds = batch.rest()
            batch.done = []


def _place(about: str) -> str:
    """The last lines of a traceback, by which faults are told apart."""
    lines = [line for line in about.strip().splitlines() if line.strip()]
    frames = [
        line.strip() for line in lines if line.startswith("  File ") and "mimscale/" in line and "fuzz" not in line
    ]
    return f"{frames[-1] if frames else ''} {lines[-1][:60] if lines else ''}"


def report(tallies: dict[str, Tally], found: dict[tuple[str, str, str], list[tuple[int, str]]]) -> None:
    """Print the table, and what went wrong."""
    for (kind, outcome, _), cases in found.items():
        seeds = ", ".join(str(seed) for seed, _ in cases[:5])
        print(f"\n== {kind}: {outcome}, {len(cases)} of them (seeds {seeds})\n{cases[0][1].strip()[-3500:]}")
        print(f"   python tests/fuzz.py --replay {kind}:{cases[0][0]}")
    print(
        f"\n{'kind':22}{'inputs':>8}{'refused':>9}{'accepted':>10}{'tracebacks':>12}{'hangs':>7}{'over memory':>13}"
        f"{'writes elsewhere':>18}{'slowest':>10}{'most':>10}"
    )
    whole = Tally()
    for kind, tally in [*tallies.items(), ("all", whole)]:
        c = tally.counts
        print(
            f"{kind:22}{tally.inputs:>8,}{c['refused']:>9,}{c['accepted']:>10,}{c['traceback']:>12}{c['hang']:>7}{c['memory']:>13}{c['write']:>18}"
            f"{tally.slowest:>8.1f} s{tally.largest / 2**20:>6.0f} MiB"
        )
        for outcome, count in c.items():
            whole.counts[outcome] += count if tally is not whole else 0
        whole.slowest, whole.largest = max(whole.slowest, tally.slowest), max(whole.largest, tally.largest)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=20, help="inputs of each kind; fewer of those that take long (20)")
    made.add_argument("--seed", type=int, default=0, help="the first one (0)")
    made.add_argument("--kind", nargs="+", choices=sorted(KINDS), default=list(KINDS), help="by default all")
    made.add_argument("--replay", metavar="KIND:SEED", help="one input once more, which is then left where it is")
    made.add_argument("--jobs", type=int, default=1, help="processes side by side (1)")
    made.add_argument("--folder", type=Path, help="to work in; by default a temporary one")
    made.add_argument("--sample", type=int, default=0, metavar="N", help="show the messages of N refusals of each kind")
    return made


def main(argv: list[str] | None = None, modules: Sequence[str] = MODULES) -> int:
    """Try the inputs; status 1 where one did not pass."""
    for name in modules:
        importlib.import_module(f"fuzzing.{name}")
    asked = parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fuzz_", ignore_cleanup_errors=True) as name:
        folder = (asked.folder or Path(name)).resolve()
        (folder / "material").mkdir(parents=True, exist_ok=True)
        if asked.replay:
            return _replay(*asked.replay.rsplit(":", 1), Path(tempfile.mkdtemp(prefix="fuzz_replay_")))
        began = time.monotonic()
        prepare([need for kind in asked.kind for need in KINDS[kind].needs], folder / "material")
        tallies = {kind: Tally() for kind in asked.kind}
        batches = []
        for kind in asked.kind:
            seeds = list(range(asked.seed, asked.seed + max(1, round(asked.rounds * KINDS[kind].share))))
            batches += [
                Batch(kind, seeds[at : at + BATCH], folder / f"{kind}-{at}", folder / "material")
                for at in range(0, len(seeds), BATCH)
            ]
        found: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
        try:
            for kind, seed, outcome, about, seconds, grown in tried(batches, asked.jobs):
                tallies[kind].add(outcome, seconds, grown)
                if outcome in FAULTS:
                    found.setdefault((kind, outcome, _place(about)), []).append((seed, about))
                elif outcome == "refused" and tallies[kind].counts["refused"] <= asked.sample:
                    print(f"{kind}:{seed}: {about}", flush=True)
        except KeyboardInterrupt:
            print("stopped; so far:")
        report(tallies, found)
        print(f"{time.monotonic() - began:.0f} s; seeds from {asked.seed}")
    return 1 if found else 0


def _replay(kind: str, seed: str, folder: Path) -> int:
    (folder / "material").mkdir()
    prepare(KINDS[kind].needs, folder / "material")
    bad = False
    for _, _, outcome, about, seconds, grown in tried(
        [Batch(kind, [int(seed)], folder / "try", folder / "material", keep=True)], 1
    ):
        print(f"{outcome} in {seconds:.1f} s, {grown / 2**20:.0f} MiB more\n{about}")
        bad = outcome in FAULTS
    print(f"the input: {folder / 'try/case/given'}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
