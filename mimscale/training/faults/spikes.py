"""What to do about a batch that would spoil the run: stop, leave its update out, or go back before it."""

from __future__ import annotations

import json
import statistics
from collections import deque
from pathlib import Path

from mimscale.training.errors import CheckpointError
from mimscale.training.run_folder import write_beside

WINDOW = 100
# Before this many losses are known, their median says little.
LEAST = 20
# More bad batches than this in a row are no accident.
MOST_IN_A_ROW = 10


class RollBack(Exception):
    """Go back to a checkpoint of at most ``to`` updates, and leave the batches of steps ``to`` to ``step`` out."""

    def __init__(self, to: int, step: int, reason: str):
        super().__init__(reason)
        self.to, self.step, self.reason = to, step, reason


class LeftOut:
    """The steps whose batches a run leaves out, kept in ``left_out.json`` so that every later start does so too.

    A step is counted by the updates before it, from 0, and counts on though its update is left out.
    """

    def __init__(self, path: Path):
        self.path = path
        self.reasons: dict[int, str] = {}
        if path.exists():
            try:
                self.reasons = {int(step): str(reason) for step, reason in json.loads(path.read_text()).items()}
            except (OSError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{path} cannot be read ({error}); it says which batches the run leaves out: restore it, or remove it "
                    f"to train on them"
                ) from None

    def __contains__(self, step: int) -> bool:
        return step in self.reasons

    def add(self, steps: range, reason: str, write: bool) -> None:
        """Leave ``steps`` out from now on; ``write`` on the first rank."""
        self.reasons |= {step: reason for step in steps}
        if write:
            write_beside(self.path, json.dumps({str(step): reason for step, reason in sorted(self.reasons.items())}))


class SpikeJudge:
    """Compares each loss with the median of those before it. The same on every rank, since the mean loss is.

    Args:
        factor: times the median is a spike; ``None`` looks for none.
        losses: the last losses before this start.
    """

    def __init__(self, factor: float | None, losses: list[float]):
        self.factor = factor
        self.recent: deque[float] = deque(losses, maxlen=WINDOW)
        self.in_a_row = 0

    def __call__(self, loss: float) -> str | None:
        """What is wrong with a finite loss, or ``None``."""
        if self.factor is None or len(self.recent) < LEAST:
            return None
        usual = statistics.median(self.recent)
        if loss <= self.factor * usual:
            return None
        return f"the loss jumped to {loss:.4g}, over {self.factor:g} times the median {usual:.4g} of the last {len(self.recent)}"

    def note(self, loss: float, refused: bool) -> bool:
        """Remember the step; ``False`` once too many batches in a row were refused."""
        self.in_a_row = self.in_a_row + 1 if refused else 0
        if not refused:
            self.recent.append(loss)
        return self.in_a_row <= MOST_IN_A_ROW
