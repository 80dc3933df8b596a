"""ImageNet's devkit: the table of its numbers, read by a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mimscale.data.errors import ShardError
from mimscale.files import read_bytes
from mimscale.wording import printable

# The devkit's own file has 0.6 MB and 1,860 rows.
_MOST_BYTES, _MOST_ROWS = 64 * 2**20, 100_000
_SECONDS, _MEMORY = 30, 4 * 2**30

# scipy's parser trusts the file: a changed one can take the interpreter down, or all memory.
_READ = f"""
import io, json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
from scipy.io import loadmat
try:
    rows = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True, variable_names=["synsets"])["synsets"]
    found = [(int(row["ILSVRC2012_ID"]), str(row["WNID"])[:100]) for row in rows[:{_MOST_ROWS}]]
except BaseException as error:
    print(f"{{type(error).__name__}}: {{error}}"[:200], file=sys.stderr)
    sys.exit(1)
print(json.dumps(found))
"""


def synsets(table: Path) -> dict[int, str]:
    """Synset by ILSVRC2012_ID, from the devkit's ``meta.mat``.

    Raises:
        ShardError: it cannot be read, or is not that table.
    """
    try:
        content = read_bytes(table, _MOST_BYTES)
    except OSError as error:
        raise ShardError(f"{table}: cannot be read ({error.strerror or error})") from None
    # One thread: each would reserve memory of its own, which the limit counts.
    place = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _READ],
            input=content,
            capture_output=True,
            env=place,
            timeout=2 * _SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ShardError(f"{table} could not be read in {2 * _SECONDS} seconds") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = printable(said[-1]) if said and done.returncode > 0 else "it takes its reader down"
        raise ShardError(f"{table} is not the devkit's table ({why})")
    return dict(json.loads(done.stdout))
