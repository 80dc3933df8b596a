"""``mimscale keys``: every key of recipes and studies, what it does, its default, and where that comes from."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from mimscale.commands import Parser
from mimscale.files import write_text
from mimscale.reference import Reference, as_markdown, as_text, json_schema, json_text
from mimscale.study.spec import Study
from mimscale.training.recipe import Recipe
from mimscale.transfer.recipe import RECIPES
from mimscale.wording import printable

# The kinds of file that there are, and for which there are JSON schemas.
FILES = (
    Reference("pretrain", "Pre-training recipes", Recipe),
    Reference("finetune", "Fine-tuning recipes", RECIPES),
    Reference("study", "Studies", Study),
)


def references() -> dict[str, Reference]:
    """All kinds, tasks among them, in the order in which a word is looked for."""
    found = {reference.kind: reference for reference in FILES}
    return found | {task.kind: task for task in _tasks()}


def _tasks() -> list[Reference]:
    return [Reference(name, f"Fine-tuning recipes: {name}", schema) for name, schema in RECIPES.sections().items()]


def documents() -> dict[str, str]:
    """The generated documents: text by the path inside of the folder of documents."""
    schemas = {f"schemas/{reference.kind}.schema.json": json_text(json_schema(reference)) + "\n" for reference in FILES}
    pretraining, _, study = FILES
    return {"recipe.md": as_markdown([pretraining, *_tasks(), study]), **schemas}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="mimscale keys", description=__doc__, allow_abbrev=False)
    made.add_argument("word", nargs="?", metavar="SECTION|KEY", help="such as train, train.iterations or iterations")
    made.add_argument(
        "--kind", choices=list(references()), help="of which recipes, or of studies (default: the first that has it)"
    )
    made.add_argument("--json-schema", action="store_true", help="print a JSON schema of the whole kind, for editors")
    made.add_argument("--write", type=Path, metavar="DOCS", help="write DOCS/recipe.md and DOCS/schemas/*.json")
    return made


def main(argv: list[str]) -> int:
    """Run the command: status 1 where there is no such section or key."""
    asked = parser().parse_args(argv)
    known = references()
    if asked.write:
        try:
            for name, text in documents().items():
                write_text(asked.write / name, text)
                print(asked.write / name)
        except OSError as error:
            print(f"mimscale: error: cannot write into {printable(asked.write)}: {error.strerror}", file=sys.stderr)
            return 1
        return 0
    if asked.json_schema:
        print(json_text(json_schema(known[asked.kind or "pretrain"])))
        return 0
    looked = [known[asked.kind]] if asked.kind else list(known.values())
    if asked.word is None:
        chosen, keys = looked[0], looked[0].entries()
    else:
        having = [reference for reference in looked if reference.find(asked.word)]
        if not having:
            print(f"mimscale: error: {_unknown(asked.word, looked)}", file=sys.stderr)
            return 1
        chosen, keys = having[0], having[0].find(asked.word)
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    print(as_text(chosen, keys, width, bold=sys.stdout.isatty()))
    if not asked.kind:
        others = looked[1:] if asked.word is None else having[1:]
        others = [reference for reference in others if reference.find(asked.word or "") != keys]
        if others:
            print(f"\nThese are {chosen.title.lower()}; others: --kind {' | '.join(r.kind for r in others)}")
    return 0


def _unknown(word: str, looked: list[Reference]) -> str:
    word = printable(word, 200)
    near = next((near for reference in looked if (near := reference.nearest(word))), None)
    if near:
        return f"there is no section or key '{word}'; did you mean '{near}'?"
    sections = {path.partition(".")[0]: None for reference in looked for path in reference.sections() if path}
    return f"there is no section or key '{word}'; the sections are {', '.join(sections)}"
