"""Learning rate as a pure function of the step (section 3.4)."""

from __future__ import annotations

import math

from mimscale.training.recipe import Schedule


def decay_steps(schedule: Schedule, iterations: int) -> list[int]:
    """First steps (0-based) at each lower rate."""
    shares = schedule.decay_at if isinstance(schedule.decay_at, tuple) else (schedule.decay_at,)
    return [math.ceil(round(iterations * share, 6)) for share in shares]


def decay_step(schedule: Schedule, iterations: int) -> int:
    """First step (0-based) at a lower rate: where a run of this length leaves the trunk that all lengths share."""
    return min(decay_steps(schedule, iterations))


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
        return peak * schedule.decay_factor ** sum(step >= lower for lower in decay_steps(schedule, iterations))
    progress = min(1.0, (step - schedule.warmup) / max(1, iterations - schedule.warmup))
    floor = peak * schedule.final_lr_ratio
    left = 1 - progress if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (peak - floor) * left
