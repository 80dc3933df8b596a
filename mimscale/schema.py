"""Configuration as data: YAML files and ``key=value`` overrides, checked against keys that are described.

Recipes and studies alike are read here. A document is a :class:`Document` of :class:`Section` classes whose fields are made
by :func:`key`, so that every key has a default, a description, and where it comes from; :func:`describe` lists them.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from mimscale.files import UnfitFile, read_text
from mimscale.resources import Kind
from mimscale.wording import Escaped, counted, printable

# Suggestions are for typing errors; what differs more than this is another word.
NEAR = 0.7
LISTED = 20
# Of what a user wrote, in a message.
SHOWN = 200
# Of a document: bytes of its file, values in it (each as often as it is referred to), how deep they lie, and the parts of a
# key's path.
LARGEST, VALUES, DEEPEST, PARTS = 2**18, 20_000, 40, 30
# Parts of a path that the user chooses: the key of a mapping, the place in a list.
NAME, NUMBER = "NAME", "N"
COMMAND_LINE = "the command line"
# What stands at the top of each kind of file, and what takes it.
KINDS = {
    "study": (("datasets", "models", "pretrain"), "study"),
    "pre-training recipe": (("mim", "fidelity"), "pretrain"),
    "fine-tuning recipe": (("task", "finetune", "mix", "detector"), "finetune"),
}


class SchemaError(Escaped, ValueError):
    """A file or an override that cannot be used; the message names the key and what to write instead."""


@lru_cache(maxsize=1024)
def _takes_truth(annotation: Any) -> bool:
    """Whether true or false is among the values of a key, or anything is."""
    if typing.get_origin(annotation) is Literal:
        return any(isinstance(value, bool) for value in typing.get_args(annotation))
    arguments = typing.get_args(annotation)
    arguments = arguments[:1] if typing.get_origin(annotation) is Annotated else arguments
    return annotation in (bool, Any) or any(_takes_truth(argument) for argument in arguments if argument is not ...)


def _as_text(value: Any) -> Any:
    return value if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value


def _expanded(text: str) -> str:
    return os.path.expanduser(text) if text.startswith("~") else text  # noqa: PTH111 - of no such user it is as it stands


# What nobody's machine, data or patience reaches: where a key says no less, whole numbers are bounded by the first, and the
# others by the second.
MOST, GREATEST = 10**9, 1e9
Positive = Annotated[int, Field(gt=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Amount = Annotated[float, Field(gt=0, le=GREATEST)]
AmountOrZero = Annotated[float, Field(ge=0, le=GREATEST)]
Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
# Side of images, pixels; channels of a map or a token; images of a batch; processes.
Side = Annotated[int, Field(gt=0, le=4096)]
Width = Annotated[int, Field(gt=0, le=16_384)]
Batch = Annotated[int, Field(gt=0, le=2**24)]
Processes = Annotated[int, Field(gt=0, le=1024)]
Workers = Annotated[int, Field(ge=0, le=1024)]
# What is subtracted from the channels of an image, which are 0 to 1, and what they are divided by.
Mean = Annotated[float, Field(ge=-1000, le=1000)]
Deviation = Annotated[float, Field(gt=0, le=1000)]
Means = tuple[Mean, Mean, Mean]
Deviations = tuple[Deviation, Deviation, Deviation]
# Of a moving average.
Decay = Annotated[float, Field(ge=0, lt=1)]
# A name that looks like a number, as 10 or 2024 in YAML.
Word = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | int | float)]
# A file or folder; ~ is the user's home.
PLACE = AfterValidator(_expanded)


def _in_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise PydanticCustomError("order", "should have the smaller number first")
    return pair


# From the smaller to the greater.
IN_ORDER = AfterValidator(_in_order)
Span = Annotated[tuple[Amount, Amount], IN_ORDER]
Shares = Annotated[tuple[Share, Share], IN_ORDER]
Place = Annotated[Word, PLACE]


def key(
    default: Any, about: str, origin: str = "ours", *, free: bool = False, branch: bool = False, **settings: Any
) -> Any:
    """A described key of a section.

    Args:
        default: what it is where it is not given; ``...`` where it has to be given.
        about: what it does, units included, in a sentence.
        origin: where the default comes from: a section or table of the paper, the released code, or ``ours``.
        free: whether it may differ between two starts of one run, because it changes what is written and never a loss.
        branch: whether it may differ between a run and its trunk (``train.branch_from``), whose past it shares.
        **settings: bounds and whatever else pydantic's ``Field`` takes.
    """
    extra: dict[str, Any] = {"origin": origin, "free": free, "branch": branch}
    return Field(default, description=about, json_schema_extra=extra, **settings)


class Section(BaseModel):
    """One block of a document: unknown keys are errors, values never change after the check."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True, str_max_length=4096
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        """YAML reads yes and on as true, which would else pass for 1."""
        wrong: list[InitErrorDetails] = []
        for name, value in values.items() if isinstance(values, dict) else ():
            held = [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, bool)]
            field: Any = fields_of(cls).get(name) if held else None
            if field is not None and not _takes_truth(field.annotation):
                kind = PydanticCustomError("truth", "should not be {shown}", {"shown": "true" if held[0] else "false"})
                wrong.append({"type": kind, "loc": (name,), "input": value})
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return values


class Document(Section):
    """A whole file.

    ``noun`` is one of ``KINDS``, ``kind`` what ``mimscale keys --kind`` calls it; ``files`` are those that come with mimscale
    and may be given by name; ``renamed`` gives the new names of former keys.
    """

    noun: ClassVar[str]
    kind: ClassVar[str]
    files: ClassVar[Kind | None] = None
    error: ClassVar[type[SchemaError]] = SchemaError
    renamed: ClassVar[dict[str, str]] = {}

    @classmethod
    def prepare(cls, values: dict[str, Any]) -> None:
        """What is to be done before ``values``, nested and unchecked, are looked at."""


@dataclass(frozen=True)
class ChosenBy:
    """Marks a section that is one of several, told apart by one of its keys, as ``mim`` by ``mim.objective``.

    Args:
        key: which key chooses.
        default: its value where it is not given.
        section: gives the section of a value; raises ``ValueError`` for one that there is not.
        names: all values of that key.
    """

    key: str
    default: str | None
    section: Callable[[str], type[Section]]
    names: Callable[[], list[str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Validate with the chosen section, whose errors keep their place."""
        serialize = core_schema.plain_serializer_function_ser_schema(
            lambda section, info: section.model_dump(mode=info.mode), info_arg=True
        )
        return core_schema.no_info_plain_validator_function(self.validate, serialization=serialize)

    def validate(self, value: Any) -> Section:
        """The section of ``value``, a mapping of its keys, checked."""
        if isinstance(value, Section):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("section", "must be a section with keys such as {key}", {"key": self.key})
        name = value.get(self.key, self.default)
        if name is None:
            raise PydanticCustomError("chosen", "lacks '{key}': one of {names}", self._context())
        if not isinstance(name, str):
            raise PydanticCustomError("choice", "must be one of {names}", self._context())
        try:
            section = self.section(name)
        except ValueError as error:
            raise PydanticCustomError("choice", "{problem}", self._context() | {"problem": str(error)}) from None
        return section.model_validate({self.key: name, **value})

    def _context(self) -> dict[str, Any]:
        return {"key": self.key, "names": ", ".join(self.names())}

    def of(self, values: Mapping[str, Any]) -> type[Section]:
        """The section that ``values`` are keys of.

        Raises:
            ValueError: they choose one that there is not.
        """
        name = values.get(self.key, self.default) or ""
        if not isinstance(name, str):
            raise ValueError(f"'{self.key}' must be one of {', '.join(self.names())}")
        return self.section(name)

    def sections(self) -> dict[str, type[Section]]:
        """Every section that can be had, by the value that chooses it: a plug-in that cannot be used keeps no others away."""
        found = {}
        for name in self.names():
            with contextlib.suppress(ValueError):
                found[name] = self.section(name)
        return found


@dataclass(frozen=True)
class KeysOf:
    """Marks a mapping of another document's dotted keys to values, as a study's ``overrides`` are a recipe's.

    Args:
        schemas: the kinds of document whose keys they may be.
    """

    schemas: Callable[[], Sequence[type[Document]]]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Validate that every key is one of theirs; its value is checked with the document."""
        return core_schema.no_info_after_validator_function(self.validate, handler(source))

    def validate(self, values: dict[str, Any]) -> dict[str, Any]:
        """Raise ``ValidationError`` for keys that there are not."""
        unknown: list[InitErrorDetails] = [
            {"type": "extra_forbidden", "loc": (name,), "input": value}
            for name, value in values.items()
            if all(find(schema, name) is None for schema in self.schemas())
        ]
        if unknown:
            raise ValidationError.from_exception_data("overrides", unknown)
        return values


# -- what a schema holds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A key of a schema.

    Attributes:
        path: dotted; a part that the user chooses is ``NAME``.
        field: pydantic's, with annotation, default and description.
        only: values of the choosing key with which it is there, e.g. ("simmim",); empty for always.
        chooser: the choosing key of its section, e.g. "objective".
        choices: of the choosing key itself: every value, with what it says of itself.
        chosen: of that key: the default.
    """

    path: str
    field: FieldInfo
    only: tuple[str, ...] = ()
    chooser: str = ""
    choices: tuple[tuple[str, str], ...] = ()
    chosen: str | None = None

    @property
    def about(self) -> str:
        """What it does."""
        texts = dict.fromkeys(about for _, about in self.choices)
        if len(texts) > 1:
            return "; ".join(f"{name}: {about.rstrip('.')}" for name, about in self.choices) + "."
        return self.field.description or ""

    @property
    def origin(self) -> str:
        """Where its default comes from."""
        return str(_mark(self.field, "origin") or "")

    @property
    def free(self) -> bool:
        """Whether it may differ between two starts of one run."""
        return bool(_mark(self.field, "free"))

    @property
    def branch(self) -> bool:
        """Whether it may differ between a run and its trunk."""
        return bool(_mark(self.field, "branch"))

    @property
    def required(self) -> bool:
        """Whether it has to be given."""
        return self.chosen is None if self.choices else self.field.is_required()

    @property
    def default(self) -> Any:
        """What it is where it is not given."""
        if self.choices:
            return self.chosen
        return None if self.required else self.field.get_default(call_default_factory=True)


def _mark(field: FieldInfo, name: str) -> Any:
    extra = field.json_schema_extra
    return extra.get(name) if isinstance(extra, dict) else None


def unmarked(annotation: Any) -> Any:
    """An annotation without its metadata, and without ``None``."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    members = _members(annotation)
    if len(members) == 1 and members[0] is not annotation:
        return unmarked(members[0])
    return annotation


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [member for member in typing.get_args(annotation) if member is not type(None)]
    return [annotation]


def choice(field: FieldInfo) -> ChosenBy | None:
    """How a field's section is chosen; ``None`` where there is one only."""
    return next((item for item in field.metadata if isinstance(item, ChosenBy)), None)


def keys_of(field: FieldInfo) -> KeysOf | None:
    """Whose keys a field is a mapping of; ``None`` where it is none of another document's."""
    return next((item for item in field.metadata if isinstance(item, KeysOf)), None)


def is_section(kind: Any) -> bool:
    """Whether it is a section, with keys of its own."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def held_by(kind: Any) -> tuple[str | None, Any]:
    """What a mapping or a list holds, as (part of the path, kind); (None, kind) for neither."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        return NAME, unmarked(arguments[1])
    if origin in (list, tuple) and arguments:
        return NUMBER, unmarked(arguments[0])
    return None, kind


def describe(schema: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key of a schema that holds a value, in order, sections gone into."""
    for attribute, field in schema.model_fields.items():
        path = prefix + (field.alias or attribute)  # a key such as `from` cannot be an attribute
        if (chosen := choice(field)) is not None:
            yield from merged(chosen, f"{path}.")
            continue
        kind = unmarked(field.annotation)
        part, held = held_by(kind)
        if is_section(kind):
            yield from describe(kind, f"{path}.")
        elif part is not None and is_section(held):
            yield from describe(held, f"{path}.{part}.")
        else:
            yield Key(path, field)


def merged(chosen: ChosenBy, prefix: str = "") -> Iterator[Key]:
    """The keys of several sections of which one is chosen, each once for all that describe it alike."""
    sections = chosen.sections()
    held = {name: {k.path: k for k in describe(section, prefix)} for name, section in sections.items()}
    for path in dict.fromkeys(path for keys in held.values() for path in keys):
        names = [name for name, keys in held.items() if path in keys]
        if path == prefix + chosen.key:
            choices = tuple((name, held[name][path].about) for name in names)
            yield Key(path, held[names[0]][path].field, choices=choices, chosen=chosen.default)
            continue
        alike: dict[tuple[str, str], list[str]] = {}
        for name in names:
            alike.setdefault((held[name][path].about, repr(held[name][path].default)), []).append(name)
        for group in alike.values():
            found = held[group[0]][path]
            yield found if len(group) == len(sections) else replace(found, only=tuple(group), chooser=chosen.key)


def known_keys(schema: type[BaseModel]) -> list[str]:
    """Every dotted key of the schema, sections included."""
    keys: dict[str, None] = {}
    for found in describe(schema):
        parts = found.path.split(".")
        for length in range(1, len(parts) + 1):
            keys[".".join(parts[:length])] = None
    return list(keys)


@dataclass(frozen=True)
class Spot:
    """What a dotted path leads to.

    Attributes:
        kind: what its value is, without metadata and ``None``.
        field: pydantic's; ``None`` for the document itself.
        steps: keys and indices that lead there; one that the user chooses may have dots of its own.
    """

    kind: Any
    field: FieldInfo | None
    steps: tuple[str, ...] = ()


def find(schema: type[BaseModel], path: str) -> list[FieldInfo] | None:
    """The fields that a dotted path may mean (several where a section is one of several); ``None`` for no key."""
    return [spot.field for spot in _spots(schema, path) if spot.field is not None] or None


def kinds_at(schema: type[BaseModel], path: str) -> list[Any]:
    """What the values at a path are, sections among them; the schema itself for an empty path."""
    return [spot.kind for spot in _spots(schema, path)] if path else [schema]


def _spots(schema: type[BaseModel], path: str) -> list[Spot]:
    short = len(path) <= 5 * SHOWN and path.count(".") < PARTS
    return list(_walk(Spot(schema, None), path.split("."))) if short else []


def _walk(spot: Spot, parts: list[str]) -> Iterator[Spot]:
    """What lies at the end of a path, from what lies at its beginning."""
    if not parts:
        yield spot
    elif is_section(spot.kind):
        field = fields_of(spot.kind).get(parts[0])
        if field is None:
            return
        steps = (*spot.steps, parts[0])
        if (keys := keys_of(field)) is not None and len(parts) > 1:
            for schema in keys.schemas():
                for inner in _walk(Spot(schema, None), parts[1:]):
                    yield Spot(inner.kind, inner.field, (*steps, ".".join(parts[1:])))
            return
        chosen = choice(field)
        for kind in dict.fromkeys(chosen.sections().values()) if chosen else [unmarked(field.annotation)]:
            yield from _walk(Spot(kind, field, steps), parts[1:])
    else:
        part, held = held_by(spot.kind)
        arguments = typing.get_args(spot.kind)
        if part == NAME:
            field = FieldInfo(annotation=arguments[1])
            # A name may have dots; where a section ends the path, dots are more likely those of a mistaken key.
            lengths = [*range(1, len(parts)), *([1] if len(parts) == 1 else [])]
            for length in lengths if is_section(held) else [len(parts)]:
                name = ".".join(parts[:length])
                yield from _walk(Spot(held, field, (*spot.steps, name)), parts[length:])
        elif part == NUMBER and (parts[0].isdecimal() or parts[0] == NUMBER):
            field = FieldInfo(annotation=arguments[0])
            yield from _walk(Spot(held, field, (*spot.steps, parts[0])), parts[1:])


def fields_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """By the names that a file has for them."""
    return {field.alias or attribute: field for attribute, field in section.model_fields.items()}


def nearest(word: str, known: Sequence[str], cutoff: float = NEAR) -> str | None:
    """The one of ``known`` that ``word`` was most likely meant to be, if one is near."""
    return next(iter(difflib.get_close_matches(word[:100], known, n=1, cutoff=cutoff)), None)


def nearest_key(path: str, schema: type[BaseModel]) -> str | None:
    """The key that ``path`` was most likely meant to be.

    One of the same section that is spelt much like it; else one with the same last part elsewhere; else the closest spelling.
    """
    path = path[: 5 * SHOWN]
    if find(schema, path) is not None:
        return path
    *section, leaf = path.split(".")
    sections = _spots(schema, ".".join(section)) if section else [Spot(schema, None)]
    siblings = [name for spot in sections if is_section(spot.kind) for name in fields_of(spot.kind)]
    if (near := nearest(leaf, siblings)) is not None:
        return ".".join([*section, near])
    keys = known_keys(schema)
    if same_leaf := [known for known in keys if known.rpartition(".")[2] == leaf]:
        best = max(same_leaf, key=lambda known: difflib.SequenceMatcher(None, known, path[:SHOWN]).ratio())
        return _with_names(best, path)
    if (whole := nearest(path, keys, 0.8)) is not None:
        return _with_names(whole, path)
    leaves = {known.rpartition(".")[2]: known for known in reversed(keys)}
    near = nearest(leaf, list(leaves))
    return _with_names(leaves[near], path) if near else None


def _with_names(known: str, path: str) -> str:
    """A known key with the names that the user chose, where ``path`` has as many parts."""
    parts, given = known.split("."), path.split(".")
    if len(parts) != len(given):
        return known
    return ".".join(there if part in (NAME, NUMBER) else part for part, there in zip(parts, given, strict=True))


def unknown_key(path: str, where: str, schema: type[Document]) -> str:
    """What to say of a key that is not in the schema."""
    schemas, inside, path = _own_key(schema, path)
    where = f"{inside} of {where}" if inside else where
    renamed = schemas[0].renamed.get(path)
    if renamed is not None:
        return f"the key '{path}' in {where} has been renamed: write '{renamed}'"
    nearest_of = ((nearest_key(path, schema), schema) for schema in schemas)
    near, schema = next(((near, schema) for near, schema in nearest_of if near), (None, schemas[0]))
    path = printable(path, SHOWN)
    hint = f"did you mean '{near}'? {keys_command(schema, near)} lists" if near else f"{keys_command(schema)} lists"
    return f"unknown key '{shortened(path)}' in {where}; {hint} the keys"


def _own_key(schema: type[Document], path: str) -> tuple[Sequence[type[Document]], str, str]:
    """Whose key a path is, another document's in a mapping of its keys: the documents, where that lies, and the key there."""
    parts = path.split(".")
    for length in range(1, min(len(parts), PARTS)):
        inside = ".".join(parts[:length])
        for spot in _spots(schema, inside):
            if spot.field is not None and (keys := keys_of(spot.field)) is not None:
                return keys.schemas(), inside, ".".join(parts[length:])
    return [schema], "", path


def keys_command(schema: type[Document], path: str = "") -> str:
    """The command that lists the keys of the section that ``path`` lies in, or of the whole document."""
    schemas, _, path = _own_key(schema, path)
    section = path.partition(".")[0]
    known = [section] if "." in path and find(schemas[0], section) else []
    kind = schemas[0].kind
    return " ".join(["mimscale keys", *known, *([] if kind == "pretrain" else ["--kind", kind])])


def shortened(text: str) -> str:
    """At most ``SHOWN`` characters of what a user wrote, for a message."""
    return printable(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def some(names: Sequence[str]) -> str:
    """The first of names in a message, and how many more there are."""
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return ", ".join([*(printable(name, 100) for name in names[:LISTED]), *more])


def free_keys(document: BaseModel, branch: bool = False, prefix: str = "") -> frozenset[str]:
    """The dotted keys of a document that may differ between two starts of one run.

    Args:
        document: what they are the keys of.
        branch: those too that may differ between a run and its trunk.
        prefix: of all keys.
    """
    found: set[str] = set()
    for attribute, field in type(document).model_fields.items():
        path, value = prefix + (field.alias or attribute), getattr(document, attribute)
        if isinstance(value, BaseModel):
            found |= free_keys(value, branch, f"{path}.")
        elif _mark(field, "free") or (branch and _mark(field, "branch")):
            found.add(path)
    return frozenset(found)


# -- reading -----------------------------------------------------------------------------------------------------------


STRING, MERGE, NULL, INTEGER, REAL, TRUTH, LIST, MAPPING = (
    f"tag:yaml.org,2002:{tag}" for tag in ("str", "merge", "null", "int", "float", "bool", "seq", "map")
)
PLAIN = (STRING, NULL, INTEGER, REAL, TRUTH, LIST, MAPPING)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, with bounds, and plain values only: numbers are in tens or 0x, and what looks like a date is text."""

    def __init__(self, text: str):
        super().__init__(text)
        self._values, self._depth = 0, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """PyYAML's, counting."""
        self._values += 1
        self._depth += 1
        if self._values > VALUES:
            raise yaml.YAMLError(f"it holds more than {counted(VALUES, 'value')}")
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is not text", key_node.start_mark)
        if key_node.value in seen and key_node.value != "<<":
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key '{shortened(key_node.value)}'", key_node.start_mark
            )
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


def _integer(loader: _Loader, node: Any) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""), 0)


def _real(loader: _Loader, node: Any) -> float:
    return float(
        str(loader.construct_scalar(node)).replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")
    )


# Without those of binary text, sets, dates and ordered mappings, which no key takes.
_Loader.yaml_constructors = {
    tag: made for tag, made in yaml.SafeLoader.yaml_constructors.items() if tag in PLAIN or tag is None
}
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor(INTEGER, _integer)
_Loader.add_constructor(REAL, _real)
# Without dates, sixties (1:30) and eights (010), which other readers of YAML take for something else.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (NULL, TRUTH, MERGE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    INTEGER, re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)\Z"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    REAL,
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))\Z"
        r"|\.(?:nan|NaN|NAN)\Z"
    ),
    list("-+0123456789."),
)


def _weigh(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node holds and how deep they lie, where each is counted as often as it is referred to."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise yaml.YAMLError("a value holds itself")
        return found
    if node.tag not in (*PLAIN, MERGE):
        raise yaml.YAMLError(f"the tag {node.tag} is for values that no key takes, in line {node.start_mark.line + 1}")
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    known[id(node)] = None
    inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    size, depth = 1, 0
    for part in inner:
        more, deeper = _weigh(part, known)
        size, depth = size + more, max(depth, deeper)
        if size > VALUES:
            raise yaml.YAMLError(f"it holds more than {counted(VALUES, 'value')}, with what it refers to")
    if depth >= DEEPEST:
        raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep, with what it refers to")
    known[id(node)] = size, depth + 1
    return size, depth + 1


def parse_yaml(
    text: str, where: str, schema: type[BaseModel] | None = None, error: type[Exception] = SchemaError
) -> Any:
    """What a YAML text holds, of plain values only. Keys are text.

    Args:
        text: a document.
        where: what to call it in errors.
        schema: of what it holds: the values of its text keys are taken as they are written, ``010`` and ``off`` too.
        error: what to raise.

    Raises:
        SchemaError: (or ``error``) it is not valid YAML; the message has the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {})
        _keep_text(node, schema, "", set(), {})
        return loader.construct_document(node)
    # A number may have too many digits, an escape too large a number; the others are of explicit tags, such as !!bool of a word.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, LookupError, AttributeError) as problem:
        said = " ".join(str(problem)[: 10 * SHOWN].split())
        raise error(f"{printable(where)} is not valid YAML: {shortened(said)}") from None


def _keep_text(
    node: yaml.Node, schema: type[BaseModel] | None, path: str, seen: set[int], known: dict[str, bool]
) -> None:
    """Have keys, and the plain values of text keys, read as they are written; ``known`` says of a path whether it is one's."""
    if id(node) in seen and not isinstance(node, yaml.ScalarNode):  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.tag != MERGE:
                    key_node.tag = STRING
                _keep_text(value, schema, f"{path}.{key_node.value}" if path else key_node.value, seen, known)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _keep_text(value, schema, f"{path}.{NUMBER}", seen, known)
    elif isinstance(node, yaml.ScalarNode) and schema and path and node.style is None and node.tag != NULL:
        if path not in known:
            fields = find(schema, path)
            known[path] = fields is not None and all(_takes_text(field.annotation) for field in fields)
        if known[path]:
            node.tag = STRING


def read_yaml(
    path: str | Path,
    noun: str = "recipe",
    error: type[Exception] = SchemaError,
    schema: type[BaseModel] | None = None,
    files: Kind | None = None,
) -> dict[str, Any]:
    """A YAML file's top-level mapping; see :func:`parse_yaml`. One of ``files`` may be given by its name.

    Raises:
        SchemaError: (or ``error``) the file is not there, is no YAML, or holds something else than a mapping.
    """
    try:
        text = read_text(files.find(path) if files else path, LARGEST)
    except FileNotFoundError:
        raise error(files.missing(path) if files else f"there is no {noun} {printable(path)}") from None
    except UnfitFile as problem:
        raise error(f"cannot read the {noun} {printable(path)}: {problem}") from None
    except OSError as problem:
        raise error(f"cannot read the {noun} {printable(path)}: {problem.strerror}") from None
    except ValueError:  # a NUL in its name
        raise error(f"there is no {noun} {printable(path)}: a file cannot have such a name") from None
    values = parse_yaml(text, str(path), schema, error)
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise error(f"{printable(path)} must hold sections such as 'model:' and 'train:', not {found}")
    return values


def parse_override(override: str, schema: type[Document]) -> tuple[str, str]:
    """The key and the text of a ``key=value``.

    Raises:
        SchemaError: (the schema's ``error``) there is no '=' in it.
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise schema.error(f"'{shortened(override)}' is not key=value, for example {_example(schema)}")
    return path, text


def apply_override(values: dict[str, Any], override: str, schema: type[Document], where: str = COMMAND_LINE) -> None:
    """Set one ``section.key=value`` in nested ``values``.

    The value of a text key is taken as it stands (``null``, or nothing, unsets one that may be unset); any other is read as
    YAML.

    Args:
        values: sections and their keys.
        override: ``section.key=value``.
        schema: the kind of document.
        where: what to call the source of the override in errors.

    Raises:
        SchemaError: (the schema's ``error``) no '=' in it, or the key is not in the schema (the message names the nearest).
    """
    path, text = parse_override(override, schema)
    spots = [spot for spot in _spots(schema, path) if spot.field is not None]
    if not spots:
        raise schema.error(unknown_key(path, where, schema))
    *sections, leaf = spots[0].steps
    value = _value(path, text, [spot.field for spot in spots if spot.field is not None], schema)
    inner: Any = values
    for depth, step in enumerate(sections):
        inner = _entered(inner, step)
        if inner is None:
            taken = ".".join(sections[: depth + 1])
            raise schema.error(
                f"'{taken}' is no section that {path} could be set in; the file has something else there"
            )
    if isinstance(inner, list) and (place := _place_in(inner, leaf)) is not None:
        inner[place] = value
    elif isinstance(inner, dict):
        inner[leaf] = value
    else:
        raise schema.error(f"'{'.'.join(sections)}' has no {leaf}, so {path} cannot be set")


def _entered(values: Any, step: str) -> dict | list | None:
    """A section or list inside of another, made where it is not there; ``None`` where something else is."""
    if isinstance(values, list):
        inner = None if (place := _place_in(values, step)) is None else values[place]
    else:
        if values.get(step) is None:
            values[step] = {}
        inner = values[step]
    return inner if isinstance(inner, dict | list) else None


def _place_in(values: list, step: str) -> int | None:
    place = int(step) if step.isdecimal() and len(step) < 10 else len(values)
    return place if place < len(values) else None


def _value(path: str, text: str, fields: Sequence[FieldInfo], schema: type[Document]) -> Any:
    if all(_takes_text(field.annotation) for field in fields):
        unset = text in ("", "null") and all(_takes_none(field.annotation) for field in fields)
        return None if unset else text
    return parse_yaml(text, f"the value of {path}", error=schema.error)


def _takes_text(annotation: Any) -> bool:
    """Whether all values but ``None`` are text."""
    plain = unmarked(annotation)
    if typing.get_origin(plain) is Literal:
        return all(isinstance(value, str) for value in typing.get_args(plain))
    members = _members(plain)
    return plain is str or (len(members) > 1 and all(_takes_text(member) for member in members))


def _takes_none(annotation: Any) -> bool:
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return type(None) in typing.get_args(annotation)


def _example(schema: type[Document]) -> str:
    return "output=runs/study" if schema.noun == "study" else "train.iterations=1000"


def check_kind(values: dict[str, Any], where: str, schema: type[Document]) -> None:
    """Raise where a file is plainly of another kind.

    Raises:
        SchemaError: (the schema's ``error``) naming its kind, and what takes it.
    """
    found = {noun: [mark for mark in marks if mark in values] for noun, (marks, _) in KINDS.items()}
    likely = max(found, key=lambda noun: (len(found[noun]), noun == schema.noun))
    if len(found[likely]) > len(found[schema.noun]):
        mark = next(mark for mark in found[likely] if mark not in found[schema.noun])
        raise schema.error(
            f"{printable(where)} is a {likely} (it has '{mark}'), for mimscale {KINDS[likely][1]}; a {schema.noun} is wanted here"
        )


AnyDocument = TypeVar("AnyDocument", bound=Document)


def resolve(
    values: dict[str, Any],
    where: str,
    schema: type[AnyDocument],
    overridden: Collection[str] = (),
    given: str = COMMAND_LINE,
) -> AnyDocument:
    """Check nested ``values`` against the schema.

    Args:
        values: sections and their keys.
        where: what to call the source in errors, for example the file's name.
        schema: the kind of document.
        overridden: keys that are not from there, and
        given: what to call the source of those.

    Raises:
        SchemaError: (the schema's ``error``) an unknown or misplaced key, a value of the wrong kind, or a document of another
            kind; all problems are listed.
    """
    _check_extent(values, where, schema)
    check_kind(values, where, schema)
    schema.prepare(values)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        # What is wrong with one value is one problem, however many kinds of value it might have been.
        by_key: dict[str, list[Any]] = {}
        others: set[tuple] = set()
        for item in error.errors(include_url=False):
            # To look for the keys of very many would take long.
            if len(by_key) > LISTED:
                others.add(item["loc"])
                continue
            by_key.setdefault(_path(item, schema) or item["msg"], []).append(item)
        problems = [
            printable(_problem(path, items, given if path in overridden else where, schema), 8 * SHOWN)
            for path, items in list(by_key.items())[:LISTED]
        ]
    left = len(by_key) - LISTED + len(others)
    raise schema.error("\n".join([*problems, *([f"and {left} problems more"] if left > 0 else [])]))


def _check_extent(values: Any, where: str, schema: type[Document]) -> None:
    """Raise where values, which need not come from YAML, are too many or lie too deep."""
    count, depth, level = 0, 0, [values]
    while level:
        count, depth = count + len(level), depth + 1
        if count > 2 * VALUES or depth > 2 * DEEPEST:
            raise schema.error(f"{printable(where)} holds too many values, or they are nested too deep")
        level = [
            inner
            for value in level
            for inner in (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            )
        ]


def _path(item: Any, schema: type[Document]) -> str:
    parts = [str(part) for part in item["loc"] if part != "[key]"]
    if item["type"] == "extra_forbidden" or not parts:
        return ".".join(parts)
    # A union's branches appear in the location as class names; only the document's own keys are shown.
    ends = range(2, len(parts) + 1)
    known = [end for end in ends if any(_walk(Spot(schema, None), parts[:end])) or parts[end - 1].isdecimal()]
    return ".".join(parts[: max(known, default=1)])


def _problem(path: str, items: list[Any], where: str, schema: type[Document]) -> str:
    item = items[0]
    if item["type"] == "extra_forbidden":
        return _misplaced(path, where, schema)
    if not item["loc"]:
        return item["msg"]  # about several keys together; it names them
    if item["type"] == "missing":
        return f"{where} lacks '{path}'; {keys_command(schema, path)} lists the keys"
    if item["type"] == "choice":
        return f"{path}.{item['ctx']['key']} in {where}: {item['msg']}"
    if item["type"] in ("chosen", "section"):
        return f"{path} in {where} {item['msg']}" if item["type"] == "section" else f"{path} in {where}: {item['msg']}"
    wanted = " or ".join(dict.fromkeys(other["msg"] for other in items))
    found = f", not {shortened(repr(item['input']))}" if " should " in wanted else ""  # our own words name it
    return f"{shortened(path)} in {where}: {wanted}{found}"


def _misplaced(path: str, where: str, schema: type[Document]) -> str:
    """What to say of a key that is not where it stands: unknown, or one of another choice of its section."""
    owners = [key for key in describe(schema) if key.path == path and key.only]
    if owners:
        section = path.partition(".")[0]
        names = ", ".join(dict.fromkeys(name for key in owners for name in key.only))
        return (
            f"'{path}' in {where} is a key of {section}.{owners[0].chooser}={names} alone; "
            f"{keys_command(schema, path)} lists each one's keys"
        )
    return unknown_key(path, where, schema)


def settle(
    values: dict[str, Any], where: str, overrides: Sequence[str], schema: type[AnyDocument], given: str = COMMAND_LINE
) -> AnyDocument:
    """Apply ``key=value`` overrides to ``values``, which change, and check the whole; see :func:`resolve`.

    Raises:
        SchemaError: (the schema's ``error``) see :func:`apply_override` and :func:`resolve`.
    """
    check_kind(values, where, schema)
    # A plug-in's keys are known once it is loaded.
    first = [override for override in overrides if override.startswith("plugins=")]
    for override in first:
        apply_override(values, override, schema, given)
    schema.prepare(values)
    for override in overrides:
        if override not in first:
            apply_override(values, override, schema, given)
    return resolve(values, where, schema, {override.partition("=")[0] for override in overrides}, given)


def load(path: str | Path, overrides: Sequence[str], schema: type[AnyDocument]) -> AnyDocument:
    """Read a file, apply ``key=value`` overrides, and check the whole.

    Raises:
        SchemaError: (the schema's ``error``) see :func:`read_yaml`, :func:`apply_override` and :func:`resolve`.
    """
    values = read_yaml(path, schema.noun, schema.error, schema, schema.files)
    return settle(values, printable(path), overrides, schema)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def differences(a: Document, b: Document, free: Collection[str]) -> list[str]:
    """Keys outside ``free`` whose values differ, each as ``key: value in a, value in b``."""
    flat_a, flat_b = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    names = [name for name in flat_a if name not in free and flat_a[name] != flat_b.get(name)]
    return [f"{name}: {flat_a[name]} against {flat_b.get(name)}" for name in names]
