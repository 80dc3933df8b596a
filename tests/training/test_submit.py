"""What `mimscale submit` refuses, before anything waits in a queue, and what it hands to Slurm."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import RECIPE

from mimscale.cli import main
from mimscale.training.launch.job_file import SlurmError
from mimscale.training.launch.slurm import SlurmJob, write_script


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


# -- what a job file holds ---------------------------------------------------------------------------------------------

# What ends a line, a word, a quotation or an option for the shell or for sbatch, begins something else, or is replaced.
SIGNS = "\n\r\t\0\x1b\x0b\x85\u2028\u202e\ud800 '\"\\`$;&|<>(){}[]*?!#~%^=-:,@/."
ODD = [*SIGNS, "$(", "%j", "--wrap=", "\n#SBATCH "]
WORDS = st.lists(st.sampled_from([*ODD, "a", "Zß", "7"]), max_size=8).map("".join)
FIELDS = ("name", "time", "output", "recipe", "config", "options", "cluster", "overrides")


def _job(field: str, text: str) -> SlurmJob:
    values: dict = {"recipe": Path("r.yaml"), "config": Path("c.json"), "output": Path("o"), "gpus_per_node": 0}
    kinds = {"output": Path, "recipe": Path, "config": Path, "overrides": lambda t: ("a=b", f"k={t}")}
    kinds |= {"options": lambda t: (f"--comment={t}",), "cluster": lambda t: (("account", t),)}
    return SlurmJob(**values | {field: kinds.get(field, str)(text)})


def _for_sbatch(script: str) -> list[str]:
    """The words that sbatch takes from the head of a job file, by its rules (``get_argument`` in its source)."""
    words = []
    for line in script.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("#SBATCH"):
            continue
        word, quote, escaped = None, "", False
        for sign in line.removeprefix("#SBATCH"):
            if escaped:
                word, escaped = (word or "") + sign, False
            elif sign == "\\":
                escaped = True
            elif quote:
                word, quote = (word or "", "") if sign == quote else ((word or "") + sign, quote)
            elif sign in "\"'":
                word, quote = word or "", sign
            elif sign == "#":
                break
            elif sign.isspace():
                words += [word] if word is not None else []
                word = None
            else:
                word = (word or "") + sign
        assert not quote and not escaped, line
        words += [word] if word is not None else []
    return words


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Runs a job file in an empty folder where there are no commands but an srun that writes down its words."""
    programs, here = tmp_path_factory.mktemp("bin"), tmp_path_factory.mktemp("here")
    (programs / "srun").write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {programs}/words\n")
    for name in ("find", "sort", "tail"):
        (programs / name).write_text("#!/bin/bash\n")
    for program in programs.iterdir():
        program.chmod(0o755)

    def run(script: str) -> list[str]:
        (programs / "job").write_text(script, encoding="utf-8")
        for options in (["-n"], []):
            done = subprocess.run(
                [shutil.which("bash"), *options, programs / "job"],
                cwd=here,
                env={"PATH": str(programs)},
                capture_output=True,
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), done
        assert not list(here.iterdir())
        return (programs / "words").read_bytes().decode().split("\0")[:-1]

    return run


@settings(max_examples=120, deadline=None)
@given(field=st.sampled_from(FIELDS), text=WORDS)
def test_a_job_file_holds_the_words_it_was_given_and_nothing_else(shell, field, text):
    job = _job(field, text)
    try:
        script = write_script(job)
    except SlurmError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    asked = [f"--job-name={job.name}", "--nodes=1", f"--time={job.time}", "--ntasks-per-node=1"]
    asked += [f"--output={job.log}".replace("%", "%%"), "--open-mode=append", "--requeue", "--signal=USR1@180"]
    asked += [f"--{name}={value}" for name, value in job.cluster]
    assert _for_sbatch(script) == [*asked, *job.options]
    ran = ["--kill-on-bad-exit=0", "--wait=120", sys.executable, str(RECIPE.parent.parent / "pretrain.py")]
    ran += ["--deepspeed_config", os.path.realpath(job.config), "--recipe", os.path.realpath(job.recipe)]
    assert shell(script) == [*ran, "--output", os.path.realpath(job.output), *job.overrides]


@pytest.mark.parametrize("field", FIELDS)
def test_a_line_end_in_any_text_of_a_job_is_refused_by_name(field):
    with pytest.raises(SlurmError, match=r"holds the character '\\n', which no job file may hold"):
        write_script(_job(field, "a\ntouch x #"))


@pytest.mark.parametrize("fit", ["90", "24:00:00", "90:30", "2-12", "2-12:30", "2-12:30:00", "UNLIMITED"])
def test_times_of_every_form_that_slurm_takes_are_passed_on(fit):
    assert f"#SBATCH --time={fit}\n" in write_script(_job("time", fit))


@pytest.mark.parametrize("after", ["1 --wrap=x", "1:2", "--x", "", "a"])
def test_what_is_no_number_of_a_job_is_waited_for_by_none(queue, capsys, after):
    assert main(["submit", str(RECIPE), f"--after={after}", "data.shards=S", "train.global_batch=32"]) == 1
    assert "is not the number of a job, such as 4711" in capsys.readouterr().err
    assert not queue.exists()
