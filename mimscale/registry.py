"""Encoders, objectives, targets, tasks and image sources by name: mimscale's own, and those of anyone's package.

A name is registered by a decorator, by an entry point of an installed package (group ``mimscale.encoders`` and so on, whose
name is the registered one), or by importing the packages that a recipe lists under ``plugins``::

    from mimscale.registry import objectives

    @objectives.register("mine")
    class Mine(MIMObjective): ...

What is registered is a class derived from the registry's contract. Nothing is imported before it is asked for, so that names
and settings can be listed without torch.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from mimscale.wording import printable

T = TypeVar("T", bound=type)

PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class RegistryError(ValueError):
    """A name that is unknown or taken, a class that lacks what its contract asks for, or a package that cannot be imported."""


class Registry(Generic[T]):
    """Classes of one kind by name.

    Args:
        kind: what they are, for messages: "objective".
        group: of entry points: "mimscale.objectives".
        contract: the class that all of them are derived from, as "module:attribute".
        own: mimscale's, as name -> "module:attribute".
        settings: the section of a recipe that each of ``own`` takes, likewise, where that is known without importing it.
        attribute: where a class itself has that section.
        needs: what is to be installed for a name of ``own`` whose module lacks a package, by name.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        contract: str,
        own: Mapping[str, str],
        settings: Mapping[str, str] | None = None,
        attribute: str = "Settings",
        needs: Mapping[str, str] | None = None,
    ):
        self.kind, self.group, self.contract, self.attribute = kind, group, contract, attribute
        self._own, self._settings, self._needs = dict(own), dict(settings or {}), dict(needs or {})
        self._registered: dict[str, T] = {}
        self._checked: set[str] = set()

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers the class that it decorates.

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
            self._checked.discard(name)
            return thing

        return decorate

    def _is_own(self, name: str, thing: T) -> bool:
        return getattr(thing, "__module__", None) == self._own[name].partition(":")[0]

    def names(self) -> list[str]:
        """All names, mimscale's own first."""
        return list(dict.fromkeys([*self._own, *self._registered, *(point.name for point in self._points())]))

    def others(self) -> list[str]:
        """The names that are not mimscale's own."""
        return [name for name in self.names() if name not in self._own]

    def _points(self) -> Iterable:
        return _offered(self.group, tuple(sys.path))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def get(self, name: str) -> T:
        """The class that is registered by that name.

        Raises:
            RegistryError: there is none (the nearest name is given where one is near); it lacks what the contract asks for; or
                it needs a package that is not installed.
        """
        if name in self._own:
            if name not in self._registered:
                self._registered[name] = self._import(name)
            return self._registered[name]
        thing = self._registered[name] if name in self._registered else self._load(name)
        if name not in self._checked:
            self._check(name, thing)
            self._checked.add(name)
        return thing

    def settings(self, name: str) -> Any:
        """The section of a recipe that the class of that name takes; of mimscale's own, without importing the class.

        Raises:
            RegistryError: as :meth:`get`, or it has none.
        """
        if name in self._settings:
            return _attribute(self._settings[name])
        thing = self.get(name)
        if (found := getattr(thing, self.attribute, None)) is None:
            raise RegistryError(f"the {self.kind} '{name}' ({_place(thing)}) lacks {self.attribute}")
        return found

    def unknown(self, name: object) -> RegistryError:
        """What to raise for a name that there is not."""
        near = difflib.get_close_matches(str(name)[:100], self.names(), n=1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        return RegistryError(
            f"unknown {self.kind} '{printable(name, 200)}'{hint} There are {', '.join(self.names())}, "
            "and those of packages listed under 'plugins'"
        )

    def _load(self, name: str) -> T:
        """Import what an entry point offers."""
        found = [point for point in self._points() if point.name == name]
        if not found:
            raise self.unknown(name)
        if len({point.value for point in found}) > 1:
            raise RegistryError(
                f"the {self.kind} '{name}' is offered by several packages: {', '.join(sorted(p.value for p in found))}"
            )
        try:
            return self.register(name)(found[0].load())
        except (ImportError, AttributeError) as error:
            raise RegistryError(f"the {self.kind} '{name}' ({found[0].value}) cannot be imported: {error}") from error

    def _import(self, name: str) -> T:
        try:
            return _attribute(self._own[name])
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("mimscale") or name not in self._needs:
                raise
            raise RegistryError(
                f"{self.kind} {name} needs {error.name}, which is not installed: pip install '{self._needs[name]}'"
            ) from None

    def _check(self, name: str, thing: T) -> None:
        contract = _attribute(self.contract)
        if not isinstance(thing, type) or not issubclass(thing, contract):
            raise RegistryError(
                f"the {self.kind} '{name}' ({_place(thing)}) is not derived from {self.contract.replace(':', '.')}"
            )
        if lacking := sorted(getattr(thing, "__abstractmethods__", ())):
            raise RegistryError(
                f"the {self.kind} '{name}' ({_place(thing)}) lacks {', '.join(lacking)}, which every {self.kind} has: "
                f"see {self.contract.replace(':', '.')}"
            )


@lru_cache(maxsize=64)
def _offered(group: str, path: tuple[str, ...]) -> tuple:
    """Entry points of a group; to look for them takes long where many packages are installed."""
    return tuple(entry_points(group=group))


def _attribute(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _same(a: object, b: object) -> bool:
    """Whether ``b`` is ``a`` once more, as after a reload of its module."""
    return a is b or _place(a) == _place(b)


def _place(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def load_plugins(packages: object) -> None:
    """Import packages that register things, by their names: a file that names them can so run what is installed, and no more.

    Raises:
        RegistryError: not a list of names; one is not there, or cannot be imported; the message says why.
    """
    if not isinstance(packages, list | tuple):
        raise RegistryError(f"plugins: must be a list of packages, as [my_package], not {printable(repr(packages))}")
    for package in packages:
        if not isinstance(package, str) or not PACKAGE.fullmatch(package):
            raise RegistryError(
                f"plugins: {printable(repr(package))} is no name of a package, such as my_package or my_package.encoders"
            )
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
        except RegistryError:
            raise
        except Exception as error:  # whatever a package of somebody else's does when it is imported
            kind, said = type(error).__name__, printable(error)
            raise RegistryError(f"plugins: {package} cannot be imported: {kind}: {said}") from error


_SWIN = ("swinv2_s", "swinv2_b", "swinv2_l", "swinv2_h", "swinv2_g")
_VIT = ("vit_b", "vit_l", "vit_h")

encoders: Registry = Registry(
    "encoder",
    "mimscale.encoders",
    "mimscale.models.encoder:Encoder",
    dict.fromkeys(_SWIN, "mimscale.models.swin_v2:SwinTransformerV2")
    | dict.fromkeys(_VIT, "mimscale.models.vit:VisionTransformer"),
    dict.fromkeys(_SWIN, "mimscale.models.settings:SwinSettings")
    | dict.fromkeys(_VIT, "mimscale.models.settings:VitSettings"),
)
objectives: Registry = Registry(
    "objective",
    "mimscale.objectives",
    "mimscale.mim.objective:MIMObjective",
    {"simmim": "mimscale.mim.simmim:SimMIM", "mae": "mimscale.mim.mae:MAE"},
    {"simmim": "mimscale.mim.settings:SimMIMSettings", "mae": "mimscale.mim.settings:MAESettings"},
)
targets: Registry = Registry(
    "target",
    "mimscale.targets",
    "mimscale.mim.targets:Target",
    {
        "normalised-pixels": "mimscale.mim.targets:NormalisedPixels",
        "patch-normalised-pixels": "mimscale.mim.targets:PatchNormalisedPixels",
        "raw-pixels": "mimscale.mim.targets:RawPixels",
    },
)
tasks: Registry = Registry(
    "task",
    "mimscale.tasks",
    "mimscale.transfer.task:TransferTask",
    {
        "classification": "mimscale.transfer.classification.task:Classification",
        "detection": "mimscale.transfer.detection.task:Detection",
        "segmentation": "mimscale.transfer.segmentation.task:Segmentation",
    },
    {
        "classification": "mimscale.transfer.classification.recipe:ClassificationRecipe",
        "detection": "mimscale.transfer.detection.recipe:DetectionRecipe",
        "segmentation": "mimscale.transfer.segmentation.recipe:SegmentationRecipe",
    },
    attribute="schema",
    needs={"detection": "mimscale[dense]", "segmentation": "mimscale[dense]"},
)
# In the order in which they are asked whether a path is theirs.
sources: Registry = Registry(
    "source",
    "mimscale.sources",
    "mimscale.data.build.source:Source",
    {
        "shard-folder": "mimscale.data.build.sources.shard_folder:ShardFolder",
        "class-tars": "mimscale.data.build.sources.imagenet_archives:ClassTars",
        "image-folder": "mimscale.data.build.sources.image_folder:ImageFolder",
        "annotated-json": "mimscale.data.build.sources.annotated_json:AnnotatedJson",
        "plain-tar": "mimscale.data.build.sources.imagenet_archives:PlainTar",
    },
)
