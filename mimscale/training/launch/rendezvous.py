"""Where the ranks meet: the variables that ``deepspeed`` and ``torchrun`` set, made from Slurm's where srun started them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping

import psutil

# Below Linux's ephemeral ports, so that no outgoing connection holds it.
FIRST_PORT, PORTS = 12000, 20000


def rendezvous() -> dict[str, str]:
    """What is missing in the environment for the ranks to meet; empty where a launcher has set it.

    A task of srun meets the others of its step, at the address of the step's first node unless MASTER_ADDR and MASTER_PORT
    say another. Any other process is the only rank.
    """
    if "RANK" in os.environ:
        return {}
    # Only tasks of srun have it: the batch script itself, and what it starts without srun, is one process.
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return slurm_rendezvous(os.environ)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}


def slurm_rendezvous(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of one task, from Slurm's of its step."""
    # Jobs that share a node, and steps of one job, need ports of their own.
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _address(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(FIRST_PORT + (16 * job + step) % PORTS),
    }


def tasks_per_node(text: str) -> list[int]:
    """Slurm's count of tasks on each node, such as ``8(x3),4``, written out."""
    counts = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def _address(nodes: str) -> str:
    """Where the first of Slurm's ``nodes`` is reached."""
    first = _scontrol("hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(first, None)
        return first
    except OSError:  # Slurm's name of a node need not be one that the network knows
        words = _scontrol("node", first).split()
        return next((word.partition("=")[2] for word in words if word.startswith("NodeAddr=")), first)


def _scontrol(*what: str) -> str:
    return subprocess.run(["scontrol", "show", *what], check=True, capture_output=True, text=True).stdout


def own_address(towards: str) -> str:
    """The address by which this host reaches ``towards``, and is reached from there. Nothing is sent.

    Raises:
        OSError: ``towards`` has no address, or no way leads there.
    """
    family, kind, _, _, where = socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)
        return probe.getsockname()[0]


def interface(towards: str) -> str | None:
    """The network interface that leads to ``towards``; ``None`` where that cannot be told."""
    try:
        address = own_address(towards)
    except OSError:
        return None
    known = psutil.net_if_addrs().items()
    return next((name for name, entries in known if any(e.address.partition("%")[0] == address for e in entries)), None)


def free_port() -> str:
    """A port of this machine that nobody uses now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])
