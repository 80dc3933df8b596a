"""Recipes: everything that defines a run, as data.

A recipe is a YAML file, checked against the schema below and resolved with ``key=value`` overrides.
What the hardware needs (ZeRO stage, precision, micro-batch) is not here: it belongs to the DeepSpeed configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mimscale.masking import MaskGeometry
from mimscale.mim.settings import MIMSettings
from mimscale.models.settings import EncoderSettings
from mimscale.registry import RegistryError, encoders, load_plugins, objectives
from mimscale.resources import RECIPES, Kind
from mimscale.schema import (
    GREATEST,
    Amount,
    AmountOrZero,
    Batch,
    ChosenBy,
    Count,
    Decay,
    Deviations,
    Document,
    Means,
    Place,
    Positive,
    Probability,
    SchemaError,
    Section,
    Share,
    Shares,
    Side,
    Span,
    Word,
    Workers,
    choice,
    flatten,
    free_keys,
    key,
    load,
    read_yaml,
    resolve,
)

# What fp32 holds: a rate that is far too high is for the run to tell.
LARGEST_RATE = 1e38
Rate = Annotated[float, Field(gt=0, le=LARGEST_RATE)]
Steps = Annotated[tuple[Positive, ...], Field(max_length=10_000)]


class RecipeError(SchemaError):
    """A recipe or an override that cannot be used; the message names the key and what to write instead."""


class Data(Section):
    """Where the images come from and how they are cropped."""

    shards: Place | None = key(
        None, "Shard folder that `mimscale shards build` made, or the http(s) or s3 address of one.", free=True
    )
    fraction: Word = key(
        "100", "Which of the shards' images: a stored fraction (10, 20, 50, 100) or a named subset.", "Table 2"
    )
    image_size: Side = key(192, "Side of the crops, pixels.", "section 3.4")
    crop_scale: Shares = key((0.67, 1.0), "Area of a crop, as a share of the image's.", "section 3.4")
    crop_ratio: Span = key((3 / 4, 4 / 3), "Aspect ratio of a crop, width over height.", "section 3.4")
    flip: Probability = key(0.5, "Probability that a crop is flipped left to right.", "section 3.4")
    interpolation: Literal["bilinear", "bicubic"] = key(
        "bilinear", "How crops are resized, with antialiasing.", "released code"
    )
    mean: Means = key(
        (0.485, 0.456, 0.406), "Subtracted from the channels R, G, B, which are 0 to 1.", "ImageNet, released code"
    )
    std: Deviations = key((0.229, 0.224, 0.225), "What the channels are then divided by.", "ImageNet, released code")
    decoder: Literal["libjpeg-turbo", "nvimgcodec"] = key(
        "libjpeg-turbo", "What decodes JPEGs: the CPU, or with nvimgcodec the GPU's JPEG engine."
    )
    shuffle: Literal["full", "window"] = key(
        "full", "Order of the images: over all of them, or within windows of shards, which suits network storage."
    )
    shuffle_window: Positive = key(16, "Shards in a window.")
    cache: Place | None = key(None, "Folder for local copies of shards whose `shards` is an address.", free=True)
    cache_gib: Amount | None = key(None, "Most that those copies may take, GiB; null for no limit.", free=True)
    workers: Workers | Literal["auto"] = key(
        "auto", "Decoding processes of each rank, 0 for none; auto shares the machine's cores.", free=True
    )
    max_damaged: Count = key(100, "How many damaged images are skipped before the run stops.", free=True)
    validation_images: Positive | None = key(
        None, "Validate on so many held-out images, evenly spread; null for all.", branch=True
    )


class Optimizer(Section):
    """AdamW."""

    lr: Rate = key(
        1.0e-4,
        "Peak learning rate at a global batch of `lr_batch`; it is scaled linearly to train.global_batch.",
        "released code",
    )
    lr_batch: Batch = key(512, "Images of the batch that `lr` is for.", "released code")
    betas: tuple[Decay, Decay] = key((0.9, 0.999), "Decay of the gradient's first and second moment.", "released code")
    eps: Amount = key(1.0e-8, "Added to the root of the second moment.", "released code")
    weight_decay: AmountOrZero = key(
        0.05, "Decoupled weight decay; biases, norms and tokens have none.", "released code"
    )
    clip: AmountOrZero = key(
        5.0, "Norm that the gradient of all parameters is clipped to; 0 for no clipping.", "released code"
    )


class Schedule(Section):
    """How the learning rate changes over the run."""

    kind: Literal["step", "cosine", "linear"] = key(
        "step",
        "After the warm-up: constant with steps down, or a cosine or a line to the final rate.",
        "section 3.4",
    )
    warmup: Count = key(
        6250, "Iterations in which the rate rises linearly from `warmup_lr` to its peak.", "released code"
    )
    warmup_lr: Annotated[float, Field(ge=0, le=LARGEST_RATE)] = key(
        5.0e-7, "Learning rate of the first iteration.", "released code"
    )
    decay_at: Share | Annotated[tuple[Share, ...], Field(min_length=1, max_length=1000)] = key(
        0.875, "kind=step: share of the run after which the rate steps down, or several.", "section 3.4"
    )
    decay_factor: Share = key(0.1, "kind=step: what each step down multiplies the rate by.", "section 3.4")
    final_lr_ratio: Probability = key(0.0, "kind=cosine and linear: rate at the end, as a share of the peak.")
    released: bool | None = key(
        None,
        "As the released pre-training code: `warmup_lr` is for a batch of 512 and scaled with it, and every update has the "
        "rate of the one before; null: with fidelity=released and mim.objective=simmim.",
        "paper",
    )


class Train(Section):
    """How long, how many images an iteration, and what is written when."""

    iterations: Positive = key(125_000, "Updates in all.", "section 3.4", branch=True)
    global_batch: Batch = key(2048, "Images of one update, over all ranks.", "section 3.4")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = key(
        0, "Seed of everything that is drawn: weights, order, crops, masks, drop path."
    )
    branch_from: Place | None = key(
        None, "RUN@STEP of a run with the same past, whose checkpoint this run starts from.", "section 3.4", free=True
    )
    checkpoint_every: Positive = key(1000, "Iterations between two checkpoints.", free=True)
    keep_checkpoints: Positive = key(
        2, "How many of the newest whole checkpoints are kept; at least two, pinned ones included.", free=True
    )
    pinned_steps: Annotated[tuple[Positive, ...], Field(max_length=10_000)] = key(
        (), "Iterations whose checkpoints are written and kept too.", free=True
    )
    validate_every: Positive = key(5000, "Iterations between two validations.", free=True)
    validate_batch: Batch | None = key(
        None, "Images of a rank's validation batch; null for twice the micro-batch.", free=True
    )
    log_every: Positive = key(1, "Iterations between two lines of metrics.jsonl.", free=True)
    activation_checkpointing: bool | None = key(
        None,
        "Recompute each block in the backward pass, which saves most of the activations' memory; null for what the "
        "DeepSpeed configuration has.",
        free=True,
    )
    compile: bool = key(False, "Compile the blocks with torch.compile.", free=True)
    save: Literal["async", "blocking"] = key(
        "async",
        "Write checkpoints beside training, or while it waits, which needs no copy of the state in host memory.",
        free=True,
    )
    stop_margin: AmountOrZero = key(
        120, "How long before its Slurm job's time limit a run saves and stops, seconds.", free=True
    )
    hang_minutes: Amount = key(10, "How long a run may make no progress before it is ended, minutes.", free=True)
    spike_factor: Annotated[float, Field(gt=1, le=GREATEST)] | None = key(
        4.0, "A loss of so many times the median of the last 100 is a spike; null for none.", free=True
    )
    on_spike: Literal["stop", "skip", "rollback"] = key(
        "stop",
        "At a spike or a loss that is not finite: stop, skip the update, or roll back to a checkpoint and leave the batches "
        "since out.",
        free=True,
    )
    rollback_steps: Positive = key(
        100, "on_spike=rollback: least iterations between the checkpoint and the spike.", free=True
    )


class PretrainTrain(Train):
    """How long, how many images an iteration, and what is written when."""

    reconstructions: Annotated[int, Field(ge=0, le=1024)] = key(
        8, "Pictures of filled-in images at each validation.", free=True
    )


class RunRecipe(Document):
    """What the recipe of every task holds, whatever is trained."""

    error = RecipeError
    files: ClassVar[Kind] = RECIPES
    # Keys of the data section without which there is nothing to train on, and what each is set to.
    data_places: ClassVar[dict[str, str]] = {"shards": "OUT, a folder made by mimscale shards build"}

    # What recipes had of every encoder and objective before each had keys of its own, with the defaults. Runs and studies from
    # then hold all of them.
    former: ClassVar[dict[str, Any]] = {}
    # Keys that have come since, which make no other recipe of one that leaves them at their default.
    added: ClassVar[dict[str, Any]] = {"plugins": [], "schedule.released": None}
    # Keys of which runs from before them had another value than today's default: where a start does not give one, a run in
    # the folder keeps its own.
    later: ClassVar[tuple[str, ...]] = ("schedule.released",)

    plugins: Annotated[tuple[str, ...], Field(max_length=100)] = key(
        (), "Packages to import before the rest is read: they register encoders, objectives, targets, tasks or sources."
    )
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()

    @classmethod
    def prepare(cls, values: dict[str, Any]) -> None:
        """Import the plug-ins that ``values`` name.

        Raises:
            RecipeError: one is not there, or cannot be imported.
        """
        try:
            load_plugins(values.get("plugins") or ())
        except RegistryError as error:
            raise RecipeError(str(error)) from None

    def deciding(self) -> dict[str, Any]:
        """Every dotted key that can change a loss, with its value, as recipes have had them from the beginning."""
        values, free = flatten(self.model_dump(mode="json")), self.free_keys
        kept = {name: value for name, value in values.items() if name not in free}
        kept = {name: value for name, value in kept.items() if name not in self.added or value != self.added[name]}
        return self.former | kept

    @property
    def learning_rate(self) -> float:
        """Peak learning rate at this run's global batch."""
        return self.optimizer.lr * self.train.global_batch / self.optimizer.lr_batch

    @property
    def free_keys(self) -> frozenset[str]:
        """Keys that may differ between two starts of one run: they change what is written, never a loss."""
        return free_keys(self)

    @property
    def branch_keys(self) -> frozenset[str]:
        """Keys that may differ between a run and its trunk, whose past it shares: those, and the length."""
        return free_keys(self, branch=True)

    @property
    def steps_as_released(self) -> bool:
        """Whether rates are those that the released code's updates had, ``schedule.released``."""
        return bool(self.schedule.released)

    @property
    def scales_peak_alone(self) -> bool:
        """Whether a group's ``lr_scale`` leaves the schedule's two ends as they are."""
        return False

    @classmethod
    def meant_then(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Keys in ``later`` that a recipe of a run lacks, dotted, with what runs had before there were such keys.

        Args:
            values: the recipe's, nested.
        """
        return {}

    def check_data_places(self) -> None:
        """Raise unless the recipe says where its data is.

        Raises:
            RecipeError: naming the key that is not set.
        """
        data: Any = self.data  # type: ignore[attr-defined]
        for name, kind in self.data_places.items():
            if getattr(data, name) is None:
                raise RecipeError(f"data.{name} is not set: give data.{name}={kind}")

    def to_yaml(self) -> str:
        """The resolved recipe, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


ANY_ENCODER = {"embed_dim": None, "depths": None, "num_heads": None, "depth": None, "pretrained_window_size": 0}


class Recipe(RunRecipe):
    """A pre-training recipe."""

    noun = "pre-training recipe"
    kind = "pretrain"
    former = {f"model.{name}": value for name, value in {**ANY_ENCODER, "window_size": 12}.items()} | {
        "mim.decoder": "linear",
        "mim.target_window": 47,
        "mim.norm_pix": True,
        "mim.decoder_dim": 512,
        "mim.decoder_depth": 8,
        "mim.decoder_heads": 16,
    }
    added = RunRecipe.added | {"mim.mask_patch": 32, "mim.target": None}

    fidelity: Literal["paper", "released"] = key(
        "paper",
        "Where the paper and its released code differ: the paper, or with released an l1 loss, weight decay on the bias "
        "MLP and the logit scale, and rates as in schedule.released.",
        "paper",
    )
    data: Data = Data()
    model: Annotated[EncoderSettings, ChosenBy("name", None, encoders.settings, encoders.names)]
    mim: Annotated[MIMSettings, ChosenBy("objective", "simmim", objectives.settings, objectives.names)]
    train: PretrainTrain = PretrainTrain()

    @model_validator(mode="before")
    @classmethod
    def _settle_the_loss(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("mim") or {}, dict):
            mim = dict(values.get("mim") or {})
            section = chosen_section(cls, "mim", mim)
            if section is not None and mim.get("loss") is None:
                mim["loss"] = section.losses.get(str(values.get("fidelity", "paper")))
            values = {**values, "mim": mim}
        return values

    @property
    def steps_as_released(self) -> bool:
        """See :attr:`RunRecipe.steps_as_released`; MAE's own released code steps as the paper does."""
        said = self.schedule.released
        return self.fidelity == "released" and self.mim.objective == "simmim" if said is None else said

    @classmethod
    def meant_then(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Runs of either fidelity stepped as the paper's."""
        held = values.get("schedule")
        lacks = isinstance(held, dict) and "released" not in held
        return {"schedule.released": False} if lacks and values.get("fidelity") == "released" else {}

    @property
    def mask(self) -> MaskGeometry:
        """What is masked of each image."""
        return self.mim.mask_geometry(self.model, self.data.image_size)

    @model_validator(mode="after")
    def _mask_patches_fit(self) -> Recipe:
        try:
            _ = self.mask
        except ValueError as error:
            raise PydanticCustomError("mask", "{problem}", {"problem": str(error)}) from None
        return self


def chosen_section(schema: type[Document], name: str, values: dict[str, Any]) -> Any:
    """The class of a section of which there are several, that ``values`` choose; ``None`` where they choose none."""
    chosen = choice(schema.model_fields[name])
    try:
        return chosen.of(values) if chosen else None
    except ValueError:
        return None


def paper_recipe(model: str, **sections: dict[str, Any]) -> Recipe:
    """A pre-training of a named encoder with the paper's settings; ``sections`` are set besides.

    Raises:
        RecipeError: there is no such encoder.
    """
    try:
        paper = encoders.settings(model).paper
    except RegistryError as error:
        raise RecipeError(str(error)) from None
    values: dict[str, Any] = {"model": {"name": model}}
    for name in {*paper, *sections}:
        values[name] = {**paper.get(name, {}), **sections.get(name, {})}
    return resolve(values, model, Recipe)


AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    schema: type[AnyRecipe] = Recipe,  # type: ignore[assignment]
) -> AnyRecipe:
    """Read a recipe file, apply ``key=value`` overrides, and check the whole.

    Raises:
        RecipeError: see :func:`mimscale.schema.load`.
    """
    return load(path, overrides, schema)


def stored_recipe(values: dict[str, Any], where: str, schema: type[AnyRecipe] = Recipe) -> AnyRecipe:  # type: ignore[assignment]
    """The recipe that a run was trained with, from what its folder or a checkpoint holds.

    Runs from before encoders and objectives had keys of their own hold those of all; what belongs to another is left out. Keys
    that have come since have the values that runs then had.

    Raises:
        RecipeError: it was changed into something that is no recipe of this kind, or a plug-in of its is not there.
    """
    schema.prepare(values)
    for path, value in schema.meant_then(values).items():
        name, leaf = path.split(".")
        values = {**values, name: {**values[name], leaf: value}}
    former = [path.split(".") for path in schema.former]
    for name in dict.fromkeys(section for section, _ in former):
        held = values.get(name)
        if isinstance(held, dict) and (section := chosen_section(schema, name, held)) is not None:
            others = {leaf for _, leaf in former if leaf not in section.model_fields}
            values = {**values, name: {leaf: value for leaf, value in held.items() if leaf not in others}}
    return resolve(values, where, schema)


def recipe_values(path: str | Path, files: Kind = RECIPES) -> dict[str, Any]:
    """The sections of a recipe of any kind, unchecked.

    Raises:
        RecipeError: it cannot be read.
    """
    return read_yaml(path, "recipe", RecipeError, files=files)
