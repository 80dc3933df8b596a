"""The ``mimscale`` command: its words, names instead of files, completion, and the ranks that it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimscale import __version__
from mimscale.cli import COMMANDS, main
from mimscale.resources import DS_CONFIGS, FINETUNE_RECIPES, RECIPES, STUDIES
from mimscale.study.spec import StudyError, load_study
from mimscale.training.ds_config import DeepSpeedConfigError, read_ds_config
from mimscale.training.recipe import RecipeError, load_recipe
from mimscale.transfer.recipe import load_finetune_recipe

PROGRAM = [sys.executable, "-m", "mimscale"]


def test_the_command_says_its_version_and_lists_its_words(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mimscale {__version__}\n"
    assert main(["--help"]) == 0
    listing = capsys.readouterr().out
    assert all(f"  {word} " in listing for word in COMMANDS)
    assert main([]) == 2


def test_an_unknown_word_is_answered_with_the_nearest(capsys):
    assert main(["pretrian"]) == 2
    assert "mimscale: error: there is no command 'pretrian'; did you mean 'pretrain'?" in capsys.readouterr().err


def test_the_module_is_the_command():
    done = subprocess.run([*PROGRAM, "--version"], capture_output=True, text=True)
    assert done.stdout == f"mimscale {__version__}\n"


# -- names instead of files -----------------------------------------------------------------------------------------------


def test_what_comes_with_mimscale_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("swinv2_b").model.name == "swinv2_b"
    assert load_finetune_recipe("demo").task == "classification"
    assert load_finetune_recipe("demo_classification") == load_finetune_recipe("demo")
    assert read_ds_config("zero2")["zero_optimization"]["stage"] == 2
    assert load_study("smoke").name == "Smoke"


def test_a_path_as_it_is_in_a_clone_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("launchers/recipes/swinv2_b.yaml") == load_recipe("swinv2_b")
    assert read_ds_config("ds_configs/zero2.json") == read_ds_config("zero2")


def test_a_file_wins_over_a_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # what `make demo` leaves
    assert load_recipe("demo") == load_recipe(RECIPES.find("launchers/recipes/demo.yaml"))
    Path("swinv2_b").write_text("model: {name: swinv2_l}\n")
    assert load_recipe("swinv2_b").model.name == "swinv2_l"


@pytest.mark.parametrize(
    ("read", "error", "name", "near"),
    [
        (load_recipe, RecipeError, "swinv2b", "swinv2_b"),
        (load_finetune_recipe, RecipeError, "inat18_swin_b", "inat18_swinv2_b"),
        (read_ds_config, DeepSpeedConfigError, "zero_2", "zero2"),
        (load_study, StudyError, "papr.yaml", "paper"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_where_was_looked(
    read, error, name, near, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        read(name)
    said = str(caught.value)
    assert f" {name}; did you mean '{near}'?" in said
    assert str(tmp_path) in said and near in said.rpartition("mimscale has ")[2]


@pytest.mark.parametrize(
    ("read", "name", "command"),
    [(load_recipe, "demo_detection", "finetune"), (load_finetune_recipe, "swinv2_b", "pretrain")],
)
def test_a_name_of_the_other_kind_of_recipe_is_named_as_that(read, name, command):
    with pytest.raises(RecipeError, match=f"'{name}' is a recipe of mimscale {command}"):
        read(name)


def test_every_name_that_is_listed_can_be_read():
    assert {"demo", "swinv2_g", "finetune/demo"} <= set(RECIPES.names())
    for kind in (RECIPES, FINETUNE_RECIPES, STUDIES, DS_CONFIGS):
        assert all(kind.find(name).is_file() for name in kind.names())


# -- completion ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("mimscale pre", {"pretrain", "predict"}, {"status"}),
        ("mimscale pretrain --rec", {"--recipe "}, {"--output "}),
        ("mimscale pretrain --recipe swinv2_", {"swinv2_b", "swinv2_g"}, {"imagenet1k_swinv2_b"}),
        ("mimscale finetune --recipe demo_s", {"demo_segmentation "}, {"demo"}),
        ("mimscale study plan sm", {"smoke "}, {"paper"}),
        ("mimscale bench s", {"step", "save"}, {"memory"}),
    ],
)
def test_the_shell_completes_words_options_and_names(line, offered, not_offered, tmp_path):
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE": "1", "IFS": "\v",
             "_ARGCOMPLETE_IFS": "\v", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}  # fmt: skip
    subprocess.run(PROGRAM, env=os.environ | asked, cwd=tmp_path, check=True)
    found = set(answer.read_text().split("\v"))
    assert offered <= found and not (not_offered & found)


# -- ranks -----------------------------------------------------------------------------------------------------------------

REPORT = """
import json, os, pathlib, signal, sys, time
rank = int(os.environ["RANK"])
names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
pathlib.Path(f"rank_{rank}").write_text(json.dumps({name: os.environ[name] for name in names}))
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    pathlib.Path(f"ready_{rank}").touch()
    time.sleep(60)
sys.exit(int(sys.argv[1]) if rank else 0)
"""


def test_ranks_of_one_machine_meet_and_the_first_failure_is_the_status(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("report.py").write_text(REPORT)
    program = (
        "import sys; from mimscale.training.launch.local_ranks import run_ranks; sys.exit(run_ranks(sys.argv[1:], 3))"
    )
    assert run_in_child(program, "0") == 0
    seen = [json.loads(Path(f"rank_{rank}").read_text()) for rank in range(3)]
    assert [one["LOCAL_RANK"] for one in seen] == ["0", "1", "2"]
    assert {one["WORLD_SIZE"] for one in seen} == {one["LOCAL_WORLD_SIZE"] for one in seen} == {"3"}
    assert len({one["MASTER_PORT"] for one in seen}) == 1
    assert run_in_child(program, "3") == 3


def run_in_child(program: str, word: str) -> int:
    """The status of ``program``, whose ranks run report.py."""
    return subprocess.run([sys.executable, "-c", program, "report.py", word], env=no_rank()).returncode


def no_rank() -> dict[str, str]:
    """The environment of a process that no launcher has started."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "SLURM_PROCID")}


def test_a_wish_to_stop_reaches_every_rank_and_its_status_comes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("report.py").write_text(REPORT)
    program = (
        "import sys; from mimscale.training.launch.local_ranks import run_ranks; sys.exit(run_ranks(sys.argv[1:], 2))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, "report.py", "wait"], env=no_rank())
    while not (Path("ready_0").exists() and Path("ready_1").exists()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
