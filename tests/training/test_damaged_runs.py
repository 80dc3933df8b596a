"""What is damaged in a run folder, or planted there, stops neither a resume nor ``mimscale status``, and is not lost."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import ROOT, TINY, losses

from mimscale.commands.status import main as status_command
from mimscale.training.checkpoint import remove_after
from mimscale.training.faults.spikes import LeftOut
from mimscale.training.metrics import MetricsLog, duration
from mimscale.training.pretraining.task import pretrain
from mimscale.training.recipe import RecipeError, load_recipe
from mimscale.training.run_folder import saved_steps
from mimscale.training.status import status

SETTINGS = [*TINY, "train.iterations=4", "train.checkpoint_every=2", "train.validate_every=4"]
ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.fixture(scope="module")
def train(shards, alone) -> Callable[..., dict]:
    return lambda run, *more: pretrain(
        load_recipe(ROOT / "launchers/recipes/demo.yaml", [*SETTINGS, f"data.shards={shards}", *more]), ZERO2, run
    )


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run)
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A run that was cut off after its first checkpoint, of two steps."""
    copied = tmp_path / "run"
    shutil.copytree(whole, copied)
    remove_after(copied, 2)
    (copied / "result.json").unlink()
    return copied


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def other_types(path: Path) -> None:
    path.write_text('{"step": "x", "state": 5, "time": "now", "rank": [], "train": {"iterations": "many"}}\n')


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


HARMS = [cut, not_utf8, deep, other_types, a_folder, a_pipe, endless]
FILES = ["recipe.yaml", "metrics.jsonl", "heartbeat/end.json", "heartbeat/rank_00000.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", HARMS)
def test_status_names_what_is_damaged_and_shows_the_rest(run, file, harm, capsys):
    path = run / file
    path.parent.mkdir(exist_ok=True)
    if file.endswith("end.json"):
        path.write_text('{"state": "failed", "message": "the disk is full", "time": 1}')
    harm(path)
    began = time.monotonic()
    status_command([str(run)])
    assert time.monotonic() - began < 5
    said = capsys.readouterr().out
    assert "checkpoint of step 2" in said
    if (file, harm) != ("recipe.yaml", cut):  # which is a recipe still
        assert f"damaged: {path}" in said or f"damaged: cannot read the recipe {path}" in said


@pytest.mark.parametrize("harm", [cut, not_utf8, other_types, a_folder])
def test_a_resume_goes_on_and_keeps_what_was_damaged(train, whole, run, harm, capsys):
    damaged: dict[Path, bytes | None] = {}
    for path in (run / file for file in (*FILES[:3], "result.json")):
        if path.name == "result.json" and harm is other_types:
            continue
        if not path.exists():
            path.write_text('{"state": "failed", "message": "the disk is full", "time": 1}')
        harm(path)
        damaged[path] = None if path.is_dir() else path.read_bytes()
    train(run)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged: ")]
    assert status(run).state == "finished" and not status(run).damage
    assert saved_steps(run) == [2, 4]
    assert losses(run)[-2:] == losses(whole)[-2:]
    for path, content in damaged.items():
        kept = path.with_name(f"{path.name}.damaged-1")
        assert [line for line in said if str(path) in line and line.endswith(f"; kept as {kept}")], said
        if content is None:
            assert kept.is_dir()
        elif path.name == "metrics.jsonl":
            assert kept.read_bytes() and kept.read_bytes() in content
        else:
            assert kept.read_bytes() == content


def test_damaged_lines_are_kept_and_the_others_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    bad = [b'{"step": 1, "lo\n', b"\xff\n", b'{"step": true}\n', b'{"step": 2, "loss": "x"}\n', b'{"step": 1e99}\n']
    good = [json.dumps({"step": step, "loss": 1.0 / step}).encode() + b"\n" for step in (1, 2, 3)]
    path.write_bytes(good[0] + b"".join(bad) + good[1] + b"x" * 2**21 + b"\n" + good[2] + good[2][:9])
    log = MetricsLog(path)
    assert [record["step"] for record in log.read()] == [1, 2, 3]
    assert log.damage.startswith(f"{path} has ") and log.damage.endswith("damaged lines: line 2 is no JSON")
    assert "kept as" in log.rewind(2)
    assert path.read_bytes() == good[0] + good[1]
    assert path.with_name("metrics.jsonl.damaged-1").read_bytes() == b"".join(bad) + b"x" * 2**21 + b"\n" + good[2][:9]
    assert log.rewind(2) == log.damage == ""


def test_the_status_of_a_long_run_takes_no_longer(run):
    line = b'{"step": %d, "loss": 0.5, "images_per_s": 40.0, "note": "' + b"x" * 1000 + b'"}\n'
    with (run / "metrics.jsonl").open("wb") as file:
        file.truncate(2**40)
        file.seek(0, 2)
        file.write(b"\n" + b"".join(line % step for step in range(20_000)))
    began = time.monotonic()
    assert status(run).step == 19_999
    assert not status(run).damage
    assert time.monotonic() - began < 5


def test_numbers_of_any_size_are_shown(run, capsys):
    lines = ['{"step": 3, "loss": 1e308, "images_per_s": 1e-308}', '{"step": 3, "val_loss": NaN}']
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    status_command([str(run)])
    assert "loss 1e+308" in capsys.readouterr().out


def test_a_clock_that_was_set_shows_no_time_before_now():
    assert [duration(seconds) for seconds in (-3566, float("nan"), 1e308)] == [
        "0 s",
        "an unknown time",
        "an unknown time",
    ]


def test_without_its_recipe_a_run_is_known_by_its_checkpoint(train, run):
    (run / "recipe.yaml").write_text("train: [")
    with pytest.raises(RecipeError, match=r"holds a run of another recipe .*train\.seed"):
        train(run, "train.seed=7")
    assert (run / "recipe.yaml").read_text() == "train: ["


@pytest.mark.parametrize("text", ['{"1": 2, "x": "y"}', "[]", "[", '{"-1": "y"}', "\xff"])
def test_what_says_which_batches_are_left_out_must_be_whole(tmp_path, text):
    path = tmp_path / "left_out.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{path} cannot be read .*restore it, or remove it"):
        LeftOut(path, writes=True)


def test_folders_may_lie_elsewhere_and_no_link_in_the_place_of_a_file_is_written_through(train, whole, run, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("tensorboard", "heartbeat", "checkpoints", "reconstructions"):
        shutil.move(run / name, tmp_path / f"other_{name}")
        (run / name).symlink_to(tmp_path / f"other_{name}")
    for name in ("metrics.jsonl", "ds_config.json", "curves.png", "result.json", "heartbeat/end.json", "left_out.json"):
        (run / name).unlink(missing_ok=True)
        if name != "left_out.json":
            (run / name).symlink_to(precious)
    train(run)
    assert precious.read_text() == "precious"
    assert losses(run) == losses(whole)[2:]
    assert all((run / name).is_symlink() for name in ("tensorboard", "heartbeat", "checkpoints", "reconstructions"))
    assert not (run / "metrics.jsonl").is_symlink()
    assert saved_steps(run) == [2, 4]
    assert len(list((tmp_path / "other_tensorboard").glob("events*"))) == 2
