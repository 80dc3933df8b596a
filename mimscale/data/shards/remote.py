"""Shard folders behind http(s), s3 and whatever else fsspec reads, through a bounded cache that a node's processes share.

A shard is fetched whole, checked against its SHA-256 and only then given its name, so a file in the cache is a good file.
Two processes that want the same shard take turns at a lock: the second finds it there.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mimscale.data.errors import ShardError
from mimscale.data.shards.format import MAX_INDEX_BYTES, file_sha256
from mimscale.files import open_to_append, write_beside
from mimscale.wording import printable

log = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0
# A server that says nothing for this long has gone.
SILENCE_S = 30.0
# A server that sends less than this a second, after this long, would keep a run waiting for ever.
LEAST_RATE, SLOW_S, _SLOW_ATTEMPTS = 1024, 30.0, 2
# Of the sample table of a remote folder: 64 bytes each for a billion samples.
MAX_TABLE_BYTES = 64 * 10**9
DEFAULT_CACHE_BYTES = 200 * 1024**3


def is_remote(root: str | Path) -> bool:
    """Whether ``root`` is an address and not a folder."""
    return "://" in str(root)


def default_cache() -> Path:
    """``$MIMSCALE_CACHE``, or a folder of the user's cache."""
    chosen = os.environ.get("MIMSCALE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "mimscale" / "shards"


class ShardCache:
    """Local copies of the files of one remote shard folder. Picklable; each process makes its own connection.

    Args:
        url: the remote folder.
        folder: where copies of this and other folders are kept.
        limit: bytes that all tars under ``folder`` may take together; the longest unused go first.
        build: which build the copies are of; copies of different builds are kept apart.
    """

    def __init__(self, url: str, folder: Path, limit: int = DEFAULT_CACHE_BYTES, build: str = ""):
        self.url, self.base, self.limit = url.rstrip("/"), folder, limit
        self.folder = folder / hashlib.sha256(f"{self.url} {build}".encode()).hexdigest()[:16]
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ShardError(
                f"{self.folder}: the cache cannot be written ({error.strerror}); set MIMSCALE_CACHE"
            ) from None

    def _connect(self) -> tuple[Any, str]:
        try:
            import fsspec

            options: dict[str, Any] = {}
            if self.url.startswith("http"):
                from aiohttp import ClientTimeout

                timeout = ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
                # Shards are images: nothing is gained by packing them, and an unpacked bomb lost.
                plain = {"Accept-Encoding": "identity"}
                options = {"client_kwargs": {"timeout": timeout, "headers": plain, "auto_decompress": False}}
            elif self.url.startswith("s3:"):
                # The client's own attempts would multiply with ours.
                waits = {"connect_timeout": SILENCE_S, "read_timeout": SILENCE_S, "retries": {"total_max_attempts": 1}}
                options = {"config_kwargs": waits}
            return fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            raise ShardError(f"{self.url}: cannot be opened ({error}); pip install 'mimscale[remote]'") from None

    def fetch(self, name: str, size: int | None = None, sha256: str | None = None) -> Path:
        """The local copy of a file, fetched if it is not there.

        Args:
            name: of the file in the remote folder.
            size: what it must have, bytes; a copy of another size is fetched anew.
            sha256: what it must have; checked when it is fetched.

        Raises:
            ShardError: it could not be had in ``ATTEMPTS`` attempts; names it and the last reason.
        """
        path = self.folder / name
        if self._is_there(path, size, sha256):
            return path
        with _locked(self.folder / "locks" / name):
            if self._is_there(path, size, sha256):
                return path
            if size:
                self._make_room(size, path)
            self._fetch(path, size, sha256)
        return path

    @staticmethod
    def _is_there(path: Path, size: int | None, sha256: str | None) -> bool:
        """Whether a good copy is there; marks it as used. Tars were hashed when they came: their size is enough."""
        try:
            if size is None and (sha256 is None or file_sha256(path) != sha256):
                return False
            if size is not None and path.stat().st_size != size:
                return False
            os.utime(path)
        except OSError:
            return False
        return True

    def _fetch(self, path: Path, size: int | None, sha256: str | None) -> None:
        reason, slow = "", 0
        limit = size if size is not None else MAX_INDEX_BYTES if sha256 is None else MAX_TABLE_BYTES
        for attempt in range(ATTEMPTS):
            if attempt:
                wait = min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S)
                log.warning("%s/%s: %s; trying again in %.1f s", self.url, path.name, reason, wait)
                time.sleep(wait)
            try:
                with write_beside(path) as beside:
                    files, folder = self._connect()
                    files.get_file(f"{folder}/{path.name}", str(beside), callback=_bounded(limit))
                    _check(beside, size, sha256)
                return
            except ShardError:
                raise
            except _TooSlow as error:
                reason, slow = str(error), slow + 1
                if slow == _SLOW_ATTEMPTS:
                    break
            except _Damaged as error:
                reason = str(error)
            except FileNotFoundError:
                raise ShardError(f"{self.url}/{path.name}: the server has no such file") from None
            except PermissionError as error:
                if error.filename == str(path):
                    raise ShardError(f"{printable(path)}: the cache cannot be written ({error.strerror})") from None
                raise ShardError(f"{self.url}/{path.name}: the server refuses it ({error}); see to the keys") from None
            except Exception as error:  # every protocol raises its own kinds
                reason = printable(f"{type(error).__name__}: {error}".rstrip(": "))
                if isinstance(error, OSError) and error.filename == str(path):
                    raise ShardError(f"{printable(path)}: the cache cannot be written ({error.strerror})") from None
        raise ShardError(
            f"{self.url}/{path.name}: could not be fetched in {attempt + 1} attempts (last: {reason}); see whether the server "
            "is up and run it again"
        )

    def _make_room(self, size: int, keep: Path) -> None:
        """Drop the longest unused tars until ``size`` more bytes fit; processes that have one open can read on.

        Raises:
            ShardError: the file alone is larger than all may be together.
        """
        if size > self.limit:
            raise ShardError(
                f"{self.url}/{keep.name}: has {size:,} bytes by its index, over the {self.limit:,} that all copies may take; "
                "raise data.cache_gib"
            )
        with _locked(self.base / "room.lock"):
            copies = []
            for copy in self.base.glob("*/*.tar"):
                with suppress(OSError):
                    facts = copy.stat()
                    copies.append((facts.st_mtime, facts.st_size, copy))
            total = sum(copy[1] for copy in copies)
            for _, freed, copy in sorted(copies, key=lambda copy: copy[0]):
                if total + size <= self.limit:
                    break
                if copy != keep:
                    copy.unlink(missing_ok=True)
                    total -= freed


class _Damaged(Exception):
    """What came is not what the index says."""


class _TooSlow(Exception):
    """It comes so slowly that it would never be there."""


def _bounded(limit: int) -> Any:
    """A callback of fsspec's, told of every piece that came: it ends a transfer of too many bytes, or of too few a second."""
    from fsspec.callbacks import Callback

    class Bounded(Callback):
        began, came = time.monotonic(), 0

        def relative_update(self, inc: int = 1) -> None:
            self.came += inc
            if self.came > limit:
                raise _Damaged(f"more than the {limit:,} bytes came that it may have")
            waited = time.monotonic() - self.began
            if waited > SLOW_S and self.came < LEAST_RATE * waited:
                raise _TooSlow(f"{self.came:,} bytes came in {waited:.0f} s, fewer than {LEAST_RATE:,} a second")

    return Bounded()


def _check(path: Path, size: int | None, sha256: str | None) -> None:
    if size is not None and path.stat().st_size != size:
        raise _Damaged(f"{path.stat().st_size:,} bytes came, the index says {size:,}")
    if sha256 is not None and file_sha256(path) != sha256:
        raise _Damaged("what came does not have the SHA-256 that the index says")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes (and threads: each opens the file for itself)."""
    file = open_to_append(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


class FetchAhead:
    """Brings the shards of coming steps into the cache while the present ones are read.

    Args:
        fetch: brings one shard, by number.
        shards_of: the shards that a step reads.
        start: first step.
        stop: step to end before, or None.
        ahead: how many steps to be in front of the reader.
    """

    def __init__(
        self,
        fetch: Callable[[int], object],
        shards_of: Callable[[int], Iterable[int]],
        start: int,
        stop: int | None,
        ahead: int = 32,
    ):
        self._fetch, self._shards_of, self._next, self._stop, self._ahead = fetch, shards_of, start, stop, ahead
        self._present = start
        self._changed = threading.Condition()
        self._ended = False
        self._thread: threading.Thread | None = None

    def reached(self, step: int) -> None:
        """Tell that the reader has come to ``step``; the first call starts the thread."""
        with self._changed:
            self._present = step
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Stop after the shard that is being fetched."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _run(self) -> None:
        latest: dict[int, None] = {}
        while self._stop is None or self._next < self._stop:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._next <= self._present + self._ahead)
            for shard in self._shards_of(self._next):
                if self._ended:
                    return
                if shard in latest:
                    continue
                try:
                    self._fetch(shard)
                except ShardError as error:
                    # The reader will meet the same and report it; here it must not take the process down.
                    log.warning("%s", error)
                    return
                latest[shard] = None
                if len(latest) > 4096:
                    latest.pop(next(iter(latest)))
            self._next += 1
            if self._ended:
                return
