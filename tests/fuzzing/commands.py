"""Commands as they are typed, on files that somebody else made."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 - which looks for fonts once, by starting a program

from fuzzing.case import Case, Ended, Misfit, Reader, kind
from fuzzing.mutations import ODD_NUMBERS, ODD_TEXTS, bytes_mutated, clutter, file_mutated, json_mutated, tree_mutated
from fuzzing.recipes import overrides, yaml_mutated
from fuzzing.weights import newest, safetensors_mutated, sealed
from mimscale import cli
from mimscale.schema import known_keys
from mimscale.training.recipe import Recipe


def _call(words: list[str], also: str = "error: ") -> None:
    """Run a command, and see that it ends as commands do.

    Args:
        words: of the command line.
        also: what it says where it ends with a status.

    Raises:
        Ended: with a status that is not 0.
        Misfit: in another way.
    """
    before = len(sys.stderr.getvalue())  # type: ignore[attr-defined]
    try:
        status = cli.main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    said = sys.stderr.getvalue()[before:]  # type: ignore[attr-defined]
    if status not in (0, 1, 2):
        raise Misfit(f"{words} ended with status {status}")
    if status and also not in said:
        raise Misfit(f"{words} ended with status {status} and said nothing of an error: {said[-500:]!r}")
    if len(said) > 50_000:
        raise Misfit(f"{words} said {len(said):,} characters")
    if status == 2 and "usage: " in said:  # argparse repeats the word that was typed, as it was typed
        sys.stderr.truncate(before)
        raise Ended(f"usage: {words!r}")
    if status:
        raise Ended(said[:15_000])


def _odd(rng: random.Random) -> str:
    found = str(rng.choice((rng.choice(ODD_TEXTS), rng.choice(ODD_NUMBERS[:-5]))))
    return found.replace("\0", "") or "x"  # no command line holds a NUL


def _spoilt_run(case: Case, name: str) -> Path:
    """A run in which something is not as it was."""
    run, rng = case.copy(name), case.rng
    way = rng.random()
    if way < 0.35:
        path = newest(run) / "checkpoint.json"
        import json

        manifest = json.loads(path.read_bytes())
        section = rng.choice(("recipe", "data", "shapes", "recipe"))
        manifest[section] = tree_mutated(manifest[section], rng)
        try:
            path.write_bytes(sealed(manifest))
        except (TypeError, ValueError):
            path.write_bytes(b"{}")
    elif way < 0.5:
        file_mutated(newest(run) / "checkpoint.json", json_mutated, case)
    elif way < 0.6:
        file_mutated(next(newest(run).glob("*.safetensors")), safetensors_mutated, case)
    elif way < 0.7:
        clutter(run / "checkpoints", case)
    return run


@kind("evaluate", Ended, needs=("tuned",), share=0.1, starts=True)
def evaluate(case: Case) -> Reader:
    """``mimscale evaluate``."""
    run, rng = _spoilt_run(case, "tuned"), case.rng
    shards = case.copy("shards")
    if rng.random() < 0.5:
        file_mutated(rng.choice(sorted(shards.iterdir())), bytes_mutated, case)
    words = ["evaluate", str(run), "--output", str(case.out / "evaluation"), "--shards", str(shards)]
    if rng.random() < 0.4:
        words.append(f"data.{rng.choice(('validation', 'mean', 'image_size', 'workers', 'shards', 'x'))}={_odd(rng)}")
    return lambda: _call(words)


@kind("predict", Ended, needs=("tuned", "images"), share=0.15)
def predict(case: Case) -> Reader:
    """``mimscale predict``."""
    run, rng = _spoilt_run(case, "tuned"), case.rng
    images = sorted(case.copy("images").iterdir())
    for path in rng.sample(images, 3):
        file_mutated(path, bytes_mutated, case, strange=0.3)
    where = f"{run}{rng.choice(('', '', '@10', '@7', '@x', '@99999999999999999999'))}"
    return lambda: _call(
        ["predict", *map(str, rng.sample(images, 5)), "--run", where, "--output", str(case.out / "said")]
    )


@kind("reconstruct", Ended, needs=("run", "images"), share=0.15)
def reconstruct(case: Case) -> Reader:
    """``mimscale reconstruct``."""
    run, rng = _spoilt_run(case, "run"), case.rng
    images = sorted(case.copy("images").iterdir())
    for path in rng.sample(images, 3):
        file_mutated(path, bytes_mutated, case, strange=0.3)
    given = (
        [str(path) for path in rng.sample(images, 4)]
        if rng.random() < 0.7
        else ["--count", rng.choice(("1", "2", "0", "-1", "9999", "x"))]
    )
    more = rng.choice(
        ([], [], ["--step", rng.choice(("5", "7", "x", "9" * 30))], ["--seed", rng.choice(("1", "-1", "9" * 30))])
    )
    return lambda: _call(["reconstruct", str(run), *given, *more, "--output", str(case.out / "sheet.png")])


@kind("probe", Ended, needs=("run", "weights"), share=0.1)
def probe(case: Case) -> Reader:
    """``mimscale probe``."""
    rng = case.rng
    if rng.random() < 0.5:
        source = _spoilt_run(case, "run")
        case.outputs.append(source / "probe")
    else:
        source = case.copy("weights/encoder.safetensors")
        file_mutated(source, safetensors_mutated, case)
        case.outputs.append(source.parent / "probe")
    shards = case.copy("shards")
    if rng.random() < 0.5:
        file_mutated(rng.choice(sorted(shards.iterdir())), bytes_mutated, case)
    more = rng.choice(
        (
            [],
            [],
            ["--knn", rng.choice(("0", "1", "10", "-1", "9" * 12))],
            ["--fraction", _odd(rng)],
            ["--validation", _odd(rng)],
        )
    )
    return lambda: _call(["probe", str(source), "--shards", str(shards), *more])


@kind("plan-memory", Ended, needs=("recipes",), share=0.15)
def plan_memory(case: Case) -> Reader:
    """``mimscale plan-memory``."""
    rng = case.rng
    way = rng.random()
    if way < 0.4:
        path = case.copy("recipes/demo.yaml", "recipe.yaml")
        file_mutated(path, yaml_mutated, case)
        words = ["--recipe", str(path)]
    elif way < 0.7:
        words = ["--recipe", "demo", *[text.replace("\0", "") for text in overrides(rng, known_keys(Recipe))]]
    else:
        words = [
            rng.choice(
                ("--model", "--gpus", "--gpu", "--memory", "--batch", "--deepspeed_config", "--recipe", "--write")
            ),
            _odd(rng),
        ]
    return lambda: _call(["plan-memory", *words])


@kind("bench", Ended, needs=("shards",), share=0.1)
def bench(case: Case) -> Reader:
    """``mimscale bench``, up to where it measures."""
    rng = case.rng
    option = rng.choice(
        (
            "--model",
            "--batch",
            "--image",
            "--window",
            "--device",
            "--zero",
            "--recipe",
            "--folder",
            "--steps",
            "--rounds",
            "--threads",
        )
    )
    which = rng.choice(("step", "memory", "data", "communication", "save", _odd(rng)))
    # Each ends before it measures: one option is always wrong.
    wrong = {
        "data": [str(case.given / "nowhere")],
        "save": ["--deepspeed_config", "nowhere"],
        "communication": ["--recipe", "nowhere"],
    }
    words = [which, *wrong.get(which, ["--window", "63"]), option, rng.choice(("0", "-1", "9" * 30, "nan", _odd(rng)))]
    if which == "data" and rng.random() < 0.7:
        shards = case.copy("shards")
        file_mutated(shards / rng.choice(("index.json", "samples.npy")), bytes_mutated, case, strange=0.5)
        words = ["data", str(shards), "--rounds", "1", "--batch", "2", "--images", "2", "--scratch", str(case.out)]
    return lambda: _call(["bench", *words])


@kind("other-commands", Ended, needs=("run", "tuned", "weights", "shards"), share=0.3)
def others(case: Case) -> Reader:
    """``export``, ``status``, ``shards list`` and ``verify``, ``keys``, ``features`` and words that are no command."""
    rng = case.rng
    word = rng.choice(("export", "status", "list", "verify", "index", "keys", "plan-communication", "none"))
    if word == "export":
        run = _spoilt_run(case, rng.choice(("run", "tuned")))
        to = rng.choice(("safetensors", "safetensors", "released", "timm", "transformers", _odd(rng)))
        return lambda: _call(["export", str(run), "--to", to, "--output", str(case.out / "exported")])
    if word == "status":
        run = _spoilt_run(case, "run")
        (run / "heartbeat/end.json").unlink()
        return lambda: _call(
            ["status", str(run), str(case.given)], also=""
        )  # a run that has died is no error of the command
    if word in ("list", "verify", "index"):
        shards = case.copy("shards")
        file_mutated(rng.choice(sorted(shards.iterdir())), bytes_mutated, case, strange=0.3)
        case.outputs.append(shards)
        return lambda: _call(
            ["shards", word, str(shards), *([] if word == "list" else ["--workers", "1"])],
            also=": " if word == "verify" else "error: ",
        )
    if word == "keys":
        return lambda: _call(["keys", _odd(rng)])
    if word == "plan-communication":
        return lambda: _call(["plan-communication", rng.choice(("--recipe", "--gpus", "--zero")), _odd(rng)])
    return lambda: _call([_odd(rng), _odd(rng)])
