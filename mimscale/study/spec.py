"""STUDY.yaml: which models, datasets, lengths and tasks a study is made of, as data.

A study lists ``datasets``, ``models`` and tasks (``finetune``) by name, and under ``pretrain`` one or more grids over those
names. Every grid is a product; the study is the union of its grids, and a cell that several grids hold is one cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mimscale.resources import STUDIES
from mimscale.schema import Document, Place, Positive, SchemaError, Section, Word, load, nearest

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]
Names = tuple[Name, ...]
Decoder = Literal["linear", "4-blocks", "8-blocks"]


class StudyError(SchemaError):
    """A study that cannot be used, or folders that do not belong to it; the message says what to change."""


class Dataset(Section):
    """What a model is pre-trained on: a fraction or class subset of the shards of that name (Table 2).

    ``sampling: classes`` says that it holds all images of a few classes (IN100). ``images`` and ``classes`` are for planning
    where the shards are not at hand; those of the shards count where they are.
    """

    shards: Name
    fraction: Word = "100"
    sampling: Literal["uniform", "classes"] = "uniform"
    images: Positive | None = None
    classes: Positive | None = None


class Resources(Section):
    """What a run gets. What a model or task leaves open is the study's; ``gpus`` is for each node, 0 for none.

    ``deepspeed`` is the DeepSpeed configuration, ``time`` Slurm's limit for one start of a run; a run that reaches it goes on.
    """

    deepspeed: str | None = None
    nodes: Positive | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    time: str | None = None

    def over(self, others: Resources) -> Resources:
        """These, and ``others`` where these are open."""
        return others.model_copy(update=self.model_dump(exclude_none=True))


class Encoder(Section):
    """A model of the study: a pre-training recipe, with keys of it that differ here."""

    recipe: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    resources: Resources = Resources()


class Grid(Section):
    """A product of pre-trainings. ``decoders: null`` leaves each recipe's own; ``lengths`` are iterations."""

    models: Names = Field(min_length=1)
    datasets: Names = Field(min_length=1)
    lengths: tuple[Positive, ...] = Field(min_length=1)
    decoders: tuple[Decoder, ...] | None = None
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    overrides: dict[str, Any] = Field(default_factory=dict)


class Selection(Section):
    """Which pre-trainings: those that are in every list given."""

    models: Names | None = None
    datasets: Names | None = None
    lengths: tuple[Positive, ...] | None = None
    decoders: tuple[Decoder, ...] | None = None
    seeds: tuple[int, ...] | None = None


class Finetuning(Section):
    """A task that is fine-tuned from every pre-training in ``of``.

    ``recipe`` may hold ``{model}``. ``after`` names another task: this one then starts from that one's weights in place of the
    pre-training's. The encoder's size and the seed are the pre-training's. ``shards`` is unset where the recipe names its data.
    """

    recipe: str
    shards: Name | None = None
    of: Selection = Selection()
    after: Name | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    resources: Resources = Resources()


class Speed(Section):
    """What GPU-hours are estimated with: ``mfu`` is the share of a ``gpu``'s peak, ``price`` that of one GPU-hour."""

    gpu: str = "H100"
    gpu_memory: Annotated[float, Field(gt=0)] = 80
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    price: Annotated[float, Field(ge=0)] | None = None


class Local(Section):
    """How ``run`` uses this machine: runs side by side, ranks of each, and new tries of one that failed."""

    parallel: Positive = 1
    ranks: Positive = 1
    retries: Annotated[int, Field(ge=0)] = 2


class Slurm(Section):
    """What the cluster wants to know of every job."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None


class Study(Document):
    """A whole study. Recipes and configurations are files or names; relative paths count from the working directory."""

    noun = "study"
    files = STUDIES
    error = StudyError
    renamed: ClassVar[dict[str, str]] = {"stop_doomed": "stop_overfitting"}

    name: str
    output: Place
    shards: dict[Name, Place | None]
    datasets: dict[Name, Dataset]
    models: dict[Name, Encoder]
    pretrain: tuple[Grid, ...] = Field(min_length=1)
    finetune: dict[Name, Finetuning] = Field(default_factory=dict)
    resources: Resources = Resources()
    speed: Speed = Speed()
    local: Local = Local()
    slurm: Slurm = Slurm()
    stop_overfitting: bool = False


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study, apply ``key=value`` overrides, and check that every name it uses is there.

    Raises:
        StudyError: the file cannot be read; an unknown key or name (the nearest is named); a value of the wrong kind; tasks
            that wait for each other.
    """
    study = load(path, overrides, Study)
    _check_names(study, str(path))
    _check_order(study, str(path))
    return study


def _check_names(study: Study, where: str) -> None:
    """Raise unless every name that is used is one that the study defines."""
    used: list[tuple[str, Sequence[str] | None, str, Sequence[str]]] = []
    for name, dataset in study.datasets.items():
        used.append((f"datasets.{name}.shards", [dataset.shards], "shards", list(study.shards)))
    for number, grid in enumerate(study.pretrain):
        used.append((f"pretrain.{number}.models", grid.models, "model", list(study.models)))
        used.append((f"pretrain.{number}.datasets", grid.datasets, "dataset", list(study.datasets)))
    for name, task in study.finetune.items():
        used.append((f"finetune.{name}.of.models", task.of.models, "model", list(study.models)))
        used.append((f"finetune.{name}.of.datasets", task.of.datasets, "dataset", list(study.datasets)))
        used.append((f"finetune.{name}.shards", [task.shards] if task.shards else None, "shards", list(study.shards)))
        used.append((f"finetune.{name}.after", [task.after] if task.after else None, "task", list(study.finetune)))
    problems = []
    for key, names, kind, known in used:
        for name in names or ():
            if name not in known:
                near = nearest(name, known)
                hint = f"did you mean '{near}'?" if near else f"there are {', '.join(known)}"
                problems.append(f"{key} in {where}: unknown {kind} '{name}'; {hint}")
    if problems:
        raise StudyError("\n".join(problems))


def _check_order(study: Study, where: str) -> None:
    """Raise where tasks start from each other in a circle."""
    for name in study.finetune:
        chain = [name]
        while (before := study.finetune[chain[-1]].after) is not None:
            chain.append(before)
            if before == name:
                raise StudyError(
                    f"finetune in {where}: {' after '.join(chain)}, which is a circle; none could be first"
                )
            if before in chain[:-1]:
                break  # a circle further on, which its own members report
