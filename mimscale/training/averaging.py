"""A moving average of the weights, kept by the optimizer as one more state beside Adam's moments.

So it is partitioned, saved and restored as they are, at every ZeRO stage and precision.
"""

from __future__ import annotations

from typing import Any

import torch

AVERAGE = "average"


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
