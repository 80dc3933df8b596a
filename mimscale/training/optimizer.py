"""AdamW's parameter groups: what decays and what does not."""

from __future__ import annotations

from typing import Any

from torch import nn

from mimscale.training.recipe import Recipe


def decay_groups(objective: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Two groups, decayed and not.

    Not decayed: 1-D parameters, biases, the mask token, and (``fidelity: paper``) the bias MLP and the logit scale. The
    released pre-training code decays those two by a naming slip (``fidelity: released``).
    """
    exempt = {f"model.{name}" for name in objective.model.no_weight_decay(fidelity=recipe.fidelity)}  # type: ignore
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in objective.named_parameters():
        # Under ZeRO-3 the parameter here is an empty placeholder; its real shape is beside it.
        ndim = len(getattr(parameter, "ds_shape", parameter.shape))
        (kept if name in exempt or ndim <= 1 or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.optimizer.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
