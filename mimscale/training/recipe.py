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

from mimscale.mim.masking import hidden_patches
from mimscale.schema import Document, Place, Positive, SchemaError, Section, Share, Word, load, read_yaml, resolve


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


class Model(Section):
    """The encoder (Table 1). ``None`` takes the named size's own value."""

    name: str
    window_size: Positive = 12
    pretrained_window_size: int | tuple[int, int, int, int] = 0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    embed_dim: Positive | None = None
    depths: tuple[Positive, ...] | None = None
    num_heads: tuple[Positive, ...] | Positive | None = None
    depth: Positive | None = None


class MIM(Section):
    """The objective (section 3.1, Table 4).

    ``loss: null`` is what the chosen fidelity uses (paper l2, released l1), ``mask_ratio: null`` what the objective uses
    (SimMIM 0.6, MAE 0.75).
    """

    objective: Literal["simmim", "mae"] = "simmim"
    loss: Literal["l1", "l2"] | None = None
    decoder: Literal["linear", "4-blocks", "8-blocks"] = "linear"
    target_window: Positive | None = 47
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    norm_pix: bool = True
    decoder_dim: Positive = 512
    decoder_depth: Positive = 8
    decoder_heads: Positive = 16


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

    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()

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
        for key, kind in self.data_places.items():
            if getattr(data, key) is None:
                raise RecipeError(f"data.{key} is not set: give data.{key}={kind}")

    def to_yaml(self) -> str:
        """The resolved recipe, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


class Recipe(RunRecipe):
    """A pre-training recipe. ``fidelity`` settles where the paper and its released code differ."""

    noun = "pre-training recipe"

    fidelity: Literal["paper", "released"] = "paper"
    data: Data = Data()
    model: Model
    mim: MIM = MIM()
    train: PretrainTrain = PretrainTrain()

    @model_validator(mode="before")
    @classmethod
    def _settle_the_objective(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("mim") or {}, dict):
            mim = dict(values.get("mim") or {})
            simmim = mim.get("objective", "simmim") == "simmim"
            if mim.get("loss") is None:
                mim["loss"] = "l1" if simmim and values.get("fidelity") == "released" else "l2"
            if mim.get("mask_ratio") is None:
                mim["mask_ratio"] = 0.6 if simmim else 0.75
            values = {**values, "mim": mim}
        return values

    @property
    def mask_patch(self) -> int:
        """Side in pixels of the squares that are hidden or shown: 32 for SimMIM, the encoder's patch for MAE."""
        if self.mim.objective == "simmim":
            return 32
        return 14 if self.model.name == "vit_h" else 16

    @property
    def mask_grid(self) -> int:
        """Side of the mask, in mask patches."""
        return self.data.image_size // self.mask_patch

    @property
    def hidden(self) -> int:
        """Mask patches hidden in each image: ceil(ratio * L) for SimMIM, L - int(L * (1 - ratio)) for MAE."""
        return hidden_patches(self.mim.objective, self.mask_grid**2, self.mim.mask_ratio)

    @model_validator(mode="after")
    def _mask_patches_fit(self) -> Recipe:
        size, patch = self.data.image_size, self.mask_patch
        if size % patch:
            raise PydanticCustomError(
                "image_size",
                "data.image_size={size} is not a multiple of the {patch}-pixel mask patch of {name}; {fits} would fit",
                {"size": size, "patch": patch, "name": self.model.name, "fits": size // patch * patch or patch},
            )
        return self


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

    Raises:
        RecipeError: it was changed into something that is no recipe of this kind.
    """
    return resolve(values, where, schema)


def recipe_values(path: str | Path) -> dict[str, Any]:
    """The sections of a recipe file of any kind, unchecked.

    Raises:
        RecipeError: it cannot be read.
    """
    return read_yaml(Path(path), "recipe", RecipeError)
