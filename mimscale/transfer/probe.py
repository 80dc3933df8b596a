"""What frozen features are worth, in minutes: a linear classifier and nearest neighbours.

Features are those of centre crops, pooled as for a classifier. They are computed once and kept; a second probe of the same
weights on the same images reads them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mimscale.data import EvaluationStream, ShardIndex
from mimscale.files import write_beside
from mimscale.models.preprocessing import Preprocessing, preprocessing_of
from mimscale.models.weights.export import load, without_head
from mimscale.models.weights.released import load_released, read_checkpoint
from mimscale.training.pretraining.module import build_objective, normalise
from mimscale.training.recipe import Recipe, RecipeError, load_recipe, recipe_values
from mimscale.transfer.classification.labels import check_labels
from mimscale.transfer.load import folder_of, is_run, load_run
from mimscale.transfer.recipe import load_finetune_recipe
from mimscale.transfer.weights import task_encoder
from mimscale.wording import printable

# Strengths of the linear classifier's penalty to choose from, and the share of the training images they are chosen on.
PENALTIES = tuple(10.0**power for power in range(-6, 1))
HELD_BACK = 0.1
TEMPERATURE = 0.07  # of the neighbours' votes, as DINO weighs them


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder that gives pooled features (B, C) of normalised images, and how its images are made.

    ``name`` tells its weights from others'.
    """

    encoder: Any
    images: Preprocessing
    name: str


def frozen_encoder(source: str, recipe_file: Path | None = None) -> FrozenEncoder:
    """The encoder of a run of any kind, of an exported file, or of a released one.

    Args:
        source: RUN, RUN@STEP or FILE.
        recipe_file: for a file that does not say what it holds: a recipe, of pre-training or fine-tuning, whose ``model`` and
            ``data`` describe it.

    Raises:
        CheckpointError, RecipeError, ValueError: it cannot be read, or does not fit its recipe.
    """
    if is_run(source):
        run = load_run(source)
        name = f"{run.checkpoint.path.resolve()} {run.checkpoint.manifest['files']}"
        return FrozenEncoder(without_head(run.encoder()), run.preprocessing, name)
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"{source}: there is no such run or file")
    name = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
    if recipe_file is None:
        if path.suffix != ".safetensors":
            raise RecipeError(f"{source} does not say what it holds: give --recipe with its model and image size")
        encoder = load(path)
        return FrozenEncoder(encoder, preprocessing_of(encoder), name)
    if "task" in recipe_values(recipe_file):
        recipe: Any = load_finetune_recipe(recipe_file)
        encoder = task_encoder(recipe)
    else:
        recipe = load_recipe(recipe_file, (), Recipe)
        encoder = build_objective(recipe).model.encoder
    load_released(encoder, path)
    data = recipe.data
    return FrozenEncoder(
        without_head(encoder.eval()), Preprocessing(data.image_size, data.image_size, data.mean, data.std), name
    )


@dataclass(frozen=True)
class Features:
    """Pooled features (N, C) fp32 of a fraction's images, and their classes (N,) int64."""

    values: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: Tensor) -> Features:
        """Some of them."""
        return Features(self.values[chosen], self.labels[chosen])


def features(
    frozen: FrozenEncoder,
    index: ShardIndex,
    fraction: str,
    batch: int,
    workers: int,
    device: torch.device,
    folder: Path,
) -> Features:
    """Features of all images of a fraction, kept in ``folder``; damaged images are left out.

    Raises:
        ShardError: no such fraction, images without a class, or too many damaged ones.
    """
    check_labels(index, fraction)
    how = frozen.images
    told = json.dumps([frozen.name, index.content.build, fraction, how.image_size, how.mean, how.std])
    path = folder / f"features_{fraction}_{hashlib.sha256(told.encode()).hexdigest()[:16]}.safetensors"
    if path.exists() and (kept := _kept(path, len(index.classes))) is not None:
        return kept
    stream = EvaluationStream(index, fraction, how.image_size, batch, workers=workers)
    encoder = frozen.encoder.to(device)
    values, labels = [], []
    with torch.no_grad():
        for images in tqdm(stream, total=len(stream), desc=f"features of {fraction}", disable=not sys.stderr.isatty()):
            pooled = encoder(normalise(images.images.to(device), how.mean, how.std))
            values.append(pooled.float().cpu()[images.valid])
            labels.append(images.labels[images.valid])
    found = Features(torch.cat(values), torch.cat(labels))
    with write_beside(path) as beside:
        try:
            save_file({"values": found.values, "labels": found.labels}, beside)
        except SafetensorError as error:
            raise OSError(f"{printable(path)} cannot be written ({printable(error)})") from None
    return found


def _kept(path: Path, classes: int) -> Features | None:
    """Features of an earlier probe; ``None`` where the file is damaged, so that they are computed anew."""
    try:
        found = read_checkpoint(path)
        values, labels = found["values"], found["labels"]
        fits = values.ndim == 2 and values.dtype == torch.float32 and labels.dtype == torch.int64
        if (
            not fits
            or labels.shape != values.shape[:1]
            or not len(labels)
            or not 0 <= int(labels.min()) <= int(labels.max()) < classes
        ):
            raise ValueError("values and labels do not go together")
    except (OSError, ValueError, KeyError) as error:
        print(f"mimscale: {printable(path)} is damaged and computed anew ({printable(error)})", file=sys.stderr)
        return None
    return Features(values, labels)


def fit_linear(train: Features, classes: int, penalty: float, device: torch.device) -> Tensor:
    """Softmax regression by L-BFGS: minimise mean cross-entropy + penalty / 2 * |W|^2 (the biases are free).

    Returns:
        (C + 1, classes) fp32, the biases last.
    """
    x = F.pad(train.values.to(device), (0, 1), value=1.0)
    y = train.labels.to(device)
    weight = torch.zeros(x.shape[1], classes, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=200, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight, y) + 0.5 * penalty * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def accuracy(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in percent, of scores (N, classes)."""
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices.cpu() == labels[:, None]
    return 100 * hits[:, 0].double().mean().item(), 100 * hits.any(1).double().mean().item()


def linear_probe(train: Features, val: Features, classes: int, device: torch.device) -> dict[str, float]:
    """Fit on the training features, standardised, with the penalty that does best on a tenth of them held back."""
    deviation, mean = torch.std_mean(train.values, dim=0)
    standard = [Features((part.values - mean) / deviation.clamp(min=1e-6), part.labels) for part in (train, val)]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held = max(1, round(HELD_BACK * len(train)))
    chosen_on, fitted_on = standard[0].rows(order[:held]), standard[0].rows(order[held:])

    def top1(penalty: float) -> float:
        weight = fit_linear(fitted_on, classes, penalty, device)
        return accuracy(_scores(chosen_on, weight), chosen_on.labels)[0]

    penalty = max(PENALTIES, key=lambda p: (top1(p), p)) if len(fitted_on) else PENALTIES[-1]
    weight = fit_linear(standard[0], classes, penalty, device)
    top, five = accuracy(_scores(standard[1], weight), val.labels)
    return {"linear_top1": top, "linear_top5": five, "penalty": penalty}


def _scores(part: Features, weight: Tensor) -> Tensor:
    return F.pad(part.values.to(weight.device), (0, 1), value=1.0) @ weight


def nearest_neighbours(train: Features, val: Features, classes: int, k: int, device: torch.device) -> dict[str, float]:
    """Votes of the k nearest training images by cosine, weighed with exp(cosine / 0.07)."""
    bank, labels = F.normalize(train.values, dim=1).to(device), train.labels.to(device)
    scores = []
    for part in F.normalize(val.values, dim=1).split(256):
        near, place = (part.to(device) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), classes, device=device)
        scores.append(votes.scatter_add_(1, labels[place], (near / TEMPERATURE).exp()))
    top, five = accuracy(torch.cat(scores), val.labels)
    return {"knn_top1": top, "knn_top5": five, "k": k}


def probe(
    source: str,
    shards: str,
    fraction: str = "100",
    validation: str = "val",
    knn: int = 20,
    recipe: Path | None = None,
    batch: int = 64,
    workers: int = 0,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Probe the encoder of a run or file on labelled shards.

    Args:
        source: RUN, RUN@STEP or FILE.
        shards: shard folder.
        fraction: what the probes are fitted on.
        validation: what they are tested on.
        knn: neighbours that vote.
        recipe: for a FILE that does not say what it holds.
        batch: images at a time.
        workers: processes that read ahead.
        folder: where features are kept; in the run, or beside the file, if ``None``.

    Returns:
        The figures, in the shape of a run's ``result.json``.

    Raises:
        CheckpointError, RecipeError, ShardError, ValueError: what cannot be read.
    """
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen = frozen_encoder(source, recipe)
    index = ShardIndex.load(shards)
    folder = folder or folder_of(source) / "probe"
    train, val = (features(frozen, index, part, batch, workers, device, folder) for part in (fraction, validation))
    classes = len(index.classes)
    commonest = int(torch.bincount(train.labels).argmax())
    figures = {
        **linear_probe(train, val, classes, device),
        **nearest_neighbours(train, val, classes, knn, device),
        "commonest_class": 100 * (val.labels == commonest).double().mean().item(),
    }
    return {
        "task": "probe",
        "metric": "linear_top1",
        "value": figures["linear_top1"],
        "from": source,
        "validation": figures,
        "images": {"train": len(train), "val": len(val)},
        "seconds": time.monotonic() - began,
    }
