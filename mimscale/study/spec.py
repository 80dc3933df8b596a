"""STUDY.yaml: which models, datasets, lengths and tasks a study is made of, as data.

A study lists ``datasets``, ``models`` and tasks (``finetune``) by name, and under ``pretrain`` one or more grids over those
names. Every grid is a product; the study is the union of its grids, and a cell that several grids hold is one cell.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from mimscale.resources import STUDIES
from mimscale.schema import (
    LISTED,
    AmountOrZero,
    Count,
    Document,
    KeysOf,
    Place,
    Positive,
    Processes,
    SchemaError,
    Section,
    Share,
    Word,
    key,
    load,
    nearest,
    some,
)
from mimscale.training.launch.job_file import NAME, TIME, Rule
from mimscale.training.recipe import Recipe
from mimscale.transfer.recipe import task_schemas
from mimscale.wording import counted, printable

Name = Annotated[Word, Field(pattern=r"^[A-Za-z0-9_.]{1,64}$")]
# What a study may list of anything, and what it may consist of.
MANY, JOBS = 1000, 5000
Listed = Field(min_length=1, max_length=MANY)
Named = Field(max_length=MANY)
Names = Annotated[tuple[Name, ...], Listed]
Lengths = Annotated[tuple[Positive, ...], Listed]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Listed]
Decoder = Literal["linear", "4-blocks", "8-blocks"]
PretrainKeys = Annotated[dict[str, Any], Named, KeysOf(lambda: [Recipe])]
FinetuneKeys = Annotated[dict[str, Any], Named, KeysOf(task_schemas)]


def _of_slurm(rule: Rule) -> AfterValidator:
    def check(text: str) -> str:
        if (fault := rule.fault(text)) is not None:
            raise PydanticCustomError("slurm", "{fault}", {"fault": fault})
        return text

    return AfterValidator(check)


def _a_folder(text: str) -> str:
    if "\0" in text or not text:
        raise PydanticCustomError("folder", "is no folder's name")
    return text


TimeLimit = Annotated[str, _of_slurm(TIME)]
SlurmName = Annotated[Word, _of_slurm(NAME)]


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
    nodes: Annotated[int, Field(gt=0, le=65_536)] | None = key(None, "Nodes; null in the end for 1.")
    gpus: Annotated[int, Field(ge=0, le=1024)] | None = key(
        None, "GPUs of each node, 0 for none; null in the end for 8."
    )
    time: TimeLimit | None = key(
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

    models: Names = key(..., "Names of `models`.", "Table 1")
    datasets: Names = key(..., "Names of `datasets`.", "Table 2")
    lengths: Lengths = key(..., "Iterations; lengths that share their first steps share a trunk.", "section 3.4")
    decoders: Annotated[tuple[Decoder, ...], Listed] | None = key(
        None, "SimMIM's prediction heads; null for each recipe's own.", "Table 4"
    )
    seeds: Seeds = key((0,), "Seeds.")
    overrides: PretrainKeys = key({}, "Keys of the recipes that differ here, each with its value.")


class Selection(Section):
    """Which pre-trainings: those that are in every list given."""

    models: Names | None = key(None, "Names of `models`; null for all.")
    datasets: Names | None = key(None, "Names of `datasets`; null for all.")
    lengths: Lengths | None = key(None, "Iterations; null for all.")
    decoders: Annotated[tuple[Decoder, ...], Listed] | None = key(None, "SimMIM's prediction heads; null for all.")
    seeds: Seeds | None = key(None, "Seeds; null for all.")


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
    gpu_memory: Annotated[float, Field(gt=0, le=1_000_000)] = key(80, "Memory of a GPU, GB.")
    mfu: Share = key(0.4, "Share of the GPU's peak that training reaches.")
    price: AmountOrZero | None = key(None, "Price of one GPU-hour, in any currency; null for no costs.")


class Local(Section):
    """How ``run`` uses this machine."""

    parallel: Processes = key(1, "Runs side by side.")
    ranks: Processes = key(1, "Ranks of each run.")
    retries: Count = key(2, "New tries of a run that failed.")


class Slurm(Section):
    """What the cluster wants to know of every job."""

    account: SlurmName | None = key(None, "Account that jobs are charged to.")
    partition: SlurmName | None = key(None, "Partition that jobs run in.")
    qos: SlurmName | None = key(None, "Quality of service.")


class Study(Document):
    """A whole study. Recipes and configurations are files or names; relative paths count from the working directory."""

    noun = "study"
    kind = "study"
    files = STUDIES
    error = StudyError
    renamed: ClassVar[dict[str, str]] = {"stop_doomed": "stop_overfitting"}

    name: Word = key(..., "Title of the study.")
    output: Annotated[Place, AfterValidator(_a_folder)] = key(..., "Folder for its runs and its report.")
    shards: Annotated[dict[Name, Place | None], Named] = key(
        ..., "Shard folders or addresses by name; null for one that is given when the study is run."
    )
    datasets: Annotated[dict[Name, Dataset], Named]
    models: Annotated[dict[Name, Encoder], Named]
    pretrain: Annotated[tuple[Grid, ...], Listed]
    finetune: Annotated[dict[Name, Finetuning], Named] = Field(default_factory=dict)
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
    study, where = load(path, overrides, Study), printable(path)
    _check_names(study, where)
    _check_order(study, where)
    _check_extent(study, where)
    return study


def _check_names(study: Study, where: str) -> None:
    """Raise unless every name that is used is one that the study defines."""
    used: list[tuple[str, Sequence[str] | None, str, Collection[str]]] = []
    for name, dataset in study.datasets.items():
        used.append((f"datasets.{name}.shards", [dataset.shards], "shards", study.shards))
    for number, grid in enumerate(study.pretrain):
        used.append((f"pretrain.{number}.models", grid.models, "model", study.models))
        used.append((f"pretrain.{number}.datasets", grid.datasets, "dataset", study.datasets))
    for name, task in study.finetune.items():
        used.append((f"finetune.{name}.of.models", task.of.models, "model", study.models))
        used.append((f"finetune.{name}.of.datasets", task.of.datasets, "dataset", study.datasets))
        used.append((f"finetune.{name}.shards", [task.shards] if task.shards else None, "shards", study.shards))
        used.append((f"finetune.{name}.after", [task.after] if task.after else None, "task", study.finetune))
    unknown = [
        (place, name, kind, known)
        for place, names, kind, known in used
        for name in dict.fromkeys(names or ())
        if name not in known
    ]
    problems = []
    for place, name, kind, known in unknown[:LISTED]:
        near = nearest(name, list(known))
        hint = f"did you mean '{near}'?" if near else f"there are {some(list(known))}"
        problems.append(f"{place} in {where}: unknown {kind} '{name}'; {hint}")
    if len(unknown) > LISTED:
        problems.append(f"and {len(unknown) - LISTED} problems more")
    if problems:
        raise StudyError("\n".join(problems))


def _check_order(study: Study, where: str) -> None:
    """Raise where tasks start from each other in a circle."""
    ordered: set[str] = set()  # those that begin with one that comes after none
    for name in study.finetune:
        chain: dict[str, None] = {name: None}
        before = study.finetune[name].after
        while before is not None and before not in ordered:
            if before in chain:
                circle = [*list(chain)[list(chain).index(before) :], before]
                raise StudyError(
                    f"finetune in {where}: {printable(' after '.join(circle), 1000)}, which is a circle; none could be first"
                )
            chain[before] = None
            before = study.finetune[before].after
        ordered.update(chain)


def _check_extent(study: Study, where: str) -> None:
    """Raise where a study has more jobs than anybody waits for: its product is counted before it is made."""
    grids = [
        len(grid.models) * len(grid.datasets) * len(grid.decoders or (None,)) * len(grid.seeds) * len(set(grid.lengths))
        for grid in study.pretrain
    ]
    count = sum(grids)
    if count > JOBS:
        raise StudyError(
            f"pretrain in {where} makes {counted(count, 'pre-training')}, more than {JOBS:,}; split it into several studies"
        )
