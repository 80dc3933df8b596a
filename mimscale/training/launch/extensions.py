"""Where DeepSpeed's compiled operators lie, and a build of one that no earlier start can hold up."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from mimscale.training.errors import TrainingError
from mimscale.wording import printable

FOLDER = "TORCH_EXTENSIONS_DIR"


def extension_folder() -> Path:
    """``TORCH_EXTENSIONS_DIR``, or a folder in the user's cache for this processor and these packages.

    Operators are compiled for the processor that compiles them, so hosts that share a home need folders of their own. Where the
    cache cannot be written, a folder of this user's in the place for temporary files stands in.

    Raises:
        TrainingError: neither can be written.
    """
    if chosen := os.environ.get(FOLDER):
        return Path(chosen)
    stack = f"py{sys.version_info[0]}{sys.version_info[1]}-torch{version('torch')}-deepspeed{version('deepspeed')}"
    key = f"{stack}-{hashlib.sha256(_processor().encode()).hexdigest()[:8]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    tried = []
    for root in (cache / "mimscale", Path(tempfile.gettempdir()) / f"mimscale-{os.getuid()}"):
        folder = root / key
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # What lies there is run: nobody else may be able to put it there.
            if root.lstat().st_uid == os.getuid() and not root.is_symlink() and os.access(folder, os.W_OK):
                return folder
            tried.append(f"{printable(folder)} is not this user's")
        except OSError as problem:
            tried.append(f"{printable(folder)}: {problem.strerror}")
    raise TrainingError(
        f"there is no folder for DeepSpeed's compiled operators ({'; '.join(tried)}): set {FOLDER} to one that can be written"
    )


@contextmanager
def built_alone(name: str, first: bool) -> Iterator[None]:
    """Load a compiled operator, compiling it where it is missing, while no other process of this host does.

    torch marks a build by a file that a killed process leaves behind, and everybody after waits for it to go. In here, whoever
    made such a file has ended, so it goes.

    Args:
        name: DeepSpeed's name of the operator, such as ``cpu_adam``.
        first: say so before something is compiled; true on one rank of a host.

    Raises:
        TrainingError: it cannot be compiled.
    """
    folder = extension_folder()
    os.environ[FOLDER] = str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        guard = os.open(folder / f"{name}.building", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as problem:
        raise TrainingError(
            f"DeepSpeed's {name} cannot be compiled into {printable(folder)} ({problem.strerror}): set {FOLDER} to a folder "
            "that can be written"
        ) from None
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        (folder / name / "lock").unlink(missing_ok=True)
        if first and not (folder / name / f"{name}.so").exists():
            print(
                f"mimscale: DeepSpeed compiles {name} into {printable(folder)}, once; that takes a minute or two",
                flush=True,
            )
        try:
            yield
        except (RuntimeError, OSError, ImportError) as problem:
            # torch's "Error building extension", a missing ninja or compiler, DeepSpeed's own refusals.
            text = printable(str(problem).strip().splitlines()[-1] if str(problem).strip() else type(problem).__name__)
            raise TrainingError(
                f"DeepSpeed's {name} cannot be compiled ({text}): it takes a C++ compiler (CXX={os.environ.get('CXX', 'c++')}) "
                "and ninja; or leave offload_optimizer out of the DeepSpeed configuration"
            ) from problem
    finally:
        os.close(guard)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), *sorted(set(told))])
