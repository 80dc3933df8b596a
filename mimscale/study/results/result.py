"""What one cell of a study came to: the shape in which results reach the laws, verdicts and report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mimscale.files import read_json as read_json_file
from mimscale.files import write_text
from mimscale.wording import Escaped, printable

Status = Literal["done", "missing", "failed", "running", "stopped"]
Kind = Literal["pretrain", "finetune"]
Point = tuple[int, float | None, float | None]
Score = tuple[str, str]  # a task and one of its scores

# Each fine-tuning task's score, larger is better, in percent (Section 3.5): (task, score) in the order of Table 3.
SCORES = (("in1k", "top1"), ("inat18", "top1"), ("coco", "box_ap"), ("coco", "mask_ap"), ("ade20k", "miou"))
SCORE_NAMES = {
    ("in1k", "top1"): "ImageNet-1K top-1",
    ("inat18", "top1"): "iNaturalist-18 top-1",
    ("coco", "box_ap"): "COCO box AP",
    ("coco", "mask_ap"): "COCO mask AP",
    ("ade20k", "miou"): "ADE20K mIoU",
}

TOP1: Score = ("in1k", "top1")
_METRICS = {"top1": "top-1", "box_ap": "box AP", "mask_ap": "mask AP", "miou": "mIoU"}


def score_name(score: Score) -> str:
    """A score as a reader knows it: "ImageNet-1K top-1"; a task of the study's own keeps its name."""
    task, metric = score
    return SCORE_NAMES.get(score) or f"{task} {_METRICS.get(metric, metric)}"


class ResultsError(Escaped):
    """Results that contradict each other or cannot be read."""


@dataclass(frozen=True)
class Result:
    """One pre-training or fine-tuning run.

    Attributes:
        cell: unique id within the study.
        kind: "pretrain" or "finetune".
        model: encoder name, as "swinv2_b".
        dataset: what it was pre-trained on (for a fine-tuning: what its start was pre-trained on), as "in1k_10".
        iterations: length of the pre-training, in updates.
        parameters: of the encoder.
        total_parameters: of encoder and decoder together (Table 4).
        architecture: Table 1's columns of the encoder: base_channels, depth, heads, window, finetune_window.
        flops_per_image: of one training image, forward and backward; compute is this x iterations x global_batch.
        images: training images in the dataset (Table 2).
        classes: classes in the dataset (Table 2).
        global_batch: images an update.
        objective: "simmim" or "mae".
        decoder: "linear", "4-blocks" or "8-blocks" (Table 4).
        sampling: "uniform" over all classes, or "classes": all images of a few classes (Table 5).
        seed: of the run.
        val_loss: on the validation images, by the run's own loss.
        val_loss_l1: the same predictions' absolute error.
        val_loss_l2: the same predictions' squared error.
        train_loss: at the end of training.
        task: of a fine-tuning: "in1k", "inat18", "coco" or "ade20k".
        scores: of a fine-tuning, in percent, by the names of its task's figures: top1, box_ap, mask_ap, miou, ....
        start: of a fine-tuning, the pre-training cell it starts from.
        curve: points (step, training loss, validation loss), ``None`` where that loss was not measured.
        run: folder that the numbers came from; ``None`` for published results.
        recipe: digest of the resolved recipe.
        status: "done", "missing" (not started), "failed", "running", or "stopped" by a verdict.
        note: a sentence for the reader, as why it failed or was stopped.
    """

    cell: str
    kind: Kind
    model: str
    dataset: str
    iterations: int
    parameters: int | None = None
    total_parameters: int | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    flops_per_image: float | None = None
    images: int | None = None
    classes: int | None = None
    global_batch: int | None = None
    objective: str = "simmim"
    decoder: str = "linear"
    sampling: str = "uniform"
    seed: int = 0
    val_loss: float | None = None
    val_loss_l1: float | None = None
    val_loss_l2: float | None = None
    train_loss: float | None = None
    task: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    start: str | None = None
    curve: tuple[Point, ...] = ()
    run: str | None = None
    recipe: str | None = None
    status: Status = "done"
    note: str = ""

    @property
    def compute(self) -> float | None:
        """Training FLOPs, or ``None`` where flops_per_image or global_batch is unknown."""
        if self.flops_per_image is None or self.global_batch is None:
            return None
        return self.flops_per_image * self.iterations * self.global_batch

    @property
    def epochs(self) -> float | None:
        """How often each image was seen, or ``None`` where images or global_batch is unknown."""
        if not self.images or self.global_batch is None:
            return None
        return self.iterations * self.global_batch / self.images


def check(results: Iterable[Result]) -> list[Result]:
    """The results, once they are seen to fit together.

    Raises:
        ResultsError: a cell appears twice, or a fine-tuning starts from a cell that is not there.
    """
    results = list(results)
    seen: dict[str, Result] = {}
    for result in results:
        other = seen.setdefault(result.cell, result)
        if other is not result:
            raise ResultsError(
                f'cell "{result.cell}" has two results, {other.run or "without a run"} and '
                f"{result.run or 'without a run'}; keep one, or give them different seeds"
            )
    for result in results:
        if result.kind == "finetune" and result.start not in seen:
            raise ResultsError(f'fine-tuning "{result.cell}" starts from "{result.start}", which is not in the study')
    return results


def write_json(results: Iterable[Result], path: Path) -> None:
    """Write results to a JSON file that ``read_json`` takes back as they were."""
    write_text(path, json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n")


def read_json(path: Path) -> list[Result]:
    """Read what ``write_json`` wrote.

    Raises:
        ResultsError: the file is damaged, or holds something else.
    """
    try:
        content = read_json_file(path)
        if not isinstance(content, list):
            raise ValueError("it is no list")
        return check(_result(values, place) for place, values in enumerate(content))
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{printable(path)} holds no results of a study ({printable(error)}); collect them anew"
        ) from error


_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int), "None": (type(None),)}


def _result(values: Any, place: int) -> Result:
    """One entry of a file of results.

    Raises:
        ValueError: it is none; the key is named.
    """
    known = {each.name: str(each.type) for each in dataclasses.fields(Result)}
    needed = ("cell", "kind", "model", "dataset", "iterations")
    if not isinstance(values, dict) or not set(needed) <= values.keys() <= known.keys():
        raise ValueError(f"entry {place} lacks one of {', '.join(needed)}, or has something else than a result's keys")
    for key, value in values.items():
        if key in ("architecture", "scores"):
            fits = isinstance(value, dict) and (key != "scores" or all(map(_is_number, value.values())))
        elif key == "curve":
            fits = isinstance(value, list | tuple) and all(map(_is_point, value))
        elif key in ("kind", "status"):
            fits = value in get_args(Kind if key == "kind" else Status)
        else:
            kinds = [kind for word in known[key].split(" | ") for kind in _KINDS[word]]
            fits = type(value) in kinds and (not isinstance(value, int) or abs(value) < 2**63)
        if not fits:
            raise ValueError(f"entry {place} has {key}={printable(value, 60)}, which is no {known[key]}")
    return Result(**{**values, "curve": tuple((p[0], p[1], p[2]) for p in values.get("curve", ()))})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not abs(value) >= 2**63


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and type(value[0]) is int
        and all(loss is None or type(loss) in (int, float) for loss in value[1:])
    )
