"""What ends a training: errors whose message is what the user sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from mimscale.data.errors import ShardError
from mimscale.wording import Escaped

Batch = TypeVar("Batch")


class TrainingError(Escaped, RuntimeError):
    """Training cannot continue; the message names the step, the cause and what to do."""


class CorruptedUpdateError(TrainingError):
    """An update went wrong after it had reached the weights."""


class RankLocalError(Escaped, RuntimeError):
    """Something that happened to this rank alone, so that this rank has to report it."""


def read_here(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches that this rank reads for itself.

    Raises:
        RankLocalError: they cannot be read.
    """
    try:
        yield from batches
    except (ShardError, OSError) as error:
        raise RankLocalError(str(error)) from error


class CheckpointError(Escaped, ValueError):
    """A checkpoint that cannot be written or used; the message names it and what to do."""
