"""Pre-training by masked image modelling, as a task for the loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from mimscale.data import CropSpec, MIMStream, ShardIndex
from mimscale.training.checkpoint import Checkpoint
from mimscale.training.errors import read_here
from mimscale.training.faults.recovery import check_data
from mimscale.training.loop import run
from mimscale.training.optimizer import decay_groups
from mimscale.training.pictures import loss_curves, reconstruction_sheet
from mimscale.training.planning.counting import activation_bytes, largest_micro_batch, parameter_sizes
from mimscale.training.planning.throughput import flops_per_image
from mimscale.training.pretraining.module import build_objective
from mimscale.training.pretraining.validation import validate
from mimscale.training.ranks import Ranks
from mimscale.training.recipe import Recipe
from mimscale.training.task import Evaluator, Task, TaskBatch, ValidationResult
from mimscale.wording import counted


def pretrain(recipe: Recipe, ds_config: dict[str, Any], output: str | Path) -> dict[str, Any]:
    """Pre-train, or resume pre-training, in the run folder ``output``; see :func:`mimscale.training.loop.run`."""
    return run(lambda: Pretraining(recipe), ds_config, output)


def rank_workers(asked: int | str, ranks: Ranks) -> int:
    """Data workers of a rank: on ``auto``, the cores that the rank itself leaves free, at most 8."""
    if asked != "auto":
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // ranks.local_world_size - 1))


def few_images(images: int, batch: int) -> str:
    """What it means to train on fewer images than a batch holds."""
    return f"a batch of {batch} takes each of the {counted(images, 'image')} {batch / images:.1f} times, in crops of its own"


def open_shards(recipe: Any) -> ShardIndex:
    """The index of a recipe's shards.

    Raises:
        RecipeError: ``data.shards`` is not set.
        ShardError: there is no usable index.
    """
    recipe.check_data_places()
    data = recipe.data
    places: dict[str, Any] = {"cache": Path(data.cache)} if data.cache else {}
    sizes: dict[str, Any] = {"cache_bytes": int(data.cache_gib * 2**30)} if data.cache_gib else {}
    return ShardIndex.load(data.shards, **places, **sizes)


def reading(recipe: Any, ranks: Ranks, step: int) -> dict[str, Any]:
    """How a rank reads a recipe's training images from ``step`` on: arguments of a :class:`mimscale.data.CropStream`."""
    data, train = recipe.data, recipe.train
    return {
        "fraction": data.fraction,
        "seed": train.seed,
        "global_batch": train.global_batch,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "start_step": step,
        "stop_step": train.iterations,
        "workers": rank_workers(data.workers, ranks),
        "max_damaged": data.max_damaged,
        "shuffle": data.shuffle,
        "window": data.shuffle_window,
    }


def data_position(index: ShardIndex, fraction: str, seed: int, images: int) -> dict[str, Any]:
    """What a checkpoint says of the data after ``images`` images."""
    epoch, position = divmod(images, len(index.samples(fraction)))
    return {
        "build": index.content.build,
        "fraction": fraction,
        "seed": seed,
        "images_seen": images,
        "epoch": epoch,
        "position": position,
    }


class Pretraining(Task):
    """SimMIM or MAE on shards.

    Raises:
        RecipeError, ShardError: the shards cannot be used, or have no such fraction.
    """

    recipe: Recipe

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.index = open_shards(recipe)
        MIMStream(self.index, fraction=recipe.data.fraction)  # an unknown fraction is an error here, not after minutes
        self.flops_per_image = flops_per_image(recipe)

    @override
    def build(self) -> nn.Module:
        return build_objective(self.recipe)

    @override
    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        return decay_groups(module, self.recipe)

    @override
    def largest_micro_batch(self, config: dict[str, Any], ranks: Ranks) -> int:
        sizes = parameter_sizes(self.recipe)
        return largest_micro_batch(sizes, lambda bf16: activation_bytes(self.recipe, bf16), config, ranks)

    @override
    def describe(self) -> str:
        data = self.recipe.data
        return (
            f"{self.recipe.model.name} with {self.recipe.mim.objective}, {self.flops_per_image / 3e9:.2f} GFLOPs an image "
            f"forward; {len(self.index.samples(data.fraction))} images ({data.fraction})"
        )

    @override
    def notices(self) -> list[str]:
        data, batch = self.recipe.data, self.recipe.train.global_batch
        said, images = [], len(self.index.samples(data.fraction))
        if images < batch:
            said.append(few_images(images, batch))
        if "val" not in self.index.fractions:
            said.append(
                f"{data.shards} holds no images out: nothing will be validated and no reconstruction drawn "
                "(mimscale shards build --val-share 5%, or --val SOURCE)"
            )
        return said

    @override
    def batches(self, step: int, ranks: Ranks) -> Iterator[TaskBatch]:
        data = self.recipe.data
        decodes_here = data.decoder == "nvimgcodec"  # in the rank itself, which holds the device
        on_gpu = ranks.device.type == "cuda"
        how = reading(self.recipe, ranks, step)
        stream = MIMStream(
            self.index,
            **(how | {"workers": 0} if decodes_here else how),
            crops=CropSpec.of(data, device=str(ranks.device) if decodes_here else "cpu"),
            mask_grid=self.recipe.mask.grid[0],
            masked=self.recipe.mask.masked,
        )
        for batch in read_here(stream):
            # Page-locked memory is what copies to a GPU beside its work.
            pinned = batch.pin_memory() if on_gpu and not decodes_here else batch
            yield TaskBatch((pinned.images, pinned.mask, pinned.draw_keys), batch.keys, batch.skipped)

    @override
    def validate(self, engine: Evaluator, step: int) -> ValidationResult | None:
        found = validate(engine, self.recipe, self.index)
        if found is None:
            return None
        assert self.recipe.mim.loss is not None
        record = found.record(self.recipe.mim.loss)
        text = (
            f"validation loss {record['val_loss']:.4f} (l1 {found.l1:.4f}, l2 {found.l2:.4f}; "
            f"predicting the local mean {record['val_baseline']:.4f}) on {counted(found.images, 'image')}"
        )
        pictures = {"reconstructions": reconstruction_sheet(*found.samples)} if found.samples is not None else {}
        return ValidationResult(record, text, pictures)

    @override
    def data_state(self, step: int) -> dict[str, Any]:
        train = self.recipe.train
        return data_position(self.index, self.recipe.data.fraction, train.seed, step * train.global_batch)

    @override
    def check_data(self, source: Checkpoint) -> None:
        assert self.recipe.data.shards is not None
        check_data(source, self.index.content.build, self.recipe.data.shards)

    @override
    def draw_curves(self, records: list[dict[str, Any]], path: Path) -> None:
        validations = [record for record in records if "val_loss" in record]
        loss_curves(records, path, validations[-1].get("val_baseline") if validations else None)
