"""What share of a step is left for computing on more and more GPUs, at each ZeRO stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mimscale.training.planning.communication import Network, predict, step_time
from mimscale.training.planning.counting import recomputed_blocks
from mimscale.training.planning.throughput import flops_per_image
from mimscale.training.planning.zero import Load, plan_way
from mimscale.training.recipe import paper_recipe

# What a way is called: (ZeRO stage, changes to its configuration).
WAYS: dict[str, tuple[int, dict[str, int]]] = {
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "3, small whole": (3, {"stage3_param_persistence_threshold": 100_000}),
    "3, hpZ": (3, {"zero_hpz_partition_size": 8}),
}
# Nodes of 8 GPUs with NVLink, and what joins them: 8 adapters of 400 Gbit/s; one of 100 Gbit/s. Four fifths are reached.
NETWORKS = {"8x400": Network(8, 0.8 * 450e9, 0.8 * 400e9), "1x100": Network(8, 0.8 * 450e9, 0.8 * 12.5e9)}


def rows(
    model: str,
    network: Network,
    gpus: tuple[int, ...],
    batch: int,
    peak: float,
    mfu: float,
    gpu_bytes: float,
    accumulate: int | None = None,
) -> list[dict[str, Any]]:
    """One row for each number of GPUs and each of WAYS; ``accumulate`` micro-batches, or as few as fit.

    Raises:
        RecipeError, DeepSpeedConfigError: no such model, or the batch does not divide over the GPUs.
    """
    checkpointing = model in ("swinv2_h", "swinv2_g")
    recipe = paper_recipe(model, train={"global_batch": batch, "activation_checkpointing": checkpointing})
    flops = flops_per_image(recipe)
    counted = Load.of(recipe, gpus[0], gpu_bytes)
    blocks = recomputed_blocks(recipe) if checkpointing else []
    found = []
    for count in gpus:
        load = replace(counted, gpus=count)
        compute = flops * (4 / 3 if checkpointing else 1) * batch / (count * peak * mfu)
        for name, (stage, changes) in WAYS.items():
            if changes.get("zero_hpz_partition_size", 0) >= count:
                continue
            micro = max(1, batch // count // accumulate) if accumulate else None
            way = plan_way(load, stage, (), micro, changes)
            config = way.config | {"gradient_accumulation_steps": batch // count // way.micro}
            traffic = predict(load.sizes, config, count, blocks)
            took = step_time(traffic, network, compute)
            found.append(
                {
                    "gpus": count,
                    "way": name,
                    "fits": way.fits,
                    "micro": way.micro,
                    "sent": traffic.sent,
                    "compute": took.compute,
                    "communication": took.communication,
                    "efficiency": took.efficiency,
                }
            )
    return found
