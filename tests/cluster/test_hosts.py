"""On two hosts with addresses of their own: trained by ``deepspeed --hostfile``, cut from each other, started again."""

import re
import subprocess
import time

import network_hosts
import pytest
from training_runs import ROOT, TINY, launcher, losses, records, write_config

from mimscale.training.run_folder import saved_steps

MISSING = network_hosts.missing()
pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(MISSING), reason=MISSING or "")]
BOUND = 9.0  # seconds


def test_a_link_cut_in_mid_step_ends_the_run_with_who_is_silent_and_the_next_start_goes_on(
    tmp_path, shards, undisturbed
):
    run, config = tmp_path / "run", write_config(tmp_path, zero_optimization={"stage": 2})
    settings = ["train.checkpoint_every=5", "train.reconstructions=0", f"train.hang_minutes={BOUND / 60}"]
    settings = [*TINY, *settings, f"data.shards={shards}"]
    with network_hosts.two_hosts() as hosts:
        where = ["--hostfile", str(hosts.hostfile), "--no_ssh_check", "--master_addr", hosts.addresses[0]]
        command = hosts.on(0, "deepspeed", *where, *launcher(run, config, *settings))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=hosts.environment, **pipes)
        while process.poll() is None and not ((run / "metrics.jsonl").exists() and len(records(run)) >= 6):
            time.sleep(0.01)
        hosts.link("down")
        began = time.monotonic()
        output = process.communicate(timeout=100)[0]
        took = time.monotonic() - began
        assert process.returncode != 0, output[-3000:]
        errors = [line for line in output.splitlines() if "mimscale: error" in line]
        assert len(errors) == 1, output[-3000:]
        assert re.search(r"no progress for \d+ s .*rank 1 on beta .* does not answer alpha at", errors[0])
        assert took < 6 * BOUND
        assert saved_steps(run)[-1] == 5

        hosts.link("up")
        process = subprocess.Popen(command, cwd=ROOT, env=hosts.environment, **pipes)
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output[-3000:]
    assert "resuming from" in output
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)
