"""``mimscale study`` and ``launchers/study.py``: ``COMMAND STUDY [key=value ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimscale.commands import Parser
from mimscale.commands.numbers import real, whole
from mimscale.registry import objectives
from mimscale.wording import printable

if TYPE_CHECKING:
    from mimscale.study.jobs import Job
    from mimscale.study.results.result import Result
    from mimscale.study.spec import Study

PUBLISHED = Path("published")
STUDY_HELP = "a file, or one of mimscale's own: smoke, mini, paper; report and predict also take the word: published"
Command = Callable[[Any, Any, argparse.Namespace], int]


def _plan(study: Study, jobs: dict[str, Job], options: argparse.Namespace) -> int:
    from mimscale.study.plan import plan_text, write_plan
    from mimscale.study.plan_picture import draw_graph

    print(plan_text(study, jobs))
    output = Path(study.output)
    output.mkdir(parents=True, exist_ok=True)
    write_plan(study, jobs, output / "plan.json")
    pictures = draw_graph(study, jobs, output)
    print(f"\nThe same as data: {output / 'plan.json'}; the graph as a picture: {', '.join(map(str, pictures))}")
    return 0


def _run(study: Study, jobs: dict[str, Job], options: argparse.Namespace) -> int:
    from mimscale.study.run.local import LocalRun

    return LocalRun(study, jobs).run()


def _submit(study: Study, jobs: dict[str, Job], options: argparse.Namespace) -> int:
    from mimscale.study.run.slurm import submit_study

    return submit_study(study, jobs)


def _status(study: Study, jobs: dict[str, Job], options: argparse.Namespace) -> int:
    from mimscale.study.run.status import show_status

    return show_status(study, jobs, options.watch)


def _report(study: Study, jobs: dict[str, Job], options: argparse.Namespace) -> int:
    from mimscale.study.report.report import write_report
    from mimscale.study.results.collect import collect

    results, output = collect(study, jobs), Path(study.output)
    page = write_report(results, options.out or output / "report", study.name, output=output)
    done = sum(result.status == "done" for result in results)
    print(f"{page}: {done} of {len(results)} results are there")
    return 0


def _predict(study: Study, jobs: dict[str, Job], options: argparse.Namespace) -> int:
    from mimscale.study.results.collect import collect

    return _answer(collect(study, jobs), options)


def _answer(results: list[Result], options: argparse.Namespace) -> int:
    from mimscale.study.report.answers import answer

    asked = (options.model, options.dataset, options.length, options.budget, options.objective, options.check)
    print(answer(results, *asked))
    return 0


def _of_published(options: argparse.Namespace) -> int:
    """``report`` and ``predict`` of the 63 runs that the paper's authors released."""
    from mimscale.study.report.report import write_report
    from mimscale.study.results.published import published
    from mimscale.study.spec import StudyError

    if options.command == "predict":
        return _answer(published(), options)
    if options.command == "report":
        title = "Published runs of “On Data Scaling in Masked Image Modeling”"
        print(write_report(published(), options.out or Path("published"), title))
        return 0
    raise StudyError(f"published runs are there already: report and predict take them, {options.command} does not")


COMMANDS: dict[str, tuple[Command, str]] = {
    "plan": (_plan, "jobs, dependencies, GPU-hours, cost, and a picture of the graph"),
    "submit": (_submit, "queue what is missing or failed on Slurm"),
    "run": (_run, "train what is missing or failed on this machine"),
    "status": (_status, "where every job is"),
    "report": (_report, "figures and tables of the results so far, as one HTML page"),
    "predict": (_predict, "the loss of a cell that was not run, or what a budget is best spent on"),
}


def parser(program: str = "mimscale study") -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog=program,
        description="A grid of pre-trainings and fine-tunings: planned, run, judged and reported.",
        epilog="\n".join(f"  {name:<8}{text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("command", choices=list(COMMANDS), metavar="|".join(COMMANDS))
    made.add_argument("study", type=Path, metavar="STUDY", help=STUDY_HELP)
    made.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the study, such as output=runs/mine")
    made.add_argument("--watch", action="store_true", help="status: look again every few seconds")
    made.add_argument("--out", type=Path, metavar="DIR", help="report: where to (default OUTPUT/report)")
    question = made.add_argument_group("predict")
    question.add_argument("--model", help="of the study, such as swinv2_h")
    question.add_argument("--dataset", help="of the study, such as in1k_50")
    question.add_argument("--length", type=whole(1), metavar="N", help="iterations of the cell to predict")
    question.add_argument("--budget", type=real(), help="relative compute; the smallest model's shortest length is 1")
    question.add_argument(
        "--objective", default="simmim", choices=objectives.names(), help="whose cells (default: simmim)"
    )
    question.add_argument("--check", action="store_true", help="predict cells that were run, from the others")
    return made


def main(argv: list[str] | None = None, program: str = "mimscale study") -> int:
    """Run one command of the study; returns the exit status."""
    options = parser(program).parse_intermixed_args(argv)
    from mimscale.study.jobs import build_graph
    from mimscale.study.results.result import ResultsError
    from mimscale.study.spec import StudyError, load_study
    from mimscale.training.launch.slurm import SlurmError

    try:
        if options.study == PUBLISHED:
            return _of_published(options)
        study = load_study(options.study, options.overrides)
        return COMMANDS[options.command][0](study, build_graph(study), options)
    except (StudyError, ResultsError, SlurmError) as error:
        print("\n".join(f"mimscale: error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"mimscale: error: {printable(error.filename)}: {error.strerror}", file=sys.stderr)
        return 1
