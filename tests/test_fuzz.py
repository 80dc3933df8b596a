"""Some seconds of ``tests/fuzz.py``, and that it sees what it looks for; anyone can run it for hours."""

import subprocess
import sys

import pytest
from training_runs import ENVIRONMENT, ROOT

PLANTED = """
import sys, os
sys.path.insert(0, "tests")
import fuzz
from fuzzing.case import kind
from mimscale.data.errors import ShardError

def error(case):
    raise {"a": 1}["b"]

def refusal(message):
    def read():
        raise ShardError(message)
    return read

def waits():
    os.mkfifo("pipe")
    open("pipe").read()

READERS = {
    "sound": lambda case: lambda: refusal("out/index.json is damaged")() if case.rng.random() < 0.5 else None,
    "traceback": lambda case: lambda: {}["b"],
    "crash": lambda case: lambda: os.abort(),
    "message": lambda case: refusal(""),
    "not-its-own": lambda case: lambda: int("x"),
    "hang": lambda case: lambda: [0 for _ in iter(int, 1)],
    "memory": lambda case: lambda: bytearray(b"x") * ((1 << 30) + (1 << 28)),
    "write": lambda case: lambda: (case.victim / "file.txt").write_text("mine"),
    "input": lambda case: lambda: (case.given / "more").touch(),
    "start": lambda case: lambda: os.system("true"),
}
for name, reader in READERS.items():
    kind(name, ShardError, ValueError)(reader)
fuzz.SECONDS = 4.0
sys.exit(fuzz.main(["--rounds", "2"], modules=()))
"""


@pytest.fixture(scope="module")
def planted() -> tuple[int, dict[str, list[str]]]:
    command = [sys.executable, "-c", PLANTED]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    table = done.stdout[done.stdout.rindex("inputs") :].splitlines()[1:]
    return done.returncode, {line.split()[0]: line.split()[1:8] for line in table}


@pytest.mark.parametrize(
    ("name", "column"),
    [
        *[(name, 3) for name in ("traceback", "crash", "message", "not-its-own")],
        ("hang", 4),
        ("memory", 5),
        *[(name, 6) for name in ("write", "input", "start")],
    ],
)
def test_a_planted_fault_is_found(planted, name, column):
    status, table = planted
    assert status == 1
    assert table[name][0] == "2" and table[name][column] == "2", table[name]


def test_a_sound_reader_has_no_fault(planted):
    assert planted[1]["sound"][3:] == ["0", "0", "0", "0"]


def test_some_inputs_of_every_kind_are_read_or_refused():
    command = [sys.executable, "tests/fuzz.py", "--rounds", "3", "--seed", "100"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
