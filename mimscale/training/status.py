"""How far a run is and how it fares, read from its folder by anyone who can see it."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimscale.files import is_whole
from mimscale.training.faults.watchdog import read_end, read_heartbeats
from mimscale.training.metrics import MetricsLog, duration
from mimscale.training.recipe import RecipeError
from mimscale.training.run_folder import RunFolder, read_recipe_value, saved_steps
from mimscale.wording import counted, printable

# Of metrics.jsonl: a hundred thousand steps, so that the longest run's status takes no longer than others'.
LAST_BYTES = 2**24


@dataclass(frozen=True)
class Status:
    """One run: its state, where it is, a line on its health, and what in its folder is damaged."""

    run: Path
    state: str
    step: int
    total: int | None
    figures: str
    health: str
    damage: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = f" ({self.step / self.total:.0%})" if self.total else ""
        lines = [
            f"{printable(self.run)}: {self.state}, step {self.step}{f'/{self.total}' if self.total else ''}{share}"
        ]
        damage = [f"damaged: {text}" for text in self.damage]
        return "\n  ".join([*lines, *(text for text in (self.figures, self.health) if text), *damage])


def status(run: Path) -> Status:
    """Look at one run folder; what is damaged in it is named, and the rest shown.

    Raises:
        FileNotFoundError: it is no run folder.
    """
    if not os.path.lexists(run / "recipe.yaml"):
        raise FileNotFoundError(f"{printable(run)} is no run folder: it has no recipe.yaml")
    damage: list[str] = []
    total, batch = _sizes(run / "recipe.yaml", damage)
    logged = _logged(run / "metrics.jsonl", damage)
    state, health = _state(run, damage)
    return Status(run, state, logged.step, total, _figures(run, logged, total, batch), health, tuple(damage))


def _sizes(recipe: Path, damage: list[str]) -> tuple[int | None, int | None]:
    """Steps and images a step."""
    found: list[int | None] = []
    for key in ("train.iterations", "train.global_batch"):
        try:
            value = read_recipe_value(recipe, key)
        except RecipeError as error:
            damage.append(str(error))
            return None, None
        if value is not None and not is_whole(value, 1):
            damage.append(f"{printable(recipe)} has {key}={printable(value, 60)}, which is no number of them")
        found.append(value if is_whole(value, 1) else None)
    return found[0], found[1]


@dataclass
class _Logged:
    """The last lines of ``metrics.jsonl``."""

    step: int = 0
    training: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=20))
    validation: dict[str, Any] | None = None


def _logged(path: Path, damage: list[str]) -> _Logged:
    log, found = MetricsLog(path), _Logged()
    for record in log.records(LAST_BYTES):
        found.step = record["step"]
        if "loss" in record:
            found.training.append(record)
        if "val_loss" in record:
            found.validation = record
    damage += [log.damage] if log.damage else []
    return found


def _state(run: Path, damage: list[str]) -> tuple[str, str]:
    if os.path.lexists(run / "result.json"):
        if RunFolder(run).finished() is not None:
            return "finished", ""
        damage.append(f"{printable(run / 'result.json')}; the same command writes it anew")
    beats = read_heartbeats(run / "heartbeat", damage)
    now = time.time()
    try:
        if (end := read_end(run / "heartbeat")) is not None:
            return printable(end.state, 60), f"{duration(now - end.time)} ago: {printable(end.message, 2000)}"
    except OSError as error:
        damage.append(str(error))
    if not beats:
        return "not started", ""
    silent = [beat for beat in beats if beat.is_silent(now)]
    if len(silent) == len(beats):
        newest = max(beats, key=lambda beat: beat.beat)
        return "died without reporting an error", f"last sign of life {duration(now - newest.beat)} ago: {newest.place}"
    if silent:
        return "stalled", "no life: " + "; ".join(beat.place for beat in silent[:4])
    slowest = min(beats, key=lambda beat: (beat.step, beat.since))
    return "running", f"{counted(len(beats), 'rank')}; {slowest.place} for {duration(now - slowest.since)}"


def _figures(run: Path, logged: _Logged, total: int | None, batch: int | None) -> str:
    parts = []
    if logged.training:
        parts.append(f"loss {_shown(statistics.median(record['loss'] for record in logged.training), 4)}")
        rates = [record["images_per_s"] for record in logged.training if "images_per_s" in record]
        rate = statistics.median(rates) if rates else 0
        parts += [f"{_shown(rate, 1)} images/s"] if rates else []
        if total and batch and rate > 0 and logged.step < total:
            parts.append(f"ETA {duration((total - logged.step) * batch / rate)}")
    if logged.validation:
        parts.append(f"validation {_shown(logged.validation['val_loss'], 4)} at step {logged.validation['step']}")
    saved = saved_steps(run)
    parts.append(f"checkpoint of step {saved[-1]}" if saved else "no checkpoint yet")
    return " | ".join(parts)


def _shown(value: float, digits: int) -> str:
    """A number with so many digits behind the point, however large it is."""
    return f"{value:.{digits}f}" if abs(value) < 1e9 else f"{value:.3g}"
