"""Two hosts on this one: each with its own name, address, processes and ssh daemon, and a link between them to cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "pdsh")
NAMES = ("alpha", "beta")


def missing() -> str | None:
    """Why there can be no hosts here, or ``None``."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        return f"needs Debian's iproute2, openssh-server and pdsh ({', '.join(absent)} is not here)"
    probe = f"probe{os.getpid()}"
    done = subprocess.run(
        ["ip", "link", "add", probe, "type", "veth", "peer", "name", f"{probe}p"], capture_output=True
    )
    subprocess.run(["ip", "link", "del", probe], capture_output=True)
    return None if done.returncode == 0 else "this kernel has no veth"


@dataclass(frozen=True)
class Hosts:
    """``init`` are the processes that hold each host's namespaces; what runs on a host ends with its own."""

    folder: Path
    addresses: tuple[str, str]
    init: tuple[int, int]

    def on(self, host: int, *command: str) -> list[str]:
        """A command line that runs ``command`` on a host."""
        namespaces = ["--net", "--uts", "--pid", "--mount"]
        return ["nsenter", f"--target={self.init[host]}", *namespaces, f"--wdns={Path.cwd()}", *command]

    @property
    def hostfile(self) -> Path:
        """DeepSpeed's list of both hosts, one rank on each."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{address} slots=1\n" for address in self.addresses))
        return path

    @property
    def environment(self) -> dict[str, str]:
        """What pdsh needs to find the hosts."""
        return {**os.environ, "PDSH_SSH_ARGS_APPEND": f"-F {self.folder}/ssh_config"}

    def link(self, state: str) -> None:
        """Set the link ``up`` or ``down``."""
        subprocess.run(self.on(0, "ip", "link", "set", "eth0", state), check=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make the hosts; remove them with everything that runs on them when the block is left."""
    folder = Path(tempfile.mkdtemp(prefix="hosts_"))
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    net = f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"
    addresses = (f"{net}.1", f"{net}.2")
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user_key\nUserKnownHostsFile /dev/null\nStrictHostKeyChecking no\nLogLevel ERROR\n"
        "BatchMode yes\nServerAliveInterval 2\nServerAliveCountMax 2\n"
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nStrictModes no\n"
        f"PermitRootLogin yes\nUsePAM no\nSetEnv OMP_NUM_THREADS=1 PATH={Path(sys.executable).parent}:{os.environ['PATH']}\n"
        "ClientAliveInterval 2\nClientAliveCountMax 2\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd asks for it
    holders: list[subprocess.Popen] = []
    try:
        for name in NAMES:
            # The name is the host's own; when the first process ends, the kernel ends all others of its host.
            start = f"hostname {name}; exec sleep infinity"
            spaces = ["--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child=KILL"]
            holders.append(subprocess.Popen(["unshare", *spaces, "sh", "-c", start]))
        init = tuple(_child(holder.pid) for holder in holders)
        hosts = Hosts(folder, addresses, init)  # type: ignore[arg-type]
        ends = [["name", "eth0", "netns", str(pid)] for pid in init]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        sshd = shutil.which("sshd")
        assert sshd
        for host, address in enumerate(addresses):
            for command in (
                ["ip", "addr", "add", f"{address}/24", "dev", "eth0"],
                ["ip", "link", "set", "eth0", "up"],
                ["ip", "link", "set", "lo", "up"],
                [sshd, "-f", str(folder / "sshd_config")],
            ):
                subprocess.run(hosts.on(host, *command), check=True)
        yield hosts
    finally:
        for holder in holders:
            holder.send_signal(signal.SIGKILL)  # and with it, by --kill-child, its whole host
            holder.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _child(parent: int) -> int:
    """The one child of a process, once it is there and has its own name."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/cmdline").read_bytes().startswith(b"sleep"):
            return int(children[0])
        time.sleep(0.01)
    raise AssertionError("a host did not start")
