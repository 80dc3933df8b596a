"""One start of a training: checks its recipe and configuration, trains, and ends with one clear message where it cannot."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from mimscale.resources import LAUNCHERS
from mimscale.training.faults.preemption import REQUEUE_EXIT, Preempted, deafen, exit_status, heard, listen
from mimscale.training.launch.local_ranks import run_ranks, under_launcher

if TYPE_CHECKING:
    from mimscale.training.recipe import RunRecipe

# Other ranks wait this long before they follow the first one out: the launcher ends all processes when one goes, and the
# first must have reported why.
GRACE_SECONDS = 5.0


def fail(error: BaseException, everywhere: bool, status: int = 1) -> NoReturn:
    """Report what went wrong and exit.

    Args:
        error: its message is what the user sees.
        everywhere: whether all ranks fail alike; then only the first one reports it.
        status: what the process exits with.
    """
    deafen()  # the launcher ends the others when one goes; they still have to say why
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


@dataclass(frozen=True)
class Start:
    """What a launcher is given.

    Args:
        recipe: file (YAML), or the name of one that comes with mimscale.
        ds_config: DeepSpeed configuration (JSON), likewise; ``None`` for what suits this machine.
        output: run folder; one that exists is resumed.
        overrides: recipe keys, ``key=value``.
        check: look at recipe and configuration, and train nothing.
        ranks: how many there will be; ``None`` where nobody has said.
    """

    recipe: str
    ds_config: str | None
    output: str
    overrides: tuple[str, ...] = ()
    check: bool = False
    ranks: int | None = None


def start_ranks_here(launcher: Literal["pretrain", "finetune"], start: Start, by_default: int | None = None) -> None:
    """Start a training's ranks on this machine and exit as they do; return where this process is to be the only one, or is one.

    Args:
        launcher: which script each rank runs.
        start: what it is given.
        by_default: ranks, where ``start`` does not say; ``None`` for one a GPU, or one on a machine without.
    """
    if start.check or under_launcher():
        return
    listen()
    count, where = start.ranks or by_default, ""
    if count is None:
        import torch

        gpus = torch.cuda.device_count()
        count, where = gpus or 1, ", one a GPU" if gpus else " on the CPU; --ranks N starts N"
        print(f"mimscale: {count} {'rank' if count == 1 else 'ranks'}{where}", flush=True)
    if count == 1:
        return
    command = [str(LAUNCHERS / f"{launcher}.py"), "--recipe", start.recipe, "--output", start.output]
    command += ["--deepspeed_config", start.ds_config] if start.ds_config else []
    sys.exit(run_ranks([*command, *start.overrides], count))


def _suitable_config() -> str:
    """The DeepSpeed configuration for whoever names none."""
    import torch

    name, where = ("zero2", "there are GPUs") if torch.cuda.is_available() else ("cpu", "there is no GPU")
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        print(f"mimscale: --deepspeed_config {name}, since {where}", flush=True)
    return name


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
    start: Start,
    schema: Callable[[], type[RunRecipe]],
    trainer: Callable[[], Callable[[Any, dict[str, Any], str], Any]],
) -> NoReturn:
    """Check what was given, then train.

    Args:
        start: what to train, with what, into which folder.
        schema: gives the kind of recipe.
        trainer: gives ``train(recipe, ds_config, output)``; called once the arguments are known to be good, since what it
            imports takes seconds.
    """
    heartbeat = Path(start.output) / "heartbeat"

    def ended_at_once(message: str) -> None:
        from mimscale.training.faults.watchdog import note_end

        note_end(heartbeat, "stopped", message)

    listen(ended_at_once)
    from mimscale.training.ds_config import DeepSpeedConfigError, read_ds_config, zero_stage
    from mimscale.training.recipe import RecipeError, load_recipe

    try:
        recipe = load_recipe(start.recipe, start.overrides, schema())
        ds_config = read_ds_config(start.ds_config or _suitable_config())
        zero_stage(ds_config)
        if start.check:
            check(recipe, ds_config, start.ranks)
    except (RecipeError, DeepSpeedConfigError) as error:
        fail(error, everywhere=True)
    if start.check:
        sys.exit(0)

    from mimscale.data import ShardError
    from mimscale.training.errors import CheckpointError, RankLocalError, TrainingError
    from mimscale.training.faults.lock import RunInUseError
    from mimscale.training.faults.watchdog import lost_rank, note_end

    def end(error: BaseException, everywhere: bool, state: str = "failed", status: int = 1) -> NoReturn:
        if not everywhere or int(os.environ.get("RANK", "0")) == 0:
            note_end(heartbeat, state, str(error))
        fail(error, everywhere, status)

    try:
        trainer()(recipe, ds_config, start.output)
    except (RecipeError, DeepSpeedConfigError, ShardError, RunInUseError) as error:
        fail(error, everywhere=True)  # nothing has begun
    except (CheckpointError, TrainingError) as error:
        end(error, everywhere=True)
    except Preempted as error:
        by_people = error.status != REQUEUE_EXIT
        end(error, everywhere=True, state="stopped" if by_people else "preempted", status=error.status)
    except (RankLocalError, OSError) as error:
        end(error, everywhere=False)
    except RuntimeError as error:
        message = lost_rank(heartbeat, error)
        if message is None:
            raise
        if (reason := heard()) is not None:
            # Another rank was quicker to end, or was killed by whoever has asked.
            text = f"stopped by {reason}, and another rank ended before this step could be saved"
            end(
                Preempted(f"{text}; the same command resumes from the last checkpoint"),
                False,
                "stopped",
                exit_status(reason),
            )
        end(TrainingError(message), everywhere=False)
    deafen()
    sys.exit(0)


def launch_pretraining(start: Start) -> NoReturn:
    """Pre-train as ``start`` says, and exit."""

    def schema() -> type[RunRecipe]:
        from mimscale.training.recipe import Recipe

        return Recipe

    def trainer() -> Callable[[Any, dict[str, Any], str], Any]:
        from mimscale.training.pretraining.task import pretrain

        return pretrain

    launch(start, schema, trainer)
