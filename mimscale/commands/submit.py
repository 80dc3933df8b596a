"""``mimscale submit``: a recipe as a Slurm job. Writes the submission file into the run folder, shows it, and queues it."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mimscale.commands import Parser
from mimscale.commands.numbers import whole
from mimscale.resources import LAUNCHERS, RECIPES
from mimscale.wording import printable

if TYPE_CHECKING:
    from mimscale.training.launch.slurm import SlurmJob

SCRIPT = "submit.sbatch"
# More than any cluster has.
NODES, RANKS, CORES = 65_536, 1_024, 4_096


def check_arguments(job: SlurmJob) -> None:
    """Let the job's launcher look at its arguments now, and not when the job has waited for its turn.

    Raises:
        SlurmError: with what the launcher says.
    """
    from mimscale.training.launch.slurm import SlurmError

    command = [sys.executable, str(LAUNCHERS / f"{job.launcher}.py"), "--check", f"--ranks={job.ranks}"]
    # With = a name that begins with a dash is no option.
    command += [f"--deepspeed_config={job.config}", f"--recipe={job.recipe}", f"--output={job.output}", *job.overrides]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SlurmError(done.stderr.strip().replace("mimscale: error: ", ""))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="mimscale submit", description=__doc__, allow_abbrev=False)
    made.add_argument(
        "recipe",
        type=Path,
        metavar="RECIPE",
        help="a file (YAML), or one of mimscale's own: swinv2_b, finetune/inat18_swinv2_b",
    )
    made.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as data.shards=SHARDS")
    made.add_argument("--output", type=Path, metavar="RUN", help="run folder (runs/RECIPE's name)")
    made.add_argument("--deepspeed_config", type=Path, default=Path("zero2"), metavar="FILE|NAME", help="(zero2)")
    made.add_argument("--nodes", type=whole(1, NODES), default=1, metavar="N", help="(1)")
    made.add_argument(
        "--gpus-per-node", type=whole(0, RANKS), default=8, metavar="N", help="one rank each (8); 0 trains on CPUs"
    )
    made.add_argument(
        "--tasks-per-node", type=whole(1, RANKS), metavar="N", help="ranks on each node where there are no GPUs (1)"
    )
    made.add_argument(
        "--cpus-per-task", type=whole(1, CORES), metavar="N", help="cores of each rank; by default the site's"
    )
    made.add_argument("--time", default="24:00:00", help="limit of one start (24:00:00); requeued until it is done")
    made.add_argument("--signal", type=whole(1), default=180, metavar="S", help="stop S seconds before that (180)")
    made.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="JOB",
        help="start when this job has ended well; may be repeated",
    )
    made.add_argument("--name", help="of the job (RECIPE's name)")
    made.add_argument(
        "--sbatch", default="", metavar="OPTIONS", help="more of sbatch's, in quotes: '--account=a --partition=p'"
    )
    made.add_argument("--dry-run", action="store_true", help="write and show the file, and leave it at that")
    return made


def _options(text: str) -> tuple[str, ...]:
    from mimscale.training.launch.slurm import SlurmError

    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise SlurmError(f"--sbatch {printable(text)}: {str(error).lower()}") from None


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--sbatch":
            words[-1] += f"={word}"  # argparse would take a value such as --account=a for an option of its own
        else:
            words.append(word)
    asked = parser().parse_intermixed_args(words)
    from mimscale.files import write_text
    from mimscale.training.launch.slurm import SlurmError, SlurmJob, submission, submit, write_script
    from mimscale.training.recipe import RecipeError, recipe_values

    try:
        job = SlurmJob(
            recipe=RECIPES.find(asked.recipe),
            config=asked.deepspeed_config,
            output=asked.output or Path("runs") / asked.recipe.stem,
            overrides=tuple(asked.overrides),
            launcher="finetune" if "task" in recipe_values(asked.recipe) else "pretrain",
            name=asked.name or asked.recipe.stem,
            nodes=asked.nodes,
            gpus_per_node=asked.gpus_per_node,
            tasks_per_node=asked.tasks_per_node,
            cpus_per_task=asked.cpus_per_task,
            time=asked.time,
            signal_seconds=asked.signal,
            options=_options(asked.sbatch),
        )
        text = write_script(job)
        check_arguments(job)
        script = job.output / SCRIPT
        write_text(script, text)
        print(text)
        if asked.dry_run:
            print(f"written to {script}; submit it with: {shlex.join(submission(script, asked.after))}")
            return 0
        number = submit(script, asked.after)
    except OSError as error:
        print(f"mimscale: error: {printable(error.filename or 'the job file')}: {error.strerror}", file=sys.stderr)
        return 1
    except (SlurmError, RecipeError) as error:
        print("\n".join(f"mimscale: error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    print(f"job {number}; it prints to {job.log}; mimscale status {job.output} shows its progress")
    return 0
