"""How large a study's models are and what they compute: parameters, FLOPs, and what they keep in memory.

Counting takes torch, and a second for each large model. So the counts of all models of the studies that come with mimscale are
kept in ``data/counts.json``, which ``python -m mimscale.study.counts`` writes anew; any other model is counted when it is asked
for.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from mimscale.files import write_text
from mimscale.study.spec import StudyError
from mimscale.training.planning.zero import GPU_SHARE, Load
from mimscale.training.recipe import Recipe, RecipeError, RunRecipe

KEPT = "counts.json"
# Of other models, by :func:`key`: many jobs of a study train the same.
_counted: dict[str, dict[str, Any]] = {}


def sizes(recipe: RunRecipe) -> tuple[int, int, int]:
    """(encoder's parameters, all parameters, FLOPs of one training image).

    Of a fine-tuning the encoder's alone are counted: heads for detection and segmentation come on top.

    Raises:
        StudyError: the recipe's sizes do not fit together.
    """
    name = key(recipe)
    entry = kept().get(name) or _counted.get(name)
    if entry is None:
        entry = _counted[name] = count(recipe, memory=False)
    return entry["encoder"], entry["parameters"], entry["flops"]


def load(recipe: Recipe, gpus: int, gpu_bytes: float) -> Load:
    """What a pre-training puts on ``gpus`` GPUs of ``gpu_bytes`` each."""
    if entry := kept().get(key(recipe)):
        elements = [int(size) for size, count in entry["elements"].items() for _ in range(count)]
        return Load(recipe, elements, entry["activations"], gpus, gpu_bytes * GPU_SHARE)
    return Load.of(recipe, gpus, gpu_bytes)


def key(recipe: RunRecipe) -> str:
    """Of all that decides what is counted."""
    values = recipe.model_dump(mode="json")
    decides: dict[str, Any] = {name: values[name] for name in ("task", "model", "mim") if name in values}
    if isinstance(recipe, Recipe):
        decides["recompute"] = bool(recipe.train.activation_checkpointing)
    decides["image_size"] = values["data"]["image_size"]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def kept() -> dict[str, dict[str, Any]]:
    """The counts that are kept, by :func:`key`."""
    return json.loads(resources.files("mimscale.study").joinpath("data", KEPT).read_text())


def count(recipe: RunRecipe, memory: bool = True) -> dict[str, Any]:
    """Count a model on the meta device, as one entry of ``counts.json``.

    Args:
        recipe: a pre-training's, or a fine-tuning's, of which the encoder alone is counted.
        memory: also count, for a pre-training, parameters by their ``elements``, and the bytes of ``activations`` in bf16
            that one image keeps for the backward pass.

    Raises:
        StudyError: the recipe's sizes do not fit together.
    """
    import torch

    from mimscale.training.planning.counting import activation_bytes, parameter_sizes
    from mimscale.training.planning.throughput import flops_per_image, training_flops
    from mimscale.training.pretraining.module import build_objective
    from mimscale.transfer.recipe import FinetuneRecipe
    from mimscale.transfer.weights import task_encoder

    def parameters(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    try:
        if isinstance(recipe, Recipe):
            with torch.device("meta"):
                objective = build_objective(recipe)
            entry: dict[str, Any] = {"encoder": parameters(objective.encoder), "parameters": parameters(objective)}
            entry["flops"] = flops_per_image(recipe)
            if memory:
                elements = Counter(sorted(parameter_sizes(recipe)))
                entry["elements"] = {str(size): count for size, count in elements.items()}
                entry["activations"] = activation_bytes(recipe, bf16=True)
            return entry
        assert isinstance(recipe, FinetuneRecipe)
        size = recipe.model_dump()["data"]["image_size"]
        with torch.device("meta"):
            encoder = task_encoder(recipe)
        total = parameters(encoder)
        flops = training_flops(lambda: encoder, lambda module: module(torch.empty(1, 3, size, size)))
        return {"encoder": total, "parameters": total, "flops": flops}
    except RecipeError as error:
        raise StudyError(f"{recipe.model_dump()['model']['name']} of the study cannot be built: {error}") from None


def write(recipes: Iterable[RunRecipe], path: Path) -> None:
    """Count every model once, and write one entry a line."""
    found = {key(recipe): recipe for recipe in recipes}
    lines = [f" {json.dumps(name)}: {json.dumps(count(recipe))}" for name, recipe in found.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    from mimscale.resources import STUDIES
    from mimscale.study.jobs import build_graph
    from mimscale.study.spec import load_study

    studies = [load_study(name) for name in STUDIES.names()]
    jobs = [job for study in studies for job in build_graph(study).values()]
    write((job.recipe for job in jobs), Path(__file__).parent / "data" / KEPT)
