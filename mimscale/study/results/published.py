"""The paper's own numbers: its 63 released SwinV2 runs, and what its tables print."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from typing import Any

from mimscale.models.sizes import SWIN_SIZES
from mimscale.schema import parse_yaml
from mimscale.study.results.result import Result

BATCH = 2048  # Section 3.4

# Encoders' parameters, and forward multiply-adds at 192 px, in billions, counted on mimscale's own models.
PARAMETERS = {
    "swinv2_s": 48_960_000,
    "swinv2_b": 86_890_000,
    "swinv2_l": 195_200_000,
    "swinv2_h": 655_200_000,
    "swinv2_g": 1_061_000_000,
}
GMACS = {"swinv2_s": 6.81, "swinv2_b": 11.86, "swinv2_l": 26.1, "swinv2_h": 86.0, "swinv2_g": 138.6}

# Table 2: (images, classes).
DATASETS = {
    "in1k_10": (128_000, 1000),
    "in1k_20": (256_000, 1000),
    "in1k_50": (641_000, 1000),
    "in100": (127_000, 100),
    "in1k_100": (1_280_000, 1000),
    "in22k": (14_200_000, 21_800),
}


def _data(name: str) -> str:
    return resources.files("mimscale.study").joinpath("data", name).read_text()


@cache
def paper_tables() -> dict[str, Any]:
    """Tables 1 to 5 as the paper prints them: "table1" to "table5", each a list of rows."""
    return parse_yaml(_data("paper_tables.yaml"), "paper_tables.yaml")


def published() -> list[Result]:
    """The 63 pre-trainings whose validation loss the authors released, and their 63 fine-tunings on ImageNet-1K.

    Training losses and curves are not among what was released, so they are ``None`` and empty.
    """
    results = []
    for row in csv.DictReader(_data("published_results.csv").splitlines()):
        model, dataset, iterations = row["model"], row["dataset"], int(row["iterations"])
        size = SWIN_SIZES[model]
        images, classes = DATASETS[dataset]
        cell = f"{model}-{dataset}-{iterations}"
        about: dict[str, Any] = {
            "model": model,
            "dataset": dataset,
            "iterations": iterations,
            "parameters": PARAMETERS[model],
            "architecture": {
                "base_channels": size.embed_dim,
                "depth": "-".join(map(str, size.depths)),
                "heads": "-".join(map(str, size.num_heads)),
                "window": 12,
                "finetune_window": 14,
            },
            "flops_per_image": 6e9 * GMACS[model],
            "images": images,
            "classes": classes,
            "global_batch": BATCH,
        }
        loss = float(row["val_loss"])
        results.append(Result(cell=cell, kind="pretrain", val_loss=loss, **about))
        scores = {"top1": float(row["finetune_top1"])}
        results.append(Result(cell=f"{cell}-in1k", kind="finetune", task="in1k", scores=scores, start=cell, **about))
    return results
