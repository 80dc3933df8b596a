"""Recipes: everything that defines a run, as data.

A recipe is a YAML file, checked against the schema below and resolved with ``key=value`` overrides.
What the hardware needs (ZeRO stage, precision, micro-batch) is not here: it belongs to the DeepSpeed configuration.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from mimscale.mim.masking import hidden_patches
from mimscale.resources import RECIPES, Kind


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message names the key and what to write instead."""


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[str, BeforeValidator(lambda value: value if isinstance(value, bool) else str(value))]


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


class Section(BaseModel):
    """One block of a recipe: unknown keys are errors, values never change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)


class Data(Section):
    """Where the images come from and how they are cropped (paper, section 3.4).

    ``shuffle: window`` keeps reads to ``shuffle_window`` shards at a time, for network storage. ``cache`` and ``cache_gib``
    hold local copies of shards whose ``shards`` is an address. ``decoder: nvimgcodec`` decodes on the GPU's JPEG engine.
    """

    shards: str | None = None
    fraction: Fraction = "100"
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
    cache: str | None = None
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
    branch_from: str | None = None
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


class RunRecipe(Section):
    """What the recipe of every task holds, whatever is trained."""

    # Keys that may differ between two starts of one run: they change what is written, never a loss.
    free_keys: ClassVar[frozenset[str]] = FREE_KEYS
    files: ClassVar[Kind] = RECIPES  # which of those that come with mimscale it may be
    # Keys of the data section without which there is nothing to train on, and what each is set to.
    data_places: ClassVar[dict[str, str]] = {"shards": "OUT, a folder made by shards/build.py"}

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


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, sections included."""
    keys = []
    for attribute, field in section.model_fields.items():
        name = field.alias or attribute  # a key such as `from` cannot be an attribute
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def nearest_key(key: str, schema: type[BaseModel] = Recipe) -> str | None:
    """The key that ``key`` was most likely meant to be: the same last part elsewhere, else the closest spelling."""
    keys = known_keys(schema)
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return max(same_leaf, key=lambda k: difflib.SequenceMatcher(None, k, key).ratio())
    whole = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if whole:
        return whole[0]
    leaves = difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1] for k in keys], n=1, cutoff=0.6)
    return next((k for k in keys if leaves and k.rsplit(".", 1)[-1] == leaves[0]), None)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; here that is an error."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: str | Path, kind: Kind = RECIPES) -> dict:
    """The top-level mapping of a YAML file, or of one that comes with mimscale and is given by its name.

    Raises:
        RecipeError: the file is not there, is no YAML, or holds something else than a mapping.
    """
    try:
        # Built on SafeLoader: plain values only, no objects.
        values = yaml.load(kind.find(path).read_text(), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise RecipeError(kind.missing(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold sections such as 'model:' and 'train:', not {type(values).__name__}")
    return values


def apply_override(values: dict, override: str, schema: type[BaseModel] = Recipe) -> None:
    """Set one ``section.key=value`` in nested ``values``; the value is read as YAML.

    Raises:
        RecipeError: no '=' in it, or the key is not in the schema (the message names the nearest one).
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"'{override}' is not key=value, for example train.iterations=1000")
    if key not in known_keys(schema):
        raise RecipeError(_unknown(key, "the command line", schema))
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader) if text else None
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of {key} is not valid: {' '.join(str(error).split())}") from None
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"'{section}' must be a section with keys such as {key}")
    values[leaf] = value


def _unknown(key: str, where: str, schema: type[BaseModel]) -> str:
    near = nearest_key(key, schema)
    return f"unknown key '{key}' in {where}" + (f"; did you mean '{near}'?" if near else "; the README lists the keys")


def resolve(values: dict, where: str, schema: type[AnyRecipe] = Recipe) -> AnyRecipe:  # type: ignore[assignment]
    """Check nested ``values`` against the schema.

    Args:
        values: sections and their keys.
        where: what to call the source in errors, for example the file's name.
        schema: the kind of recipe.

    Raises:
        RecipeError: an unknown or misplaced key, or a value of the wrong kind; all problems are listed.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            # A union's branches appear in the location as class names; only the recipe's own keys are shown.
            parts = [str(part) for part in item["loc"]]
            key = ".".join(parts[: 2 if parts and parts[0] in schema.model_fields and len(parts) > 1 else 1])
            if item["type"] == "extra_forbidden":
                problems.append(_unknown(".".join(parts), where, schema))
            elif item["type"] == "missing":
                problems.append(f"{where} lacks '{key}'")
            elif not parts:
                problems.append(item["msg"])  # about several keys together; it names them
            else:
                problems.append(f"{key} in {where}: {item['msg']}, not {item['input']!r}")
        raise RecipeError("\n".join(dict.fromkeys(problems))) from None


def load_recipe(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    schema: type[AnyRecipe] = Recipe,  # type: ignore[assignment]
) -> AnyRecipe:
    """Read a recipe file, apply ``key=value`` overrides, and check the whole.

    Raises:
        RecipeError: see :func:`read_yaml`, :func:`apply_override` and :func:`resolve`.
    """
    values = read_yaml(path, schema.files)
    for override in overrides:
        apply_override(values, override, schema)
    return resolve(values, str(path), schema)


def differences(a: RunRecipe, b: RunRecipe, free: frozenset[str]) -> list[str]:
    """Keys outside ``free`` whose values differ, each as ``key: value in a, value in b``."""
    flat_a, flat_b = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    keys = [key for key in flat_a if key not in free and flat_a[key] != flat_b.get(key)]
    return [f"{key}: {flat_a[key]} against {flat_b.get(key)}" for key in keys]


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
