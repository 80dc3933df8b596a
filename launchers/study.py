"""A study: ``python launchers/study.py plan|submit|run|status|report STUDY.yaml [key=value ...]``.

``plan`` shows jobs and their cost, ``submit`` queues them on Slurm, ``run`` trains them here, ``status`` shows where they are
and ``report`` what came out.
"""

import sys

from mimscale.entry import enter


def main(argv: list[str] | None = None) -> int:
    """The command, which is imported when an interrupt of its imports would end well."""
    from mimscale.commands.study import main as study

    return study(argv, program="study.py")


if __name__ == "__main__":
    sys.exit(enter(main))
