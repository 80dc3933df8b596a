"""Pre-training: from a recipe and a DeepSpeed configuration to a run folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from mimscale.data import MIMBatch, MIMStream, ShardError, ShardIndex
from mimscale.training import checkpoint as checkpoints
from mimscale.training.checkpoint import Checkpoint
from mimscale.training.ds_config import BatchSplit, reconcile, split_batch
from mimscale.training.engine import Engine, OneRankError, Ranks, StepResult, TrainingError, start_ranks, stop_ranks
from mimscale.training.memory import largest_micro_batch
from mimscale.training.metrics import MetricsLog, Progress, device_peak, duration, flops_per_image
from mimscale.training.objective import build_objective
from mimscale.training.param_groups import decay_groups
from mimscale.training.pictures import loss_curves, reconstruction_sheet, save_png
from mimscale.training.recipe import Recipe, RecipeError
from mimscale.training.run_folder import (
    RunFolder,
    check_branch,
    check_data,
    check_resumable,
    write_beside,
)
from mimscale.training.schedule import learning_rate
from mimscale.training.validation import Validation, validate

T = TypeVar("T")


def pretrain(recipe: Recipe, ds_config: dict[str, Any], output: str | Path) -> dict[str, Any]:
    """Train until ``train.iterations``, going on from the newest whole checkpoint of ``output`` if it has one.

    Every rank calls it; a process group that is there already is used and left as it is.

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
        run = _Run.prepare(recipe, ds_config, RunFolder(output), ranks)
        done = run.folder.finished() if run.step == recipe.train.iterations else None
        if _from_first(done is not None):
            run.progress.say(f"{output} is finished; its result is in {run.folder.result}")
            return done or {}
        run.train()
        return run.finish()
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


def _workers(recipe: Recipe, ranks: Ranks) -> int:
    """Data workers of a rank: on ``auto``, the cores that the rank itself leaves free, at most 8."""
    if recipe.data.workers != "auto":
        return recipe.data.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // ranks.local_world_size - 1))


@dataclass
class _Run:
    """One start of a run."""

    recipe: Recipe
    ranks: Ranks
    folder: RunFolder
    index: ShardIndex
    split: BatchSplit
    engine: Engine
    progress: Progress
    log: MetricsLog
    board: SummaryWriter | None
    step: int
    peak_flops: float
    image_flops: int
    started: float = field(default_factory=time.time)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def prepare(cls, recipe: Recipe, ds_config: dict[str, Any], folder: RunFolder, ranks: Ranks) -> _Run:
        """Check everything that can be checked, find where to go on, and build the engine there."""
        if recipe.data.shards is None:
            raise RecipeError("data.shards is not set: give data.shards=OUT, a folder made by shards/build.py")
        cache = {"cache": Path(recipe.data.cache)} if recipe.data.cache else {}
        size = {"cache_bytes": int(recipe.data.cache_gib * 2**30)} if recipe.data.cache_gib else {}
        index = ShardIndex.load(recipe.data.shards, **cache, **size)  # type: ignore[arg-type]
        MIMStream(index, fraction=recipe.data.fraction)  # an unknown fraction is an error here, not after minutes
        micro_bound = None
        if ds_config.get("train_micro_batch_size_per_gpu", "auto") == "auto":
            micro_bound = _from_first(largest_micro_batch(recipe, ds_config, ranks))
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
            check_data(source, index.content.build, recipe.data.shards)
            if not resumed:
                check_branch(source, recipe)

        progress = Progress(step, recipe.train.iterations, ranks.is_first)
        for problem in problems:
            progress.say(f"damaged checkpoint: {problem}; going on from the one before it")
        engine = Engine(
            build=lambda: build_objective(recipe),
            groups=lambda module: decay_groups(module, recipe),
            recipe=recipe,
            config=config,
            ranks=ranks,
            restore=source.tensor if source else None,
            restored_steps=step,
            check=source.check_shapes if source else None,
        )
        log = MetricsLog(folder.metrics)

        def begin() -> None:
            folder.describe(recipe, config)
            log.rewind(step)

        _first_only(ranks, begin)
        board = SummaryWriter(str(folder.tensorboard), purge_step=step + 1) if ranks.is_first else None
        run = cls(
            recipe=recipe,
            ranks=ranks,
            folder=folder,
            index=index,
            split=split,
            engine=engine,
            progress=progress,
            log=log,
            board=board,
            step=step,
            peak_flops=device_peak(ranks.device, config["bf16"]["enabled"]) * ranks.world_size,
            image_flops=flops_per_image(recipe),
        )
        run._announce(source, config)
        return run

    def _announce(self, source: Checkpoint | None, config: dict[str, Any]) -> None:
        count = sum(torch.Size(shape).numel() for shape in self.engine.shapes().values())
        self.progress.say(
            f"{self.recipe.model.name} with {self.recipe.mim.objective}: {count / 1e6:.2f} M parameters, "
            f"{self.image_flops / 3e9:.2f} GFLOPs an image forward; {len(self.index.samples(self.recipe.data.fraction))} images "
            f"({self.recipe.data.fraction}); {self.ranks.world_size} x {self.ranks.device.type}, ZeRO stage "
            f"{self.engine.stage}, {'bf16' if config['bf16']['enabled'] else 'fp32'}, batch "
            f"{self.recipe.train.global_batch} = {self.ranks.world_size} ranks x {self.split.micro} x "
            f"{self.split.accumulation} accumulated"
        )
        if source is not None:
            self.progress.say(f"going on from {source.path}")

    # -- training ------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Steps up to ``train.iterations``, with validation and checkpoints on the way."""
        train = self.recipe.train
        clock, images = time.monotonic(), 0
        for batch in self._batches():
            lr = learning_rate(self.recipe.schedule, self.recipe.learning_rate, train.iterations, self.step)
            self._note_skipped(batch.skipped)
            try:
                result = self.engine.train_step((batch.images, batch.mask, batch.draw_keys), lr)
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

    def _batches(self) -> Iterator[MIMBatch]:
        """This rank's share of every global batch to come, in page-locked memory if it goes to a GPU."""
        data, device = self.recipe.data, self.ranks.device
        decodes_here = data.decoder == "nvimgcodec"  # in the rank itself, which holds the device
        stream = MIMStream(
            self.index,
            fraction=data.fraction,
            seed=self.recipe.train.seed,
            image_size=data.image_size,
            global_batch=self.recipe.train.global_batch,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_step=self.step,
            stop_step=self.recipe.train.iterations,
            workers=0 if decodes_here else _workers(self.recipe, self.ranks),
            crop_scale=data.crop_scale,
            crop_ratio=data.crop_ratio,
            flip=data.flip,
            interpolation=data.interpolation,
            mask_grid=self.recipe.mask_grid,
            hidden=self.recipe.hidden,
            max_damaged=data.max_damaged,
            shuffle=data.shuffle,
            window=data.shuffle_window,
            decoder=data.decoder,
            device=str(device) if decodes_here else "cpu",
        )
        try:
            for batch in stream:
                yield batch.pin_memory() if device.type == "cuda" and not decodes_here else batch
        except (ShardError, OSError) as error:
            raise OneRankError(str(error)) from error

    def _log(self, result: StepResult, lr: float, rate: float) -> None:
        if not self.ranks.is_first:
            return
        mfu = rate * self.image_flops / self.peak_flops
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
        samples = self.step * self.recipe.train.global_batch
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

    def _validate(self) -> Validation | None:
        found = validate(self.engine, self.recipe, self.index)
        if found is None or not self.ranks.is_first:
            return found
        assert self.recipe.mim.loss is not None
        record = found.record(self.step, self.recipe.mim.loss)
        self.log.append(record)
        self._scalars({key: value for key, value in record.items() if key != "step"})
        self.progress.say(
            f"step {self.step}: validation loss {record['val_loss']:.4f} (l1 {found.l1:.4f}, l2 {found.l2:.4f}; "
            f"predicting the local mean {record['val_baseline']:.4f}) on {found.images} images"
        )
        if found.samples is not None:
            sheet = reconstruction_sheet(*found.samples)
            path = self.folder.reconstructions / f"{checkpoints.step_name(self.step)}.png"
            save_png(sheet, path)
            if self.board is not None:
                from torchvision.transforms.functional import pil_to_tensor

                self.board.add_image("reconstructions", pil_to_tensor(sheet), self.step)
        return found

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the current step, and remove the oldest ones."""
        images = self.step * self.recipe.train.global_batch
        epoch, position = divmod(images, len(self.index.samples(self.recipe.data.fraction)))
        about = {
            "recipe": self.recipe.model_dump(mode="json"),
            "data": {
                "build": self.index.content.build,
                "fraction": self.recipe.data.fraction,
                "seed": self.recipe.train.seed,
                "images_seen": images,
                "epoch": epoch,
                "position": position,
            },
            "trained_with": {
                "ranks": self.ranks.world_size,
                "zero_stage": self.engine.stage,
                "micro_batch": self.split.micro,
            },
            "versions": checkpoints.versions(),
        }
        checkpoints.save(self.folder.path, self.step, self.engine.shapes(), self.engine.full_state, about)
        train = self.recipe.train
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
            validations = [r for r in records if "val_loss" in r]
            tail = training[-max(1, len(training) // 20) :]
            result = {
                "steps": self.step,
                "parameters": sum(torch.Size(shape).numel() for shape in self.engine.shapes().values()),
                "final_loss": training[-1]["loss"] if training else None,
                "train_loss": sum(r["loss"] for r in tail) / len(tail) if tail else None,
                "validation": validations[-1] if validations else None,
                "images_per_s": sorted(r["images_per_s"] for r in training)[len(training) // 2] if training else None,
                "skipped": {key: reason for part in skipped for key, reason in part.items()},
                "seconds": time.time() - self.started,
                "ranks": self.ranks.world_size,
                "zero_stage": self.engine.stage,
                "checkpoint": f"checkpoints/{checkpoints.step_name(self.step)}",
                "versions": checkpoints.versions(),
            }
            loss_curves(records, self.folder.curves, validations[-1]["val_baseline"] if validations else None)
            write_beside(self.folder.result, json.dumps(result, indent=2) + "\n")
            if self.board is not None:
                self.board.close()
            self.progress.close()
            self._point_out(result)
        self.engine.close()
        return result

    def _point_out(self, result: dict[str, Any]) -> None:
        self.progress.say(f"done: {self.step} steps in {duration(result['seconds'])}. To look at:")
        pictures = sorted(self.folder.reconstructions.glob("*.png"))
        if pictures:
            self.progress.say(f"  {pictures[-1]}  (original, seen, filled in)")
        self.progress.say(f"  {self.folder.curves}  (training and validation loss)")
        self.progress.say(f"  tensorboard --logdir {self.folder.tensorboard}")
        self.progress.say(f"  {self.folder.path / result['checkpoint']}  (weights and optimizer state)")
