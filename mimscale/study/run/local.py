"""``study.py run``: the graph on this machine, as many runs side by side as the study says."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from mimscale.files import is_number, open_to_append, read_end
from mimscale.resources import LAUNCHERS
from mimscale.study.folder import Record, StudyFolder
from mimscale.study.jobs import Job, descendants
from mimscale.study.run.early_stopping import Judge, Ruling
from mimscale.study.spec import Study
from mimscale.training.faults.preemption import SAME_WISH_SECONDS
from mimscale.training.launch.start import Start, launch_pretraining
from mimscale.training.metrics import duration
from mimscale.transfer.launch import launch_finetuning
from mimscale.wording import counted, printable

POLL_SECONDS = 0.2
JUDGE_SECONDS = 3.0
LOG_SECONDS = 10.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Of a log's end, where the reason of a failure is looked for.
LOG_BYTES = 2**20


@dataclass
class Active:
    """A job that is being trained by a process of ours, or by one that an ended ``run`` has left."""

    job: Job
    process: BaseProcess | subprocess.Popen[bytes] | psutil.Process
    stopping: bool = False

    def ended(self) -> int | None:
        """Its exit status; ``None`` while it runs, 0 where nobody can tell."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        if isinstance(self.process, psutil.Process):
            return None if _alive(self.process) else 0
        return self.process.exitcode

    def stop(self, again: bool = False) -> None:
        """Ask it to save and end; ``again``: at once, saved or not."""
        if not self.stopping or again:
            self.stopping = True
            self.process.terminate()


class LocalRun:
    """One ``run`` of a study; :meth:`run` returns when nothing is left that could be done.

    A fork of a process that has the launchers' imports behind it starts each run of one rank on a machine without a GPU, since
    those imports take longer than a small run; ``torchrun`` starts all others.
    """

    def __init__(self, study: Study, jobs: dict[str, Job]):
        self.study, self.jobs = study, jobs
        self.folder = StudyFolder(study)
        self.active: dict[str, Active] = {}
        self.judge = Judge(self.folder, jobs)
        self.signal: str | None = None
        self.signals, self.heard = 0, 0.0  # wishes to stop, and when the last one came
        self.asked, self.hurried = 0.0, False
        self.begun = time.monotonic()
        self.done_before = 0.0
        self.judged = self.said = self.begun
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = max(1, cores // (study.local.parallel * study.local.ranks))
        self.warm = study.local.ranks == 1 and torch.cuda.device_count() == 0

    def run(self) -> int:
        """Train whatever is missing. Returns 0 when all is done (or stopped by a verdict), else 1.

        Raises:
            StudyError: folders that do not belong to the study, shards that are not set, or another run at work.
        """
        self.folder.check(self.jobs)
        with self.folder.alone():
            heeded = [
                number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN
            ]  # nohup ignores some
            before = {number: signal.signal(number, self._note) for number in heeded}
            try:
                self._prepare()
                while self._turn():
                    time.sleep(POLL_SECONDS)
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        return self._end()

    # -- one turn of the loop ------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        for job in self.jobs.values():
            record = self.folder.record(job)
            if self.folder.done(job):
                continue
            if record.pid and (left := _process(record.pid, record.pid_since)) is not None:
                self._say(f"{job.id} is being trained still, by process {record.pid}")
                self.active[job.id] = Active(job, left)
            elif record.state == "failed" or (record.state == "stopped" and not self.study.stop_overfitting):
                self.folder.write(job, Record(verdict=record.verdict))
        self.done_before = self._done_flops()

    def _turn(self) -> bool:
        """Reap, judge and start; whether there is anything left to wait for."""
        for name, active in list(self.active.items()):
            status = active.ended()
            if status is not None:
                del self.active[name]
                self._reap(active, status)
        if self.signal is not None:
            if self.active and not all(active.stopping for active in self.active.values()):
                self._say(f"stopping at {self.signal}: waiting for {counted(len(self.active), 'run')} to save and end")
                for active in self.active.values():
                    active.stop()
                self.asked = time.monotonic()
            if self.signals > 1 and not self.hurried and time.monotonic() - self.asked > SAME_WISH_SECONDS:
                self.hurried = True
                for active in self.active.values():
                    active.stop(again=True)
            return bool(self.active)
        now = time.monotonic()
        if now - self.judged > JUDGE_SECONDS:
            self.judged = now
            self._follow(self.judge.by_curves(active.job for active in self.active.values()))
        for job in self._ready():
            if len(self.active) >= self.study.local.parallel:
                break
            self._start(job)
        if now - self.said > LOG_SECONDS:
            self._say(self._progress())
        return bool(self.active)

    def _ready(self) -> list[Job]:
        """Jobs that could start now, in the order of the study."""
        return [
            job
            for job in self.jobs.values()
            if job.id not in self.active
            and not self.folder.done(job)
            and not self.folder.record(job).state
            and self.folder.may_start(job, self.jobs)
        ]

    def _start(self, job: Job) -> None:
        record = self.folder.record(job)
        start = self.jobs[job.start.job].digest if job.start else ""
        log = self.folder.log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(open_to_append(log))
        except OSError as error:  # a link in its place, say: the other jobs can run
            record.state, record.note = "failed", f"its log cannot be written: {printable(error, 1000)}"
            self._say(f"{job.id} failed: {record.note}")
            self.folder.write(job, record)
            return
        given = Start(
            job.recipe_file,
            str(job.resources.deepspeed),
            str(self.folder.run(job).path),
            tuple(job.arguments(self.study)),
        )
        process = self._fork(job, given, log) if self.warm else self._launch(job, given, log)
        assert process.pid is not None
        self.active[job.id] = Active(job, process)
        record.digest, record.start_digest, record.build = job.digest, start, self.folder.build(job)
        record.pid, record.pid_since, record.tries = process.pid, _since(process.pid), record.tries + 1
        self.folder.write(job, record)

    def _fork(self, job: Job, start: Start, log: Path) -> BaseProcess:
        os.environ["OMP_NUM_THREADS"] = str(self.threads)
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mimscale.study.run.preload"])
        process = context.Process(target=train, args=(job.launcher, start, str(log), self.threads), name=job.id)
        process.start()
        return process

    def _launch(self, job: Job, start: Start, log: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={self.study.local.ranks}", str(LAUNCHERS / f"{job.launcher}.py")]
        command += ["--deepspeed_config", str(start.ds_config), "--recipe", start.recipe, "--output", start.output]
        command += start.overrides
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with os.fdopen(open_to_append(log), "ab") as file:
            # A session of its own: the keyboard's SIGINT is ours to pass on, as a wish to save.
            return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    def _reap(self, active: Active, status: int) -> None:
        job, record = active.job, self.folder.record(active.job)
        record.pid, record.pid_since = 0, 0.0
        if self.folder.done(job):
            record.tries = 0
            self.folder.write(job, record)
            self._say(f"{job.id}: {self._outcome(job)}")
            self._follow(self.judge.by_end_points())
            return
        if record.state == "stopped" or self.signal is not None:
            record.tries = 0
        elif record.tries > self.study.local.retries:
            record.state, record.note = "failed", self._why(job, status)
            waiting = [name for name in descendants(self.jobs, job.id) if name not in self.active]
            behind = f"; {counted(len(waiting), 'job')} behind it cannot start" if waiting else ""
            self._say(f"{job.id} failed {counted(record.tries, 'time')}: {record.note}{behind}")
        else:
            self._say(f"{job.id} ended: {self._why(job, status)}; resuming from its last checkpoint")
        self.folder.write(job, record)

    def _outcome(self, job: Job) -> str:
        found = self.folder.result(job) or {}
        last = found.get("validation") or {}
        if job.launcher == "finetune":
            value = found.get("value")
            return f"{found.get('metric')} {round(value, 4) if isinstance(value, float) else value}"
        losses = (("training loss", found.get("train_loss")), ("validation loss", last.get("val_loss")))
        return ", ".join(f"{name} {loss:.4f}" for name, loss in losses if is_number(loss)) or "done"

    def _why(self, job: Job, status: int) -> str:
        """The last thing that the launcher said of an error."""
        try:
            lines = read_end(self.folder.log(job), LOG_BYTES).decode(errors="replace").splitlines()
        except OSError:
            lines = []
        said = [line for line in lines if line.startswith("mimscale: error") or "Error" in line]
        return (
            printable(said[-1].removeprefix("mimscale: error: "), 1000)
            if said
            else f"status {status}, see {self.folder.log(job)}"
        )

    def _follow(self, rulings: Sequence[Ruling]) -> None:
        for ruling in rulings:
            self._say(str(ruling))
            for name in ruling.stopped:
                if name in self.active:
                    self.active[name].stop()

    # -- progress ------------------------------------------------------------------------------------------------------

    def _done_flops(self) -> float:
        return sum(self.judge.flops[job.id] - self.judge.left(job) for job in self.jobs.values())

    def _progress(self) -> str:
        self.said = time.monotonic()
        states = [(self.folder.done(job), self.folder.record(job).state) for job in self.jobs.values()]
        done, failed = sum(d for d, _ in states), sum(s == "failed" for _, s in states)
        stopped = sum(s == "stopped" for _, s in states)
        total = sum(self.judge.flops.values()) - sum(self.folder.record(job).saved for job in self.jobs.values())
        so_far = self._done_flops()
        gained, spent = so_far - self.done_before, time.monotonic() - self.begun
        eta = f" | ETA {duration(spent * (total - so_far) / gained)}" if gained > 0 else ""
        running = ", ".join(
            f"{a.job.id} {self.judge.step(a.job)}/{a.job.recipe.train.iterations}" for a in self.active.values()
        )
        others = "".join(f", {n} {word}" for n, word in ((failed, "failed"), (stopped, "stopped")) if n)
        return f"{done}/{len(self.jobs)} jobs done{others} | {so_far / total:.0%} of the compute{eta} | {running}"

    def _end(self) -> int:
        states = {job.id: (self.folder.done(job), self.folder.record(job).state) for job in self.jobs.values()}
        done = sum(d for d, _ in states.values())
        stopped = sum(s == "stopped" for _, s in states.values())
        failed = [name for name, (d, s) in states.items() if s == "failed" and not d]
        left = len(states) - done - stopped - len(failed)
        parts = [f"{done} of {len(states)} jobs done", f"{stopped} stopped" if stopped else ""]
        parts += [f"{left} not begun or not ended" if left else "", f"failed: {', '.join(failed)}" if failed else ""]
        ending = f" in {duration(time.monotonic() - self.begun)}"
        if self.signal is not None:
            ending += "; stopped, the same command resumes"
        self._say("; ".join(part for part in parts if part) + ending)
        return 0 if not failed and not left else 1

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None or now - self.heard > SAME_WISH_SECONDS:
            self.signals += 1
            self.heard = now
        self.signal = signal.Signals(number).name


def train(launcher: str, start: Start, log: str, threads: int) -> None:
    """The whole of one run, in a process of its own.

    Args:
        launcher: "pretrain" or "finetune".
        start: what the launcher is given.
        log: file that takes what it prints.
        threads: of torch.
    """
    os.setsid()
    sink = open_to_append(Path(log))
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    torch.set_num_threads(threads)
    if launcher == "pretrain":
        launch_pretraining(start)
    else:
        launch_finetuning(start)


def _since(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def _process(pid: int, since: float) -> psutil.Process | None:
    """The process that was started as ``pid``, unless another has its number by now."""
    try:
        found = psutil.Process(pid)
        return found if found.create_time() == since and _alive(found) else None
    except psutil.NoSuchProcess:
        return None


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
