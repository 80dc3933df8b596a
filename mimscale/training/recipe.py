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
from mimscale.schema import (
    ChosenBy,
    Document,
    Place,
    Positive,
    SchemaError,
    Section,
    Share,
    Word,
    choice,
    flatten,
    key,
    load,
    read_yaml,
    resolve,
)


class RecipeError(SchemaError):
    """A recipe or an override that cannot be used; the message names the key and what to write instead."""


# Keys that may differ between two starts of one run: they change what is written, never a loss.
FREE_KEYS = frozenset(
    {
        "data.shards",
        "data.workers",
        "data.cache",
        "data.cache_gib",
        "data.max_damaged",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.pinned_steps",
        "train.validate_every",
        "train.validate_batch",
        "train.log_every",
        "train.activation_checkpointing",
        "train.compile",
        "train.reconstructions",
        "train.branch_from",
        "train.save",
        "train.stop_margin",
        "train.hang_minutes",
        "train.spike_factor",
        "train.on_spike",
        "train.rollback_steps",
    }
)
# A branch shares its trunk's past, so besides those only the length (and with it the step down) may differ.
BRANCH_KEYS = frozenset({"train.iterations", "data.validation_images"})


class Data(Section):
    """Where the images come from and how they are cropped (paper, section 3.4).

    ``shuffle: window`` keeps reads to ``shuffle_window`` shards at a time, for network storage. ``cache`` and ``cache_gib``
    hold local copies of shards whose ``shards`` is an address. ``decoder: nvimgcodec`` decodes on the GPU's JPEG engine.
    """

    shards: Place | None = None
    fraction: Word = "100"
    image_size: Positive = 192
    crop_scale: tuple[float, float] = (0.67, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    decoder: Literal["libjpeg-turbo", "nvimgcodec"] = "libjpeg-turbo"
    shuffle: Literal["full", "window"] = "full"
    shuffle_window: Positive = 16
    cache: Place | None = None
    cache_gib: Annotated[float, Field(gt=0)] | None = None
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    max_damaged: Annotated[int, Field(ge=0)] = 100
    validation_images: Positive | None = None


class Optimizer(Section):
    """AdamW. The learning rate is ``lr`` at a global batch of ``lr_batch``, scaled linearly to the run's batch."""

    lr: Annotated[float, Field(gt=0)] = 1.0e-4
    lr_batch: Positive = 512
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    clip: Annotated[float, Field(ge=0)] = 5.0


class Schedule(Section):
    """Warm-up, then constant with steps down (``step``, the paper's), or a cosine or a line to ``final_lr_ratio``.

    Each step down, at the share ``decay_at`` of the run (several for several), multiplies the rate by ``decay_factor``.
    """

    kind: Literal["step", "cosine", "linear"] = "step"
    warmup: Annotated[int, Field(ge=0)] = 6250
    warmup_lr: Annotated[float, Field(ge=0)] = 5.0e-7
    decay_at: Share | tuple[Share, ...] = 0.875
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    final_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0


class Train(Section):
    """How long, how many images a step, and what is written when (in iterations).

    ``save: blocking`` writes checkpoints while training waits, and needs no copy of the state in host memory.
    ``stop_margin`` is how many seconds before its Slurm job's time limit a run saves and stops. ``hang_minutes`` without
    progress end a run. A loss that is not finite, or above ``spike_factor`` times the median of the last 100, stops the
    run, skips that update, or rolls back to a checkpoint at least ``rollback_steps`` before it and leaves the batches
    since out (``on_spike``).
    """

    iterations: Positive = 125_000
    global_batch: Positive = 2048
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    branch_from: Place | None = None
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2
    pinned_steps: tuple[Positive, ...] = ()
    validate_every: Positive = 5000
    validate_batch: Positive | None = None
    log_every: Positive = 1
    activation_checkpointing: bool | None = None
    compile: bool = False
    save: Literal["async", "blocking"] = "async"
    stop_margin: Annotated[float, Field(ge=0)] = 120
    hang_minutes: Annotated[float, Field(gt=0)] = 10
    spike_factor: Annotated[float, Field(gt=1)] | None = 4.0
    on_spike: Literal["stop", "skip", "rollback"] = "stop"
    rollback_steps: Positive = 100


class PretrainTrain(Train):
    """Also how many reconstructions a validation draws."""

    reconstructions: Annotated[int, Field(ge=0)] = 8


class RunRecipe(Document):
    """What the recipe of every task holds, whatever is trained."""

    error = RecipeError
    # Keys that may differ between two starts of one run: they change what is written, never a loss.
    free_keys: ClassVar[frozenset[str]] = FREE_KEYS
    # Keys of the data section without which there is nothing to train on, and what each is set to.
    data_places: ClassVar[dict[str, str]] = {"shards": "OUT, a folder made by mimscale shards build"}
    # What recipes had of every encoder and objective before each had keys of its own, with the defaults. Runs and studies from
    # then hold all of them.
    former: ClassVar[dict[str, Any]] = {}
    # Keys that have come since, which make no other recipe of one that leaves them at their default.
    added: ClassVar[dict[str, Any]] = {"plugins": []}

    plugins: tuple[str, ...] = key(
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
        values = flatten(self.model_dump(mode="json"))
        kept = {name: value for name, value in values.items() if name not in self.free_keys}
        kept = {name: value for name, value in kept.items() if name not in self.added or value != self.added[name]}
        return self.former | kept

    @property
    def learning_rate(self) -> float:
        """Peak learning rate at this run's global batch."""
        return self.optimizer.lr * self.train.global_batch / self.optimizer.lr_batch

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
    """A pre-training recipe. ``fidelity`` settles where the paper and its released code differ."""

    noun = "pre-training recipe"
    former = {f"model.{name}": value for name, value in {**ANY_ENCODER, "window_size": 12}.items()} | {
        "mim.decoder": "linear",
        "mim.target_window": 47,
        "mim.norm_pix": True,
        "mim.decoder_dim": 512,
        "mim.decoder_depth": 8,
        "mim.decoder_heads": 16,
    }
    added = RunRecipe.added | {"mim.mask_patch": 32, "mim.target": None}

    fidelity: Literal["paper", "released"] = "paper"
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

    Runs from before encoders and objectives had keys of their own hold those of all; what belongs to another is left out.

    Raises:
        RecipeError: it was changed into something that is no recipe of this kind, or a plug-in of its is not there.
    """
    schema.prepare(values)
    former = [path.split(".") for path in schema.former]
    for name in dict.fromkeys(section for section, _ in former):
        held = values.get(name)
        if isinstance(held, dict) and (section := chosen_section(schema, name, held)) is not None:
            others = {leaf for _, leaf in former if leaf not in section.model_fields}
            values = {**values, name: {leaf: value for leaf, value in held.items() if leaf not in others}}
    return resolve(values, where, schema)


def recipe_values(path: str | Path) -> dict[str, Any]:
    """The sections of a recipe file of any kind, unchecked.

    Raises:
        RecipeError: it cannot be read.
    """
    return read_yaml(Path(path), "recipe", RecipeError)
