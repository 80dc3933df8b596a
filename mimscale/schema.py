"""Configuration as data: YAML files and ``key=value`` overrides, checked against keys that are described.

Recipes and studies alike are read here. A document is a :class:`Document` of :class:`Section` classes whose fields are made
by :func:`key`, so that every key has a default, a description, and where it comes from; :func:`describe` lists them.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, core_schema

from mimscale.resources import Kind

# Suggestions are for typing errors; what differs more than this is another word.
NEAR = 0.7
LISTED = 20
NAME = "NAME"
# What stands at the top of each kind of file, and what takes it.
KINDS = {
    "study": (("datasets", "models", "pretrain"), "study"),
    "pre-training recipe": (("mim", "fidelity"), "pretrain"),
    "fine-tuning recipe": (("task", "finetune", "mix", "detector"), "finetune"),
}


class SchemaError(ValueError):
    """A file or an override that cannot be used; the message names the key and what to write instead."""


def _as_text(value: Any) -> Any:
    return value if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
# A name that looks like a number, as 10 or 2024 in YAML.
Word = Annotated[str, BeforeValidator(_as_text)]
# A file or folder; ~ is the user's home.
Place = Annotated[Word, AfterValidator(lambda text: str(Path(text).expanduser()) if text.startswith("~") else text)]


def key(default: Any, about: str, origin: str = "ours", **settings: Any) -> Any:
    """A described key of a section.

    Args:
        default: what it is where it is not given; ``...`` where it has to be given.
        about: what it does, units included, in a sentence.
        origin: where the default comes from: a section or table of the paper, the released code, or ``ours``.
        **settings: bounds and whatever else pydantic's ``Field`` takes.
    """
    return Field(default, description=about, json_schema_extra={"origin": origin}, **settings)


class Section(BaseModel):
    """One block of a document: unknown keys are errors, values never change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)


class Document(Section):
    """A whole file. ``noun`` is one of ``KINDS``; ``renamed`` gives the new names of former keys.

    ``files`` says which of the files that come with mimscale may be given by name.
    """

    noun: ClassVar[str]
    files: ClassVar[Kind]
    error: ClassVar[type[SchemaError]] = SchemaError
    renamed: ClassVar[dict[str, str]] = {}


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
        try:
            section = self.section(name)
        except ValueError as error:
            raise PydanticCustomError("chosen", "{key}: {problem}", self._context() | {"problem": str(error)}) from None
        return section.model_validate({self.key: name, **value})

    def _context(self) -> dict[str, Any]:
        return {"key": self.key, "names": ", ".join(self.names())}

    def sections(self) -> dict[str, type[Section]]:
        """Every section that there is, by the value that chooses it."""
        return {name: self.section(name) for name in self.names()}


# -- what a schema holds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A key of a schema.

    Attributes:
        path: dotted; a part that the user chooses is ``NAME``.
        field: pydantic's, with annotation, default and description.
        only: values of the choosing key with which it is there, e.g. ("simmim",); empty for always.
    """

    path: str
    field: FieldInfo
    only: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        """What it does."""
        return self.field.description or ""

    @property
    def origin(self) -> str:
        """Where its default comes from."""
        extra = self.field.json_schema_extra
        return str(extra["origin"]) if isinstance(extra, dict) and "origin" in extra else ""

    @property
    def required(self) -> bool:
        """Whether it has to be given."""
        return self.field.is_required()

    @property
    def default(self) -> Any:
        """What it is where it is not given."""
        return None if self.required else self.field.get_default(call_default_factory=True)


def _plain(annotation: Any) -> Any:
    """An annotation without its metadata, and without ``None``."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    members = _members(annotation)
    if len(members) == 1 and members[0] is not annotation:
        return _plain(members[0])
    return annotation


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (Union, __import__("types").UnionType):
        return [member for member in typing.get_args(annotation) if member is not type(None)]
    return [annotation]


def _choice(field: FieldInfo) -> ChosenBy | None:
    return next((item for item in field.metadata if isinstance(item, ChosenBy)), None)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _inner(kind: Any) -> tuple[str | None, Any]:
    """What a mapping or a list holds, as (part of the path, kind); (None, kind) for neither."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        return NAME, _plain(arguments[1])
    if origin in (list, tuple) and arguments:
        return "N", _plain(arguments[0])
    return None, kind


def describe(schema: type[BaseModel], prefix: str = "", only: tuple[str, ...] = ()) -> Iterator[Key]:
    """Every key of a schema that holds a value, in order, sections gone into."""
    for attribute, field in schema.model_fields.items():
        path = prefix + (field.alias or attribute)  # a key such as `from` cannot be an attribute
        if (choice := _choice(field)) is not None:
            yield from _merged(choice, path)
            continue
        kind = _plain(field.annotation)
        part, held = _inner(kind)
        if _is_section(kind):
            yield from describe(kind, f"{path}.", only)
        elif part is not None and _is_section(held):
            yield from describe(held, f"{path}.{part}.", only)
        else:
            yield Key(path, field, only)


def _merged(choice: ChosenBy, path: str) -> Iterator[Key]:
    sections = choice.sections()
    held = {name: {k.path: k for k in describe(section, f"{path}.")} for name, section in sections.items()}
    for one in dict.fromkeys(p for keys in held.values() for p in keys):
        names = tuple(name for name, keys in held.items() if one in keys)
        # The same key may be described differently for each of the names.
        by_text: dict[tuple[str, str], list[str]] = {}
        for name in names:
            found = held[name][one]
            by_text.setdefault((found.about, repr(found.default)), []).append(name)
        for group in by_text.values():
            everywhere = len(group) == len(sections)
            yield Key(one, held[group[0]][one].field, () if everywhere else tuple(group))


def known_keys(schema: type[BaseModel]) -> list[str]:
    """Every dotted key of the schema, sections included."""
    keys: dict[str, None] = {}
    for found in describe(schema):
        parts = found.path.split(".")
        for length in range(1, len(parts) + 1):
            keys[".".join(parts[:length])] = None
    return list(keys)


def find(schema: Any, path: str) -> list[FieldInfo] | None:
    """The fields that a dotted path may mean (several where a section is one of several); ``None`` for no key."""
    found = _walk([(schema, None)], path.split("."))
    return [field for _, field in found if field is not None] or None


Spot = tuple[Any, FieldInfo | None]


def _walk(kinds: list[Spot], parts: list[str]) -> list[Spot]:
    """What lies at the end of a path, as (kind, field), from what lies at its beginning."""
    if not parts:
        return kinds
    inner: list[Spot] = []
    for kind, field in kinds:
        if _is_section(kind):
            named = _fields(kind)
            if parts[0] in named:
                found = named[parts[0]]
                choice = _choice(found)
                options = choice.sections().values() if choice else [_plain(found.annotation)]
                inner += [(option, found) for option in options]
            continue
        part, held = _inner(kind)
        if part == NAME and held is Any:  # another document's keys, which have dots of their own
            return [(Any, field)]
        if part == NAME or (part == "N" and parts[0].isdigit()):
            inner.append((held, FieldInfo(annotation=typing.get_args(kind)[part == NAME])))
    return _walk(inner, parts[1:]) if inner else []


def _fields(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """By the names that a file has for them."""
    return {field.alias or attribute: field for attribute, field in section.model_fields.items()}


def nearest(word: str, known: Sequence[str], cutoff: float = NEAR) -> str | None:
    """The one of ``known`` that ``word`` was most likely meant to be, if one is near."""
    return next(iter(difflib.get_close_matches(word[:100], known, n=1, cutoff=cutoff)), None)


def nearest_key(path: str, schema: type[BaseModel]) -> str | None:
    """The key that ``path`` was most likely meant to be.

    One of the same section that is spelt much like it; else one with the same last part elsewhere; else the closest spelling.
    """
    *section, leaf = path.split(".")
    siblings = [name for kind, _ in _walk([(schema, None)], section) if _is_section(kind) for name in _fields(kind)]
    if (near := nearest(leaf, siblings)) is not None:
        return ".".join([*section, near])
    keys = known_keys(schema)
    same_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return max(same_leaf, key=lambda k: difflib.SequenceMatcher(None, k, path[:200]).ratio())
    if (whole := nearest(path, keys, 0.8)) is not None:
        return whole
    leaves = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
    return leaves.get(nearest(leaf, list(leaves)) or "")


def unknown_key(path: str, where: str, schema: type[BaseModel]) -> str:
    """What to say of a key that is not in the schema."""
    renamed = getattr(schema, "renamed", {}).get(path)
    if renamed is not None:
        return f"the key '{path}' in {where} has been renamed: write '{renamed}'"
    near = nearest_key(path, schema)
    hint = f"did you mean '{near}'?" if near else "mimscale keys lists the keys"
    return f"unknown key '{path}' in {where}; {hint}"


# -- reading -----------------------------------------------------------------------------------------------------------


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; here that is an error."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if isinstance(key_node, yaml.ScalarNode):
            if key_node.value in seen and key_node.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key '{key_node.value}'", key_node.start_mark
                )
            seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: str | Path, kind: Kind, error: type[SchemaError] = SchemaError) -> dict[str, Any]:
    """The top-level mapping, of plain values only, of a YAML file, or of one of ``kind`` by its name.

    Raises:
        SchemaError: (or ``error``) the file is not there, is no YAML, or holds something else than a mapping.
    """
    try:
        # Built on SafeLoader: no objects.
        values = yaml.load(kind.find(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise error(kind.missing(path)) from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"cannot read the {kind.what} {path}: {problem}") from None
    except yaml.YAMLError as problem:
        raise error(f"{path} is not valid YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(values, dict):
        raise error(f"{path} must hold sections such as 'model:' and 'train:', not {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str, schema: type[Document]) -> None:
    """Set one ``section.key=value`` in nested ``values``.

    The value of a text key is taken as it stands (``null``, or nothing, unsets one that may be unset); any other is read as
    YAML.

    Raises:
        SchemaError: (the schema's ``error``) no '=' in it, or the key is not in the schema (the message names the nearest).
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise schema.error(f"'{override}' is not key=value, for example {_example(schema)}")
    fields = find(schema, path)
    if fields is None:
        raise schema.error(unknown_key(path, "the command line", schema))
    *sections, leaf = _parts(path, schema)
    for depth, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise schema.error(f"'{'.'.join(sections[: depth + 1])}' must be a section with keys such as {path}")
    values[leaf] = _value(path, text, fields, schema)


def _parts(path: str, schema: type[BaseModel]) -> list[str]:
    """The parts of a path; the key of a mapping to anything is one part, dots included."""
    parts = path.split(".")
    for length in range(1, len(parts)):
        if any(_inner(kind) == (NAME, Any) for kind, _ in _walk([(schema, None)], parts[:length])):
            return [*parts[:length], ".".join(parts[length:])]
    return parts


def _value(path: str, text: str, fields: Sequence[FieldInfo], schema: type[Document]) -> Any:
    if fields and all(_takes_text(field.annotation) for field in fields):
        unset = text in ("", "null") and all(_takes_none(field.annotation) for field in fields)
        return None if unset else text
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader) if text else None
    except yaml.YAMLError as error:
        raise schema.error(f"the value of {path} is not valid: {' '.join(str(error).split())}") from None


def _takes_text(annotation: Any) -> bool:
    """Whether all values but ``None`` are text."""
    plain = _plain(annotation)
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
    if any(mark in values for mark in KINDS[schema.noun][0]):
        return
    for noun, (marks, command) in KINDS.items():
        found = [mark for mark in marks if mark in values and mark not in schema.model_fields]
        if noun != schema.noun and found:
            raise schema.error(
                f"{where} is a {noun} (it has '{found[0]}'), for mimscale {command}; a {schema.noun} is wanted here"
            )


AnyDocument = TypeVar("AnyDocument", bound=Document)


def resolve(values: dict[str, Any], where: str, schema: type[AnyDocument]) -> AnyDocument:
    """Check nested ``values`` against the schema.

    Args:
        values: sections and their keys.
        where: what to call the source in errors, for example the file's name.
        schema: the kind of document.

    Raises:
        SchemaError: (the schema's ``error``) an unknown or misplaced key, a value of the wrong kind, or a document of another
            kind; all problems are listed.
    """
    check_kind(values, where, schema)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = list(dict.fromkeys(_problem(item, where, schema) for item in error.errors()))
    more = [f"and {len(problems) - LISTED} problems more"] if len(problems) > LISTED else []
    raise schema.error("\n".join(problems[:LISTED] + more))


def _problem(item: Any, where: str, schema: type[Document]) -> str:
    parts = [str(part) for part in item["loc"] if part != "[key]"]
    if item["type"] == "extra_forbidden":
        return _misplaced(parts, where, schema)
    if not parts:
        return item["msg"]  # about several keys together; it names them
    # A union's branches appear in the location as class names; only the document's own keys are shown.
    path = parts[0]
    for part in parts[1:]:
        if find(schema, f"{path}.{part}") is None and not part.isdigit():
            break
        path = f"{path}.{part}"
    if item["type"] == "missing":
        return f"{where} lacks '{path}'"
    if item["type"] in ("chosen", "section"):
        return f"{path} in {where} {item['msg']}" if not item["msg"].startswith("{") else item["msg"]
    shown = repr(item["input"])
    return f"{path} in {where}: {item['msg']}, not {shown if len(shown) <= 200 else shown[:200] + '...'}"


def _misplaced(parts: list[str], where: str, schema: type[Document]) -> str:
    """What to say of a key that is not where it stands: unknown, or one of another choice of its section."""
    path = ".".join(parts)
    owners = [key for key in describe(schema) if key.path == path and key.only]
    if owners:
        names = ", ".join(dict.fromkeys(name for key in owners for name in key.only))
        field = schema.model_fields[parts[0]]
        choice = _choice(field)
        by = f"{parts[0]}.{choice.key}={names}" if choice else names
        return f"'{path}' in {where} is a key of {by} alone; mimscale keys {parts[0]} lists each one's keys"
    return unknown_key(path, where, schema)


def load(path: str | Path, overrides: Sequence[str], schema: type[AnyDocument]) -> AnyDocument:
    """Read a file, apply ``key=value`` overrides, and check the whole.

    Raises:
        SchemaError: (the schema's ``error``) see :func:`read_yaml`, :func:`apply_override` and :func:`resolve`.
    """
    values = read_yaml(path, schema.files, schema.error)
    check_kind(values, str(path), schema)
    for override in overrides:
        apply_override(values, override, schema)
    return resolve(values, str(path), schema)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def differences(a: Document, b: Document, free: frozenset[str]) -> list[str]:
    """Keys outside ``free`` whose values differ, each as ``key: value in a, value in b``."""
    flat_a, flat_b = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    names = [name for name in flat_a if name not in free and flat_a[name] != flat_b.get(name)]
    return [f"{name}: {flat_a[name]} against {flat_b.get(name)}" for name in names]
