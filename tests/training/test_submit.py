"""What `mimscale submit` refuses, before anything waits in a queue, and what it hands to Slurm."""

from pathlib import Path

import pytest
from training_runs import RECIPE

from mimscale.cli import main


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Path:
    """An sbatch that writes down how it was called, alone on the PATH; the working directory is empty."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/sbatch"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\necho 42\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "called"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--nodes=3", "data.shards=S", "train.global_batch=32"],
            "train.global_batch=32 does not divide over 24 ranks",
        ),
        (["data.shard=S"], "unknown key 'data.shard' in the command line; did you mean 'data.shards'?"),
        ([], "data.shards is not set"),
        (["--deepspeed_config=away.json", "data.shards=S"], "there is no DeepSpeed configuration away.json"),
        (["--sbatch", "--comment='a", "data.shards=S"], "--sbatch --comment='a: no closing quotation"),
    ],
)
def test_what_would_fail_after_the_queue_is_refused_before_it(queue, capsys, arguments, said):
    assert main(["submit", str(RECIPE), *arguments]) == 1
    assert f"mimscale: error: {said}" in capsys.readouterr().err
    assert not queue.exists() and not Path("runs").exists()


def test_a_fine_tuning_without_all_of_its_data_is_refused_before_the_queue(queue, capsys):
    recipe = RECIPE.parent / "finetune/demo_segmentation.yaml"
    assert main(["submit", str(recipe), "data.images=I", "data.annotations=A"]) == 1
    assert "data.classes is not set: give data.classes=FILE, with the classes' names" in capsys.readouterr().err
    assert not queue.exists()


@pytest.mark.parametrize("wrong", ["--nodes=0", "--nodes=two", "--gpus-per-node=-1"])
def test_a_number_that_is_none_is_named(queue, capsys, wrong):
    with pytest.raises(SystemExit):
        main(["submit", str(RECIPE), wrong, "data.shards=S"])
    option, _, value = wrong.partition("=")
    assert f"argument {option}: '{value}' is not a number of at least" in capsys.readouterr().err


def test_a_job_waits_for_others_and_takes_options_of_sbatch(queue, capsys):
    batch = "train.global_batch=32"
    chain = ["--after", "7", "data.shards=S", "--after", "8", batch, "--sbatch", "--partition=long"]
    assert main(["submit", str(RECIPE), *chain]) == 0
    script = "runs/demo/submit.sbatch"
    assert queue.read_text().split() == [
        "--parsable",
        "--dependency=afterok:7:8",
        "--kill-on-invalid-dep=yes",
        script,
    ]
    assert "#SBATCH --partition=long\n" in Path(script).read_text()
    assert f"OVERRIDES=(data.shards=S {batch})\n" in Path(script).read_text()
    assert capsys.readouterr().out.splitlines()[-1].startswith("job 42; it prints to ")


def test_without_slurm_the_file_is_there_to_be_taken_to_it(queue, capsys):
    (queue.parent / "bin/sbatch").unlink()
    assert main(["submit", str(RECIPE), "--after=7", "data.shards=S", "train.global_batch=32"]) == 1
    command = "sbatch --dependency=afterok:7 --kill-on-invalid-dep=yes runs/demo/submit.sbatch"
    assert f"there is no sbatch here: run '{command}' where" in capsys.readouterr().err
    assert Path("runs/demo/submit.sbatch").exists()
