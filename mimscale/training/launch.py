"""The command line of the launchers: arguments in, one clear message out when they do not fit."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mimscale.training.preemption import REQUEUE_EXIT, Preempted, deafen, listen

if TYPE_CHECKING:
    from mimscale.training.recipe import RunRecipe

# Other ranks wait this long before they follow the first one out: the launcher ends all processes when one goes, and the
# first must have said why.
GRACE_SECONDS = 5.0


def fail(error: BaseException, everywhere: bool, status: int = 1) -> NoReturn:
    """Say what went wrong and exit.

    Args:
        error: its message is what the user sees.
        everywhere: whether all ranks fail alike; then only the first one speaks.
        status: what the process exits with.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    if not everywhere or rank == 0:
        where = "" if everywhere else f" (rank {rank})"
        lines = str(error).splitlines() or [type(error).__name__]
        kind = "error" if status == 1 else "stopped"
        print("\n".join(f"mimscale: {kind}{where}: {line}" for line in lines), file=sys.stderr, flush=True)
    else:
        time.sleep(GRACE_SECONDS)
    sys.stdout.flush()
    # Not sys.exit: worker and communication threads of a half-finished step could keep the process, and with it the
    # whole job, alive.
    os._exit(status)


def arguments(program: str, purpose: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a launcher's command line."""
    parser = argparse.ArgumentParser(prog=program, description=purpose, allow_abbrev=False)
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE", help="DeepSpeed configuration (JSON)")
    parser.add_argument("--recipe", required=True, metavar="FILE", help="recipe (YAML)")
    parser.add_argument("--output", required=True, metavar="RUN", help="run folder; one that exists is resumed")
    parser.add_argument(
        "--check", action="store_true", help="look at the recipe and the configuration, and train nothing"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="with --check: how many there will be")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as train.iterations=1000")
    return parser.parse_intermixed_args(argv)


def check(recipe: RunRecipe, ds_config: dict[str, Any], ranks: int | None) -> None:
    """What can be said of a run before its machine is there.

    Raises:
        RecipeError: the recipe does not say where the data is.
        DeepSpeedConfigError: recipe and configuration contradict each other, or the batch does not divide over ``ranks``.
    """
    from mimscale.training.ds_config import reconcile, split_batch

    recipe.check_data_places()
    if ranks is not None:
        reconcile(ds_config, recipe, split_batch(ds_config, recipe.train.global_batch, ranks, None), on_gpu=True)


def launch(
    args: argparse.Namespace,
    schema: Callable[[], type[RunRecipe]],
    trainer: Callable[[], Callable[[Any, dict[str, Any], str], Any]],
) -> NoReturn:
    """Check the arguments, then train.

    Args:
        args: from :func:`arguments`.
        schema: gives the kind of recipe.
        trainer: gives ``train(recipe, ds_config, output)``; called once the arguments are known to be good, since what it
            imports takes seconds.
    """
    listen()
    from mimscale.training.ds_config import DeepSpeedConfigError, read_ds_config, zero_stage
    from mimscale.training.recipe import RecipeError, load_recipe

    try:
        recipe = load_recipe(args.recipe, args.overrides, schema())
        ds_config = read_ds_config(args.deepspeed_config)
        zero_stage(ds_config)
        if args.check:
            check(recipe, ds_config, args.ranks)
    except (RecipeError, DeepSpeedConfigError) as error:
        fail(error, everywhere=True)
    if args.check:
        sys.exit(0)

    from mimscale.data import ShardError
    from mimscale.training.checkpoint import CheckpointError
    from mimscale.training.engine import OneRankError, TrainingError
    from mimscale.training.watchdog import lost_rank, note_end

    def end(error: BaseException, everywhere: bool, state: str = "failed", status: int = 1) -> NoReturn:
        if not everywhere or int(os.environ.get("RANK", "0")) == 0:
            note_end(Path(args.output) / "heartbeat", state, str(error))
        fail(error, everywhere, status)

    try:
        trainer()(recipe, ds_config, args.output)
    except (RecipeError, DeepSpeedConfigError, ShardError) as error:
        fail(error, everywhere=True)  # nothing has begun
    except (CheckpointError, TrainingError) as error:
        end(error, everywhere=True)
    except Preempted as error:
        end(error, everywhere=True, state="preempted", status=REQUEUE_EXIT)
    except (OneRankError, OSError) as error:
        end(error, everywhere=False)
    except RuntimeError as error:
        message = lost_rank(Path(args.output) / "heartbeat", error)
        if message is None:
            raise
        end(TrainingError(message), everywhere=False)
    except KeyboardInterrupt:
        end(KeyboardInterrupt("stopped from the keyboard; the same command resumes"), everywhere=True, state="stopped")
    deafen()
    sys.exit(0)


def main(argv: list[str] | None = None) -> NoReturn:
    """The pre-training launcher."""

    def schema() -> type[RunRecipe]:
        from mimscale.training.recipe import Recipe

        return Recipe

    def trainer() -> Callable[[Any, dict[str, Any], str], Any]:
        from mimscale.training.pretraining import pretrain

        return pretrain

    launch(arguments("pretrain.py", "Pre-train an encoder by masked image modelling.", argv), schema, trainer)
