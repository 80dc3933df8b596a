"""How far a run is and how it fares, read from its folder by anyone who can see it."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from mimscale.training.faults.watchdog import read_heartbeats
from mimscale.training.metrics import MetricsLog, duration
from mimscale.training.run_folder import read_recipe_value, saved_steps
from mimscale.wording import counted


@dataclass(frozen=True)
class Status:
    """One run: its state, where it is, and a line on its health."""

    run: Path
    state: str
    step: int
    total: int | None
    figures: str
    health: str

    def __str__(self) -> str:
        share = f" ({self.step / self.total:.0%})" if self.total else ""
        lines = [f"{self.run}: {self.state}, step {self.step}{f'/{self.total}' if self.total else ''}{share}"]
        return "\n  ".join([*lines, *(text for text in (self.figures, self.health) if text)])


def status(run: Path) -> Status:
    """Look at one run folder.

    Raises:
        FileNotFoundError: it is no run folder.
    """
    if not (run / "recipe.yaml").exists():
        raise FileNotFoundError(f"{run} is no run folder: it has no recipe.yaml")
    total = read_recipe_value(run / "recipe.yaml", "train.iterations")
    records = MetricsLog(run / "metrics.jsonl").read()
    training = [record for record in records if "loss" in record]
    step = records[-1]["step"] if records else 0
    state, health = _state(run)
    return Status(run, state, step, total, _figures(run, training, records, step, total), health)


def _state(run: Path) -> tuple[str, str]:
    if (run / "result.json").exists():
        return "finished", ""
    end = run / "heartbeat" / "end.json"
    beats = read_heartbeats(run / "heartbeat")
    now = time.time()
    if end.exists():
        try:
            said = json.loads(end.read_text())
            return said["state"], f"{duration(now - said['time'])} ago: {said['message']}"
        except (OSError, ValueError, KeyError):
            pass
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


def _figures(run: Path, training: list[dict], records: list[dict], step: int, total: int | None) -> str:
    parts = []
    if training:
        last = training[-20:]
        parts.append(f"loss {statistics.median(record['loss'] for record in last):.4f}")
        rate = statistics.median(record["images_per_s"] for record in last)
        parts.append(f"{rate:.1f} images/s")
        batch = read_recipe_value(run / "recipe.yaml", "train.global_batch")
        if total and batch and rate > 0 and step < total:
            parts.append(f"ETA {duration((total - step) * batch / rate)}")
    validations = [record for record in records if "val_loss" in record]
    if validations:
        parts.append(f"validation {validations[-1]['val_loss']:.4f} at step {validations[-1]['step']}")
    saved = saved_steps(run)
    parts.append(f"checkpoint of step {saved[-1]}" if saved else "no checkpoint yet")
    return " | ".join(parts)
