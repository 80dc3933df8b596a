"""A real Slurm of two nodes on this host, in a folder of its own, gone when the tests are."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
# Both nodes are this host under two names and ports. Credentials expire soon, or a requeued job would wait two minutes.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=15
InactiveLimit=0
SchedulerParameters=sched_interval=2
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""


def missing() -> str | None:
    """Why there can be no Slurm here, or ``None``."""
    if os.geteuid() != 0:
        return "needs root to start Slurm's daemons"
    absent = [name for name in (*DAEMONS, "sbatch") if shutil.which(name) is None]
    return f"needs Debian's slurm-wlm and munge ({', '.join(absent)} is not here)" if absent else None


@dataclass(frozen=True)
class SlurmCluster:
    """Commands to the cluster, which finds its configuration in ``environment``."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Wait for ``condition``."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))
                raise AssertionError(f"{what}: not within {seconds:.0f} s\n{self.run('squeue')}{logs}")
            time.sleep(0.2)

    def wait_for_end(self, number: str, seconds: float = 240) -> str:
        """Wait until a job has ended for good; its last state."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait(lambda: self.job(number)["JobState"] in ends, f"job {number} ends", seconds)
        return self.job(number)["JobState"]


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Start the daemons; end them and every job when the block is left."""
    # munged wants folders that all may enter, which pytest's are not.
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, ports=_free_ports(3)))
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    for name in ("n1", "n2"):
        (folder / f"spool_{name}").mkdir()
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
    commands = [
        ["munged", "--foreground", *munge],
        ["slurmctld", "-D", "-f", str(configuration)],
        *(["slurmd", "-D", "-N", name, "-f", str(configuration)] for name in ("n1", "n2")),
    ]
    cluster = SlurmCluster(folder, environment)
    daemons: list[subprocess.Popen] = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("ab") as out:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
                )
            if command[0] == "munged":
                cluster.wait(lambda: (folder / "munge.socket").exists(), "munged answers", 20)
        cluster.wait(lambda: _idle(environment) == "idle idle", "both nodes are up", 60)
        yield cluster
    finally:
        subprocess.run(
            ["scancel", "--full", "--signal=KILL", "--user=root"], env=environment, capture_output=True, timeout=30
        )
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True, timeout=30)
        _end(daemons, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _idle(environment: dict[str, str]) -> str:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True)
    return " ".join(done.stdout.split())


def _end(daemons: list[subprocess.Popen], folder: Path) -> None:
    """End the daemons, and what they have started: it all carries the configuration's path in its environment."""
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
    for daemon in daemons:
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int(path.name) != os.getpid() and mark in (path / "environ").read_bytes().split(b"\0"):
                os.kill(int(path.name), signal.SIGKILL)
        except OSError:
            continue


def _free_ports(count: int) -> list[int]:
    servers = [socket.socket() for _ in range(count)]
    try:
        for server in servers:
            server.bind(("127.0.0.1", 0))
        return [server.getsockname()[1] for server in servers]
    finally:
        for server in servers:
            server.close()
