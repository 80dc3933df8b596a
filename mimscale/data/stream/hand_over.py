"""A batch from a worker process to its rank: in shared memory, or through a pipe where that is too small for it."""

from __future__ import annotations

import errno
import io
import os
import pickle
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mimscale.wording import counted

# Where torch's shared memory lies on Linux; a container's is 64 MB unless its start says another size.
SHARED_MEMORY = "/dev/shm"
# Full, no memory, no such place, not to be written, no more open files.
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.ENOENT, errno.EACCES, errno.EMFILE)


@dataclass(frozen=True)
class Piped:
    """A batch as bytes, since shared memory had no room for it."""

    content: bytes


def hand_over(batch: Any) -> Any:
    """The batch with its tensors in shared memory, or as :class:`Piped` where there is no room for all of them.

    DataLoader would move them there in a thread, whose error nobody hears: the batch would never come.
    """
    try:
        _Sharing(io.BytesIO()).dump(batch)
    except RuntimeError as problem:
        # torch's only sign of it is the text of the system's error.
        if not any(os.strerror(number) in str(problem) for number in _NO_ROOM):
            raise
        return Piped(pickle.dumps(batch, pickle.HIGHEST_PROTOCOL))
    return batch


def take_over(batch: Any) -> Any:
    """What :func:`hand_over` was given, in the other process."""
    return pickle.loads(batch.content) if isinstance(batch, Piped) else batch


def notice(batch: Piped) -> str:
    """What to tell whoever trains, once."""
    try:
        free = os.statvfs(SHARED_MEMORY)
        there = f" ({counted(free.f_blocks * free.f_frsize // 2**20, 'MiB', 'MiB')})"
    except OSError:
        there = ""
    return (
        f"{SHARED_MEMORY}{there} has no room for the batches that data workers make ahead ({len(batch.content) / 2**20:.1f} "
        "MiB each): they go through a pipe, which is slower. A container's is set at its start: docker run --shm-size=8g"
    )


class _Sharing(pickle.Pickler):
    """Goes through a batch as pickling does, and moves its tensors."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            if obj.device.type == "cpu" and not obj.is_shared():
                obj.share_memory_()
            return int, ()
        return NotImplemented
