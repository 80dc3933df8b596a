"""Where a process stands among the ranks, and small objects between them; alone, these are the identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all of them."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes logs."""
        return self.rank == 0


def alone() -> bool:
    """Whether there is nobody to talk to."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    if alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The first rank's value, on every rank."""
    if alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first_only(action: Callable[[], None]) -> None:
    """Run ``action`` on the first rank; when it raises, every rank raises the same."""
    failure: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            failure = error
    if (failure := from_first(failure)) is not None:
        raise failure
