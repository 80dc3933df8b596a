"""The keys of recipes and studies, listed: for a terminal, as Markdown, and as JSON schemas for editors."""

from __future__ import annotations

import json
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from mimscale.schema import (
    MOST,
    NAME,
    NUMBER,
    PLACE,
    ChosenBy,
    Key,
    choice,
    describe,
    fields_of,
    held_by,
    is_section,
    keys_of,
    kinds_at,
    merged,
    nearest,
    unmarked,
)


@dataclass(frozen=True)
class Reference:
    """One kind of document, to be listed.

    Attributes:
        kind: what ``mimscale keys --kind`` calls it.
        title: a heading.
        schema: its schema, or the choice among several.
    """

    kind: str
    title: str
    schema: type[BaseModel] | ChosenBy

    def entries(self) -> list[Key]:
        """Every key: first those in no section, then a document's own sections, then those it shares with others."""
        found = merged(self.schema) if isinstance(self.schema, ChosenBy) else describe(self.schema)
        order = list(dict.fromkeys(name for schema in self._schemas() for name in _own_first(schema)))
        return sorted(found, key=lambda key: ("." in key.path, order.index(key.path.partition(".")[0])))

    def _schemas(self) -> list[type[BaseModel]]:
        return list(self.schema.sections().values()) if isinstance(self.schema, ChosenBy) else [self.schema]

    def sections(self) -> dict[str, list[Key]]:
        """The keys by the section they are in, "" for those that are in none."""
        found: dict[str, list[Key]] = {}
        for key in self.entries():
            found.setdefault(key.path.rpartition(".")[0], []).append(key)
        return found

    def about(self, section: str) -> str:
        """What a section is for."""
        kinds = dict.fromkeys(kind for schema in self._schemas() for kind in kinds_at(schema, section))
        return " ".join(dict.fromkeys(_first_line(kind) for kind in kinds if is_section(kind))).strip()

    def find(self, word: str) -> list[Key]:
        """The keys of that section, the one of that path, or all whose last part it is."""
        keys = self.entries()
        inside = [key for key in keys if key.path == word or _generic(key.path).startswith(f"{_generic(word)}.")]
        return inside or [key for key in keys if key.path.rpartition(".")[2] == word]

    def nearest(self, word: str) -> str | None:
        """The section or key that ``word`` was most likely meant to be."""
        known = dict.fromkeys(name for key in self.entries() for name in (key.path, *_sections_of(key.path)))
        leaves = {path.rpartition(".")[2]: path for path in known}
        return nearest(word, list(known)) or leaves.get(nearest(word.rpartition(".")[2], list(leaves)) or "")


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().partition("\n")[0].replace("``", "`")


def _own_first(schema: type[BaseModel]) -> list[str]:
    attributes = [name for kind in schema.__mro__ for name in vars(kind).get("__annotations__", {})]
    return [schema.model_fields[name].alias or name for name in attributes if name in schema.model_fields]


def _generic(path: str) -> str:
    return path.replace(f".{NAME}", "").replace(f".{NUMBER}", "")


def _sections_of(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


# -- words for kinds of values -----------------------------------------------------------------------------------------


def takes(key: Key) -> str:
    """The values that a key takes, in words: "integer ≥ 1", "linear | 4-blocks"."""
    if key.choices:
        return " | ".join(name for name, _ in key.choices)
    if keys_of(key.field) is not None:
        return "{KEY: value, ...}"
    return _takes(key.field.annotation, key.field.metadata)


def _takes(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    metadata = list(metadata)
    while typing.get_origin(annotation) is Annotated:
        annotation, *more = typing.get_args(annotation)
        metadata += more
    metadata += [inner for item in metadata if isinstance(item, FieldInfo) for inner in item.metadata]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " | ".join("null" if member is type(None) else _takes(member) for member in arguments)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is dict:
        return f"{{{NAME}: {_takes(arguments[1])}, ...}}"
    if origin is tuple and arguments[-1] is not ...:
        texts = [_takes(argument) for argument in arguments]
        word, _, bounds = texts[0].partition(" ")
        if bounds and len(texts) > 1 and len(set(texts)) == 1:
            return f"[{', '.join(word for _ in texts)}], each {bounds}"
        return f"[{', '.join(texts)}]"
    if origin in (tuple, list):
        return f"[{_takes(arguments[0])}, ...]"
    word = "path" if PLACE in metadata else _WORDS.get(annotation, "value")
    return " ".join([word, ", ".join(_bounds(annotation, metadata))]).rstrip()


_WORDS = {int: "integer", float: "number", str: "text", bool: "true | false"}


def _bounds(kind: Any, metadata: Iterable[Any]) -> Iterator[str]:
    """The bounds of a number, without the one that all have."""
    for item in metadata:
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            bound = getattr(item, name, None)
            if isinstance(bound, int | float) and bound < MOST:
                if kind is int and name in ("gt", "lt"):
                    sign, bound = ("≥", bound + 1) if name == "gt" else ("≤", bound - 1)
                yield f"{sign} {bound}"


def default_text(key: Key) -> str:
    """A key's default as YAML has it; "required" where there is none."""
    return "required" if key.required else _value(key.default)


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_value(item) for item in value)}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value) or '""'


def _only(key: Key) -> str:
    section = key.path.rpartition(".")[0] if key.chooser != "task" else ""
    return f"{section}.{key.chooser}".lstrip(".") + f"={', '.join(key.only)}"


# -- a terminal --------------------------------------------------------------------------------------------------------


def as_text(reference: Reference, keys: Sequence[Key], width: int, bold: bool) -> str:
    """Keys laid out for a terminal.

    Args:
        reference: the kind they are of.
        keys: which of its keys.
        width: of a line, characters.
        bold: whether the terminal shows bold letters.
    """
    on, off = ("\x1b[1m", "\x1b[0m") if bold else ("", "")
    lines: list[str] = []
    section = None
    for key in keys:
        here = key.path.rpartition(".")[0]
        if here != section:
            section = here
            lines += ["", *textwrap.wrap(f"{here or reference.title}: {reference.about(here)}", width), ""]
        lines.append(f"  {on}{key.path}{off}  {takes(key)}")
        notes = [f"with {_only(key)}"] if key.only else []
        notes += ["may change when a run is resumed"] if key.free else ["may change in a branch"] if key.branch else []
        default = default_text(key) if key.required else f"default {default_text(key)}"
        texts = (key.about, "; ".join([f"{default} ({key.origin})", *notes]))
        lines += [
            line
            for text in texts
            for line in textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ")
        ]
    return "\n".join(lines[1:])


# -- Markdown ----------------------------------------------------------------------------------------------------------

_HEAD = """# Keys of recipes and studies

Every key of a pre-training recipe, a fine-tuning recipe and a study. `mimscale keys [SECTION|KEY]` prints the same in a terminal;
`mimscale keys --write docs` wrote this file and the schemas in `docs/schemas`, from what the programs themselves check.

A key is written in a YAML file under its section, or on a command line as `section.key=value`. The value of a key that takes
text or a path is taken as it is written (`data.shards=set #2`), `~` at the beginning of a path being the home; any other is read
as YAML. \\* marks keys that may change when a run is resumed, † those that may differ between a run and its trunk
(`train.branch_from`). "From" says where the default comes from: a section or table of "On Data Scaling in Masked Image Modeling",
the code that its authors released, another work, or mimscale ("ours").

No number but a learning rate is above 1,000,000,000, and no text longer than 4,096 characters. A file holds at most 256 KiB,
20,000 values (what an alias stands for counts each time) and 40 levels, a study at most 5,000 jobs. `1:30` and dates are text,
`010` is ten, and tags such as `!!binary` are refused.

For completion and checks in an editor, map files to schemas; in VS Code's settings, with the YAML extension:

```json
"yaml.schemas": {
  "docs/schemas/pretrain.schema.json": "launchers/recipes/*.yaml",
  "docs/schemas/finetune.schema.json": "launchers/recipes/finetune/*.yaml",
  "docs/schemas/study.schema.json": "launchers/studies/*.yaml"
}
```
"""


def as_markdown(references: Sequence[Reference]) -> str:
    """All keys of several kinds as one document; what is as in an earlier kind is only named."""
    lines = [_HEAD]
    seen: dict[str, tuple[str, ...]] = {}
    for reference in references:
        lines += [f"## {reference.title}", ""]
        alike: list[str] = []
        for section, keys in reference.sections().items():
            new = [key for key in keys if seen.get(key.path) != _row_of(key)]
            same = [f"`{key.path}`" for key in keys if key not in new]
            if not new:
                alike += [f"`{section}`"] if section else same
                continue
            lines += [f"### `{section}`", "", reference.about(section), ""] if section else []
            lines += ["| key | takes | default | what it does | from |", "| --- | --- | --- | --- | --- |"]
            lines += [_row(key) for key in new] + [""]
            lines += [f"As above: {', '.join(same)}.", ""] if same else []
        lines += [f"All of {', '.join(alike)} as above.", ""] if alike else []
        seen |= {key.path: _row_of(key) for key in reference.entries() if not key.only}
    return "\n".join(lines)


def _row_of(key: Key) -> tuple[str, ...]:
    """What tells whether a key is as in another kind; never so for one that is there with some choices alone."""
    return () if key.only else tuple(_row(key).split(" | ")[:-1])


def _row(key: Key) -> str:
    mark = " \\*" if key.free else " †" if key.branch else ""
    about = key.about + (f" Only with `{_only(key)}`." if key.only else "")
    default = "required" if key.required else f"`{default_text(key)}`"
    cells = [f"`{key.path}`{mark}", f"`{takes(key)}`", default, about, key.origin]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# -- JSON schemas ------------------------------------------------------------------------------------------------------


def json_schema(reference: Reference) -> dict[str, Any]:
    """A JSON schema (draft 7, which editors know) of a kind of document."""
    definitions: dict[str, Any] = {}
    held = reference.schema
    body = _chosen(held, definitions) if isinstance(held, ChosenBy) else _object(held, definitions)
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": f"mimscale: {reference.title.lower()}"}
    return {**head, **body, **({"definitions": definitions} if definitions else {})}


def json_text(node: Any, indent: int = 0) -> str:
    """JSON, on one line what fits on one."""
    line = json.dumps(node, ensure_ascii=False)
    if len(line) + indent <= 130 or not isinstance(node, dict | list):
        return line
    inner, outer = " " * (indent + 1), " " * indent
    if isinstance(node, list):
        return "[\n" + ",\n".join(inner + json_text(item, indent + 1) for item in node) + f"\n{outer}]"
    items = (f"{inner}{json.dumps(name)}: {json_text(value, indent + 1)}" for name, value in node.items())
    return "{\n" + ",\n".join(items) + f"\n{outer}}}"


def _object(schema: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    properties, required = {}, []
    for name, field in fields_of(schema).items():
        properties[name] = _property(field, definitions)
        chosen = choice(field)
        if field.is_required() and (chosen is None or chosen.default is None):
            required.append(name)
    found: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": required} if required else {})


def _property(field: FieldInfo, definitions: dict[str, Any]) -> dict[str, Any]:
    if (chosen := choice(field)) is not None:
        return _chosen(chosen, definitions)
    kind = unmarked(field.annotation)
    part, held = held_by(kind)
    if is_section(kind):
        return _object(kind, definitions) | {"description": _first_line(kind)}
    if is_section(held):
        inner = _object(held, definitions)
        return (
            {"type": "array", "items": inner} if part == NUMBER else {"type": "object", "additionalProperties": inner}
        )
    return _leaf(Key("", field), definitions)


def _chosen(chosen: ChosenBy, definitions: dict[str, Any]) -> dict[str, Any]:
    by_section: dict[type[BaseModel], list[str]] = {}
    for name, kind in chosen.sections().items():
        by_section.setdefault(kind, []).append(name)
    cases = []
    for section, values in by_section.items():
        case: dict[str, Any] = {"properties": {chosen.key: {"enum": values}}}
        if chosen.default not in values:
            case["required"] = [chosen.key]
        inner = _object(section, definitions)
        inner["properties"][chosen.key] = {"enum": values}
        inner["required"] = [name for name in inner.get("required", []) if name != chosen.key]
        cases.append({"if": case, "then": inner})
    needed = {"required": [chosen.key]} if chosen.default is None else {"default": {chosen.key: chosen.default}}
    return {"type": "object", "properties": {chosen.key: {"enum": chosen.names()}}, **needed, "allOf": cases}


def _leaf(key: Key, definitions: dict[str, Any]) -> dict[str, Any]:
    if (keys := keys_of(key.field)) is not None:
        name = " or ".join(schema.kind for schema in keys.schemas())
        if name not in definitions:
            definitions[name] = {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    other.path: _leaf(other, definitions) for schema in keys.schemas() for other in describe(schema)
                },
            }
        return {"$ref": f"#/definitions/{name}"}
    if key.choices:
        made: dict[str, Any] = {"enum": [name for name, _ in key.choices]}
    else:
        kind: Any = (
            Annotated[(key.field.annotation, *key.field.metadata)] if key.field.metadata else key.field.annotation
        )
        made = _lists(TypeAdapter(kind).json_schema())
    if key.about:
        made["description"] = f"{key.about} ({'required; ' if key.required else 'default: '}{key.origin})"
    return made if key.required else made | {"default": json.loads(json.dumps(key.default))}


def _lists(node: Any) -> Any:
    """``prefixItems`` of one kind as draft 7 has them."""
    if isinstance(node, list):
        return [_lists(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {name: _lists(value) for name, value in node.items()}
    if "prefixItems" in node:
        node["items"] = node.pop("prefixItems")[0]
    return node
