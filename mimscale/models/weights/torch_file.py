"""Torch's files of weights: their pickles are looked through, instruction by instruction, before torch runs one.

``weights_only`` keeps a file from running code, but not from asking for memory or time without end: storages of any size,
calls of what allocates, keys that take ages to hash, compressed or overlapping records. What is looked for here are those.
"""

from __future__ import annotations

import argparse
import io
import os
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mimscale.files import open_regular
from mimscale.wording import counted, printable

# A giant's names, shapes and settings take about 1 MB, in some 100,000 instructions.
LARGEST_PICKLE = 16 * 2**20
MOST_INSTRUCTIONS = 250_000
MOST_RECORDS = 20_000
# What a file of torch's format before 1.6 begins with: torch's magic number, as a pickle.
_OLD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP = b"PK\x03\x04"

_STORAGES = {
    "DoubleStorage": 8, "LongStorage": 8, "ComplexFloatStorage": 8, "FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2,
    "BFloat16Storage": 2, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip
_CALLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "yacs.config CfgNode",
    "argparse Namespace",
    "torch Size",
    "torch device",
    "_codecs encode",
}
# Instructions that torch's own reader takes, and that these checks follow.
_TAKEN = frozenset(
    (
        *("PROTO", "STOP", "FRAME", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET"),
        *(
            "TUPLE",
            "TUPLE1",
            "TUPLE2",
            "TUPLE3",
            "NONE",
            "NEWTRUE",
            "NEWFALSE",
            "BININT",
            "BININT1",
            "BININT2",
            "LONG1",
        ),
        *("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
        *(
            "GLOBAL",
            "STACK_GLOBAL",
            "REDUCE",
            "NEWOBJ",
            "BUILD",
            "SETITEM",
            "SETITEMS",
            "APPEND",
            "APPENDS",
            "BINPERSID",
        ),
        *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
    )
)


class _Global(str):
    """A name that a pickle asks for, "module name"."""


class _Mark:
    """The beginning of several values."""


_OPAQUE = object()  # a value that nothing here depends on


def read_torch(path: Path) -> Any:
    """Read a torch file of tensors and plain settings, on the CPU, memory-mapped where the format allows.

    Raises:
        ValueError: it is none, or asks for more than it holds; the message says what, without the file's name.
        OSError: the file cannot be opened, or is no regular one.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(_OLD))
        file.seek(0)
        if start.startswith(_ZIP):
            _check_zip(file, size)
        elif start == _OLD:
            _check_old(file, size)
        else:
            raise ValueError("it is neither torch's format of today (a zip) nor that before 1.6")
        file.seek(0)
        # The released training code stored its settings beside the weights; a plain dict stands in for their class.
        allowed: list[Any] = [(OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]
        with torch.serialization.safe_globals(allowed):
            try:
                if start == _OLD:
                    return torch.load(_Unseen(file, size), map_location="cpu", weights_only=True)  # type: ignore[arg-type]
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # torch's reader raises whatever the steps of a foreign pickle come upon
                said = str(error).strip().splitlines()
                raise ValueError(printable(said[0] if said else type(error).__name__)) from error


class _Unseen:
    """A file without a descriptor: torch tries no tar on it, and no read asks for more than there is."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def read(self, count: int = -1) -> bytes:
        """As of a file."""
        left = max(0, self._size - self._file.tell())
        return self._file.read(left if count < 0 else min(count, left))

    def readinto(self, buffer: Any) -> int:
        """As of a file."""
        return self._file.readinto(buffer)  # type: ignore[attr-defined]

    def readline(self) -> bytes:
        """As of a file."""
        return self._file.readline(LARGEST_PICKLE)

    def seek(self, *where: int) -> int:
        """As of a file."""
        return self._file.seek(*where)

    def tell(self) -> int:
        """As of a file."""
        return self._file.tell()


class _Bounded:
    """A file of which no read takes more than a directory of records may."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        """As of a file."""
        if count > LARGEST_PICKLE:
            raise ValueError(f"its list of records has {counted(count, 'byte')}, more than {LARGEST_PICKLE:,}")
        return self._file.read(count if count >= 0 else LARGEST_PICKLE)

    def seekable(self) -> bool:
        """As of a file."""
        return True


def _check_zip(file: BinaryIO, size: int) -> None:
    """See that the records are stored as they are, side by side, and that the pickle asks for no more than they hold."""
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:
            records = {record.filename: record for record in archive.infolist()}
            if len(records) != len(archive.infolist()) or len(records) > MOST_RECORDS:
                raise ValueError(f"its zip has more than {MOST_RECORDS:,} records, or two of one name")
            for name, record in records.items():
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                    raise ValueError(f"its record {printable(name)} is compressed, which torch does to none")
            if sum(record.file_size for record in records.values()) > size:
                raise ValueError("the records of its zip hold more bytes than the file: they overlap")
            pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise ValueError("its zip has no record NAME/data.pkl, so torch did not write it")
            if records[pickles[0]].file_size > LARGEST_PICKLE:
                raise ValueError(
                    f"its pickle has {counted(records[pickles[0]].file_size, 'byte')}, more than {LARGEST_PICKLE:,}"
                )
            asked = _look_through(io.BytesIO(archive.read(pickles[0])))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"its zip is damaged: {printable(error)}") from None
    folder = pickles[0].removesuffix("data.pkl")
    for key, needed in asked.items():
        held = records.get(f"{folder}data/{key}")
        if held is None or held.file_size < needed:
            there = "lacks" if held is None else f"has {held.file_size:,} bytes of"
            raise ValueError(
                f"a tensor needs {counted(needed, 'byte')}, and the file {there} its record {printable(key)}"
            )


def _check_old(file: BinaryIO, size: int) -> None:
    """See that the pickles at the beginning ask for no more than the file holds."""
    head = io.BytesIO(file.read(LARGEST_PICKLE))
    asked: dict[str, int] = {}
    # Magic number, version, about the machine, the content, and the keys of the storages in the order that they follow.
    for place in range(5):
        asked |= _look_through(head, tuples=place == 3)
    if sum(asked.values()) > size:
        raise ValueError(f"its tensors need {counted(sum(asked.values()), 'byte')}, and it has {size:,}")


def _look_through(pickle: BinaryIO, tuples: bool = True) -> dict[str, int]:
    """Follow a pickle without building anything.

    Args:
        pickle: read up to its end.
        tuples: whether it may hold any.

    Returns:
        The bytes that its tensors need of each storage, by the storage's key.

    Raises:
        ValueError: it is damaged, is too long, or calls something that a file of weights has no need of.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    asked: dict[str, int] = {}
    count = 0
    try:
        for code, argument, _ in pickletools.genops(pickle):
            count += 1
            if count > MOST_INSTRUCTIONS:
                raise ValueError(f"its pickle has more than {MOST_INSTRUCTIONS:,} instructions")
            if code.name not in _TAKEN or (not tuples and "TUPLE" in code.name):
                raise ValueError(f"its pickle has the instruction {code.name}, of which a file of weights has no need")
            _step(code.name, argument, stack, memo, asked)
    except (IndexError, KeyError, UnicodeDecodeError):
        raise ValueError("its pickle is damaged") from None
    except ValueError as error:
        raise ValueError(printable(error)) from None
    return asked


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any], asked: dict[str, int]) -> None:
    """One instruction."""
    if name in ("PROTO", "STOP", "FRAME"):
        return
    if name == "MARK":
        stack.append(_Mark)
    elif name == "GLOBAL":
        stack.append(_Global(argument))
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        if not isinstance(attribute, str) or not isinstance(module, str):
            raise ValueError("its pickle is damaged: a name that is no text")
        stack.append(_Global(f"{module} {attribute}"))
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "EMPTY_TUPLE":
        stack.append(())
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        stack.append(tuple(reversed([stack.pop() for _ in range(int(name[-1]))])))
    elif name == "TUPLE":
        stack.append(tuple(_marked(stack)))
    elif name == "BINPERSID":
        _storage(stack.pop(), asked)
        stack.append(_OPAQUE)
    elif name in ("REDUCE", "NEWOBJ"):
        given, called = stack.pop(), stack.pop()
        if not isinstance(called, _Global) or called not in _CALLED:
            what = called if isinstance(called, _Global) else "a value"
            raise ValueError(f"its pickle calls {printable(what).replace(' ', '.')}, which no file of weights needs")
        _check_call(called, given)
        stack.append(_OPAQUE)
    elif name in ("APPENDS", "SETITEMS"):
        values = _marked(stack)
        if name == "SETITEMS":
            _check_keys(values[::2])
        stack[-1]
    elif name == "SETITEM":
        stack.pop()
        _check_keys([stack.pop()])
    elif name in ("APPEND", "BUILD"):
        stack.pop()
    else:  # a value
        stack.append(argument if isinstance(argument, int | str) else _OPAQUE)


def _marked(stack: list[Any]) -> list[Any]:
    """Take the values since the last mark."""
    values = []
    while (value := stack.pop()) is not _Mark:
        values.append(value)
    return values[::-1]


def _check_keys(keys: list[Any]) -> None:
    """Keys are names or numbers: a tuple of tuples of tuples, each twice the same, takes for ever to hash."""
    if any(isinstance(key, tuple) for key in keys):
        raise ValueError("its pickle has a tuple as the key of a dict")


def _check_call(called: str, given: Any) -> None:
    if not isinstance(given, tuple):
        raise ValueError("its pickle is damaged: a call without arguments")
    if called == "collections OrderedDict" and given:
        raise ValueError("its pickle fills an OrderedDict in one call")
    if called == "_codecs encode" and given[1:] != ("latin1",):
        raise ValueError("its pickle encodes text in another way than Python does")


def _storage(told: Any, asked: dict[str, int]) -> None:
    """Note what a tensor needs of its storage: ("storage", kind, key, device, elements, ...)."""
    if not isinstance(told, tuple) or len(told) < 5 or told[0] != "storage":
        raise ValueError("its pickle refers to something else than a storage")
    kind, key, elements = told[1], told[2], told[4]
    if not isinstance(kind, _Global) or not kind.startswith("torch ") or kind[6:] not in _STORAGES:
        raise ValueError(f"it has a storage of the kind {printable(kind, 60)}, which holds no weights")
    if not isinstance(key, str) or not isinstance(elements, int) or not 0 <= elements < 2**60:
        raise ValueError("its pickle refers to a storage without a key and a size")
    asked[key] = max(asked.get(key, 0), elements * _STORAGES[kind[6:]])
