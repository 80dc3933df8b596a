"""Training: the recipe, the DeepSpeed engine, the loop, and what a run writes.

A task of one's own is a subclass of ``Task``, and ``run`` trains it. Both are loaded when they are first used: torch and
DeepSpeed take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimscale.training.loop import run
    from mimscale.training.task import Task

__all__ = ["Task", "run"]
_HOME = {"Task": "task", "run": "loop"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
