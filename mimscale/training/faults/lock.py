"""One start a folder: a lock that the kernel releases with its process, also across hosts where the file system carries it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from mimscale.files import parse_json
from mimscale.training.errors import TrainingError
from mimscale.wording import printable

LOCK = ".lock"
# A start that follows another closely waits this long for its end.
WAIT_SECONDS = 10.0
POLL_SECONDS = 0.2
# A line says for whom this start waits, after so long.
QUIET_SECONDS = 1.0
_MOST_BYTES = 4096
# Folders that this process holds: to the kernel, all of a process is one holder.
_held: set[Path] = set()
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class RunInUseError(TrainingError):
    """Another start has the folder; nothing in it was touched."""


@contextmanager
def only_start(folder: Path, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold ``folder``, which is made where it is missing, so that no second start does.

    The lock is one on a byte range (``fcntl.lockf``): forked workers do not inherit it, the kernel releases it when the process
    ends in whatever way, and NFS carries it to other hosts. Where the file system does not, a line says so.

    Args:
        folder: of a run or a study.
        wait: seconds to wait for another start's end.

    Raises:
        RunInUseError: another process has it; the message says which, on which host and since when. Or its lock file is not one.
        OSError: the folder cannot be made or written.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)  # so that it has one name
    place = folder.resolve()
    if place in _held:
        raise RunInUseError(f"{printable(folder)} is in use by this process already; nothing was touched")
    descriptor = _acquire(folder, wait)
    _held.add(place)
    try:
        yield
    finally:
        _held.discard(place)
        # Removed while it is held: who opened it before sees that it is gone, and makes a new one.
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(descriptor)
        if made:
            with suppress(OSError):
                folder.rmdir()  # nothing was written


def _acquire(folder: Path, wait: float) -> int:
    began, said = time.monotonic(), False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _open(folder / LOCK)
        except FileNotFoundError:
            if time.monotonic() - began > wait + POLL_SECONDS:
                raise
            continue  # the other start ended, and removed the folder that it had made
        try:
            while not _take(descriptor, folder):
                waited = time.monotonic() - began
                if waited >= wait:
                    raise RunInUseError(_in_use(folder, descriptor))
                if waited >= QUIET_SECONDS and not said:
                    said = True
                    print(f"mimscale: waiting for {_holder(descriptor)[0]}, which has {printable(folder)}", flush=True)
                time.sleep(POLL_SECONDS)
            if _is_at(descriptor, folder / LOCK):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> int:
    where = printable(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise RunInUseError(f"{where} is no plain file, so this folder cannot be locked; remove it") from None
        raise
    found = os.fstat(descriptor)
    # What has two names may be a file outside the folder, and would be written to.
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise RunInUseError(f"{where} is no plain file of one name, so this folder cannot be locked; remove it")
    return descriptor


def _take(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in _NO_LOCKS:
            _say_unseen(folder, f"its file system has no locks ({problem.strerror}): no other start is seen")
            return True
        if problem.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    if why := local_only(folder):
        _say_unseen(folder, f"{why}: a start on another host is not seen")
    return True


def _say_unseen(folder: Path, why: str) -> None:
    print(f"mimscale: {printable(folder)} is locked against a second start, but {why}; start it once", flush=True)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now().isoformat(" ", "seconds")}
    with suppress(OSError):  # a full disk; the lock holds without
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)


def _holder(descriptor: int) -> tuple[str, bool]:
    """Who holds the lock, in words, and whether it is on this host."""
    try:
        about = parse_json(os.pread(descriptor, _MOST_BYTES, 0))
        host, pid, since = (about[key] for key in ("host", "pid", "since"))
        if type(pid) is not int or not isinstance(host, str) or not isinstance(since, str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        return "another process", True  # it has not signed yet
    return f"process {pid} on {printable(host, 100)}, since {printable(since, 40)}", host == socket.gethostname()


def _in_use(folder: Path, descriptor: int) -> str:
    holder, here = _holder(descriptor)
    gone = "" if here else f". Where that host is gone for good, remove {printable(folder / LOCK)}"
    return f"{printable(folder)} is in use by {holder}; nothing was touched. Wait for it or end it{gone}"


def local_only(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Why locks in ``folder`` are not seen on other hosts that share its file system; ``None`` where they are seen."""
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return None
    place, longest, kind, options = str(folder.resolve()), -1, "", set()
    for line in lines:
        head, dash, tail = line.partition(" - ")
        fields, last = head.split(" "), tail.split(" ")
        if not dash or len(fields) < 6 or len(last) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = point == "/" or place == point or place.startswith(f"{point}/")
        if inside and len(point) >= longest:
            longest, kind, options = len(point), last[0], set(fields[5].split(",")) | set(last[2].split(","))
    if kind.startswith("nfs") and options & {"nolock", "local_lock=all", "local_lock=posix"}:
        return "NFS is mounted with local locks"
    if kind == "lustre" and "localflock" in options:
        return "Lustre is mounted with localflock"
    if kind.startswith("fuse"):
        return f"{printable(kind, 40)} may keep locks on this host"
    return None
