"""A few rounds of ``tests/faults.py``; anyone can run a hundred."""

import subprocess
import sys

from training_runs import ENVIRONMENT, ROOT


def test_runs_struck_by_faults_lose_an_interval_at_most_and_end_with_the_undisturbed_losses(shards):
    command = [sys.executable, "tests/faults.py", "--rounds", "6", "--seed", "71", "--shards", str(shards)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "every run ended with the losses of the undisturbed one" in done.stdout
