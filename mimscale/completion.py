"""Completing command lines in the shell: commands, options, recipes, studies and configurations. Needs argcomplete."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from types import ModuleType

from mimscale.resources import DS_CONFIGS, FINETUNE_RECIPES, RECIPES, STUDIES, Kind


def complete(commands: Collection[str], command: Callable[[str], ModuleType]) -> None:
    """Answer the shell, which has put the line into the environment, and exit.

    Args:
        commands: their words.
        command: gives the module of one, which has a ``parser()``.
    """
    import argcomplete

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    before = line[:point].split()
    first = int(os.environ["_ARGCOMPLETE"])  # the word that is the program, counted from 1
    word = before[first] if len(before) > first else ""
    if word in commands and (len(before) > first + 1 or line[:point].endswith(" ")):
        os.environ["_ARGCOMPLETE"] = str(first + 1)
        made = command(word).parser()
        for action in made._actions:
            if kind := _kind(word, action.dest):
                action.completer = _Names(kind)
    else:
        made = argparse.ArgumentParser("mimscale", add_help=False)
        made.add_argument("command", choices=[*commands, "--help", "--version"])
    argcomplete.autocomplete(made)


def _kind(word: str, dest: str) -> Kind | None:
    recipes = FINETUNE_RECIPES if word == "finetune" else RECIPES
    return {"recipe": recipes, "deepspeed_config": DS_CONFIGS, "study": STUDIES}.get(dest)


class _Names:
    """Names of what comes with mimscale, and files."""

    def __init__(self, kind: Kind):
        self.kind = kind

    def __call__(self, prefix: str, **_: object) -> list[str]:
        from argcomplete.completers import FilesCompleter

        return [*self.kind.names(), *FilesCompleter()(prefix)]
