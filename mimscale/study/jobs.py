"""The grid as a graph of jobs: which run starts when which other has got how far, and from what.

Lengths that differ only in where the learning rate steps down share a trunk (Section 3.4). The shortest runs from the start;
each longer one leaves the one before it where that one's rate steps down. 125K, 250K and 500K so take 546,875 iterations in
place of 875,000, and every one of them equals the run that started from nothing, to the last digit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mimscale.schema import read_yaml, settle
from mimscale.study.spec import JOBS, Encoder, Finetuning, Grid, Resources, Selection, Study, StudyError
from mimscale.training.recipe import Recipe, RecipeError, RunRecipe
from mimscale.training.run_folder import step_name
from mimscale.training.schedule import decay_step
from mimscale.transfer.recipe import recipe_schema
from mimscale.wording import counted

DEFAULTS = Resources(deepspeed="ds_configs/zero2.json", nodes=1, gpus=8, time="24:00:00")
# A start that lies elsewhere, or another name of the same shards, makes no other run.
PLACES = frozenset({"finetune.from"})
# Of a job's name: files are called by it, with endings.
LONGEST = 180


@dataclass(frozen=True)
class Branch:
    """Where a run starts: the job that leads there, and the step of it (``None``: its end)."""

    job: str
    step: int | None = None


@dataclass(frozen=True)
class Job:
    """One run of the study: a pre-training of one length, or a fine-tuning.

    Attributes:
        id: the cell's name, and that of its run folder.
        launcher: which of the launchers does it.
        recipe: the resolved recipe, without shards and starting point.
        recipe_file: what it was resolved from.
        overrides: keys that differ from the file's, for the launcher.
        dataset: of the pre-training.
        shards: what the run reads, by the study's name; ``None`` where the recipe names it.
        model: the study's name of the encoder.
        length: iterations of the pre-training.
        start: where it starts from; ``None`` for nothing.
        pinned: steps whose checkpoints others start from.
        resources: what it gets.
        task: of a fine-tuning.
    """

    id: str
    launcher: Literal["pretrain", "finetune"]
    recipe: RunRecipe = field(repr=False, compare=False)
    recipe_file: str
    overrides: tuple[str, ...]
    dataset: str
    shards: str | None
    model: str
    length: int
    seed: int
    resources: Resources
    start: Branch | None = None
    pinned: tuple[int, ...] = ()
    task: str | None = None

    @property
    def first(self) -> int:
        """The step it starts at."""
        return self.start.step or 0 if self.start and self.launcher == "pretrain" else 0

    @property
    def steps(self) -> int:
        """Updates that this job itself computes."""
        return self.recipe.train.iterations - self.first

    @property
    def digest(self) -> str:
        """Of all that decides a loss; see :func:`recipe_digest`."""
        return recipe_digest(self.recipe)

    def run(self, output: Path) -> Path:
        """Its run folder, in a study's output."""
        return output / "runs" / self.id

    def checkpoint(self, output: Path, step: int) -> Path:
        """Where its checkpoint of a step lies."""
        return self.run(output) / "checkpoints" / step_name(step)

    def arguments(self, study: Study) -> list[str]:
        """What its launcher is given after ``--deepspeed_config``, ``--recipe`` and ``--output``: key=value."""
        output = Path(study.output)
        found = list(self.overrides)
        if self.shards is not None:
            found.append(f"data.shards={study.shards[self.shards]}")
        if self.pinned:
            found.append(f"train.pinned_steps={list(self.pinned)}")
        if self.start is not None:
            source = str((output / "runs" / self.start.job).resolve())
            key = "train.branch_from" if self.launcher == "pretrain" else "finetune.from"
            found.append(f"{key}={source}" + (f"@{self.start.step}" if self.start.step else ""))
        return found


def recipe_digest(recipe: RunRecipe) -> str:
    """Of every key that can change a loss. Where shards lie and what is written when leaves it as it is."""
    kept = {key: value for key, value in recipe.deciding().items() if key not in PLACES}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def build_graph(study: Study) -> dict[str, Job]:
    """All jobs of a study by id, each after those it starts from.

    Raises:
        StudyError: recipes that cannot be used; cells that two grids describe differently; a task that nothing is
            fine-tuned for.
    """
    jobs: dict[str, Job] = {}
    for number, grid in enumerate(study.pretrain):
        for job in _pretrainings(study, grid, f"pretrain.{number}"):
            other = jobs.setdefault(job.id, job)
            if other.digest != job.digest:
                raise StudyError(f"pretrain.{number} describes {job.id} differently than a grid before it; rename one")
    jobs = _share_trunks(jobs)
    tuned: dict[str, Job] = {}
    for name in _in_order(study.finetune):
        task, before = study.finetune[name], study.finetune[name].after
        held = [job for job in jobs.values() if _selected(job, task.of)]
        if not held:
            raise StudyError(f"finetune.{name}.of selects no pre-training of the study")
        for job in held:
            start = f"{job.id}-{before}" if before else job.id
            if start not in jobs and start not in tuned:
                raise StudyError(f"finetune.{name} comes after {before}, which is not done from {job.id}")
            if len(jobs) + len(tuned) >= JOBS:
                raise StudyError(f"the study makes more than {counted(JOBS, 'job')}; split it into several studies")
            made = _finetuning(study, name, task, job, start)
            tuned[made.id] = made
    found = jobs | tuned
    if (long := max(found, key=len)) and len(long) > LONGEST:
        raise StudyError(f"{long} is too long for the name of a job and its folder; choose shorter names")
    return found


def _pretrainings(study: Study, grid: Grid, where: str) -> Iterable[Job]:
    for model in grid.models:
        encoder = study.models[model]
        for dataset in grid.datasets:
            for decoder in grid.decoders or (None,):
                for seed in grid.seeds:
                    for length in sorted(set(grid.lengths)):
                        yield _pretraining(study, encoder, model, dataset, decoder, seed, length, grid, where)


def _pretraining(
    study: Study,
    encoder: Encoder,
    model: str,
    dataset: str,
    decoder: str | None,
    seed: int,
    length: int,
    grid: Grid,
    where: str,
) -> Job:
    found = study.datasets[dataset]
    set_here: dict[str, Any] = {"data.fraction": found.fraction, "train.iterations": length, "train.seed": seed}
    if decoder is not None:
        set_here["mim.decoder"] = decoder
    overrides = _overrides({**encoder.overrides, **grid.overrides, **set_here})
    try:
        recipe = _read(encoder.recipe, overrides, Recipe)
    except RecipeError as error:
        raise StudyError(f"models.{model} in {where}: {error}") from None
    assert isinstance(recipe, Recipe)
    decoder = decoder_of(recipe)
    heavier = "" if decoder == "linear" else f"-{decoder}"
    return Job(
        id=f"{model}-{dataset}-{length}{heavier}" + (f"-seed{seed}" if seed else ""),
        launcher="pretrain",
        recipe=recipe,
        recipe_file=encoder.recipe,
        overrides=overrides,
        dataset=dataset,
        shards=found.shards,
        model=model,
        length=length,
        seed=seed,
        resources=encoder.resources.over(study.resources.over(DEFAULTS)),
    )


def decoder_of(recipe: Recipe) -> str:
    """SimMIM's decoder (Table 4); other objectives, which have one only, count as "linear"."""
    return getattr(recipe.mim, "decoder", "linear")


def _share_trunks(jobs: dict[str, Job]) -> dict[str, Job]:
    """Have each longer run of a cell leave the shorter one before it, where their learning rates part."""
    chains: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs.values():
        chains.setdefault(_chain(job), []).append(job)
    changed: dict[str, Job] = {}
    for chain in chains.values():
        chain.sort(key=lambda job: job.length)
        for shorter, longer in itertools.pairwise(chain):
            step = _parting(shorter.recipe)
            if step is None:
                continue
            before = changed.get(shorter.id, shorter)
            changed[shorter.id] = replace(before, pinned=(*before.pinned, step))
            changed[longer.id] = replace(changed.get(longer.id, longer), start=Branch(shorter.id, step))
    return _starts_first({name: changed.get(name, job) for name, job in jobs.items()})


def _starts_first(jobs: dict[str, Job]) -> dict[str, Job]:
    """Each job behind the one it starts from, which a later grid may have described; else as they are."""
    placed: dict[str, Job] = {}
    for job in jobs.values():
        chain = [job]
        while (start := chain[-1].start) is not None and start.job not in placed:
            chain.append(jobs[start.job])
        placed |= {one.id: one for one in reversed(chain)}
    return placed


def _chain(job: Job) -> tuple[object, ...]:
    """What the runs of one trunk have in common: all but the length."""
    train = job.recipe.train.model_copy(update={"iterations": 1})
    return (job.model, job.dataset, recipe_digest(job.recipe.model_copy(update={"train": train})))


def _parting(shorter: RunRecipe) -> int | None:
    """The last step that a run shares with the longer ones of its chain; ``None`` where rates differ from the start.

    With ``kind: step`` no rate before the first step down depends on the length, and all else of a chain is the same.
    """
    if shorter.schedule.kind != "step":
        return None
    return decay_step(shorter.schedule, shorter.train.iterations) or None


def _finetuning(study: Study, name: str, task: Finetuning, job: Job, start: str) -> Job:
    assert isinstance(job.recipe, Recipe)
    model = job.recipe.model
    trained = model.model_dump(include={"name", *model.shape_keys})
    sizes = {f"model.{key}": value for key, value in trained.items() if value is not None}
    file = task.recipe.replace("{model}", job.model)
    plugins = {"plugins": list(job.recipe.plugins)} if job.recipe.plugins else {}
    overrides = _overrides({**plugins, **sizes, "train.seed": job.seed, **task.overrides})
    try:
        recipe = _read(file, overrides, None)
    except RecipeError as error:
        raise StudyError(f"finetune.{name} of {job.model}: {error}") from None
    return Job(
        id=f"{job.id}-{name}",
        launcher="finetune",
        recipe=recipe,
        recipe_file=file,
        overrides=overrides,
        dataset=job.dataset,
        shards=task.shards,
        model=job.model,
        length=job.length,
        seed=job.seed,
        resources=task.resources.over(study.models[job.model].resources.over(study.resources.over(DEFAULTS))),
        start=Branch(start),
        task=name,
    )


@lru_cache(maxsize=4096)
def _read(file: str, overrides: tuple[str, ...], schema: type[RunRecipe] | None) -> RunRecipe:
    kind: type[RunRecipe] = schema or recipe_schema(file, overrides)
    return settle(json.loads(_text(file, kind)), file, overrides, kind, "the study's overrides")


@lru_cache(maxsize=256)
def _text(file: str, kind: type[RunRecipe]) -> str:
    return json.dumps(read_yaml(file, kind.noun, kind.error, kind, kind.files))


def _overrides(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


def _selected(job: Job, of: Selection) -> bool:
    assert isinstance(job.recipe, Recipe)
    wanted = (
        (of.models, job.model),
        (of.datasets, job.dataset),
        (of.lengths, job.length),
        (of.decoders, decoder_of(job.recipe)),
        (of.seeds, job.seed),
    )
    return all(names is None or name in names for names, name in wanted)


def _in_order(tasks: dict[str, Finetuning]) -> list[str]:
    """Tasks, each behind the one it comes after; ``load_study`` has seen that there is no circle."""
    place: dict[str | None, int] = {None: 0}  # how many a task comes after
    for name in tasks:
        chain: list[str | None] = [name]
        while chain[-1] not in place:
            chain.append(tasks[chain[-1] or ""].after)
        for before, after in itertools.pairwise(reversed(chain)):
            place[after] = place[before] + 1
    return sorted(tasks, key=lambda name: place[name])


def trained_alone(jobs: Iterable[Job]) -> int:
    """Pre-training iterations that the same runs would take if none shared a trunk."""
    return sum(job.length for job in jobs if job.launcher == "pretrain")


def descendants(jobs: dict[str, Job], name: str) -> list[str]:
    """All jobs that start, directly or not, from ``name``."""
    found = [name]
    for other, job in jobs.items():  # each stands behind what it starts from
        if job.start and job.start.job in found:
            found.append(other)
    return found[1:]
