"""The training loop: from a task and a DeepSpeed configuration to a run folder."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from mimscale.training import checkpoint as checkpoints
from mimscale.training.checkpoint import Checkpoint
from mimscale.training.ds_config import BatchSplit, reconcile, split_batch
from mimscale.training.engine import Engine, StepResult, start_ranks, stop_ranks
from mimscale.training.errors import CorruptedUpdateError, TrainingError
from mimscale.training.faults.preemption import Preempted, StopRequests
from mimscale.training.faults.spikes import WINDOW, LeftOut, RollBack, SpikeJudge
from mimscale.training.faults.watchdog import Watchdog
from mimscale.training.metrics import MetricsLog, Progress, duration
from mimscale.training.pictures import save_png
from mimscale.training.planning.counting import peak_bytes
from mimscale.training.planning.throughput import device_peak
from mimscale.training.ranks import Ranks, first_only, from_first, gather
from mimscale.training.run_folder import RunFolder, check_branch, check_resumable, write_beside
from mimscale.training.saver import Saver
from mimscale.training.schedule import learning_rate
from mimscale.training.task import Task, TaskBatch

# Of all batches; a run that leaves more out is not to be saved by leaving out.
MOST_LEFT_OUT = 0.1


def run(task: Callable[[], Task], ds_config: dict[str, Any], output: str | Path) -> dict[str, Any]:
    """Train until ``train.iterations``, going on from the newest whole checkpoint of ``output`` if it has one.

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
        RankLocalError: reading failed on this rank.
        Preempted: it was asked to stop and has saved.
    """
    started = not dist.is_initialized()
    ranks = start_ranks()
    try:
        while True:
            this = _Run.prepare(task(), ds_config, RunFolder(output), ranks)
            done = this.folder.finished() if this.step == this.task.recipe.train.iterations else None
            if from_first(done is not None):
                this.progress.say(f"{output} is finished; its result is in {this.folder.result}")
                return done or {}
            try:
                with this.watch:
                    this.train()
                    return this.finish()
            except RollBack as back:
                this.roll_back(back)
    finally:
        if started:
            stop_ranks()


@dataclass
class _Run:
    """One start of a run."""

    task: Task
    ranks: Ranks
    folder: RunFolder
    split: BatchSplit
    engine: Engine
    progress: Progress
    log: MetricsLog
    board: SummaryWriter | None
    step: int
    updates: int
    left_out: LeftOut
    judge: SpikeJudge
    saver: Saver
    watch: Watchdog
    peak_flops: float
    started: float = field(default_factory=time.time)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def prepare(cls, task: Task, ds_config: dict[str, Any], folder: RunFolder, ranks: Ranks) -> _Run:
        """Check everything that can be checked, find where to go on, and build the engine there."""
        recipe = task.recipe
        micro_bound = None
        if ds_config.get("train_micro_batch_size_per_gpu", "auto") == "auto":
            micro_bound = from_first(task.largest_micro_batch(ds_config, ranks))
        split = split_batch(ds_config, recipe.train.global_batch, ranks.world_size, micro_bound)
        config = reconcile(ds_config, recipe, split, ranks.device.type == "cuda")

        def tidy() -> None:
            folder.path.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_leftovers(folder.path)

        first_only(tidy)
        source, problems = checkpoints.newest_whole(folder.path)
        resumed = source is not None
        if source is None and recipe.train.branch_from is not None:
            path = checkpoints.branch_source(recipe.train.branch_from)
            source, problems = checkpoints.check(path)
            if source is None:
                raise checkpoints.CheckpointError(f"train.branch_from: {'; '.join(problems)}")
        step = source.step if source else 0
        updates = source.manifest.get("updates", step) if source else 0
        left_out = LeftOut(folder.path / "left_out.json")
        # Checked before anything is written, so that a mistake leaves the folder as it was.
        first_only(lambda: check_resumable(folder, recipe, step))
        if source is not None:
            task.check_data(source)
            if not resumed:
                check_branch(source, recipe)

        progress = Progress(step, recipe.train.iterations, ranks.is_first)
        for problem in problems:
            progress.say(f"damaged checkpoint: {problem}; going on from the one before it")
        engine = Engine(
            build=task.build,
            groups=task.groups,
            recipe=recipe,
            config=config,
            ranks=ranks,
            restore=source.tensor if source else None,
            restored_steps=updates,
            check=source.check_shapes if source else None,
            start=None if source else task.starting_weights(),
            average_decay=task.average_decay,
        )
        log = MetricsLog(folder.metrics)

        def begin() -> None:
            folder.describe(recipe, config)
            log.rewind(step)
            (folder.heartbeat / "end.json").unlink(missing_ok=True)

        first_only(begin)
        train = recipe.train
        losses = [record["loss"] for record in log.read() if "loss" in record] if ranks.is_first else []
        watch = Watchdog(folder.heartbeat, ranks, step, train.hang_minutes)
        engine.touch = watch.touch
        board = SummaryWriter(str(folder.tensorboard), purge_step=step + 1) if ranks.is_first else None
        this = cls(
            task=task,
            ranks=ranks,
            folder=folder,
            split=split,
            engine=engine,
            progress=progress,
            log=log,
            board=board,
            step=step,
            updates=updates,
            left_out=left_out,
            judge=SpikeJudge(train.spike_factor, from_first(losses[-WINDOW:])),
            saver=Saver(folder.path, train.keep_checkpoints, train.pinned_steps, train.save),
            watch=watch,
            peak_flops=device_peak(ranks.device, config["bf16"]["enabled"]) * ranks.world_size,
        )
        this._announce(source, config)
        return this

    def _announce(self, source: Checkpoint | None, config: dict[str, Any]) -> None:
        count = self.engine.parameter_count
        self.progress.say(
            f"{self.task.describe()}; {count / 1e6:.2f} M parameters; {self.ranks.world_size} x {self.ranks.device.type}, "
            f"ZeRO stage {self.engine.stage}, {'bf16' if config['bf16']['enabled'] else 'fp32'}, batch "
            f"{self.split.local * self.ranks.world_size} = {self.ranks.world_size} ranks x {self.split.micro} x "
            f"{self.split.accumulation} accumulated"
        )
        if source is not None:
            self.progress.say(f"going on from {source.path}")

    # -- training ------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Steps up to ``train.iterations``, with validation and checkpoints on the way.

        Raises:
            Preempted: some rank was asked to stop; what was done is saved.
            RollBack: a batch was bad, and ``train.on_spike`` asks to go back.
            TrainingError: it asks to stop, or going on is hopeless.
        """
        train = self.task.recipe.train
        clock, images = time.monotonic(), 0
        with StopRequests(train.stop_margin) as stop:
            self.watch.note("data", self.step)
            for batch in self.task.batches(self.step, self.ranks):
                # A save that failed ends the run now, and not with the next save.
                result, lr = self._step(batch, stop.wanted() is not None or self.saver.has_failed())
                self.step += 1
                images += train.global_batch
                last = self.step == train.iterations
                if self.step % train.log_every == 0 or last:
                    now = time.monotonic()
                    self._log(result, lr, images / (now - clock))
                    clock, images = now, 0
                if self.step % train.validate_every == 0 or last:
                    self._validate()
                    clock = time.monotonic()
                stopping = result.asked and not last
                if self.step % train.checkpoint_every == 0 or self.step in train.pinned_steps or last or stopping:
                    self.save()
                    clock = time.monotonic()
                if stopping:
                    self._stop(stop.reason)
                self.watch.note("data", self.step)

    def _step(self, batch: TaskBatch, asked: bool) -> tuple[StepResult, float]:
        recipe, train = self.task.recipe, self.task.recipe.train
        lr = learning_rate(recipe.schedule, recipe.learning_rate, train.iterations, self.step)
        self._note_skipped(batch.skipped)
        self.watch.note("step", self.step + 1, batch.keys)
        known = self.left_out.reasons.get(self.step)
        refuse = known is not None or train.on_spike == "skip"
        try:
            judge = self.judge if known is None else lambda loss: known
            result = self.engine.train_step(batch.tensors, lr, asked, judge, refuse)
        except TrainingError as error:
            spoilt = isinstance(error, CorruptedUpdateError)
            if train.on_spike == "stop":
                raise self._diverged(error, batch.keys) from None
            back = 1 if train.on_spike == "skip" and spoilt else train.rollback_steps
            raise RollBack(max(0, self.step + 1 - back), self.step, str(error)) from None
        if result.refused is not None and known is None:
            self.left_out.add(range(self.step, self.step + 1), result.refused, self.ranks.is_first)
            self.progress.say(
                f"step {self.step + 1} is left out: {result.refused}; samples {self._samples(batch.keys)}"
            )
        self.updates += result.refused is None
        if known is None and not self.judge.note(result.loss, result.refused is not None):
            raise self._diverged(TrainingError(f"{self.judge.in_a_row} batches in a row were left out"), batch.keys)
        return result, lr

    def _stop(self, reason: str | None) -> None:
        self.saver.finish()
        reason = next(filter(None, gather(reason)), "another rank's wish")
        raise Preempted(
            f"stopped by {reason} after step {self.step}, which is saved; the same command goes on from there"
        )

    def roll_back(self, back: RollBack) -> None:
        """Remove the checkpoints after ``back.to`` and note which batches are left out, so that the next start goes so."""
        self.saver.finish()
        self.left_out.add(range(back.to, back.step + 1), back.reason, self.ranks.is_first)
        first_only(lambda: checkpoints.remove_after(self.folder.path, back.to))
        steps = checkpoints.saved_steps(self.folder.path)
        self.progress.say(
            f"step {back.step + 1}: {back.reason}; going back to step {steps[-1] if steps else 0}, and leaving out the "
            f"batches of steps {back.to + 1} to {back.step + 1}"
        )
        if len(self.left_out.reasons) > MOST_LEFT_OUT * self.task.recipe.train.iterations + back.step + 1 - back.to:
            raise TrainingError(
                f"{len(self.left_out.reasons)} batches are left out by now ({self.left_out.path}); a lower optimizer.lr or "
                f"a smaller optimizer.clip is needed"
            )
        if self.board is not None:
            self.board.close()
        self.engine.close()

    def _log(self, result: StepResult, lr: float, rate: float) -> None:
        if not self.ranks.is_first:
            return
        if result.refused is not None:
            self.log.append({"step": self.step, "left_out": result.refused})
            return
        mfu = rate * self.task.flops_per_image / self.peak_flops
        record = {
            "step": self.step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "images_per_s": rate,
            "mfu": mfu,
        }
        self.log.append(record)
        self._scalars({key: value for key, value in record.items() if key != "step"})
        self.progress.step(
            self.step,
            f"loss {result.loss:.4f} | lr {lr:.2e} | grad {result.grad_norm:.2f} | {rate:.1f} images/s | MFU {mfu:.0%}",
        )

    def _scalars(self, values: dict[str, float]) -> None:
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(("validation/" if key.startswith("val_") else "train/") + key, value, self.step)
        samples = self.step * self.task.recipe.train.global_batch
        self.engine.write_events([(f"mimscale/{key}", value, samples) for key, value in values.items()])

    def _note_skipped(self, skipped: list[tuple[str, str]]) -> None:
        for key, reason in skipped:
            if key not in self.skipped:
                self.skipped[key] = reason
                print(f"rank {self.ranks.rank}: skipped the damaged image {key}: {reason}", flush=True)

    def _samples(self, keys: list[str]) -> str:
        """The first samples of the global batch. Collective."""
        return ", ".join(key for part in gather(keys[:4])[:4] for key in part) + ", ..."

    def _diverged(self, error: TrainingError, keys: list[str]) -> TrainingError:
        samples = self._samples(keys)
        hosts = gather(socket.gethostname())
        where = f" ({', '.join(dict.fromkeys(hosts[rank] for rank in error.ranks[:8]))})" if error.ranks else ""
        with contextlib.suppress(checkpoints.CheckpointError):
            self.saver.finish()
        steps = checkpoints.saved_steps(self.folder.path)
        back = f"the last checkpoint is {checkpoints.step_name(steps[-1])}" if steps else "there is no checkpoint yet"
        return TrainingError(
            f"step {self.step + 1}: {error}{where}; nothing of this step was saved, and {back}. Samples of the batch: {samples} "
            f"A lower optimizer.lr, a longer schedule.warmup or a smaller optimizer.clip usually help; train.on_spike=skip "
            f"or rollback leaves such batches out"
        )

    def _validate(self) -> None:
        self.watch.note("validate", self.step)
        with self.engine.averaged():
            found = self.task.validate(self.engine, self.step)
        if found is None or not self.ranks.is_first:
            return
        self.log.append({"step": self.step, **found.record})
        self._scalars(found.record)
        self.progress.say(f"step {self.step}: {found.text}")
        for name, picture in found.pictures.items():
            save_png(picture, self.folder.path / name / f"{checkpoints.step_name(self.step)}.png")
            if self.board is not None:
                from torchvision.transforms.functional import pil_to_tensor

                self.board.add_image(name, pil_to_tensor(picture), self.step)

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
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
                "micro_batch": self.split.micro,
            },
            "versions": checkpoints.versions(),
        }
        self.saver.save(self.step, self.engine.shapes(), self.engine.full_state, about)

    def finish(self) -> dict[str, Any]:
        """Write the curves and ``result.json``, and say what to look at."""
        self.saver.finish()
        skipped = gather(self.skipped)
        peaks = gather(peak_bytes(self.ranks.device))
        result: dict[str, Any] = {}
        if self.ranks.is_first:
            records = self.log.read()
            training = [r for r in records if "loss" in r]
            tail = training[-max(1, len(training) // 20) :]
            result = {
                "steps": self.step,
                "parameters": self.engine.parameter_count,
                "final_loss": training[-1]["loss"] if training else None,
                "train_loss": sum(r["loss"] for r in tail) / len(tail) if tail else None,
                **self.task.result(records),
                "images_per_s": sorted(r["images_per_s"] for r in training)[len(training) // 2] if training else None,
                "skipped": {key: reason for part in skipped for key, reason in part.items()},
                "left_out": {str(step + 1): reason for step, reason in self.left_out.reasons.items()},
                "seconds": time.time() - self.started,
                "ranks": self.ranks.world_size,
                "zero_stage": self.engine.stage,
                "peak_memory_gb": [round(peak / 1e9, 3) for peak in peaks],
                "checkpoint": f"checkpoints/{checkpoints.step_name(self.step)}",
                "versions": checkpoints.versions(),
            }
            self.task.draw_curves(records, self.folder.curves)
            write_beside(self.folder.result, json.dumps(result, indent=2) + "\n")
            if self.board is not None:
                self.board.close()
            self.progress.close()
            self._point_out(result)
        self.engine.close()
        return result

    def _point_out(self, result: dict[str, Any]) -> None:
        self.progress.say(
            f"done: {self.step} steps in {duration(result['seconds'])}, at most {max(result['peak_memory_gb']):.1f} GB a rank. "
            f"To look at:"
        )
        for folder in sorted({picture.parent for picture in self.folder.path.glob("*/step_*.png")}):
            self.progress.say(f"  {max(folder.glob('step_*.png'))}")
        self.progress.say(f"  {self.folder.curves}  (training and validation)")
        self.progress.say(f"  tensorboard --logdir {self.folder.tensorboard}")
        self.progress.say(f"  {self.folder.path / result['checkpoint']}  (weights and optimizer state)")
