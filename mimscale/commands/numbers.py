"""Numbers that commands take: read with bounds, so that what no machine has is refused before anything is computed with it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from mimscale.wording import printable

# More than anybody has, and few enough that arithmetic with them is exact and quick.
MOST = 10**9


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """A type of ``add_argument``: a whole number from ``least`` to ``most``."""

    def read(text: str) -> int:
        digits = text.strip().removeprefix("-")
        # Python refuses to read thousands of digits, with a message of its own.
        number = int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"'{printable(text, 60)}' is not a number of at least {_range(least, most)}"
            )
        return number

    return read


def real(above: float = 0.0, most: float = float(MOST), at_least: float | None = None) -> Callable[[str], float]:
    """A type of ``add_argument``: a number greater than ``above`` (or at least ``at_least``), and at most ``most``."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not ((number > above if at_least is None else number >= at_least) and number <= most):
            least = f"above {above:g}" if at_least is None else f"of at least {at_least:g}"
            raise argparse.ArgumentTypeError(f"'{printable(text, 60)}' is not a number {least} and at most {most:g}")
        return number

    return read


def _range(least: int, most: int) -> str:
    return f"{least}" if most >= MOST else f"{least} and at most {most:,}"
