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
from mimscale.schema import Document, KeysOf, Place, Positive, SchemaError, Section, Word, key, load, nearest
from mimscale.training.recipe import Recipe
from mimscale.transfer.recipe import task_schemas

Name = Annotated[Word, Field(pattern=r"^[A-Za-z0-9_.]+$")]
Names = tuple[Name, ...]
Decoder = Literal["linear", "4-blocks", "8-blocks"]
PretrainKeys = Annotated[dict[str, Any], KeysOf(lambda: [Recipe])]
FinetuneKeys = Annotated[dict[str, Any], KeysOf(task_schemas)]


class StudyError(SchemaError):
    """A study that cannot be used, or folders that do not belong to it; the message says what to change."""


class Dataset(Section):
    """What a model is pre-trained on."""

    shards: Name = key(..., "Which shards: a name of `shards`.", "Table 2")
    fraction: Word = key("100", "Which of their images: a stored fraction or a named subset.", "Table 2")
    sampling: Literal["uniform", "classes"] = key(
        "uniform",
        "Whether it holds some images of all classes, or all images of a few (IN100).",
        "section 3.3, Table 5",
    )
    images: Positive | None = key(
        None, "Images in it, for planning where the shards are not at hand; null for the shards' own count.", "Table 2"
    )
    classes: Positive | None = key(
        None, "Classes in it, for planning where the shards are not at hand; null for the shards' own count.", "Table 2"
    )


class Resources(Section):
    """What a run gets; what a model or a task leaves null is the study's."""

    deepspeed: str | None = key(None, "DeepSpeed configuration (JSON); null in the end for ds_configs/zero2.json.")
    nodes: Positive | None = key(None, "Nodes; null in the end for 1.")
    gpus: Annotated[int, Field(ge=0)] | None = key(None, "GPUs of each node, 0 for none; null in the end for 8.")
    time: str | None = key(
        None, "Slurm's limit for one start of a run, which is then resumed, H:MM:SS; null in the end for 24:00:00."
    )

    def over(self, others: Resources) -> Resources:
        """These, and ``others`` where these are open."""
        return others.model_copy(update=self.model_dump(exclude_none=True))


class Encoder(Section):
    """A model of the study: a pre-training recipe, with keys of it that differ here."""

    recipe: str = key(..., "Pre-training recipe (YAML).", "Table 1")
    overrides: PretrainKeys = key({}, "Keys of that recipe that differ here, each with its value.")
    resources: Resources = Resources()


class Grid(Section):
    """A product of pre-trainings."""

    models: Names = key(..., "Names of `models`.", "Table 1", min_length=1)
    datasets: Names = key(..., "Names of `datasets`.", "Table 2", min_length=1)
    lengths: tuple[Positive, ...] = key(
        ..., "Iterations; lengths that share their first steps share a trunk.", "section 3.4", min_length=1
    )
    decoders: tuple[Decoder, ...] | None = key(
        None, "SimMIM's prediction heads; null for each recipe's own.", "Table 4"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = key((0,), "Seeds.")
    overrides: PretrainKeys = key({}, "Keys of the recipes that differ here, each with its value.")


class Selection(Section):
    """Which pre-trainings: those that are in every list given."""

    models: Names | None = key(None, "Names of `models`; null for all.")
    datasets: Names | None = key(None, "Names of `datasets`; null for all.")
    lengths: tuple[Positive, ...] | None = key(None, "Iterations; null for all.")
    decoders: tuple[Decoder, ...] | None = key(None, "SimMIM's prediction heads; null for all.")
    seeds: tuple[int, ...] | None = key(None, "Seeds; null for all.")


class Finetuning(Section):
    """A task that is fine-tuned from every pre-training in ``of``; the encoder's size and the seed are that one's."""

    recipe: str = key(
        ..., "Fine-tuning recipe (YAML); {model} in it stands for the name of the pre-training's model.", "section 3.5"
    )
    shards: Name | None = key(None, "Which shards: a name of `shards`; null where the recipe names its data.")
    of: Selection = Selection()
    after: Name | None = key(
        None, "Another task, whose weights this one starts from; null for the pre-training's.", "ours"
    )
    overrides: FinetuneKeys = key({}, "Keys of that recipe that differ here, each with its value.")
    resources: Resources = Resources()


class Speed(Section):
    """What GPU-hours and costs are estimated with."""

    gpu: str = key("H100", "Which GPU's peak.")
    gpu_memory: Annotated[float, Field(gt=0)] = key(80, "Memory of a GPU, GB.")
    mfu: Annotated[float, Field(gt=0, le=1)] = key(0.4, "Share of the GPU's peak that training reaches.")
    price: Annotated[float, Field(ge=0)] | None = key(
        None, "Price of one GPU-hour, in any currency; null for no costs."
    )


class Local(Section):
    """How ``run`` uses this machine."""

    parallel: Positive = key(1, "Runs side by side.")
    ranks: Positive = key(1, "Ranks of each run.")
    retries: Annotated[int, Field(ge=0)] = key(2, "New tries of a run that failed.")


class Slurm(Section):
    """What the cluster wants to know of every job."""

    account: Word | None = key(None, "Account that jobs are charged to.")
    partition: Word | None = key(None, "Partition that jobs run in.")
    qos: Word | None = key(None, "Quality of service.")


class Study(Document):
    """A whole study. Recipes and configurations are files or names; relative paths count from the working directory."""

    noun = "study"
    kind = "study"
    files = STUDIES
    error = StudyError
    renamed: ClassVar[dict[str, str]] = {"stop_doomed": "stop_overfitting"}

    name: Word = key(..., "Title of the study.")
    output: Place = key(..., "Folder for its runs and its report.")
    shards: dict[Name, Place | None] = key(
        ..., "Shard folders or addresses by name; null for one that is given when the study is run."
    )
    datasets: dict[Name, Dataset]
    models: dict[Name, Encoder]
    pretrain: tuple[Grid, ...] = Field(min_length=1)
    finetune: dict[Name, Finetuning] = Field(default_factory=dict)
    resources: Resources = Resources()
    speed: Speed = Speed()
    local: Local = Local()
    slurm: Slurm = Slurm()
    stop_overfitting: bool = key(
        False, "Stop pre-trainings whose validation loss is predicted to rise until their end."
    )


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
    for place, names, kind, known in used:
        for name in names or ():
            if name not in known:
                near = nearest(name, known)
                hint = f"did you mean '{near}'?" if near else f"there are {', '.join(known)}"
                problems.append(f"{place} in {where}: unknown {kind} '{name}'; {hint}")
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
