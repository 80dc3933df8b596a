"""The training loop: from a task and a DeepSpeed configuration to a run folder."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mimscale.files import remove_partial
from mimscale.training import checkpoint as checkpoints
from mimscale.training.ds_config import reconcile, split_batch
from mimscale.training.engine import Engine, start_ranks, stop_ranks
from mimscale.training.errors import CheckpointError, CorruptedUpdateError, TrainingError
from mimscale.training.faults.lock import only_start
from mimscale.training.faults.preemption import Preempted, StopRequests
from mimscale.training.faults.recovery import StartingPoint, check_branch, check_resumable, continued, starting_point
from mimscale.training.faults.spikes import WINDOW, Apply, LeftOut, RollBack, Skip, SpikePolicy, Stop
from mimscale.training.faults.watchdog import Watchdog, forget_end
from mimscale.training.metrics import MetricsLog, Progress, RunLog, duration
from mimscale.training.planning.counting import peak_bytes
from mimscale.training.planning.throughput import device_peak
from mimscale.training.ranks import Ranks, first_only, from_first, gather
from mimscale.training.recipe import RunRecipe
from mimscale.training.run_folder import RunFolder, saved_steps, step_name
from mimscale.training.saver import Saver
from mimscale.training.schedule import rate_of
from mimscale.training.task import Task, TaskBatch


def run(task: Callable[[], Task], ds_config: dict[str, Any], output: str | Path) -> dict[str, Any]:
    """Train until ``train.iterations``, resuming from the newest whole checkpoint of ``output`` if it has one.

    Every rank calls it; a process group that is there already is used and left as it is.

    Args:
        task: makes the task, once the ranks have met.
        ds_config: the DeepSpeed configuration, as read.
        output: the run folder.

    Returns:
        The run's result, as in ``result.json``.

    Raises:
        RecipeError, DeepSpeedConfigError, ShardError, CheckpointError, TrainingError: on all ranks alike; the message says
            what to do.
        RunInUseError: another start has the run folder; nothing in it was touched.
        RankLocalError: reading failed on this rank.
        Preempted: it was asked to stop and has saved.
    """
    started = not dist.is_initialized()
    ranks = start_ranks()
    folder = RunFolder(output)
    try:
        with StopRequests() as stop, contextlib.ExitStack() as held:
            first_only(lambda: held.enter_context(only_start(folder.path)))
            while True:
                this = _prepare(task(), ds_config, folder, ranks)
                done = folder.finished() if this.step == this.task.recipe.train.iterations else None
                if from_first(done is not None):
                    this.log.progress.report(f"{output} is finished; its result is in {folder.result}")
                    return done or {}
                with this.watch:
                    back = this.train(stop)
                    if back is None:
                        return this.finish()
                this.roll_back(back)
    finally:
        if started:
            stop_ranks()


# -- getting ready -----------------------------------------------------------------------------------------------------


def _prepare(task: Task, ds_config: dict[str, Any], folder: RunFolder, ranks: Ranks) -> _Run:
    """Check everything that can be checked, find where to resume, and build the engine there."""
    recipe, train = task.recipe, task.recipe.train
    config = _settle(task, ds_config, ranks)
    first_only(lambda: _tidy(folder))
    start = starting_point(folder, recipe)
    left_out = LeftOut(folder.path / "left_out.json", ranks.is_first)
    task.recipe = recipe = _continued(folder, recipe, start)
    # Checked before anything is written, so that a mistake leaves the folder as it was.
    first_only(lambda: check_resumable(folder, recipe, start))
    if start.source is not None:
        task.check_data(start.source)
        if not start.resumed:
            check_branch(start.source, recipe)
    progress = Progress(start.step, train.iterations, ranks.is_first)
    engine = _build(task, config, ranks, start)
    first_only(lambda: _open(folder, task, config, start, progress))
    log = RunLog(folder, ranks, progress, start.step, engine.write_events)
    watch = Watchdog(folder.heartbeat, ranks, start.step, train.hang_minutes)
    engine.touch = watch.touch
    progress.report(_described(task, config, ranks, engine))
    for notice in task.notices():
        progress.report(notice)
    if start.source is not None:
        progress.report(f"resuming from {start.source.path}")
    return _Run(
        task=task,
        ranks=ranks,
        folder=folder,
        engine=engine,
        log=log,
        step=start.step,
        updates=start.updates,
        policy=SpikePolicy(train, left_out, from_first(log.losses()[-WINDOW:])),
        saver=Saver(folder.path, train.keep_checkpoints, train.pinned_steps, train.save, ranks),
        watch=watch,
        peak_flops=device_peak(ranks.device, config["bf16"]["enabled"]) * ranks.world_size,
    )


def _continued(folder: RunFolder, recipe: RunRecipe, start: StartingPoint) -> RunRecipe:
    found: list[RunRecipe] = []
    first_only(lambda: found.append(continued(folder, recipe, start)))
    return from_first(found[0] if found else recipe)


def _settle(task: Task, ds_config: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed configuration of these ranks. Collective."""
    micro_bound = None
    if ds_config.get("train_micro_batch_size_per_gpu", "auto") == "auto":
        micro_bound = from_first(task.largest_micro_batch(ds_config, ranks))
    split = split_batch(ds_config, task.recipe.train.global_batch, ranks.world_size, micro_bound)
    return reconcile(ds_config, task.recipe, split, ranks.device.type == "cuda")


def _tidy(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    checkpoints.remove_leftovers(folder.path)
    for written in (folder.path, folder.heartbeat):
        remove_partial(written)


def _build(task: Task, config: dict[str, Any], ranks: Ranks, start: StartingPoint) -> Engine:
    source = start.source
    return Engine(
        build=task.build,
        groups=task.groups,
        recipe=task.recipe,
        config=config,
        ranks=ranks,
        restore=source.tensor if source else None,
        restored_steps=start.updates,
        check=source.check_shapes if source else None,
        start=None if source else task.starting_weights(),
        average_decay=task.average_decay,
    )


def _open(folder: RunFolder, task: Task, config: dict[str, Any], start: StartingPoint, progress: Progress) -> None:
    for step, problems in start.damaged.items():
        aside = checkpoints.set_aside(folder.path / "checkpoints" / step_name(step), "damaged")
        progress.report(
            f"damaged checkpoint: {checkpoints.shortened(problems)}; set aside as {aside.name}; resuming from the one before it"
        )
    damaged = folder.describe(task.recipe, config)
    damaged += [MetricsLog(folder.metrics).rewind(start.step), forget_end(folder.heartbeat)]
    for problem in filter(None, damaged):
        progress.report(f"damaged: {problem}")


def _described(task: Task, config: dict[str, Any], ranks: Ranks, engine: Engine) -> str:
    return (
        f"{task.describe()}; {engine.parameter_count / 1e6:.2f} M parameters; {ranks.world_size} x {ranks.device.type}, "
        f"ZeRO stage {engine.stage}, {'bf16' if config['bf16']['enabled'] else 'fp32'}, batch "
        f"{task.recipe.train.global_batch} = {ranks.world_size} ranks x {engine.micro} x {engine.accumulation} accumulated"
    )


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One batch: its loss and rate, the gradient's norm, why its update was left out, and whether any rank asks to stop."""

    loss: float
    lr: float
    grad_norm: float
    left_out: str | None
    stop_requested: bool


@dataclass
class _Run:
    """One start of a run; ``step`` counts batches, ``updates`` those that were not left out."""

    task: Task
    ranks: Ranks
    folder: RunFolder
    engine: Engine
    log: RunLog
    step: int
    updates: int
    policy: SpikePolicy
    saver: Saver
    watch: Watchdog
    peak_flops: float

    def train(self, stop: StopRequests) -> RollBack | None:
        """Steps up to ``train.iterations``, with validation and checkpoints on the way.

        Returns:
            ``None`` at the end; before it, where to go back to.

        Raises:
            Preempted: some rank was asked to stop; what was done is saved.
            TrainingError: the loss or an update was bad, and ``train.on_spike`` asks to stop.
        """
        train = self.task.recipe.train
        clock, images = time.monotonic(), 0
        self.watch.note("data", self.step)
        for batch in self.task.batches(self.step, self.ranks):
            # A save that failed ends the run now, and not with the next save.
            done = self._step(batch, stop.wanted(train.stop_margin) is not None or self.saver.has_failed())
            if isinstance(done, RollBack):
                return done
            self.step += 1
            stop.has_stepped()
            images += train.global_batch
            last = self.step == train.iterations
            if self.step % train.log_every == 0 or last:
                now = time.monotonic()
                self._log(done, images / (now - clock))
                clock, images = now, 0
            if self.step % train.validate_every == 0 or last:
                self._validate()
                clock = time.monotonic()
            stopping = done.stop_requested and not last
            if self.step % train.checkpoint_every == 0 or self.step in train.pinned_steps or last or stopping:
                self._save()
                clock = time.monotonic()
            if stopping:
                self._stop(stop.reason)
            self.watch.note("data", self.step)
        return None

    def _step(self, batch: TaskBatch, stop_requested: bool) -> _Step | RollBack:
        recipe = self.task.recipe
        self.log.skipped_samples(batch.skipped)
        self.watch.note("step", self.step + 1, batch.keys)
        lr = rate_of(recipe, self.step)
        loss = self.engine.forward_backward(batch.tensors, stop_requested)
        decision = self.policy.judge(self.step, loss.mean, loss.bad_ranks)
        grad_norm, left_out = math.nan, None
        if isinstance(decision, Apply):
            try:
                grad_norm = self.engine.apply(partial(rate_of, recipe, self.step))
                self.updates += 1
            except CorruptedUpdateError as error:
                decision = self.policy.judge_corruption(self.step, f"{error} at a loss of {loss.mean:.4g}")
        if isinstance(decision, Skip):
            self.engine.discard()
            left_out = decision.reason
            if not decision.known:
                samples = self._samples(batch.keys)
                self.log.progress.report(f"step {self.step + 1} is left out: {left_out}; samples {samples}")
        if isinstance(decision, Stop):
            raise self._diverged(decision, batch.keys)
        if isinstance(decision, RollBack):
            return decision
        return _Step(loss.mean, lr, grad_norm, left_out, loss.stop_requested)

    def _stop(self, reason: str | None) -> None:
        self.saver.finish()
        reason = next(filter(None, gather(reason)), "another rank's wish")
        raise Preempted(
            f"stopped by {reason} after step {self.step}, which is saved; the same command resumes from there", reason
        )

    def roll_back(self, back: RollBack) -> None:
        """Remove the checkpoints after ``back.to`` and note which batches are left out, so that the next start does so.

        Raises:
            TrainingError: too many are left out by now.
        """
        self.saver.finish()
        self.policy.leave_out(back, self.step)
        first_only(lambda: checkpoints.remove_after(self.folder.path, back.to))
        steps = saved_steps(self.folder.path)
        self.log.progress.report(
            f"step {self.step + 1}: {back.reason}; going back to step {steps[-1] if steps else 0}, and leaving out the "
            f"batches of steps {back.to + 1} to {self.step + 1}"
        )
        if self.policy.is_hopeless(back, self.step):
            left_out = self.policy.left_out
            raise TrainingError(
                f"{len(left_out.reasons)} batches are left out by now ({left_out.path}); a lower optimizer.lr or "
                f"a smaller optimizer.clip is needed"
            )
        self.log.close()
        self.engine.close()

    def _samples(self, keys: list[str]) -> str:
        """The first samples of the global batch. Collective."""
        return ", ".join(key for part in gather(keys[:4])[:4] for key in part) + ", ..."

    def _diverged(self, stop: Stop, keys: list[str]) -> TrainingError:
        samples = self._samples(keys)
        hosts = gather(socket.gethostname())
        where = f" ({', '.join(dict.fromkeys(hosts[rank] for rank in stop.ranks[:8]))})" if stop.ranks else ""
        with contextlib.suppress(CheckpointError):
            self.saver.finish()
        steps = saved_steps(self.folder.path)
        back = f"the last checkpoint is {step_name(steps[-1])}" if steps else "there is no checkpoint yet"
        return TrainingError(
            f"step {self.step + 1}: {stop.reason}{where}; nothing of this step was saved, and {back}. Samples of the batch: "
            f"{samples} A lower optimizer.lr, a longer schedule.warmup or a smaller optimizer.clip usually help; "
            f"train.on_spike=skip or rollback leaves such batches out"
        )

    def _log(self, done: _Step, rate: float) -> None:
        if done.left_out is not None:
            self.log.left_out(self.step, done.left_out)
            return
        mfu = rate * self.task.flops_per_image / self.peak_flops
        record = {"loss": done.loss, "lr": done.lr, "grad_norm": done.grad_norm, "images_per_s": rate, "mfu": mfu}
        self.log.step(self.step, record, self._images())

    def _images(self) -> int:
        return self.step * self.task.recipe.train.global_batch

    def _validate(self) -> None:
        self.watch.note("validate", self.step)
        with self.engine.averaged():
            found = self.task.validate(self.engine, self.step)
        if found is not None:
            self.log.validation(self.step, found, self._images())

    # -- saving --------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Have a checkpoint of the current step written, and the oldest ones removed."""
        self.watch.note("save", self.step)
        about = {
            "updates": self.updates,
            "recipe": self.task.recipe.model_dump(mode="json"),
            "data": self.task.data_state(self.step),
            "trained_with": {
                "ranks": self.ranks.world_size,
                "local_ranks": self.ranks.local_world_size,
                "zero_stage": self.engine.stage,
                "micro_batch": self.engine.micro,
            },
            "versions": checkpoints.versions(),
        }
        self.saver.save(self.step, self.engine.shapes(), self.engine.full_state, about)

    def finish(self) -> dict[str, Any]:
        """Write the curves and ``result.json``, and report what to look at; the result, on the first rank."""
        self.saver.finish()
        skipped = {key: reason for part in gather(self.log.skipped) for key, reason in part.items()}
        peaks = [round(peak / 1e9, 3) for peak in gather(peak_bytes(self.ranks.device))]
        result: dict[str, Any] = {}
        if self.ranks.is_first:
            records = self.log.metrics.read()
            result = self._result(records, skipped, peaks)
            self.task.draw_curves(records, self.folder.curves)
            if damaged := self.folder.finish(result):
                self.log.progress.report(f"damaged: {damaged}")
            self.log.close()
            self._point_out(result)
        self.engine.close()
        return result

    def _result(self, records: list[dict[str, Any]], skipped: dict[str, str], peaks: list[float]) -> dict[str, Any]:
        training = [r for r in records if "loss" in r]
        rates = sorted(r["images_per_s"] for r in training if "images_per_s" in r)
        tail = training[-max(1, len(training) // 20) :]
        return {
            "steps": self.step,
            "parameters": self.engine.parameter_count,
            "final_loss": training[-1]["loss"] if training else None,
            "train_loss": sum(r["loss"] for r in tail) / len(tail) if tail else None,
            **self.task.result(records),
            "images_per_s": rates[len(rates) // 2] if rates else None,
            "skipped": skipped,
            "left_out": {str(step + 1): reason for step, reason in self.policy.left_out.reasons.items()},
            "seconds": time.monotonic() - self.log.started,
            "ranks": self.ranks.world_size,
            "zero_stage": self.engine.stage,
            "peak_memory_gb": peaks,
            "checkpoint": f"checkpoints/{step_name(self.step)}",
            "versions": checkpoints.versions(),
        }

    def _point_out(self, result: dict[str, Any]) -> None:
        report = self.log.progress.report
        report(
            f"done: step {self.step} in {duration(result['seconds'])}, at most {max(result['peak_memory_gb']):.1f} GB a rank. "
            f"To look at:"
        )
        for folder in sorted({picture.parent for picture in self.folder.path.glob("*/step_*.png")}):
            report(f"  {max(folder.glob('step_*.png'))}")
        report(f"  {self.folder.curves}  ({'training and validation' if result.get('validation') else 'training'})")
        report(f"  tensorboard --logdir {self.folder.tensorboard}")
        report(f"  {self.folder.path / result['checkpoint']}  (weights and optimizer state)")
