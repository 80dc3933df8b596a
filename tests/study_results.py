"""Made-up results of a study whose laws are known, for the tests of fits, verdicts and the report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from mimscale.study.results.result import Result

SIZES = {"swinv2_s": 50_000_000, "swinv2_b": 90_000_000, "swinv2_l": 200_000_000, "swinv2_h": 650_000_000}
IMAGES = {"photos_10": 1_000, "photos_20": 2_000, "photos_50": 5_000, "photos_100": 10_000}
LENGTHS = (1000, 2000, 4000)
SIZE_SLOPE, LENGTH_SLOPE = -0.02, -0.03


def clean_loss(parameters: float, iterations: float) -> float:
    """Loss where data suffices: a power law of both."""
    return 2.0 * parameters**SIZE_SLOPE * iterations**LENGTH_SLOPE


def grid(seeds: int = 1, run: str | None = None, **changes: Any) -> Iterator[Result]:
    """Pre-trainings of every model, dataset and length; a cell overfits where its model and length ask for more data.

    A seed adds 0.0005 to the loss of the one before. Training loss falls with compute, the more so where a cell
    overfits.
    """
    for model, parameters in SIZES.items():
        for dataset, images in IMAGES.items():
            for iterations in LENGTHS:
                need = 600 * (parameters / 50e6) ** 0.5 * iterations / 1000
                clean = clean_loss(parameters, iterations)
                loss = clean * (1 + 0.05 * max(0.0, math.log(need / images)))
                for seed in range(seeds):
                    cell = f"{model}-{dataset}-{iterations}-{seed}"
                    about: dict[str, Any] = {
                        "cell": cell,
                        "kind": "pretrain",
                        "model": model,
                        "dataset": dataset,
                        "iterations": iterations,
                        "parameters": parameters,
                        "flops_per_image": 6.0 * parameters,
                        "images": images,
                        "classes": 8,
                        "global_batch": 64,
                        "seed": seed,
                        "val_loss": loss + 0.0005 * seed,
                        "train_loss": clean - 0.5 * (loss - clean),
                        "run": f"{run}/{cell}" if run else None,
                    }
                    yield Result(**(about | changes))
