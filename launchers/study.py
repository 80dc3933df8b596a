"""A study: ``python launchers/study.py plan|submit|run|status|report STUDY.yaml [key=value ...]``.

``plan`` shows jobs and their cost, ``submit`` queues them on Slurm, ``run`` trains them here, ``status`` shows where they are
and ``report`` what came out.
"""

import sys

from mimscale.commands.study import main

if __name__ == "__main__":
    sys.exit(main(program="study.py"))
