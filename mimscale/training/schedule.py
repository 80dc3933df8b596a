"""Learning rate as a pure function of the step (section 3.4)."""

from __future__ import annotations

import math

from mimscale.training.recipe import Schedule


def decay_step(schedule: Schedule, iterations: int) -> int:
    """First step (0-based) at the lower rate: where a run of this length leaves the trunk that all lengths share."""
    return math.ceil(round(iterations * schedule.decay_at, 6))


def learning_rate(schedule: Schedule, peak: float, iterations: int, step: int) -> float:
    """Rate of the update that turns the weights after ``step`` updates into those after ``step + 1``.

    Args:
        schedule: warm-up and shape; with ``kind: step``, nothing before :func:`decay_step` depends on ``iterations``.
        peak: rate at the end of the warm-up.
        iterations: length of the run.
        step: updates already made, 0-based.
    """
    if step < schedule.warmup:
        return schedule.warmup_lr + (peak - schedule.warmup_lr) * step / schedule.warmup
    if schedule.kind == "step":
        return peak * (schedule.decay_factor if step >= decay_step(schedule, iterations) else 1.0)
    progress = (step - schedule.warmup) / max(1, iterations - schedule.warmup)
    floor = peak * schedule.final_lr_ratio
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
