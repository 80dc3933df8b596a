"""What to do about a batch that would corrupt the run: stop, leave its update out, or go back before it."""

from __future__ import annotations

import json
import re
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mimscale.files import UnfitFile, read_json, write_text
from mimscale.training.errors import CheckpointError
from mimscale.wording import printable

if TYPE_CHECKING:
    from mimscale.training.recipe import Train

WINDOW = 100
# Before this many losses are known, their median says little.
LEAST = 20
# More bad batches than this in a row are no accident.
MOST_IN_A_ROW = 10
# Of all batches; a run that leaves more out is not to be saved by leaving out.
MOST_LEFT_OUT = 0.1
_STEP = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Apply:
    """Make the update."""


@dataclass(frozen=True)
class Skip:
    """Leave this batch's update out; ``known`` where the run has done so before."""

    reason: str
    known: bool = False


@dataclass(frozen=True)
class RollBack:
    """Go back to a checkpoint of at most ``to`` updates, and leave the batches since out."""

    reason: str
    to: int


@dataclass(frozen=True)
class Stop:
    """End the run; ``ranks`` are where the cause lies, as far as that is known."""

    reason: str
    ranks: tuple[int, ...] = ()


class LeftOut:
    """The steps whose batches a run leaves out, kept in ``left_out.json`` so that every later start does so too.

    A step is counted by the updates before it, from 0, and counts on though its update is left out.

    Args:
        path: of the file.
        writes: whether this rank is the one that writes it.

    Raises:
        CheckpointError: the file cannot be read.
    """

    def __init__(self, path: Path, writes: bool):
        self.path, self.writes = path, writes
        self.reasons: dict[int, str] = {}
        try:
            self.reasons = _read_reasons(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CheckpointError(
                f"{printable(path)} cannot be read ({printable(error.strerror)}); it says which batches the run leaves out: "
                f"restore it, or remove it to train on them"
            ) from None

    def add(self, steps: range, reason: str) -> None:
        """Leave ``steps`` out from now on."""
        self.reasons |= {step: reason for step in steps}
        if self.writes:
            write_text(self.path, json.dumps({str(step): reason for step, reason in sorted(self.reasons.items())}))


def _read_reasons(path: Path) -> dict[int, str]:
    """Reasons by step.

    Raises:
        UnfitFile: the file holds something else.
        OSError: it cannot be read.
    """
    values = read_json(path)
    if not isinstance(values, dict) or not all(_STEP.fullmatch(step) for step in values):
        raise UnfitFile(path, "does not hold reasons by step")
    return {int(step): printable(reason, 1000) for step, reason in values.items()}


class SpikePolicy:
    """Decides about each batch before its update: the same on every rank, since the mean loss is.

    A spike is told from the median of the losses before it.

    Args:
        train: ``on_spike``, ``spike_factor`` and ``rollback_steps`` count.
        left_out: what the run leaves out already.
        losses: the last losses before this start.
    """

    def __init__(self, train: Train, left_out: LeftOut, losses: list[float]):
        self.train, self.left_out = train, left_out
        self.recent: deque[float] = deque(losses, maxlen=WINDOW)
        self.in_a_row = 0

    def judge(self, step: int, loss: float, bad_ranks: tuple[int, ...] = ()) -> Apply | Skip | RollBack | Stop:
        """What to do about a batch.

        Args:
            step: updates before it.
            loss: mean over the global batch.
            bad_ranks: those whose own loss is not finite.
        """
        problem = (
            f"the loss became {loss} on rank{'s' * (len(bad_ranks) > 1)} {_listed(bad_ranks)}" if bad_ranks else None
        )
        if (known := self.left_out.reasons.get(step)) is not None:
            return Skip(problem or known, known=True)
        problem = problem or self._spike(loss)
        if problem is None:
            self.in_a_row = 0
            self.recent.append(loss)
            return Apply()
        if self.train.on_spike != "skip":
            return self._give_up(step, problem, bad_ranks, self.train.rollback_steps)
        self.in_a_row += 1
        self.left_out.add(range(step, step + 1), problem)
        if self.in_a_row > MOST_IN_A_ROW:
            return Stop(f"{self.in_a_row} batches in a row were left out")
        return Skip(problem)

    def judge_corruption(self, step: int, reason: str) -> RollBack | Stop:
        """What to do about an update that has corrupted the weights: that of the batch after ``step`` updates."""
        return self._give_up(step, reason, (), 1 if self.train.on_spike == "skip" else self.train.rollback_steps)

    def _give_up(self, step: int, reason: str, ranks: tuple[int, ...], back: int) -> RollBack | Stop:
        return Stop(reason, ranks) if self.train.on_spike == "stop" else RollBack(reason, max(0, step + 1 - back))

    def _spike(self, loss: float) -> str | None:
        factor = self.train.spike_factor
        if factor is None or len(self.recent) < LEAST:
            return None
        usual = statistics.median(self.recent)
        if loss <= factor * usual:
            return None
        return f"the loss jumped to {loss:.4g}, over {factor:g} times the median {usual:.4g} of the last {len(self.recent)}"

    def leave_out(self, back: RollBack, step: int) -> None:
        """Leave out the batches that a roll-back from the batch after ``step`` updates goes back before."""
        self.left_out.add(range(back.to, step + 1), back.reason)

    def is_hopeless(self, back: RollBack, step: int) -> bool:
        """Whether too many batches are left out by now, not counting those of this roll-back."""
        return len(self.left_out.reasons) > MOST_LEFT_OUT * self.train.iterations + step + 1 - back.to


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
