"""What the ``mimscale`` command and the launchers do: arguments in, words out."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from mimscale.wording import printable


class Parser(argparse.ArgumentParser):
    """Of a command's words; what it refuses ends as every other error does, in ``mimscale: error: ...``, with status 2."""

    def error(self, message: str) -> NoReturn:
        """Show the usage and what is wrong, and exit."""
        self.print_usage(sys.stderr)
        self.exit(2, f"mimscale: error: {printable(message, 2000)}\n")
