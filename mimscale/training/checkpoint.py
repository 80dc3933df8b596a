"""Checkpoints: the whole training state in plain fp32 safetensors, whole or absent, and independent of how it was trained.

A checkpoint is a folder ``step_XXXXXXXX`` with a ``checkpoint.json`` (step, data position, resolved recipe, versions, size and
SHA-256 of every file, and its own) and the tensors, split over the ranks that wrote them. Each parameter and each of Adam's
moments is stored whole, so any number of ranks at any ZeRO stage and precision can resume from it. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mimscale.files import UnfitFile, open_regular, read_json, sync, write_text
from mimscale.training.errors import CheckpointError
from mimscale.training.optimizer import AVERAGE
from mimscale.training.ranks import gather
from mimscale.training.run_folder import MANIFEST, MOST_STEPS, saved_steps, step_name, step_of
from mimscale.wording import printable

FORMAT = 2
# Tensors are flushed to a file of about this size, which bounds the host memory that a save needs.
FILE_BYTES = 1 << 30
# Of a tensor; far beyond any model's, and within what torch can count.
MOST_DIMENSIONS, MOST_NUMBERS = 16, 2**48


def owners(shapes: dict[str, tuple[int, ...]], world_size: int) -> dict[str, int]:
    """Which rank writes which parameter: the largest first, each to the rank with the least so far."""
    load = [0] * world_size
    owner = {}
    for name in sorted(shapes, key=lambda n: (-math.prod(shapes[n]), n)):
        rank = min(range(world_size), key=lambda r: (load[r], r))
        owner[name] = rank
        load[rank] += math.prod(shapes[name])
    return owner


@dataclass
class Checkpoint:
    """An open checkpoint, read lazily."""

    path: Path
    manifest: dict[str, Any]
    _files: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the manifest; :meth:`damage` looks at the rest.

        Raises:
            CheckpointError: no manifest, an unreadable one, one of another format, or one of another step than its folder.
        """
        where = printable(path)
        try:
            manifest = read_json(path / MANIFEST)
            if not isinstance(manifest, dict):
                raise ValueError("it is no mapping")
            version = manifest["format"]
            if version == FORMAT and type(version) is int:
                if manifest.pop("sha256") != _digest(manifest):
                    raise ValueError("its own SHA-256 does not hold")
                _check_types(manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{where} has no {MANIFEST}: it is not a whole checkpoint") from None
        except UnfitFile as problem:
            raise CheckpointError(f"{problem}: the checkpoint is damaged") from None
        except OSError as problem:
            raise CheckpointError(f"{where}/{MANIFEST} cannot be read ({problem.strerror})") from None
        except KeyError as missing:
            raise CheckpointError(f"{where}/{MANIFEST} is damaged (it has no {missing.args[0]})") from None
        except (ValueError, RecursionError) as problem:
            raise CheckpointError(f"{where}/{MANIFEST} is damaged ({problem})") from None
        if version != FORMAT or type(version) is not int:
            raise CheckpointError(
                f"{where} has format {printable(version, 40)}; this mimscale reads format {FORMAT}: "
                f"resume it with the version that wrote it"
            )
        if step_of(path.name) not in (None, manifest["step"]):
            raise CheckpointError(
                f"{where} is a checkpoint of step {manifest['step']}, which its name contradicts: rename it"
            )
        return cls(path, manifest)

    @property
    def step(self) -> int:
        """Updates behind this state."""
        return self.manifest["step"]

    def damage(self, file: str) -> str | None:
        """What is wrong with one of the files, or ``None`` when its size and SHA-256 are as recorded."""
        entry = self.manifest["files"][file]
        path = self.path / file
        try:
            with os.fdopen(open_regular(path), "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != entry["bytes"]:
                    return f"{printable(path)} has {size} bytes instead of {entry['bytes']}"
                if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
                    return f"{printable(path)} has changed since it was written (SHA-256 differs)"
        except UnfitFile as problem:
            return str(problem)
        except OSError as problem:
            return f"{printable(path)} cannot be read ({problem.strerror})"
        return None

    def problems(self) -> list[str]:
        """What is wrong with it, by every file's size and SHA-256; empty where it is whole."""
        return [problem for file in self.manifest["files"] if (problem := self.damage(file))]

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole, fp32, on the CPU: a parameter's name, alone or after ``exp_avg/``, ``exp_avg_sq/``, ``average/``.

        Raises:
            CheckpointError: it is not there, cannot be read, or is not what the manifest says.
        """
        for file in self._locate(name):
            try:
                if file not in self._files:
                    os.close(open_regular(self.path / file))
                    self._files[file] = safe_open(self.path / file, framework="pt")
                tensor = self._files[file].get_tensor(name)
            except (OSError, SafetensorError) as problem:
                raise CheckpointError(
                    f"{printable(self.path / file)} does not give the tensor {printable(name, 100)} ({printable(problem)})"
                ) from None
            shape = self.manifest["shapes"].get(name.rpartition("/")[2])
            if shape != list(tensor.shape) or tensor.dtype != torch.float32:
                raise CheckpointError(
                    f"{printable(self.path / file)}: {printable(name, 100)} is {str(tensor.dtype).removeprefix('torch.')} "
                    f"of shape {tuple(tensor.shape)}, and not as {MANIFEST} says float32 of shape {printable(shape, 60)}"
                )
            return tensor
        raise CheckpointError(f"{printable(self.path)} holds no tensor {printable(name, 100)}")

    def trained(self, name: str) -> Tensor:
        """A parameter as it is to be used: its moving average where one was kept."""
        average = f"{AVERAGE}/{name}"
        return self.tensor(average if any(self._locate(average)) else name)

    def _locate(self, name: str) -> Iterator[str]:
        return (file for file, entry in self.manifest["files"].items() if name in entry["tensors"])

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compare with a model's parameters.

        Raises:
            CheckpointError: it is a checkpoint of another model; up to five differences are listed.
        """
        saved = {name: tuple(shape) for name, shape in self.manifest["shapes"].items()}
        problems = [f"lacks {name}" for name in shapes if name not in saved]
        problems += [f"has {name}, which the model has not" for name in saved if name not in shapes]
        problems += [
            f"{name} is {saved[name]}, in the model {shapes[name]}"
            for name in shapes
            if name in saved and saved[name] != tuple(shapes[name])
        ]
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(f"{self.path} is a checkpoint of another model: {'; '.join(problems[:5])}{more}")


def _check_types(manifest: dict[str, Any]) -> None:
    """See that a manifest's step, shapes and files are what they should be.

    Raises:
        ValueError: one is not; its name is in the message.
    """

    def whole(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**62

    shapes, files = manifest["shapes"], manifest["files"]
    if not whole(manifest["step"]) or manifest["step"] > MOST_STEPS:
        raise ValueError("its step is no number of steps")
    if not whole(manifest.get("updates", 0)) or manifest.get("updates", 0) > manifest["step"]:
        raise ValueError("its updates are no number up to its step")
    for key in ("recipe", "data"):
        if not isinstance(manifest.get(key, {}), dict):
            raise ValueError(f"its {key} is no mapping")
    if not isinstance(manifest.get("data", {}).get("build", ""), str):
        raise ValueError("its data.build is no text")
    if not isinstance(shapes, dict) or not all(isinstance(s, list) and all(map(whole, s)) for s in shapes.values()):
        raise ValueError("its shapes are no lists of sizes by name")
    if not all(len(shape) <= MOST_DIMENSIONS and math.prod(shape) < MOST_NUMBERS for shape in shapes.values()):
        raise ValueError("its shapes have more dimensions or numbers than a tensor")
    if not isinstance(files, dict):
        raise ValueError("its files are no mapping")
    for name, entry in files.items():
        if not name or name in (".", "..") or "/" in name or "\0" in name or len(name) > 255:
            raise ValueError(f"it names the file {printable(name, 60)}, which is no plain name")
        listed = entry.get("tensors") if isinstance(entry, dict) else None
        if not isinstance(listed, list) or not all(isinstance(tensor, str) for tensor in listed):
            raise ValueError(f"its entry of {printable(name, 60)} lists no tensors")
        if not whole(entry.get("bytes")) or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"its entry of {printable(name, 60)} has no bytes and sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_chunks(folder: Path, rank: int, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Write ``tensors`` as files of about FILE_BYTES; always consumes them all, since reading them is collective.

    Returns:
        The manifest's entry for each file: its size, SHA-256 and tensors.
    """
    written: dict[str, dict[str, Any]] = {}
    chunk: dict[str, Tensor] = {}
    size = 0
    failure: Exception | None = None

    def flush() -> None:
        nonlocal failure, size
        if chunk and failure is None:
            name = f"rank_{rank:05d}_{len(written):03d}.safetensors"
            try:
                save_file(chunk, folder / name)
                sync(folder / name)
                written[name] = {
                    "bytes": (folder / name).stat().st_size,
                    "sha256": _sha256(folder / name),
                    "tensors": sorted(chunk),
                }
            except (OSError, SafetensorError) as error:
                failure = error
        chunk.clear()
        size = 0

    for name, tensor in tensors:
        chunk[name] = tensor
        size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES:
            flush()
    flush()
    if failure is not None:
        raise failure
    return written


def begin(run: Path, step: int) -> Path:
    """Make the folder that a checkpoint is written in before it is renamed into place. Collective.

    Raises:
        CheckpointError: it cannot be made.
    """
    beside = run / "checkpoints" / f".saving_{step_name(step)}"
    failure: str | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            _discard(beside)
            beside.mkdir(parents=True)
        except OSError as error:
            failure = str(error)
    if failures := [problem for problem in gather(failure) if problem]:
        raise cannot_save(run, step, failures)
    return beside


def manifest(
    step: int, shapes: dict[str, tuple[int, ...]], files: dict[str, dict[str, Any]], about: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    whole = {name: list(shape) for name, shape in shapes.items()}
    content = {"format": FORMAT, "step": step, **about, "shapes": whole, "files": files}
    return {**content, "sha256": _digest(json.loads(json.dumps(content)))}


def cannot_save(run: Path, step: int, failures: list[str]) -> CheckpointError:
    """Remove what was written of a checkpoint, and the error to raise."""
    folder = run / "checkpoints"
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(folder / f".saving_{step_name(step)}", ignore_errors=True)
    before = [s for s in saved_steps(run) if s != step]
    kept = f"{step_name(before[-1])} is untouched" if before else "there is no earlier checkpoint"
    return CheckpointError(
        f"cannot save {folder / step_name(step)}: {'; '.join(failures[:3])}; {kept}. "
        f"Make room (or mend the cause) and start the same command again: it resumes from the last checkpoint"
    )


def commit(run: Path, step: int, about: dict[str, Any]) -> None:
    """Write the manifest ``about`` and rename the written folder into place. For one rank to call.

    What has the name already (a damaged one of the same step, or somebody else's folder) gets another name.
    """
    folder = run / "checkpoints"
    beside = folder / f".saving_{step_name(step)}"
    write_text(beside / MANIFEST, json.dumps(about, indent=1), durable=True)
    target = folder / step_name(step)
    if os.path.lexists(target):
        set_aside(target, "replaced")
    beside.rename(target)
    sync(folder)


def set_aside(path: Path, why: Literal["damaged", "replaced"]) -> Path:
    """Give what has a checkpoint's name another one beside it, which no start reads or removes.

    Returns:
        Its new path: ``damaged_step_...`` or ``replaced_step_...``, with a number where that is taken.
    """
    name, number = f"{why}_{path.name}", 1
    while os.path.lexists(aside := path.with_name(name if number == 1 else f"{name}_{number}")):
        number += 1
    path.rename(aside)
    return aside


class Retention:
    """Which of a run's checkpoints stay: those that are whole count, and not names.

    Each is checked against its SHA-256 before it counts, once; again when a file's size, times or place on the disk change.

    Args:
        run: the run folder.
        keep: newest whole checkpoints that stay. Where 1 is asked for and no other whole one is there for good, the one
            before the newest stays as well, since the newest may be damaged later.
        pinned: steps that always stay.
    """

    def __init__(self, run: Path, keep: int, pinned: Iterable[int] = ()):
        self.run, self.keep, self.pinned = run, keep, frozenset(pinned)
        self._whole: dict[int, tuple[tuple[int, ...], ...]] = {}
        self._newly: int | None = None

    def just_written(self, step: int, files: Iterable[str]) -> None:
        """Count the checkpoint of ``step``, of ``files``, as whole: their SHA-256 was taken as they were written."""
        self._whole[step] = self._signature(step, files)
        self._newly = step

    def apply(self) -> list[str]:
        """Remove the whole checkpoints that need not stay, and set damaged ones aside. For one rank to call.

        The newest whole one and the one just written stay always. Older ones than those that stay are removed unread.

        Returns:
            What was wrong with those set aside, a line each.

        Raises:
            OSError: one cannot be removed or renamed.
        """
        lines: list[str] = []
        stay: set[int] = set()
        old: list[int] = []
        counted = 0
        for step in reversed(saved_steps(self.run)):
            enough = counted >= self.keep and len(stay) >= 2
            held = step in self.pinned or step == self._newly
            if enough and not held:
                old.append(step)
                continue
            if problems := self._problems(step):
                lines.append(self._set_aside(step, problems))
                continue
            if counted < self.keep or held:
                stay.add(step)
                counted += 1
            else:
                old.append(step)
        if len(stay) < 2 and old:
            stay.add(old.pop(0))
        _remove(self.run, old)
        self._whole = {step: seen for step, seen in self._whole.items() if step in stay}
        return lines

    def _problems(self, step: int) -> list[str]:
        """What is wrong with a checkpoint; those known to be whole and untouched since are not read again."""
        try:
            checkpoint = Checkpoint.open(self.run / "checkpoints" / step_name(step))
            seen = self._signature(step, checkpoint.manifest["files"])
        except CheckpointError as problem:
            return [str(problem)]
        except OSError as problem:
            return [f"{printable(problem.filename)} cannot be read ({problem.strerror})"]
        if self._whole.get(step) == seen:
            return []
        problems = checkpoint.problems()
        if not problems:
            self._whole[step] = seen
        return problems

    def _signature(self, step: int, files: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        folder = self.run / "checkpoints" / step_name(step)
        found = [(folder / name).stat() for name in (MANIFEST, *sorted(files))]
        return tuple((file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns) for file in found)

    def _set_aside(self, step: int, problems: list[str]) -> str:
        aside = set_aside(self.run / "checkpoints" / step_name(step), "damaged")
        return f"{shortened(problems)}; set aside as {aside.name}"


def shortened(problems: list[str], most: int = 3) -> str:
    """The first ``most`` of some problems, and how many more there are."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def remove_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps. For one rank to call.

    Raises:
        CheckpointError: there are earlier ones, and none is whole; nothing is removed then.
    """
    saved = saved_steps(run)
    before = [s for s in saved if s <= step]
    problems: list[str] = []
    for earlier in reversed(before):
        try:
            found = Checkpoint.open(run / "checkpoints" / step_name(earlier)).problems()
        except CheckpointError as problem:
            found = [str(problem)]
        if not found:
            break
        problems += found
    else:
        if before:
            raise CheckpointError(
                f"cannot go back to step {step} of {printable(run)}: {shortened(problems)}; the later checkpoints are untouched. "
                f"Restore an earlier one, or start with train.on_spike=skip"
            )
    _remove(run, (s for s in saved if s > step))


def _remove(run: Path, steps: Iterable[int]) -> None:
    for step in steps:
        # Renamed first, so that a kill half-way leaves nothing that looks like a checkpoint.
        doomed = run / "checkpoints" / f".removing_{step_name(step)}"
        _discard(doomed)
        (run / "checkpoints" / step_name(step)).rename(doomed)
        _discard(doomed)


def _discard(path: Path) -> None:
    """Remove a folder and what is in it; of a link, the link alone."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Remove what an interrupted save or removal left behind. For one rank to call, before training."""
    folder = run / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        state, _, name = path.name.partition("_")
        if state in (".saving", ".removing") and step_of(name) is not None:
            _discard(path)


def check(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """Open a checkpoint and look at every file, the files shared out over the ranks. Collective.

    Returns:
        The checkpoint, or ``None`` when it is damaged, and what is wrong with it; the same on every rank.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    checkpoint, problems = None, []
    try:
        checkpoint = Checkpoint.open(path)
        files = sorted(checkpoint.manifest["files"])
        problems = [problem for file in files[rank::world_size] if (problem := checkpoint.damage(file))]
    except CheckpointError as error:
        problems = [str(error)]
    found = sorted({problem for part in gather(problems) for problem in part})
    return (None if found else checkpoint), found


def open_newest(run: Path, step: int | None = None) -> Checkpoint:
    """A run's checkpoint, checked whole, for one process to read: that of ``step``, or the newest.

    Raises:
        CheckpointError: there is none (the steps there are get listed), or it is damaged.
    """
    steps = saved_steps(run)
    if not steps or (step is not None and step not in steps):
        there = f"it has steps {', '.join(map(str, steps))}" if steps else "it has none"
        raise CheckpointError(f"{run} has no checkpoint{'' if step is None else f' of step {step}'}; {there}")
    checkpoint = Checkpoint.open(run / "checkpoints" / step_name(steps[-1] if step is None else step))
    if problems := checkpoint.problems():
        raise CheckpointError(f"{shortened(problems)}; choose another with --step")
    return checkpoint


def newest_whole(run: Path) -> tuple[Checkpoint | None, dict[int, list[str]]]:
    """The newest undamaged checkpoint of a run, and what is wrong with newer ones, by step. Collective.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; starting afresh would hide that.
    """
    steps = gather(saved_steps(run))[0]
    damaged: dict[int, list[str]] = {}
    for step in reversed(steps):
        checkpoint, found = check(run / "checkpoints" / step_name(step))
        if checkpoint is not None:
            return checkpoint, damaged
        damaged[step] = found
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {run / 'checkpoints'} is whole: {shortened([p for found in damaged.values() for p in found])}. "
            f"Restore one, or remove the folder to start from the first step"
        )
    return None, {}


def branch_source(branch_from: str) -> Path:
    """The checkpoint folder that ``RUN@STEP`` names.

    Raises:
        CheckpointError: not of that form, or no such checkpoint; the steps that are there are listed.
    """
    run_text, at, step_text = branch_from.rpartition("@")
    if not at or not step_text.isascii() or not step_text.isdigit() or len(step_text) > 13:
        raise CheckpointError(f"train.branch_from={branch_from} is not RUN@STEP, for example runs/trunk@109375")
    run, step = Path(run_text), int(step_text)
    path = run / "checkpoints" / step_name(step)
    if not path.is_dir():
        steps = saved_steps(run)
        there = f"it has {', '.join(map(str, steps))}" if steps else "it has no checkpoints"
        raise CheckpointError(f"train.branch_from: there is no checkpoint of step {step} in {run}; {there}")
    return path


def versions() -> dict[str, str]:
    """Versions of what wrote the state."""
    from importlib.metadata import version

    return {name: version(name) for name in ("mimscale", "deepspeed")} | {"torch": torch.__version__}
