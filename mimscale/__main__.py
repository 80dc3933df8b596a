"""``python -m mimscale``: the ``mimscale`` command."""

import sys

from mimscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
