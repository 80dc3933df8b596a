"""The process that tries one input after the other, and sees what each does: errors, memory, writes, what it starts."""

from __future__ import annotations

import ast
import faulthandler
import hashlib
import io
import linecache
import os
import random
import resource
import shutil
import stat
import sys
import time
import traceback
import unicodedata
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mimscale
from fuzzing.case import KINDS, Case, Kind, Misfit

PACKAGE = str(Path(mimscale.__file__).parent)
# Beyond what a case may take, so that this machine is not taken down before the growth is seen.
ADDRESS_SPACE = 8 * 2**30
LONGEST_MESSAGE = 20_000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "shutil.rmtree",
}
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile"}
_HARMLESS = ("/dev/null", "/proc/self/")


class Watch:
    """What the reader of one input does, as Python's audit events tell; one in a process, for hooks cannot be taken away."""

    def __init__(self, *temporary: Path):
        self.temporary = tuple(map(str, temporary))
        self.allowed: tuple[str, ...] = ()
        self.starts = True
        self.active = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, values: tuple) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = values
            if isinstance(flags, int) and flags & _WRITING and isinstance(path, str | bytes | os.PathLike):
                self._wrote("open to write", path)
        elif event == "os.mkdir" and os.path.lexists(values[0]):
            return  # it is there already, which is no change
        elif event in _CHANGES:
            for path in values[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, str | bytes | os.PathLike):
                    self._wrote(event, path)
        elif event in _STARTS and not self.starts:
            self.seen.append(f"{event} {values!r:.200}")
        elif event == "socket.connect" and not str(values[1]).startswith("('127.0.0.1'"):  # ranks meet there
            self.seen.append(f"{event} {values[1:]!r:.200}")

    def _wrote(self, event: str, path: Any) -> None:
        self.active = False  # what is looked up here is not the reader's
        try:
            place = Path(os.fsdecode(path))
            place = place.parent.resolve() / place.name
            whole = str(place.resolve() if event == "open to write" and place.is_symlink() else place)
            if not whole.startswith((*self.allowed, *self.temporary, *_HARMLESS)):
                self.seen.append(f"{event} {whole!r:.300}")
        except (OSError, ValueError):
            pass
        finally:
            self.active = True


def tree(folder: Path, content: bool) -> dict[str, tuple]:
    """What lies in a folder, links not followed: enough to see a change."""
    found: dict[str, tuple] = {}
    for where, folders, names in os.walk(os.fsencode(folder)):
        for name in [*folders, *names]:
            path = where + b"/" + name
            facts = os.lstat(path)
            told: tuple = (
                facts.st_mode,
                facts.st_size if not stat.S_ISDIR(facts.st_mode) else 0,
                facts.st_mtime_ns,
                facts.st_ino,
            )
            if content and stat.S_ISREG(facts.st_mode):
                with Path(os.fsdecode(path)).open("rb") as file:
                    told = (*told, hashlib.file_digest(file, "sha256").hexdigest())
            found[os.fsdecode(path)] = told
    return found


def changes(before: dict[str, tuple], after: dict[str, tuple], outputs: tuple[str, ...]) -> list[str]:
    """Names that differ and lie outside of the outputs; of the folder that holds an output the time may change."""
    differ = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    return sorted(
        path
        for path in differ
        if not f"{path}/".startswith(outputs)
        and not (
            path in before
            and path in after
            and stat.S_ISDIR(before[path][0])
            and any(out.startswith(path + "/") for out in outputs)
        )
    )


def unprintable(text: str) -> str:
    """The characters in it that no message may hold."""
    return "".join(
        sorted({c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t\r"})
    )


@cache
def _raises(file: str) -> frozenset[int]:
    """The lines of a module that are part of a ``raise``."""
    found: set[int] = set()
    for node in ast.walk(ast.parse("".join(linecache.getlines(file)))):
        if isinstance(node, ast.Raise):
            found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(found)


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether mimscale raises it itself: it is a class of its own, or one of Python's from a ``raise`` of its own."""
    if type(error).__module__.startswith(("mimscale", "fuzzing")):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    if last is not None and last.filename.startswith(PACKAGE) and last.lineno in _raises(last.filename):
        return True
    # What the system says of a file; commands show its name and what the system said.
    return isinstance(error, OSError) and error.errno is not None and error.filename is not None


def message_fault(error: BaseException) -> str | None:
    """What is wrong with a refusal's message."""
    text = str(error)
    if not text.strip():
        return "the message is empty"
    if len(text) > LONGEST_MESSAGE:
        return f"the message has {len(text):,} characters"
    if odd := unprintable(text):
        return f"the message has the characters {odd!r}"
    return None


def judge(kind: Kind, case: Case, reader: Any, watch: Watch) -> tuple[str, str]:
    """Read one input: what came of it ("accepted", "refused", "traceback", "memory", "write"), and more about it."""
    said = io.StringIO()
    outputs = tuple(f"{path}/" for path in (case.out, *case.outputs))
    before, victim = tree(case.given, content=False), tree(case.victim, content=True)
    watch.allowed, watch.starts, watch.seen = (*outputs, *(out[:-1] for out in outputs)), kind.starts, []
    outcome, about = "accepted", ""
    try:
        watch.active = True
        try:
            with redirect_stdout(said), redirect_stderr(said):
                reader()
        finally:
            watch.active = False
    except kind.refusals as error:
        outcome, about = "refused", f"{type(error).__name__}: {error}"
        fault = message_fault(error)
        if not _raised_on_purpose(error):
            fault = "it is not mimscale that raises it"
        if fault:
            outcome, about = "traceback", f"{fault}\n{traceback.format_exc()}"
    except MemoryError:
        outcome, about = "memory", traceback.format_exc()
    except Misfit as error:
        outcome, about = "traceback", f"Misfit: {error}\n{said.getvalue()[-2000:]}"
    except BaseException:
        outcome, about = "traceback", traceback.format_exc()
    if outcome in ("accepted", "refused"):
        if odd := unprintable(said.getvalue()):
            outcome, about = (
                "traceback",
                f"Misfit: what was printed has the characters {odd!r}: {said.getvalue()[:1000]!r}",
            )
        touched = changes(before, tree(case.given, content=False), outputs) + changes(
            victim, tree(case.victim, content=True), ()
        )
        if touched or watch.seen:
            outcome, about = "write", f"Misfit: written or started: {touched[:5]} {watch.seen[:5]}\n{about}"
    return outcome, about


def _memory() -> tuple[int, int]:
    """Resident bytes of this process, now and at most since the last look."""
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(facts["VmRSS"].split()[0]) << 10, int(facts["VmHWM"].split()[0]) << 10


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def make_victim(folder: Path) -> None:
    """The folder that nobody may write in."""
    (folder / "folder").mkdir(parents=True)
    (folder / "file.txt").write_text("not yours\n")
    (folder / "folder" / "image.jpg").write_bytes(b"\xff\xd8\xff\xd9")


def work(kind_name: str, seeds: list[int], place: Path, material: Path, say: Connection, keep: bool) -> None:
    """Try the inputs of one kind with these seeds, and tell of each over ``say``.

    Args:
        kind_name: of the kind.
        seeds: of the inputs.
        place: folder of this process's own.
        material: folder of sound files.
        say: gets (what, seed, ...): ("prepare", seed), ("read", seed, resident bytes), ("done", seed, outcome, about, processor
            seconds, bytes grown).
        keep: leave the input of the last one where it is.
    """
    shutil.rmtree(place, ignore_errors=True)
    for name in ("home", "tmp"):
        (place / name).mkdir(parents=True)
    make_victim(place / "victim")
    os.environ |= {
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "tmp"),
        "XDG_CACHE_HOME": str(place / "home/cache"),
    }
    sys.dont_write_bytecode = True
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable(log, all_threads=False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + ADDRESS_SPACE,) * 2)
    kind, watch = KINDS[kind_name], Watch(place / "tmp", place / "home/cache")
    if not kind.starts:
        os.environ["PATH"] = ""  # nor is there a Slurm that would be waited for
    for seed in seeds:
        say.send(("prepare", seed))
        shutil.rmtree(place / "case", ignore_errors=True)
        rng = random.Random(f"{kind_name}:{seed}")
        name = "given" if rng.random() < 0.9 else "a\x1b[31m\u202eb c"  # a folder, too, may be called as it likes
        case = Case(place / "case", material, place / "victim", rng, name)
        case.given.mkdir(parents=True)
        case.out.mkdir()
        os.chdir(case.out)
        try:
            reader = kind.prepare(case)
        except Exception:
            say.send(("done", seed, "traceback", f"the fuzzer itself:\n{traceback.format_exc()}", 0.0, 0))
            continue
        _forget_peak()
        start, _ = _memory()
        say.send(("read", seed, start))
        began = time.process_time()
        outcome, about = judge(kind, case, reader, watch)
        taken, (_, peak) = time.process_time() - began, _memory()
        if keep and case.notes:
            about += "\n" + "\n".join(case.notes)
        say.send(("done", seed, outcome, about, taken, max(0, peak - start)))
        del reader
    if not keep:
        shutil.rmtree(place / "case", ignore_errors=True)
    say.send(("end",))
    say.close()
    os._exit(0)
