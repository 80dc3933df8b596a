"""What is done to sound files: to their bytes, lines, values, and to the files as such."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzzing.case import Case

ODD_TEXTS = (
    "",
    " ",
    "\0",
    "\n",
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "\x07\x08",
    "\u202egnp.exe",
    "\u2028",
    "\ud800",
    "\U0010ffff",
    "é" * 300,
    "../../../victim/file.txt",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "..",
    ".",
    "a/b",
    "~",
    "~root/x",
    "$HOME",
    "`id`",
    "$(touch x)",
    "; touch x",
    "=1+1",
    "@SUM(1)",
    "-rf",
    "--help",
    "null",
    "NaN",
    "nan",
    "inf",
    "-inf",
    "true",
    "yes",
    "1e999",
    "0x10",
    "1_000",
    "010",
    "1:30",
    "2024-01-01",
    "!!python/object/apply:os.system [id]",
    "%s%s%s%n",
    "{0.__class__}",
    "x" * 5000,
    "9" * 400,
    "9" * 5000,
    "١٢٣",
    "step_00000010",
    "swinv2_s",
    "simmim",
    "http://127.0.0.1:1/x",
    "s3://x/y",
    "file:///etc/passwd",
)
ODD_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    256,
    -256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**11,
    10**30,
    10**400,
    0.0,
    -0.0,
    0.5,
    -0.5,
    1e-300,
    1e300,
    1e38,
    -1e38,
    float("nan"),
    float("inf"),
    float("-inf"),
)
ODD_NAMES = (
    b"a b",
    b"-rf",
    b"\xff\xfe",
    b"new\nline",
    b"\x1b[2J",
    b"n" * 255,
    "\u202eevil.png".encode(),
    b"=cmd",
    b"'quote",
    b'"',
    b"$(id)",
    b"...",
    b"%s",
    b"#",
    b"~",
    b"\\",
    b"tab\there",
    b"dot.",
    b"CON",
    "ü".encode(),
    "u\u0308".encode(),
    b".hidden",
)


# -- bytes -------------------------------------------------------------------------------------------------------------


def bytes_mutated(data: bytes, rng: random.Random, most: int = 4) -> bytes:
    """Bytes with up to ``most`` changes."""
    for _ in range(min(most, rng.choice((1, 1, 1, 2, 3, 4)))):
        data = rng.choice(BYTES)(data, rng)
    return data


def _place(data: bytes, rng: random.Random) -> int:
    # Headers lie at the beginning and at the end of most files.
    bound = rng.choice((16, 64, 512, len(data), len(data), len(data)))
    place = rng.randrange(max(1, min(bound, len(data))))
    return len(data) - 1 - place if data and rng.random() < 0.2 else place


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return (
        data[:at]
        + bytes(
            rng.choice((0, 1, 0x20, 0x2D, 0x30, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            for _ in range(rng.choice((1, 1, 4, 16)))
        )
        + data[at + 1 :]
    )


def _number(data: bytes, rng: random.Random) -> bytes:
    at, order, width = _place(data, rng), rng.choice("<>"), rng.choice("BHIQ")
    size = struct.calcsize(width)
    value = rng.choice(
        (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1, len(data))
    )
    return data[:at] + struct.pack(order + width, value % 2 ** (8 * size)) + data[at + size :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, len(data) // 2, max(0, len(data) - 1), _place(data, rng)))]


def _drop(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, 512, rng.randrange(1, 100))) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at, size = _place(data, rng), rng.choice((1, 4, 16, 64, 512, 1024))
    return data[:at] + data[at : at + size] * rng.choice((2, 3, 10, 1000 if size <= 64 else 20)) + data[at + size :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    new = rng.choice(
        (b"\0" * 8, b"\xff" * 8, b"\r\n", b"\x1b[31m", b"\xef\xbb\xbf", b"9" * 50, rng.randbytes(16), b"\0" * 4096)
    )
    return data[:at] + new + data[at:]


def _swap(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted((_place(data, rng), _place(data, rng)))
    size = rng.choice((1, 4, 16, 512))
    return (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
        if b >= a + size
        else data
    )


def _digits(data: bytes, rng: random.Random) -> bytes:
    """A number written out becomes another."""
    places = [i for i, byte in enumerate(data[:20000]) if 48 <= byte <= 57]
    if not places:
        return _flip(data, rng)
    at = rng.choice(places)
    return (
        data[:at]
        + rng.choice((b"-1", b"0", b"7", b"9" * 12, b"8" * 30, b"1e9", b".5", b"777", b"NaN"))
        + data[at + 1 :]
    )


def _noise(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        (
            b"",
            rng.randbytes(rng.choice((1, 8, 100, 5000))),
            data + rng.randbytes(50),
            data * 2,
            b"\0" * len(data),
            data[::-1],
        )
    )


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _flip,
    _set,
    _number,
    _number,
    _cut,
    _drop,
    _repeat,
    _insert,
    _swap,
    _digits,
    _noise,
)


# -- values of JSON, YAML and the like ---------------------------------------------------------------------------------


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    """Something that nobody expects."""
    if depth > 2 or rng.random() < 0.75:
        return rng.choice(
            (
                lambda: rng.choice(ODD_TEXTS),
                lambda: rng.choice(ODD_NUMBERS),
                lambda: rng.choice((None, True, False, [], {})),
            )
        )()
    if rng.random() < 0.5:
        return [odd_value(rng, depth + 1) for _ in range(rng.choice((1, 2, 4, 30)))]
    return {rng.choice(ODD_TEXTS): odd_value(rng, depth + 1) for _ in range(rng.choice((1, 3)))}


def _spots(value: Any, at: tuple = ()) -> list[tuple]:
    """The ways to all values inside of one, itself the first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:50]) if isinstance(value, list) else ()
    return [at, *(spot for key, part in inner for spot in _spots(part, (*at, key)))]


def _at(value: Any, way: tuple) -> Any:
    for step in way:
        value = value[step]
    return value


def tree_mutated(value: Any, rng: random.Random, most: int = 3) -> Any:
    """A value with up to ``most`` changes inside."""
    value = copy.deepcopy(value)
    for _ in range(min(most, rng.choice((1, 1, 1, 2, 3, 4)))):
        spots = _spots(value)
        *way, last = rng.choice(spots[1:] or [("",)])
        if len(spots) == 1 or rng.random() < 0.03:
            value = odd_value(rng)
            continue
        inner, old = _at(value, tuple(way)), _at(value, (*way, last))
        what = rng.choice(
            ("odd", "odd", "odd", "near", "near", "type", "remove", "rename", "add", "many", "deep", "another", "long")
        )
        if what == "odd":
            inner[last] = odd_value(rng)
        elif what == "near":
            inner[last] = _near(old, rng)
        elif what == "type":
            inner[last] = rng.choice((str(old), [old], {"a": old}, [], {}, None, repr(old), not old, {"0": old}))
        elif what == "remove":
            del inner[last]
        elif what == "rename" and isinstance(inner, dict):
            inner[rng.choice((*ODD_TEXTS, f"{last} ", str(last).upper(), str(last)[:-1]))] = inner.pop(last)
        elif what == "add" and isinstance(old, dict):
            for _ in range(rng.choice((1, 3, 2000))):
                old[rng.choice(ODD_TEXTS) + str(rng.randrange(10000))] = odd_value(rng, 3)
        elif what == "many" and isinstance(old, list):
            old.extend((old or [odd_value(rng)]) * rng.choice((1, 3, 2000)))
        elif what == "deep":
            for _ in range(rng.choice((1, 5, 30, 60))):
                old = rng.choice(([old], {"a": old}))
            inner[last] = old
        elif what == "another":
            inner[last] = copy.deepcopy(_at(value, rng.choice(spots)))
        else:
            inner[last] = rng.choice(("x" * 100_000, list(range(5000)), ["a"] * 3000, {str(i): i for i in range(3000)}))
    return value


def _near(old: Any, rng: random.Random) -> Any:
    """Much like it, and wrong."""
    if isinstance(old, bool):
        return rng.choice((not old, int(old), str(old)))
    if isinstance(old, int | float) and not abs(old) < 1e300:
        return rng.choice((0, 1, -old, str(old)))
    if isinstance(old, int | float):
        return rng.choice((-old, old + 1, old - 1, old * 1000, old / 2, float(old), old * 10**9, str(old), 0))
    if isinstance(old, str):
        at = rng.randrange(len(old) + 1)
        return rng.choice(
            (old[:at] + rng.choice(ODD_TEXTS[:11]) + old[at:], old[:at], old * 50, old.upper(), old + "\n", " " + old)
        )
    if isinstance(old, list):
        return rng.choice(
            (
                old[:-1],
                old[::-1],
                old * 2,
                old[:1],
                [*old, old[-1] if old else 0],
                {str(i): v for i, v in enumerate(old)},
            )
        )
    if isinstance(old, dict):
        return rng.choice((list(old.items()), list(old), dict(list(old.items())[:-1])))
    return 0


def depth_of(value: Any) -> int:
    """How deep a value is nested."""
    inner = value.values() if isinstance(value, dict) else value[:50] if isinstance(value, list) else ()
    return 1 + max(map(depth_of, inner), default=0)


def json_mutated(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with other values, or other bytes."""
    if rng.random() < 0.25:
        return bytes_mutated(data, rng)
    return json_text(tree_mutated(json.loads(data), rng), rng)


def json_text(value: Any, rng: random.Random) -> bytes:
    """A value as JSON, now and then written as nobody does."""
    text = json.dumps(value, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.1:
        text = rng.choice(
            (
                text[:-1],
                text + "}",
                "\ufeff" + text,
                "[" * 100_000 + text,
                '{"a":' * 5000 + text,
                text.replace('"', "'"),
                text.replace("1", "1" * 5000, 1),
                text.replace("{", '{"step": 1, "step": 2, ', 1),
                text.replace(":", ": -", 1),
                text.replace("0", "1e400", 1),
                text.replace(",", ",,", 1),
            )
        )
    return text.encode("utf-8", "surrogatepass")


def lines_mutated(data: bytes, rng: random.Random) -> bytes:
    """A text file with other lines, or other bytes."""
    if rng.random() < 0.3:
        return bytes_mutated(data, rng)
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        what = rng.choice(("remove", "repeat", "swap", "odd", "join", "indent", "word", "many"))
        if what == "remove":
            lines[at : at + 1] = []
        elif what == "repeat":
            lines[at:at] = [lines[at]] * rng.choice((1, 2, 100))
        elif what == "swap":
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif what == "odd":
            lines[at] = rng.choice(ODD_TEXTS)
        elif what == "join":
            lines[at] = " ".join(lines[at : at + 2])
        elif what == "indent":
            lines[at] = rng.choice((" ", "\t", "- ", "  ")) + lines[at]
        elif what == "word":
            words = lines[at].split(" ")
            words[rng.randrange(len(words))] = str(
                rng.choice((rng.choice(ODD_TEXTS), rng.choice(ODD_NUMBERS[:-4]) if rng.random() < 0.5 else 10**20))
            )
            lines[at] = " ".join(words)
        else:
            lines[at:at] = [rng.choice(ODD_TEXTS)] * 3000
        lines = lines or [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")


# -- files -------------------------------------------------------------------------------------------------------------


def rewrite(path: Path, how: Callable[[bytes, random.Random], bytes], rng: random.Random) -> None:
    """Change the content of a file."""
    if path.is_file() and path.stat().st_size < 2**26:  # not what it was replaced by before
        path.write_bytes(how(path.read_bytes(), rng))


def replace_file(path: Path, case: Case) -> None:
    """Put something that is no plain file, or a strange one, in the place of a file."""
    rng = case.rng
    what = rng.choice(
        (
            "pipe",
            "zero",
            "loop",
            "victim",
            "nowhere",
            "folder",
            "huge",
            "empty",
            "socket",
            "missing",
            "random",
            "self",
            "void",
        )
    )
    case.notes.append(f"{path.name} is replaced: {what}")
    content = path.read_bytes() if path.is_file() else b""
    with suppress(FileNotFoundError):
        path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "zero":
        path.symlink_to("/dev/zero")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "victim":
        path.symlink_to(case.victim / "file.txt")
    elif what == "nowhere":
        path.symlink_to("no/such/file")
    elif what == "folder":
        path.mkdir()
    elif what == "huge":
        with path.open("wb") as file:
            file.write(content)
            file.truncate(rng.choice((2**28, 2**33, 2**41)))
    elif what == "empty":
        path.touch()
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server, suppress(OSError):  # its name may be too long
            server.bind(str(path))
    elif what == "random":
        path.symlink_to("/dev/urandom")
    elif what == "self":
        path.symlink_to(path.parent)
    elif what == "void":
        path.symlink_to("/dev/null")


def file_mutated(path: Path, how: Callable[[bytes, random.Random], bytes], case: Case, strange: float = 0.07) -> None:
    """Change a file's content, or now and then the file as such."""
    if case.rng.random() < strange:
        replace_file(path, case)
    else:
        rewrite(path, how, case.rng)


def clutter(folder: Path, case: Case, most: int = 4) -> None:
    """Put strange entries into a folder."""
    for _ in range(case.rng.randint(1, most)):
        name = os.fsdecode(
            case.rng.choice(ODD_NAMES)
            + case.rng.choice((b"", b"", b".jpg", b".json", b".tar", b".png"))[: case.rng.choice((0, 5))]
        )
        path = folder / name[:240]
        if os.path.lexists(path):
            continue
        with suppress(OSError):
            if case.rng.random() < 0.3:
                path.write_bytes(case.rng.randbytes(20))
            else:
                path.touch()
                replace_file(path, case)
