"""What can happen to a run: each kind of fault strikes one start of it and says what it did and what has to follow."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import psutil
from training_runs import launcher, records

from mimscale.commands import pretrain
from mimscale.training.checkpoint import Checkpoint
from mimscale.training.errors import CheckpointError
from mimscale.training.faults.preemption import REQUEUE_EXIT, exit_status
from mimscale.training.run_folder import saved_steps

PATIENCE = 240.0


class Violation(AssertionError):
    """A promise of the trainer was broken; the message says which."""


@dataclass
class Outcome:
    """What a fault did.

    ``said`` has to stand in the output of this start, ``named`` in that of the next. ``redo`` bounds the steps that the next
    start makes again; ``None`` for the usual bound. ``mend`` is called before the next start.
    """

    what: str
    said: str | None = None
    named: str | None = None
    redo: int | None = None
    status: int | None = None
    mend: Callable[[], None] = lambda: None


@dataclass
class Start:
    """One start of a run: its ranks as bare processes, since a launcher would end them all when one goes.

    They are forked from this one, which has imported everything: a start takes a second instead of ten.
    """

    run: Path
    config: Path
    overrides: list[str]
    interval: int
    shards: Path
    rng: random.Random
    disk_full: Callable[[int], Callable[[], None]] | None
    ranks: int = 2
    log_name: str = "log"
    processes: list[ForkProcess] = field(default_factory=list)
    # Seconds by which the wall clock of the ranks is set forward.
    clock: Synchronized[float] = field(default_factory=lambda: multiprocessing.Value("d", 0.0))

    def begin(self) -> None:
        """Start the ranks."""
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = str(server.getsockname()[1])
        self.log = self.run.with_name(f"{self.run.name}.{self.log_name}")
        self.log.write_text("")
        self.left_behind = self._unfinished()
        world = {"WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1"}
        arguments = launcher(self.run, self.config, *self.overrides)[1:]
        for rank in map(str, range(self.ranks)):
            environment = world | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
            self.processes.append(ForkProcess(target=_rank, args=(arguments, environment, self.log, self.clock)))
            self.processes[-1].start()

    def is_alive(self) -> bool:
        """Whether all ranks are there."""
        return all(process.exitcode is None for process in self.processes)

    def output(self) -> str:
        """What the ranks have said so far."""
        return self.log.read_text(errors="replace")

    def logged(self) -> int:
        """Steps in the run's metrics.jsonl."""
        lines = records(self.run) if (self.run / "metrics.jsonl").exists() else []
        return lines[-1]["step"] if lines else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, and not what an earlier start has left of one."""
        return bool(self._unfinished() - self.left_behind)

    def _unfinished(self) -> set[tuple[Path, int]]:
        found = set()
        for path in (self.run / "checkpoints").glob(".saving_*"):
            with contextlib.suppress(FileNotFoundError):  # whole by now
                found.add((path, path.stat().st_ctime_ns))
        return found

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait for it; ``False`` when the ranks ended before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if not self.is_alive():
                return False
            if time.monotonic() > deadline:
                raise Violation(f"nothing happened for {PATIENCE:.0f} s\n{self.output()[-3000:]}")
            time.sleep(0.002)
        return True

    def some_steps(self) -> bool:
        """Let it train for a random while; ``False`` when it ended before."""
        self.wait(lambda: self.logged() > 0 and "ZeRO stage" in self.output())
        target = self.logged() + self.rng.randint(1, 2 * self.interval + 2)
        if not self.wait(lambda: self.logged() >= target):
            return False
        time.sleep(self.rng.uniform(0, 0.15))
        return self.is_alive()

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(self.ranks):
            process = self.processes[rank]
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def end(self) -> None:
        """Leave no process behind."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def ended_by_itself(self, *ranks: int, within: float) -> float:
        """Wait for the end of these ranks; seconds it took."""
        began = time.monotonic()
        while any(self.processes[rank].exitcode is None for rank in ranks):
            if time.monotonic() - began > within:
                raise Violation(f"rank {ranks} still runs {within:.0f} s after the fault\n{self.output()[-3000:]}")
            time.sleep(0.02)
        return time.monotonic() - began


def _rank(arguments: list[str], environment: dict[str, str], log: Path, clock: Synchronized[float]) -> None:
    real = time.time
    time.time = lambda: real() + clock.value
    os.environ.update(environment)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    pretrain.main(arguments)


def whole_steps(run: Path) -> list[int]:
    """Steps whose checkpoints are undamaged."""
    found = []
    for step in saved_steps(run):
        try:
            checkpoint = Checkpoint.open(run / "checkpoints" / f"step_{step:08d}")
        except CheckpointError:
            continue
        if not any(checkpoint.damage(file) for file in checkpoint.manifest["files"]):
            found.append(step)
    return found


def kill_one(start: Start) -> Outcome | None:
    """SIGKILL of one rank in training: the others notice, say who is lost, and end."""
    return _kill_one(start) if start.some_steps() else None


def kill_one_in_save(start: Start) -> Outcome | None:
    """SIGKILL of one rank while a checkpoint is being written."""
    return _kill_one(start) if _into_save(start) else None


def _kill_one(start: Start) -> Outcome:
    victim = start.rng.randrange(start.ranks)
    start.signal(signal.SIGKILL, victim)
    others = [rank for rank in range(start.ranks) if rank != victim]
    took = start.ended_by_itself(*others, within=60)
    return Outcome(f"rank {victim} killed, the other gave up after {took:.1f} s", said=f"rank {victim} on", status=1)


def kill_all(start: Start) -> Outcome | None:
    """SIGKILL of all ranks in training."""
    if not start.some_steps():
        return None
    start.signal(signal.SIGKILL)
    return Outcome("all ranks killed")


def kill_all_in_save(start: Start) -> Outcome | None:
    """SIGKILL of all ranks while a checkpoint is being written."""
    if not _into_save(start):
        return None
    start.signal(signal.SIGKILL)
    return Outcome("all ranks killed in a save")


def kill_starting(start: Start) -> Outcome | None:
    """SIGKILL of all ranks at any moment of their start."""
    time.sleep(start.rng.uniform(0, 4))
    start.signal(signal.SIGKILL)
    return Outcome("all ranks killed while starting")


def kill_data_worker(start: Start) -> Outcome | None:
    """SIGKILL of one rank's data worker: the rank says so, and all end."""
    if not start.some_steps():
        return None
    victim = start.rng.randrange(start.ranks)
    for worker in psutil.Process(start.processes[victim].pid).children():
        worker.kill()
    took = start.ended_by_itself(*range(start.ranks), within=60)
    said = f"error (rank {victim}): a data worker process was killed"
    return Outcome(f"rank {victim}'s data worker killed, all gave up after {took:.1f} s", said=said, status=1)


def _into_save(start: Start) -> bool:
    if not start.wait(start.is_saving):
        return False
    time.sleep(start.rng.choice((0, start.rng.uniform(0, 0.04))))
    return start.is_alive()


def freeze(start: Start) -> Outcome | None:
    """SIGSTOP of one rank: the watchdog of another ends the run and names it."""
    if not start.some_steps():
        return None
    victim = start.rng.randrange(start.ranks)
    start.signal(signal.SIGSTOP, victim)
    others = [rank for rank in range(start.ranks) if rank != victim]
    took = start.ended_by_itself(*others, within=90)
    start.signal(signal.SIGKILL, victim)
    return Outcome(f"rank {victim} stopped, ended after {took:.1f} s", said=f"rank {victim} on", status=1)


def preempt(start: Start) -> Outcome | None:
    """SIGTERM or SIGUSR1 to one rank: all agree on a step, save and exit with the status that asks to be queued again."""
    if not start.some_steps():
        return None
    number = start.rng.choice((signal.SIGTERM, signal.SIGUSR1))
    start.signal(number, start.rng.randrange(start.ranks))
    start.ended_by_itself(*range(start.ranks), within=90)
    if (start.run / "result.json").exists():
        return None
    return Outcome(f"{number.name} to one rank", said=f"stopped by {number.name}", redo=0, status=REQUEUE_EXIT)


def signal_twice(start: Start) -> Outcome | None:
    """One signal to all ranks, twice: saved after the step or ended at once, no save torn, and the status of the signal."""
    if not start.some_steps():
        return None
    number = start.rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    gap = start.rng.uniform(0, 2)
    start.signal(number)
    deadline = time.monotonic() + gap
    while time.monotonic() < deadline and start.is_alive():
        time.sleep(0.01)
    start.signal(number)
    start.ended_by_itself(*range(start.ranks), within=60)
    if (start.run / "result.json").exists():
        return None
    ended = {process.exitcode for process in start.processes}
    # A rank may see the other one gone before it has heard for itself.
    if start.processes[0].exitcode != exit_status(number.name) or not ended <= {exit_status(number.name), 1}:
        raise Violation(f"{number.name} twice ended with {ended}\n{start.output()[-3000:]}")
    return Outcome(f"{number.name} twice within {gap:.1f} s", said=number.name)


def suspend(start: Start) -> Outcome | None:
    """All ranks stopped for longer than the watchdog's patience, as by a closed lid: they go on."""
    if not start.some_steps():
        return None
    start.signal(signal.SIGSTOP)
    slept = start.rng.uniform(13, 16)
    time.sleep(slept)
    start.signal(signal.SIGCONT)
    return _goes_on(start, f"all ranks stopped for {slept:.0f} s")


def set_clock(start: Start) -> Outcome | None:
    """The wall clock jumps, forward or back: nothing is taken for hung, and no time is negative."""
    if not start.some_steps():
        return None
    start.clock.value = start.rng.choice((-1, 1)) * 10 ** start.rng.uniform(1, 7)
    return _goes_on(start, f"the clock set by {start.clock.value:.0f} s")


def _goes_on(start: Start, what: str) -> Outcome | None:
    before = start.logged()
    start.wait(lambda: start.logged() >= before + 2)
    if start.is_alive():
        # One beat of the watchdog's after it, which is when it would have ended the run.
        time.sleep(start.rng.uniform(2, 3))
    for process in start.processes:
        if process.exitcode not in (None, 0):
            raise Violation(f"{what} ended the run\n{start.output()[-3000:]}")
    if not start.is_alive():
        return None
    start.signal(signal.SIGKILL)
    return Outcome(f"{what}, {start.logged() - before} steps after it")


def fill_disk(start: Start) -> Outcome | None:
    """The disk fills up to a random room of less than a checkpoint: an error that says so, and nothing lost."""
    if start.disk_full is None or not start.some_steps():
        return None
    room = start.rng.choice((0, start.rng.randrange(2_000_000)))
    free = start.disk_full(room)
    try:
        start.ended_by_itself(*range(start.ranks), within=90)
    finally:
        free()
    if (start.run / "result.json").exists():
        return None
    failed = re.search(r"cannot save \S*/step_(\d+)", start.output())
    late = start.logged() - int(failed[1]) if failed else 0
    if late >= start.interval:
        raise Violation(f"a save that failed was told of {late} steps later\n{start.output()[-3000:]}")
    redo = start.interval + late if failed else None
    return Outcome(f"disk full but for {room} bytes", said="No space left", status=1, redo=redo)


def fill_log_disk(start: Start) -> Outcome | None:
    """The first rank may write no more to its log, as on a full disk: an error names the log, and no line of it is half there."""
    if not start.some_steps():
        return None
    log, pid = start.run / "metrics.jsonl", start.processes[0].pid
    assert pid is not None
    room = start.rng.randrange(60)
    bound = log.stat().st_size + room
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (bound, bound))
    start.ended_by_itself(*range(start.ranks), within=90)
    if (start.run / "result.json").exists():
        return None
    if not log.read_bytes().endswith(b"\n"):
        raise Violation(f"half a line is logged\n{start.output()[-3000:]}")
    return Outcome(f"{room} bytes of room for the log", said="File too large", status=1, redo=2 * start.interval)


def plant_links(start: Start) -> Outcome | None:
    """Links out of the run folder in the place of its files after a kill: a start resumes, and what is outside stays."""
    if not start.some_steps():
        return None
    start.signal(signal.SIGKILL)
    start.end()
    outside = start.run.with_name("outside")
    outside.mkdir(exist_ok=True)
    names = [
        "ds_config.json",
        "curves.png",
        "heartbeat/end.json",
        *(f"heartbeat/rank_{rank:05d}.json" for rank in (0, 1)),
    ]
    names += [f".{name}.partial-1" for name in ("metrics.jsonl", "recipe.yaml", "result.json")]
    names += [f"reconstructions/step_{step:08d}.png" for step in (12, 24)]
    for name in names:
        link, target = start.run / name, outside / Path(name).name
        target.write_text("precious")
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    again = Start(start.run, start.config, start.overrides, start.interval, start.shards, start.rng, None)
    again.log_name = "planted"
    again.begin()
    try:
        again.wait(lambda: "ZeRO stage" in again.output())
        again.some_steps()
        ended_well = all(process.exitcode in (None, 0) for process in again.processes)
    finally:
        again.end()
    changed = [path.name for path in outside.iterdir() if path.name not in {Path(name).name for name in names}]
    changed += [path.name for path in outside.iterdir() if path.read_text() != "precious"]
    if changed or not ended_well:
        raise Violation(f"written to outside: {changed}\n{again.output()[-3000:]}")
    return Outcome(f"{len(names)} links planted")


def truncate(start: Start) -> Outcome | None:
    """The newest checkpoint loses the end of one of its files after a kill: it is named, and the one before it used."""

    def cut(path: Path) -> str:
        size = start.rng.randrange(path.stat().st_size)
        os.truncate(path, size)
        return f"cut to {size} bytes"

    return _damage(start, cut)


def flip_bit(start: Start) -> Outcome | None:
    """One bit of the newest checkpoint flips after a kill: it is named, and the one before it used."""

    def flip(path: Path) -> str:
        data = bytearray(path.read_bytes())
        bit = start.rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        return f"bit {bit} flipped"

    return _damage(start, flip)


def _damage(start: Start, harm: Callable[[Path], str]) -> Outcome | None:
    if not start.some_steps() or not start.wait(lambda: len(saved_steps(start.run)) >= 2):
        return None
    start.end()
    steps = whole_steps(start.run)
    if len(steps) < 2:
        return None
    folder = start.run / "checkpoints" / f"step_{steps[-1]:08d}"
    path = start.rng.choice(sorted(folder.iterdir()))
    what = harm(path)
    named = f"damaged checkpoint: {folder}"
    return Outcome(f"{folder.name}/{path.name} {what}", named=named, redo=2 * start.interval + start.interval)


def damage_newest_two(start: Start) -> Outcome | None:
    """The newest checkpoints are damaged, an older pinned one is whole: what the next start saves stays, the pinned one too."""
    if not start.some_steps() or not start.wait(lambda: len(saved_steps(start.run)) >= 3):
        return None
    start.end()
    steps = whole_steps(start.run)
    if len(steps) < 3:
        return None
    for step in steps[-2:]:
        data = next((start.run / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))
        os.truncate(data, data.stat().st_size - start.rng.randint(1, 100))
    before = start.logged()
    again = Start(start.run, start.config, start.overrides, start.interval, start.shards, start.rng, None)
    again.log_name = "after_damage"
    again.begin()
    try:
        aside = "set aside as damaged_step_"
        again.wait(lambda: again.output().count(aside) == 2 and saved_steps(start.run)[-1] > steps[-3])
        arrived = not again.is_alive()
    finally:
        again.end()
    left = whole_steps(start.run)
    if not set(steps[:1]) <= set(left) or len(left) < 2:
        raise Violation(
            f"{steps} were saved, {steps[-2:]} damaged; of the whole ones {left} are left\n{again.output()[-3000:]}"
        )
    if aside not in again.output():
        raise Violation(f"the damaged ones were not named\n{again.output()[-3000:]}")
    there = "arrived" if arrived else f"saved {left[-1]}"
    return Outcome(f"steps {steps[-2:]} damaged, the start after it {there}", redo=before)


def start_twice(start: Start) -> Outcome | None:
    """A second start of the run: it says who has it and ends, and the first goes on as if nothing had been."""
    if not start.some_steps():
        return None
    second = Start(start.run, start.config, start.overrides, start.interval, start.shards, start.rng, None)
    second.log_name = "second"
    # Stopped meanwhile, since it could arrive before the second one has come to the lock.
    start.signal(signal.SIGSTOP)
    second.begin()
    try:
        second.ended_by_itself(*range(second.ranks), within=90)
    finally:
        second.end()
        start.signal(signal.SIGCONT)
    holder = f"in use by process {start.processes[0].pid}"
    if holder not in second.output() or any(process.exitcode != 1 for process in second.processes):
        raise Violation(f"the second start did not say '{holder}'\n{second.output()[-3000:]}")
    before = start.logged()
    start.wait(lambda: start.logged() > before)
    start.signal(signal.SIGKILL)
    return Outcome("a second start was refused")


def remove_shard(start: Start) -> Outcome | None:
    """A shard goes while it is trained on: what is open is read on, and a start without it says which one is missing."""
    if not start.some_steps():
        return None
    shard = start.rng.choice(sorted(start.shards.glob("train-*.tar")))
    away = shard.with_suffix(".away")
    shard.rename(away)
    start.some_steps()
    start.end()
    if (start.run / "result.json").exists():
        away.rename(shard)
        return None
    again = Start(start.run, start.config, start.overrides, start.interval, start.shards, start.rng, None)
    again.log_name = "without"
    again.begin()
    try:
        again.ended_by_itself(*range(start.ranks), within=PATIENCE)
        if shard.name not in again.output() or any(process.exitcode == 0 for process in again.processes):
            raise Violation(f"{shard.name} was away and nobody said so\n{again.output()[-3000:]}")
    finally:
        again.end()
        away.rename(shard)
    return Outcome(f"{shard.name} removed, and put back")


KINDS: dict[str, Callable[[Start], Outcome | None]] = {
    "kill one": kill_one,
    "kill one in a save": kill_one_in_save,
    "kill all": kill_all,
    "kill all in a save": kill_all_in_save,
    "kill all at start": kill_starting,
    "kill a data worker": kill_data_worker,
    "freeze one": freeze,
    "preempt": preempt,
    "signal twice": signal_twice,
    "suspend": suspend,
    "set the clock": set_clock,
    "full disk": fill_disk,
    "log disk full": fill_log_disk,
    "links planted": plant_links,
    "truncate": truncate,
    "flip a bit": flip_bit,
    "damage the newest two": damage_newest_two,
    "start twice": start_twice,
    "remove a shard": remove_shard,
}
