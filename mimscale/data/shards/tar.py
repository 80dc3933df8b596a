"""Tar headers by hand: packing them to known bytes, reading them without trusting them, walking an archive.

Python's ``tarfile`` spends most of its time on features that shards do not have. A shard is a row of ustar members
whose headers hold nothing that differs between two builds: no time, no owner, one mode.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mimscale.wording import printable

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)

_MAGIC = b"ustar\x0000"
_CONSTANT_HEAD = b"0000644\x00" + b"0000000\x00" * 2
_CONSTANT_TIME = b"00000000000\x00"
_LINK_AND_TAIL = bytes(100) + _MAGIC + bytes(32 + 32) + b"0000000\x00" * 2
_CONSTANT_SUM = sum(_CONSTANT_HEAD) + sum(_CONSTANT_TIME) + sum(_LINK_AND_TAIL) + ord("0") + 8 * ord(" ")


class TarError(ValueError):
    """Bytes that are not the tar header they should be."""


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an archive.

    Attributes:
        name: its name, undecoded.
        offset: where its payload starts in the archive, bytes.
        size: length of its payload, bytes.
        is_file: false for folders, links and devices.
        kind: its type flag: ``1`` a hard link, ``2`` a symbolic one, ``5`` a folder.
    """

    name: bytes
    offset: int
    size: int
    is_file: bool
    kind: bytes = b"0"


def padding(size: int) -> int:
    """Bytes between the end of a payload of ``size`` bytes and the next header."""
    return -size % BLOCK


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """The (prefix, name) fields that ustar stores for ``name``.

    Raises:
        TarError: the name does not fit into ustar's 155 + 100 bytes.
    """
    if len(name) <= 100:
        return b"", name
    cut = name.find(b"/", len(name) - 101)
    if cut < 0 or cut > 155 or cut == len(name) - 1:
        raise TarError(f"name of {len(name)} bytes does not fit a ustar header: {name[:60]!r}...")
    return name[:cut], name[cut + 1 :]


def pack_header(name: bytes, size: int) -> bytes:
    """The 512 header bytes of a plain file: mode 0644, owner 0, time 0.

    Raises:
        TarError: the name is too long, or the size above ustar's 8 GiB.
    """
    if size >= 8**11:
        raise TarError(f"{name!r} has {size} bytes; a ustar member holds at most {8**11 - 1}")
    prefix, name = split_name(name) if len(name) > 100 else (b"", name)
    size_field = b"%011o" % size
    # The sum of a header is the sum of its parts, and most of them never change.
    checksum = _CONSTANT_SUM + sum(name) + sum(size_field) + sum(prefix)
    head = b"%b%b%b\x00%b%06o\x00 0%b" % (
        name.ljust(100, b"\x00"), _CONSTANT_HEAD, size_field, _CONSTANT_TIME, checksum, _LINK_AND_TAIL,
    )  # fmt: skip
    return head + prefix.ljust(BLOCK - len(head), b"\x00")


def _number(field: bytes) -> int:
    """A header's number: octal text, or GNU's base-256 when the top bit is set."""
    if field and field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\x00", 1)[0].strip()
    if not text:
        return 0
    if not all(48 <= digit <= 55 for digit in text):
        raise TarError(f"not a number in a tar header: {field!r}")
    return int(text, 8)


def parse_header(block: bytes) -> tuple[bytes, int, bytes]:
    """(name, payload size, type flag) of a header.

    Raises:
        TarError: not 512 bytes, or its checksum does not hold.
    """
    if len(block) != BLOCK:
        raise TarError(f"header cut short: {len(block)} of {BLOCK} bytes")
    stored = _number(block[148:156])
    if stored != sum(block) - sum(block[148:156]) + 8 * 32:
        raise TarError("header checksum does not hold")
    name = block[:100].split(b"\x00", 1)[0]
    if block[257:262] == b"ustar":
        prefix = block[345:500].split(b"\x00", 1)[0]
        # GNU's old format keeps times where ustar has its prefix.
        if prefix and block[257:265] == _MAGIC:
            name = prefix + b"/" + name
    return name, _number(block[124:136]), block[156:157]


def _pax_fields(payload: bytes) -> dict[bytes, bytes]:
    fields, start = {}, 0
    while start < len(payload):
        # A record's length comes first, in digits: at most those of the largest header that is read.
        blank = payload.find(b" ", start, start + len(str(_MAX_META_BYTES)) + 1)
        length = payload[start:blank]
        if blank < 0 or not length.isdigit() or not blank - start < int(length) <= len(payload) - start:
            raise TarError("damaged pax header")
        key, _, value = payload[blank + 1 : start + int(length) - 1].partition(b"=")
        fields[key] = value
        start += int(length)
    return fields


def _pax_size(text: bytes) -> int:
    if not text.isdigit() or len(text) > _MAX_SIZE_DIGITS:
        raise TarError("a pax header's size that is no number of bytes")
    return int(text)


# A pax or long-name header beyond this is damage, not a name.
_MAX_META_BYTES = 1 << 20
# Of a member's name: the longest path that Linux takes.
_MAX_NAME_BYTES = 4096
# Of a size in bytes: more than any file has.
_MAX_SIZE_DIGITS = 18


# First bytes of what compresses whole tars: a range of bytes of it is no image.
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def _shown(name: bytes) -> str:
    return f"'{printable(name.decode('utf-8', 'backslashreplace'), 100)}'"


def walk(file: BinaryIO | int, start: int, end: int, what: str) -> Iterator[Member]:
    """Every member of the archive that lies at bytes ``start`` to ``end`` of an open file.

    Only headers are read; payloads are stepped over. GNU long names and pax paths and sizes are understood.

    Args:
        file: an open binary file or its descriptor.
        start: where the archive starts, bytes.
        end: where it must have ended, bytes.
        what: how to call the archive in errors.

    Raises:
        TarError: damage; the message names ``what``, the member before it and the byte.
    """
    descriptor = file if isinstance(file, int) else file.fileno()
    position, last = start, "its start"
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    while position < end:
        block = os.pread(descriptor, BLOCK, position)
        if len(block) == BLOCK and not block.strip(b"\x00"):
            return
        try:
            name, size, kind = parse_header(block)
            if b"size" in pax:
                size = _pax_size(pax[b"size"])
        except TarError as error:
            if position == start and (tool := next((t for m, t in _PACKED.items() if block.startswith(m)), "")):
                raise TarError(
                    f"{what}: is packed ({tool}), whatever its name; unpack it with {tool} -d first"
                ) from None
            raise TarError(f"{what}: {error} at byte {position}, after {last}") from None
        payload = position + BLOCK
        if payload + size > end:
            raise TarError(
                f"{what}: {_shown(name)} at byte {position} should hold {size} bytes, but the archive ends at {end}"
            )
        if kind in (b"L", b"x", b"g", b"K"):
            if size > _MAX_META_BYTES:
                raise TarError(f"{what}: a name of {size} bytes at byte {position}")
            content = os.pread(descriptor, size, payload)
            try:
                if kind == b"L":
                    long_name = content.rstrip(b"\x00")
                elif kind == b"x":
                    pax = _pax_fields(content)
            except TarError as error:
                raise TarError(f"{what}: {error} at byte {position}, after {last}") from None
        else:
            name = pax.get(b"path", long_name if long_name is not None else name)
            if len(name) > _MAX_NAME_BYTES:
                raise TarError(
                    f"{what}: a name of {len(name):,} bytes at byte {position}; {_MAX_NAME_BYTES:,} are the most that is read"
                )
            yield Member(name, payload, size, kind in (b"0", b"\x00", b"7"), kind)
            long_name, pax, last = None, {}, _shown(name)
        position = payload + size + padding(size)
    # Archives without the two empty blocks at the end exist and are readable; one that stops inside a member is not
    # reached here.
