"""Learning rate as a pure function of the step (section 3.4)."""

from __future__ import annotations

import math

from mimscale.training.recipe import RunRecipe, Schedule

# Images of the batch that all rates in the released configurations are for.
RELEASED_BATCH = 512


def decay_steps(schedule: Schedule, iterations: int) -> list[int]:
    """First steps (0-based) at each lower rate."""
    shares = schedule.decay_at if isinstance(schedule.decay_at, tuple) else (schedule.decay_at,)
    return [math.ceil(round(iterations * share, 6)) for share in shares]


def decay_step(schedule: Schedule, iterations: int) -> int:
    """First step (0-based) at a lower rate: where a run of this length leaves the trunk that all lengths share."""
    return min(decay_steps(schedule, iterations))


def learning_rate(
    schedule: Schedule,
    peak: float,
    iterations: int,
    step: int,
    scale: float = 1.0,
    warmup_lr: float | None = None,
) -> float:
    """Rate of the update that turns the weights after ``step`` updates into those after ``step + 1``.

    Args:
        schedule: warm-up and shape; with ``kind: step``, nothing before :func:`decay_step` depends on ``iterations``.
        peak: rate at the end of the warm-up.
        iterations: length of the run.
        step: updates already made, 0-based.
        scale: of the peak alone: the warm-up still starts at ``warmup_lr``, and a cosine or a line still ends at
            ``final_lr_ratio`` of the whole peak.
        warmup_lr: where the warm-up starts; by default the schedule's.
    """
    top = peak * scale
    if step < schedule.warmup:
        start = schedule.warmup_lr if warmup_lr is None else warmup_lr
        return start + (top - start) * step / schedule.warmup
    if schedule.kind == "step":
        return top * schedule.decay_factor ** sum(step >= lower for lower in decay_steps(schedule, iterations))
    progress = min(1.0, (step - schedule.warmup) / max(1, iterations - schedule.warmup))
    floor = peak * schedule.final_lr_ratio
    left = 1 - progress if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (top - floor) * left


def rate_of(recipe: RunRecipe, step: int, scale: float = 1.0) -> float:
    """Rate at which a recipe's update ``step`` (0-based) moves the parameters of a group.

    Args:
        recipe: its schedule, peak and length, and what the two keys for it say: ``schedule.released`` and
            ``finetune.layer_decay_of``.
        step: updates already made.
        scale: the group's ``lr_scale``.
    """
    peak, start = recipe.learning_rate, recipe.schedule.warmup_lr
    if recipe.steps_as_released:
        # The released code sets the rate after the update, from that update's own number, so that the first one counts twice.
        step, start = max(0, step - 1), start * recipe.train.global_batch / RELEASED_BATCH
    inner, outer = (scale, 1.0) if recipe.scales_peak_alone else (1.0, scale)
    return outer * learning_rate(recipe.schedule, peak, recipe.train.iterations, step, inner, start)
