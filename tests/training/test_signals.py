"""However a command is interrupted or its output closed, it ends in one line; who listens to signals ends as they ask."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mimscale.training.faults.watchdog import Watchdog
from mimscale.training.ranks import Ranks

ENTERED = "from mimscale.entry import enter\nimport sys, time\n"


def started(program: str, **how) -> subprocess.Popen:
    """A process that has said "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


WAITING = "def program():\n    print('ready', flush=True)\n    {0}\n    time.sleep(60)\nsys.exit(enter(program))\n"


@pytest.mark.parametrize("signals", [1, 2])
def test_an_interrupt_ends_a_command_in_one_line(signals):
    busy = "try:\n        time.sleep(60)\n    finally:\n        time.sleep(60)" if signals == 2 else "pass"
    process = started(ENTERED + WAITING.format(busy))
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.communicate(timeout=60)[1] == "mimscale: interrupted\n"
    assert process.returncode == 130


def test_an_interrupt_in_an_import_is_not_turned_into_an_error_of_the_library(tmp_path):
    (tmp_path / "slow_to_import.py").write_text(
        "import time\ntry:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError('a part is missing')\n"
    )
    process = started(ENTERED + WAITING.format(f"sys.path.insert(0, {str(tmp_path)!r}); import slow_to_import"))
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "mimscale: interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize("closing", ["| head -1 >/dev/null", ">&-", "2>&- >&- <&-"])
def test_an_output_that_nobody_reads_is_no_error(closing):
    command = f"{sys.executable} -m mimscale keys {closing}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_the_output_is_named():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mimscale", "keys"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "mimscale: error: standard output: No space left on device\n")


def test_an_unknown_fault_keeps_its_traceback_and_asks_to_report_it():
    done = subprocess.run(
        [sys.executable, "-c", ENTERED + "sys.exit(enter(lambda: 1 // 0))"], capture_output=True, text=True
    )
    *traceback, last = done.stderr.splitlines()
    assert (done.returncode, traceback[0]) == (1, "Traceback (most recent call last):")
    assert "please report it" in last and last.startswith("mimscale: this is a fault of mimscale ")


LISTENING = """
import time, threading
from mimscale.training.faults import preemption
preemption.listen()
with preemption.StopRequests() as stop:
    {0}
    print("ready", flush=True)
    while stop.wanted(0) is None:
        time.sleep(0.01)
    print(stop.wanted(0), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_before_its_first_step_a_training_ends_at_once(number, status):
    process = started(LISTENING.format("pass"))
    process.send_signal(number)
    assert f"stopped by {number.name} before its first step" in process.communicate(timeout=60)[1]
    assert process.returncode == status


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_after_a_step_the_first_signal_asks_and_a_later_one_ends(number, status):
    process = started(LISTENING.format("stop.has_stepped()"))
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    process.send_signal(number)  # of the same wish
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(number)
    assert f"ended by a second {number.name}, without saving" in process.communicate(timeout=60)[1]
    assert process.returncode == status


def test_what_nohup_ignores_stays_ignored():
    ignoring = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = started(LISTENING.format("pass"), preexec_fn=ignoring)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_rank_goes_with_the_process_that_started_it():
    rank = LISTENING.format("pass")
    parent = (
        "import os, subprocess, sys, time\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}], env=os.environ | {{'MIMSCALE_PARENT': str(os.getpid())}},"
        " stdout=subprocess.PIPE, text=True)\n"
        "assert rank.stdout.readline() == 'ready\\n'\nprint('ready', flush=True)\nprint(rank.pid, flush=True)\ntime.sleep(60)\n"
    )
    process = started(parent)
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < deadline, os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


WATCHED = """
import sys, time
from pathlib import Path
import torch
from mimscale.training.faults.watchdog import Watchdog
from mimscale.training.ranks import Ranks
with Watchdog(Path(sys.argv[1]), Ranks(0, 1, 0, 1, torch.device("cpu")), 3, hang_minutes=0.02, end=print) as watch:
    watch.note("step", 4)
    print("ready", flush=True)
    for _ in range(20):
        time.sleep(0.1)
        watch.note("step", 4)
"""


def test_a_run_that_was_stopped_as_a_whole_is_not_taken_for_a_hung_one(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == ""


def test_a_clock_that_is_set_ends_no_run(tmp_path, monkeypatch):
    said: list[str] = []
    plain = time.time
    with Watchdog(tmp_path, Ranks(0, 1, 0, 1, torch.device("cpu")), 3, hang_minutes=0.01, end=said.append) as watch:
        for hours in (0, 1, -1):
            monkeypatch.setattr(time, "time", lambda hours=hours: plain() + 3600 * hours)
            for _ in range(5):
                watch.note("step", 4)
                time.sleep(0.1)
        beat = json.loads((tmp_path / "rank_00000.json").read_text())
    assert said == []
    assert 0 <= beat["beat"] - beat["since"] < 1
