"""The text of a Slurm job file: options that sbatch reads at its top, and settings of the shell below them.

Every text that a user, a recipe or a study puts into such a file goes through :class:`JobFile`. sbatch takes an option from a
line, which a line end would close, and splits it by rules of its own; the shell takes what is quoted as it stands. So options are
checked, each by the rule of its kind, and settings are quoted. What neither can show, such as a line end, is refused in both.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from mimscale.wording import printable


class SlurmError(RuntimeError):
    """A job that cannot be written or submitted; the message says what to do."""


@dataclass(frozen=True)
class Rule:
    """What a text may be that reaches sbatch.

    Attributes:
        what: it is, for messages.
        pattern: that all of it matches.
    """

    what: str
    pattern: re.Pattern[str]

    def fault(self, text: str) -> str | None:
        """Why ``text`` is none, for after its name; ``None`` where it is one."""
        if (unfit := unfit_character(text)) is not None:
            return f"'{printable(text)}' holds {unfit}, which no job file may hold"
        if not self.pattern.fullmatch(text):
            return f"'{printable(text)}' is not {self.what}"
        return None


# sbatch would end a quoted text at a quote, and take the character behind a backslash for another.
_QUOTED = r'[^"\\]'
TIME = Rule(
    "a time limit of Slurm, such as 24:00:00, 90 (minutes) or 2-12:00:00 (days before the dash)",
    re.compile(
        r"[0-9]{1,8}(:[0-9]{1,8}){0,2}|[0-9]{1,6}-[0-9]{1,6}(:[0-9]{1,6}){0,2}|UNLIMITED|INFINITE", re.IGNORECASE
    ),
)
NAME = Rule(
    "a name of Slurm's: letters, digits and . _ @ / + : , = - of which it begins with none",
    re.compile(r"\w[\w.@/+:,=-]{0,254}"),
)
TITLE = Rule('a name of 1 to 200 characters without " and \\', re.compile(_QUOTED + "{1,200}"))
PLACE = Rule('a path of at most 4,000 characters without " and \\', re.compile(_QUOTED + "{1,4000}"))
WORD = Rule(
    'an option of sbatch, such as --account=NAME, without " and \\',
    re.compile(rf"--[A-Za-z][A-Za-z-]*(={_QUOTED}{{0,4000}})?|-[A-Za-z]{_QUOTED}{{0,4000}}"),
)
VALUE = Rule('the value of an option of sbatch, without " and \\', re.compile(rf"[^-\"\\]{_QUOTED}{{0,4000}}"))
NUMBER = Rule("the number of a job, such as 4711", re.compile(r"[0-9]{1,12}([_+][0-9]{1,12})?"))
SETTING = re.compile("[A-Z][A-Z_]*")
PLAIN = re.compile(r"[A-Za-z0-9_.,:;/@%=+-]+")


def unfit_character(text: str) -> str | None:
    """The first character of ``text`` that cannot be seen, as messages name it: a line end, an escape, half a character."""
    if printable(text, len(text)) == text:
        return None
    return f"the character {next(character for character in text if printable(character) != character)!a}"


def checked(source: str, text: str, rule: Rule) -> str:
    """``text``, which is what ``rule`` says.

    Raises:
        SlurmError: it is not; the message begins with ``source``, what the user calls it.
    """
    if (fault := rule.fault(text)) is not None:
        raise SlurmError(f"{source}: {fault}")
    return text


class JobFile:
    """A job file in the making."""

    def __init__(self) -> None:
        self._options: list[str] = []
        self._settings: list[str] = []

    def ask(self, option: str, value: str | int | None = None, rule: Rule = NAME, source: str = "") -> None:
        """Ask sbatch for something.

        Args:
            option: without dashes: "job-name".
            value: of it; ``None`` for an option that has none.
            rule: what the value has to be, where it is a text.
            source: where it is from, for messages; by default the option.

        Raises:
            SlurmError: the value is not what ``rule`` says.
        """
        text = "" if value is None else f"={value}"
        if isinstance(value, str):
            checked(source or f"--{option}", value, rule)
        self._options.append(_one_word(f"--{option}{text}"))

    def ask_for_file(self, option: str, path: Path, source: str = "") -> None:
        """Ask sbatch for an option whose value is a file of that very name."""
        checked(source or f"--{option}", str(path), PLACE)
        name = str(path).replace("%", "%%")  # sbatch replaces %j and the like
        self._options.append(_one_word(f"--{option}={name}"))

    def ask_as_given(self, words: tuple[str, ...], source: str) -> None:
        """Ask sbatch for what a user has written as options, word by word: ("--partition=long", "-A", "me").

        Raises:
            SlurmError: one is no option, nor the value of the one before it.
        """
        takes_value = False
        for word in words:
            checked(source, word, VALUE if takes_value and not word.startswith("-") else WORD)
            takes_value = word.startswith("-") and "=" not in word
            self._options.append(_one_word(word))

    def set(self, name: str, value: str | tuple[str, ...], source: str = "") -> None:
        """Set a variable of the shell: to a text, or to a list of texts.

        Raises:
            SlurmError: a text holds a character that cannot be seen.
        """
        assert SETTING.fullmatch(name), name
        for text in (value,) if isinstance(value, str) else value:
            if (unfit := unfit_character(text)) is not None:
                raise SlurmError(f"{source or name}: '{printable(text)}' holds {unfit}, which no job file may hold")
        shown = shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
        self._settings.append(f"{name}={shown}")

    def text(self, body: str) -> str:
        """The whole file, with what the job does."""
        head = ["#!/bin/bash", *(f"#SBATCH {option}" for option in self._options), *self._settings]
        return "\n".join(head) + "\n" + body


def _one_word(option: str) -> str:
    """An option as one word for sbatch, which splits a line at blanks, and where a # begins a comment."""
    return option if PLAIN.fullmatch(option) else f'"{option}"'
