"""Encoders, objectives, targets, tasks and image sources by name: mimscale's own, and those of anyone's package.

A name is registered by a decorator, by an entry point of an installed package (group ``mimscale.encoders`` and so on, whose
name is the registered one), or by importing the packages that a recipe lists under ``plugins``::

    from mimscale.registry import objectives

    @objectives.register("mine")
    class Mine(MIMObjective): ...

Nothing is imported before it is asked for, so that names can be listed without torch.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class RegistryError(ValueError):
    """A name that is unknown or taken, or a package that cannot be imported; the message says which there are."""


class Registry(Generic[T]):
    """Things of one kind by name.

    Args:
        kind: what they are, for messages: "objective".
        group: of entry points: "mimscale.objectives".
        own: mimscale's, as name -> "module:attribute".
        needs: what is to be installed for a name of ``own`` whose module lacks a package, by name.
    """

    def __init__(self, kind: str, group: str, own: Mapping[str, str], needs: Mapping[str, str] | None = None):
        self.kind, self.group = kind, group
        self._own, self._needs = dict(own), dict(needs or {})
        self._registered: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers what it decorates.

        Raises:
            RegistryError: the name is taken.
        """

        def decorate(thing: T) -> T:
            taken = self._registered.get(name)
            if taken is not None and not _same(taken, thing):
                raise RegistryError(
                    f"the {self.kind} '{name}' is registered twice: by {_place(taken)} and {_place(thing)}"
                )
            if name in self._own and not self._is_own(name, thing):
                raise RegistryError(
                    f"the {self.kind} '{name}' of {_place(thing)} is mimscale's own name; choose another"
                )
            self._registered[name] = thing
            return thing

        return decorate

    def _is_own(self, name: str, thing: T) -> bool:
        return getattr(thing, "__module__", None) == self._own[name].partition(":")[0]

    def names(self) -> list[str]:
        """All names, mimscale's own first."""
        return list(dict.fromkeys([*self._own, *self._registered, *(point.name for point in self._points())]))

    def _points(self) -> Iterable:
        return entry_points(group=self.group)

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def get(self, name: str) -> T:
        """What is registered by that name.

        Raises:
            RegistryError: nothing is (the nearest name is given where one is near), or it needs a package that is not
                installed.
        """
        if name in self._registered:
            return self._registered[name]
        if name in self._own:
            return self._registered.setdefault(name, self._import(name))
        found = [point for point in self._points() if point.name == name]
        if len({point.value for point in found}) > 1:
            raise RegistryError(
                f"the {self.kind} '{name}' is offered by several packages: {', '.join(sorted(p.value for p in found))}"
            )
        if not found:
            near = difflib.get_close_matches(str(name), self.names(), n=1, cutoff=0.6)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise RegistryError(f"unknown {self.kind} '{name}'{hint} There are {', '.join(self.names())}")
        try:
            return self.register(name)(found[0].load())
        except (ImportError, AttributeError) as error:
            raise RegistryError(f"the {self.kind} '{name}' ({found[0].value}) cannot be imported: {error}") from error

    def _import(self, name: str) -> T:
        module, _, attribute = self._own[name].partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("mimscale") or name not in self._needs:
                raise
            raise RegistryError(
                f"{self.kind} {name} needs {error.name}, which is not installed: pip install '{self._needs[name]}'"
            ) from None


def _same(a: object, b: object) -> bool:
    """Whether ``b`` is ``a`` once more, as after a reload of its module."""
    return a is b or _place(a) == _place(b)


def _place(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def load_plugins(packages: Iterable[str]) -> None:
    """Import packages that register things.

    Raises:
        RegistryError: one is not there, or cannot be imported; the message says why.
    """
    for package in packages:
        if package in sys.modules:
            continue
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name and (package == error.name or package.startswith(f"{error.name}.")):
                raise RegistryError(
                    f"plugins: there is no package '{package}'; install it, or put the folder that holds it on PYTHONPATH"
                ) from None
            raise RegistryError(f"plugins: {package} needs {error.name}, which is not installed") from error


encoders: Registry = Registry(
    "encoder",
    "mimscale.encoders",
    {
        name: "mimscale.models.swin_v2:SwinTransformerV2"
        for name in ("swinv2_s", "swinv2_b", "swinv2_l", "swinv2_h", "swinv2_g")
    }
    | {name: "mimscale.models.vit:VisionTransformer" for name in ("vit_b", "vit_l", "vit_h")},
)
objectives: Registry = Registry(
    "objective", "mimscale.objectives", {"simmim": "mimscale.mim.simmim:SimMIM", "mae": "mimscale.mim.mae:MAE"}
)
targets: Registry = Registry("target", "mimscale.targets", {})
tasks: Registry = Registry(
    "task",
    "mimscale.tasks",
    {
        "classification": "mimscale.transfer.classification.task:Classification",
        "detection": "mimscale.transfer.detection.task:Detection",
        "segmentation": "mimscale.transfer.segmentation.task:Segmentation",
    },
    needs={"detection": "mimscale[dense]", "segmentation": "mimscale[dense]"},
)
sources: Registry = Registry("source", "mimscale.sources", {})
