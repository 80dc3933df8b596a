"""AdamW: which parameters decay, and a moving average of the weights as one more state beside its moments.

So the average is partitioned, saved and restored as they are, at every ZeRO stage and precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mimscale.training.recipe import Recipe

AVERAGE = "average"


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


class AveragingAdamW(torch.optim.AdamW):
    """AdamW whose state also has an exponential moving average of the fp32 weights.

    Early averages would be of hardly anything but the starting weights, so after t updates the decay is at most
    (1 + t) / (10 + t).

    Args:
        groups: parameter groups.
        decay: share of the average that stays at each update.
        **settings: AdamW's own.
    """

    def __init__(self, groups: list[dict[str, Any]], decay: float, **settings: Any):
        super().__init__(groups, **settings)
        self.average_decay = decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of the weights, then of their average."""
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    warm = (1 + state["step"]) / (10 + state["step"])
                    weight = (1 - warm.clamp(max=self.average_decay)).to(parameter.device, parameter.dtype)
                    state[AVERAGE].lerp_(parameter, weight)
        return loss


@contextmanager
def without_gradients(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While it lasts, the optimizer's ``step`` finds no gradients, so that it changes neither weights nor its own state."""
    taken: list[list[tuple[torch.Tensor, torch.Tensor | None]]] = []  # a step may call that of its base class

    def take(*_: Any) -> None:
        taken.append([(weight, weight.grad) for group in optimizer.param_groups for weight in group["params"]])
        for weight, _gradient in taken[-1]:
            weight.grad = None

    def give_back(*_: Any) -> None:
        for weight, gradient in taken.pop():
            weight.grad = gradient

    hooks = optimizer.register_step_pre_hook(take), optimizer.register_step_post_hook(give_back)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
