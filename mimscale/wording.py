"""Numbers and foreign text in messages."""

from __future__ import annotations

import unicodedata


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: 1 image, 2,000 images, 1 batch, 2 batches.

    Args:
        number: of them.
        noun: of one.
        plural: of several; by default the noun with an s, or es after ch, sh, s and x.
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {plural or noun + ('es' if noun.endswith(('ch', 'sh', 's', 'x')) else 's')}"


def printable(text: object, most: int = 300) -> str:
    """Foreign text (a key, a file's name, somebody else's message) as it may stand in a message, a log or a table.

    Control characters, line ends, marks that turn the direction of writing, and halves of characters become escapes such as
    ``\\x1b``; what is longer than ``most`` characters is cut in the middle.
    """
    whole = str(text)
    if len(whole) > most:
        kept = (most - 5) // 2
        whole = f"{whole[:kept]} ... {whole[-kept:]}"
    return _escaped(whole)


def escaped(message: str) -> str:
    """A message that foreign text may have come into: escaped as by :func:`printable`, but for its line ends, and whole."""
    return "\n".join(map(_escaped, message.split("\n")))


class Escaped(Exception):
    """An error in whose message there may be foreign text (names, keys): what no terminal should get of it is escaped."""

    def __init__(self, message: object = ""):
        super().__init__(escaped(str(message)))


def _escaped(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if unicodedata.category(c) not in _UNSEEN else c.encode("unicode_escape").decode() for c in text)


# Controls, formats (among them marks of direction), surrogates, private and unassigned characters, line separators.
_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
