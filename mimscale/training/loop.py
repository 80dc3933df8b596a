"""The training loop: from a task and a DeepSpeed configuration to a run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from mimscale.training import checkpoint as checkpoints
from mimscale.training.checkpoint import Checkpoint
from mimscale.training.ds_config import BatchSplit, reconcile, split_batch
from mimscale.training.engine import Engine, Ranks, StepResult, TrainingError, start_ranks, stop_ranks
from mimscale.training.metrics import MetricsLog, Progress, device_peak, duration
from mimscale.training.pictures import save_png
from mimscale.training.run_folder import RunFolder, check_branch, check_resumable, write_beside
from mimscale.training.schedule import learning_rate
from mimscale.training.task import Task

T = TypeVar("T")


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
        OneRankError: reading failed on this rank.
    """
    started = not dist.is_initialized()
    ranks = start_ranks()
    try:
        this = _Run.prepare(task(), ds_config, RunFolder(output), ranks)
        done = this.folder.finished() if this.step == this.task.recipe.train.iterations else None
        if _from_first(done is not None):
            this.progress.say(f"{output} is finished; its result is in {this.folder.result}")
            return done or {}
        this.train()
        return this.finish()
    finally:
        if started:
            stop_ranks()


def _from_first(value: T) -> T:
    """The first rank's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _first_only(ranks: Ranks, action: Callable[[], None]) -> None:
    """Run ``action`` on the first rank; when it raises, every rank raises the same."""
    failure: Exception | None = None
    if ranks.is_first:
        try:
            action()
        except Exception as error:
            failure = error
    if (failure := _from_first(failure)) is not None:
        raise failure


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
    peak_flops: float
    started: float = field(default_factory=time.time)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def prepare(cls, task: Task, ds_config: dict[str, Any], folder: RunFolder, ranks: Ranks) -> _Run:
        """Check everything that can be checked, find where to go on, and build the engine there."""
        recipe = task.recipe
        micro_bound = None
        if ds_config.get("train_micro_batch_size_per_gpu", "auto") == "auto":
            micro_bound = _from_first(task.largest_micro_batch(ds_config, ranks))
        split = split_batch(ds_config, recipe.train.global_batch, ranks.world_size, micro_bound)
        config = reconcile(ds_config, recipe, split, ranks.device.type == "cuda")

        def tidy() -> None:
            folder.path.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_leftovers(folder.path)

        _first_only(ranks, tidy)
        source, problems = checkpoints.newest_whole(folder.path)
        resumed = source is not None
        if source is None and recipe.train.branch_from is not None:
            path = checkpoints.branch_source(recipe.train.branch_from)
            source, problems = checkpoints.check(path)
            if source is None:
                raise checkpoints.CheckpointError(f"train.branch_from: {'; '.join(problems)}")
        step = source.step if source else 0
        # Checked before anything is written, so that a mistake leaves the folder as it was.
        _first_only(ranks, lambda: check_resumable(folder, recipe, step))
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
            restored_steps=step,
            check=source.check_shapes if source else None,
            start=None if source else task.starting_weights(),
        )
        log = MetricsLog(folder.metrics)

        def begin() -> None:
            folder.describe(recipe, config)
            log.rewind(step)

        _first_only(ranks, begin)
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
            peak_flops=device_peak(ranks.device, config["bf16"]["enabled"]) * ranks.world_size,
        )
        this._announce(source, config)
        return this

    def _announce(self, source: Checkpoint | None, config: dict[str, Any]) -> None:
        count = sum(torch.Size(shape).numel() for shape in self.engine.shapes().values())
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
        """Steps up to ``train.iterations``, with validation and checkpoints on the way."""
        recipe, train = self.task.recipe, self.task.recipe.train
        clock, images = time.monotonic(), 0
        for batch in self.task.batches(self.step, self.ranks):
            lr = learning_rate(recipe.schedule, recipe.learning_rate, train.iterations, self.step)
            self._note_skipped(batch.skipped)
            try:
                result = self.engine.train_step(batch.tensors, lr)
            except TrainingError as error:
                raise self._diverged(error, batch.keys) from None
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
            if self.step % train.checkpoint_every == 0 or self.step in train.pinned_steps or last:
                self.save()
                clock = time.monotonic()

    def _log(self, result: StepResult, lr: float, rate: float) -> None:
        if not self.ranks.is_first:
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

    def _diverged(self, error: TrainingError, keys: list[str]) -> TrainingError:
        gathered: list[list[str]] = [[] for _ in range(self.ranks.world_size)]
        dist.all_gather_object(gathered, keys[:4])
        samples = ", ".join(key for part in gathered[:4] for key in part)
        steps = checkpoints.saved_steps(self.folder.path)
        back = f"the last checkpoint is {checkpoints.step_name(steps[-1])}" if steps else "there is no checkpoint yet"
        return TrainingError(
            f"step {self.step + 1}: {error}; nothing of this step was saved, and {back}. Samples of the batch: {samples}, "
            f"... A lower optimizer.lr, a longer schedule.warmup or a smaller optimizer.clip usually help"
        )

    def _validate(self) -> None:
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
        """Write a checkpoint of the current step, and remove the oldest ones."""
        about = {
            "recipe": self.task.recipe.model_dump(mode="json"),
            "data": self.task.data_state(self.step),
            "trained_with": {
                "ranks": self.ranks.world_size,
                "zero_stage": self.engine.stage,
                "micro_batch": self.split.micro,
            },
            "versions": checkpoints.versions(),
        }
        checkpoints.save(self.folder.path, self.step, self.engine.shapes(), self.engine.full_state, about)
        train = self.task.recipe.train
        _first_only(
            self.ranks, lambda: checkpoints.rotate(self.folder.path, train.keep_checkpoints, train.pinned_steps)
        )

    def finish(self) -> dict[str, Any]:
        """Write the curves and ``result.json``, and say what to look at."""
        skipped: list[dict[str, str]] = [{} for _ in range(self.ranks.world_size)]
        dist.all_gather_object(skipped, self.skipped)
        result: dict[str, Any] = {}
        if self.ranks.is_first:
            records = self.log.read()
            training = [r for r in records if "loss" in r]
            tail = training[-max(1, len(training) // 20) :]
            result = {
                "steps": self.step,
                "parameters": sum(torch.Size(shape).numel() for shape in self.engine.shapes().values()),
                "final_loss": training[-1]["loss"] if training else None,
                "train_loss": sum(r["loss"] for r in tail) / len(tail) if tail else None,
                **self.task.result(records),
                "images_per_s": sorted(r["images_per_s"] for r in training)[len(training) // 2] if training else None,
                "skipped": {key: reason for part in skipped for key, reason in part.items()},
                "seconds": time.time() - self.started,
                "ranks": self.ranks.world_size,
                "zero_stage": self.engine.stage,
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
        self.progress.say(f"done: {self.step} steps in {duration(result['seconds'])}. To look at:")
        for folder in sorted({picture.parent for picture in self.folder.path.glob("*/step_*.png")}):
            self.progress.say(f"  {max(folder.glob('step_*.png'))}")
        self.progress.say(f"  {self.folder.curves}  (training and validation)")
        self.progress.say(f"  tensorboard --logdir {self.folder.tensorboard}")
        self.progress.say(f"  {self.folder.path / result['checkpoint']}  (weights and optimizer state)")
