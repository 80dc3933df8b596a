"""Files of weights, from elsewhere and of mimscale's own, and checkpoints of runs."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file

import mimscale
from fuzzing.case import Case, Reader, kind, material
from fuzzing.mutations import (
    ODD_TEXTS,
    bytes_mutated,
    clutter,
    file_mutated,
    json_mutated,
    json_text,
    replace_file,
    tree_mutated,
)
from mimscale.data import ShardIndex
from mimscale.models import create_encoder, load_released
from mimscale.models.weights.export import export_weights
from mimscale.models.weights.released import all_weights, read_checkpoint
from mimscale.training import checkpoint as checkpoints
from mimscale.training.checkpoint import Checkpoint
from mimscale.training.errors import CheckpointError
from mimscale.training.pretraining.module import build_objective
from mimscale.training.pretraining.task import data_position
from mimscale.training.recipe import RecipeError, load_recipe
from mimscale.training.run_folder import RunFolder
from mimscale.transfer.load import load_run
from mimscale.transfer.recipe import load_finetune_recipe
from mimscale.transfer.weights import encoder_weights

TINY = [
    "model.embed_dim=8",
    "model.depths=[1,1,1,1]",
    "model.num_heads=[1,1,2,2]",
    "model.window_size=2",
    "data.image_size=64",
    "data.workers=0",
    "train.global_batch=4",
    "train.iterations=20",
]


def tiny(**more: Any) -> Any:
    """The encoder of all these files."""
    return create_encoder(
        "swinv2_s", img_size=64, window_size=2, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), **more
    )


def write_run(folder: Path, recipe: Any, module: Any, data: dict[str, Any], steps: tuple[int, ...]) -> None:
    """A run folder with checkpoints, as training leaves it."""
    run = RunFolder(folder)
    run.describe(recipe, {"zero_optimization": {"stage": 2}})
    shapes = {name: tuple(part.shape) for name, part in all_weights(module).items()}
    for step in steps:
        path = folder / "checkpoints" / f"step_{step:08d}"
        path.mkdir(parents=True)
        tensors = [(name, part.detach().float().clone()) for name, part in all_weights(module).items()]
        tensors += [
            (f"{moment}/{name}", torch.zeros(shape))
            for moment in ("exp_avg", "exp_avg_sq")
            for name, shape in list(shapes.items())[:4]
        ]
        files = checkpoints.write_chunks(path, 0, tensors)
        about = {
            "updates": step,
            "recipe": recipe.model_dump(mode="json"),
            "data": data,
            "versions": checkpoints.versions(),
            "trained_with": {"ranks": 1, "local_ranks": 1, "zero_stage": 2, "micro_batch": 4},
        }
        (path / "checkpoint.json").write_text(json.dumps(checkpoints.manifest(step, shapes, files, about), indent=1))
    lines = [
        {"step": step, "loss": 1.0 / step, "lr": 1e-3, "grad_norm": 0.5, "images_per_s": 10.0, "mfu": 0.1}
        for step in range(1, 11)
    ]
    lines.append({"step": 10, "val_loss": 0.5, "val_loss_l1": 0.4, "val_loss_l2": 0.3})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.heartbeat.mkdir()
    for rank in range(2):
        beat = {
            "rank": rank,
            "host": "nowhere",
            "pid": 1,
            "step": 10,
            "phase": "step",
            "since": 1.7e9,
            "beat": 1.7e9,
            "every": 5.0,
        }
        (run.heartbeat / f"rank_{rank:05d}.json").write_text(
            json.dumps({**beat, "keys": ["a", "b"], "address": ["127.0.0.1", 1]})
        )
    (run.heartbeat / "end.json").write_text(json.dumps({"state": "failed", "message": "disk full", "time": 1.7e9}))
    (folder / "left_out.json").write_text(json.dumps({"7": "the loss became nan on rank 0"}))


@material("run", "shards")
def make_run(folder: Path) -> None:
    """A pre-training."""
    torch.manual_seed(0)
    shards = folder.parent / "shards"
    recipe = load_recipe("demo", [*TINY, f"data.shards={shards}"])
    write_run(folder, recipe, build_objective(recipe), data_position(ShardIndex.load(shards), "100", 0, 40), (5, 10))


@material("tuned", "shards")
def make_tuned(folder: Path) -> None:
    """A fine-tuning on classification."""
    from mimscale.transfer.classification.task import Classification

    torch.manual_seed(0)
    shards = folder.parent / "shards"
    index = ShardIndex.load(shards)
    keys = [*TINY, f"data.shards={shards}", "data.resize_shorter=64"]
    recipe = load_finetune_recipe("demo", keys)
    data = {**data_position(index, "100", 0, 40), "classes": list(index.classes)}
    write_run(folder, recipe, Classification.module_of(recipe, data), data, (10,))


@material("weights")
def make_weights(folder: Path) -> None:
    """Exported weights, and the authors' format, of today and of before torch 1.6."""
    folder.mkdir()
    torch.manual_seed(0)
    recipe = load_recipe("demo", TINY)
    objective = build_objective(recipe)
    export_weights(objective.model, "safetensors", folder / "encoder.safetensors")
    export_weights(objective.model, "released", folder / "released.pth")
    state = torch.load(folder / "released.pth")
    torch.save({**state, "epoch": 3, "config": {"lr": 0.1}}, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(
        {name: part.detach().contiguous().clone() for name, part in tiny().named_parameters()},
        folder / "plain.safetensors",
    )


def _read_weights(path: Path, rng: random.Random) -> None:
    read_checkpoint(path)
    if rng.random() < 0.5:
        load_released(tiny(), path)
    elif path.suffix == ".safetensors" and rng.random() < 0.6:
        encoder = mimscale.load(path)
        mimscale.transform(encoder)
    else:
        encoder_weights(str(path), tiny())


def _pickle_mutated(data: bytes, rng: random.Random) -> bytes:
    """A pickle with other instructions, calls or numbers."""
    if rng.random() < 0.5:
        return bytes_mutated(data, rng)
    other = rng.choice(
        (
            b"cos\nsystem\nX\x02\0\0\0idtR",
            b"cbuiltins\neval\nX\x03\0\0\x001+1tR",
            b"cbuiltins\nbytearray\n\x8a\x08" + (2**40).to_bytes(8, "little") + b"\x85R",
            b"(" * 5000,
            b"]" * 3000 + b"a" * 2000,
            b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)),
            b"N" * 300_000,
            b"ctorch\nload\nX\x01\0\0\0x\x85R",
            b"ctorch.hub\nload\n)R",
            b"cposix\nsystem\n",
            b"X\xff\xff\xff\x7fabc",
            b"\x8a\xff" + b"\xff" * 255,
            b"}",
            b"]",
            b"s" * 20,
            b"0" * 20,
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"cargparse\nNamespace\n)R}X\x01\0\0\0aK\x01sb",
            b"I999999999999999999999\n",
            b"F1e999\n",
            b"h\xff",
            b"j\xff\xff\xff\x7f",
            b"\x95" + b"\xff" * 8,
        )
    )
    at = rng.randrange(2, len(data))
    return data[:at] + other + rng.choice((data[at:], b".", b"", data[at + len(other) :]))


@kind("torch-zip", ValueError, needs=("weights",))
def torch_zip(case: Case) -> Reader:
    """A .pth file, which is a zip of a pickle and storages."""
    path, rng = case.copy("weights/released.pth", "weights.pth"), case.rng
    if rng.random() < 0.4:
        file_mutated(path, bytes_mutated, case)
    else:
        with zipfile.ZipFile(path) as archive:
            records = {record.filename: archive.read(record) for record in archive.infolist()}
        name = rng.choice([*[name for name in records if name.endswith("data.pkl")] * 12, *records])
        records[name] = (_pickle_mutated if name.endswith("pkl") else bytes_mutated)(records[name], rng)
        if rng.random() < 0.15:
            other = rng.choice(list(records))
            records[
                rng.choice((*ODD_TEXTS[1:40], "../x", other + "x", "archive/data/0", "archive/code/x.py"))[
                    :200
                ].replace("\ud800", "")
            ] = records.pop(other)
        with zipfile.ZipFile(path, "w", rng.choice((0, 0, 0, zipfile.ZIP_DEFLATED))) as archive:
            for name, content in records.items():
                archive.writestr(name if name.strip("\0") and name[0] != "\0" else "?", content)
            if rng.random() < 0.1:
                archive.writestr("archive/data/99", b"\0" * 50_000_000 if archive.compression else b"x")
    return lambda: _read_weights(path, rng)


@kind("torch-legacy", ValueError, needs=("weights",))
def torch_legacy(case: Case) -> Reader:
    """A .pth file of before torch 1.6: pickles, then storages."""
    path, rng = case.copy("weights/old.pth", "weights.pth"), case.rng
    data = path.read_bytes()
    if rng.random() < 0.5:
        file_mutated(path, bytes_mutated, case)
    else:
        parts, stream = [], io.BytesIO(data)
        for _ in range(5):
            start = stream.tell()
            for _ in _instructions(stream):
                pass
            parts.append(data[start : stream.tell()])
        place = rng.choice((0, 1, 2, 3, 3, 3, 3, 4))
        parts[place] = (
            _pickle_mutated(parts[place], rng)
            if rng.random() < 0.8
            else pickle.dumps(rng.choice((2**40, -1, "x", [], None, {"a": 1})), 2)
        )
        path.write_bytes(b"".join(parts) + rng.choice((data[stream.tell() :],) * 3 + (b"",)))
    return lambda: _read_weights(path, rng)


def _instructions(stream: io.BytesIO) -> Any:
    import pickletools

    return pickletools.genops(stream)


def safetensors_mutated(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or other bytes."""
    if rng.random() < 0.25:
        return bytes_mutated(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    said = header.get("__metadata__", {})
    way = rng.random()
    if way < 0.5 and "mimscale.encoder" in said:
        key = rng.choice(("mimscale.encoder", "mimscale.encoder", "mimscale.images"))
        if key in said:
            said[key] = json_mutated(said[key].encode(), rng).decode("utf-8", "replace")
    elif way < 0.6:
        said[rng.choice(("mimscale.package", "mimscale.images", *ODD_TEXTS[:5]))] = rng.choice(ODD_TEXTS)
    else:
        header = tree_mutated(header, rng)
    text = json_text(header, rng)
    if rng.random() < 0.1:
        rest = rest[: rng.randrange(len(rest))]
    return (
        struct.pack("<Q", len(text) if rng.random() < 0.95 else rng.choice((0, 2**40, 2**63, len(text) + 8)))
        + text
        + rest
    )


@kind("safetensors", ValueError, needs=("weights",))
def safetensors(case: Case) -> Reader:
    """An exported file: its header, the settings in it, its tensors."""
    name = case.rng.choice(("encoder", "encoder", "plain"))
    path = case.copy(f"weights/{name}.safetensors", "weights.safetensors")
    file_mutated(path, safetensors_mutated, case)
    return lambda: _read_weights(path, case.rng)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def sealed(manifest: Any) -> bytes:
    """A manifest with a digest that holds."""
    if isinstance(manifest, dict):
        manifest.pop("sha256", None)
        manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest).encode()


def _manifest_renewed(data: bytes, rng: random.Random) -> bytes:
    manifest = json.loads(data)
    section = rng.choice((None, "recipe", "data", "shapes", "files"))
    if section is None:
        manifest = tree_mutated(manifest, rng)
    else:
        manifest[section] = tree_mutated(manifest[section], rng)
    try:
        return sealed(manifest)
    except (TypeError, UnicodeEncodeError):
        return json_text(manifest, rng)


def _use_run(run: Path, rng: random.Random) -> None:
    """Read a run as the commands and a fine-tuning do."""
    if rng.random() < 0.3:
        weights = encoder_weights(str(run), tiny())
        [weights(name) for name in ("patch_embed.proj.weight", "norm.weight")]
    else:
        found = load_run(run)
        module = found.module()
        if found.kind is not None:
            import numpy as np

            found.task.say(found.recipe, found.checkpoint.manifest["data"], module, np.zeros((70, 60, 3), np.uint8))


def newest(run: Path) -> Path:
    """A run's last checkpoint."""
    return max((run / "checkpoints").iterdir())


@kind("manifest", CheckpointError, RecipeError, ValueError, needs=("run", "tuned"))
def manifest(case: Case) -> Reader:
    """What a checkpoint says of itself, changed by accident."""
    run = case.copy(case.rng.choice(("run", "tuned")))
    file_mutated(newest(run) / "checkpoint.json", json_mutated, case, strange=0.15)
    return lambda: _use_run(run, case.rng)


@kind("manifest-renewed", CheckpointError, RecipeError, ValueError, needs=("run", "tuned"))
def manifest_renewed(case: Case) -> Reader:
    """What a checkpoint says of itself, with its digest renewed."""
    run = case.copy(case.rng.choice(("run", "tuned")))
    file_mutated(newest(run) / "checkpoint.json", _manifest_renewed, case, strange=0)
    return lambda: _use_run(run, case.rng)


@kind("tensors-renewed", CheckpointError, RecipeError, ValueError, needs=("run", "tuned"))
def tensors(case: Case) -> Reader:
    """A checkpoint's tensors, with their size and digest renewed."""
    run, rng = case.copy(case.rng.choice(("run", "tuned"))), case.rng
    folder = newest(run)
    path = next(folder.glob("*.safetensors"))
    if rng.random() < 0.35:
        held = load_file(path)
        for name in rng.sample(sorted(held), 3):
            other = rng.choice(
                (
                    torch.zeros(0),
                    torch.zeros(3),
                    held[name].half(),
                    held[name].long(),
                    held[name].double(),
                    held[name].reshape(-1),
                    held[name] * float("nan"),
                    torch.zeros(2, 2, dtype=torch.bool),
                )
            )
            held[rng.choice((name, name, name + "x"))] = other.clone()
        path.write_bytes(save(held))
    else:
        file_mutated(path, safetensors_mutated, case, strange=0.15)
    manifest = json.loads((folder / "checkpoint.json").read_bytes())
    if path.is_file() and path.stat().st_size < 2**26 and rng.random() < 0.95:
        content = path.read_bytes()
        manifest["files"][path.name] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "checkpoint.json").write_bytes(sealed(manifest))
    return lambda: _use_run(run, rng)


@kind("checkpoint-folder", CheckpointError, RecipeError, ValueError, needs=("run",))
def checkpoint_folder(case: Case) -> Reader:
    """A folder of checkpoints with strange entries."""
    run, rng = case.copy("run"), case.rng
    folder = run / "checkpoints"
    for name in rng.sample(
        (
            "step_00000099",
            "step_" + "9" * 20,
            "step_" + "9" * 250,
            "step_-1",
            "step_1",
            ".saving_step_00000012",
            "step_00000010.bak",
        ),
        2,
    ):
        (folder / name[:255]).mkdir() if rng.random() < 0.6 else (folder / name[:255]).touch()
    if rng.random() < 0.5:
        clutter(folder, case)
    if rng.random() < 0.5:
        replace_file(rng.choice([path for path in (folder / "step_00000010").iterdir()]), case)

    def read() -> None:
        steps = checkpoints.saved_steps(run)
        for step in steps[-3:]:
            try:
                found = Checkpoint.open(folder / f"step_{step:08d}")
                print([found.damage(file) for file in found.manifest["files"]])
            except CheckpointError as error:
                print(error)
        _use_run(run, rng)

    return read
