"""The directory of a zip file, read strictly: one meaning or an error.

Two readers that understand one zip file differently are how a harmless looking checkpoint hides
another one. So a record here has one name, one place that no other record shares, and the same
description in its local header and in the directory. Nothing is ever extracted.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from .._core.errors import FileError
from .checksum import crc32
from .torch_values import printable

__all__ = ["Record", "check_crc", "check_records", "read_directory", "record_bytes"]

STORED, DEFLATED = 0, 8
ENCRYPTED, STREAMED, UTF8 = 1, 8, 1 << 11
MARK16, MARK32 = 0xFFFF, 0xFFFFFFFF
MAX_RECORDS = 1_000_000
# An inflated record may be this many times the whole file, or FREE_BYTES, whichever is more.
MAX_INFLATION = 64
FREE_BYTES = 64 << 20
CHUNK = 1 << 20

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_EXTRA = struct.Struct("<2H")


class Record(NamedTuple):
    """One record: where its data lies and what the directory says of it (crc 0: not recorded)."""

    name: str
    offset: int
    packed: int
    size: int
    method: int
    crc: int


def read_directory(data: memoryview, where: str) -> dict[str, Record]:
    """Read and check the directory of the zip file ``data``; ``where`` names it in errors.

    Raises:
        FileError: if two readings are possible, or anything lies outside the file.
    """
    try:
        start, size, count = _find_directory(data, where)
        return _read_entries(data, where, start, size, count)
    except (struct.error, IndexError, UnicodeDecodeError):
        raise FileError(f"{where}: the zip directory is damaged") from None


def record_bytes(data: memoryview, record: Record, where: str) -> np.ndarray:
    """The bytes of a record as ``uint8``: a view when stored, inflated (and checked) when not."""
    packed = data[record.offset : record.offset + record.packed]
    if record.method == STORED:
        return np.frombuffer(packed, np.uint8)
    if record.method != DEFLATED:
        raise _bad(where, record.name, f"is packed by method {record.method}; 0 and 8 are read")
    if record.size > max(FREE_BYTES, MAX_INFLATION * len(data)):
        raise _bad(where, record.name, f"would inflate to {record.size} bytes, far above its file")
    try:
        whole = _inflate(packed, record.size)
    except (zlib.error, ValueError):
        raise _bad(where, record.name, "does not inflate to the announced size") from None
    if record.crc and crc32(whole) != record.crc:
        raise _bad(where, record.name, "does not match its checksum")
    return whole


def check_crc(data: memoryview, record: Record, where: str) -> None:
    """Compare a record with the checksum in the directory, where one was recorded."""
    content = record_bytes(data, record, where)
    if record.crc and crc32(content) != record.crc:
        raise _bad(where, record.name, "does not match its checksum")


def check_records(
    data: memoryview,
    records: Iterable[Record],
    where: str,
    progress: Callable[[int], Any] | None = None,
) -> int:
    """Compare all records with their checksums; returns how many have one."""
    count = 0
    for record in records:
        check_crc(data, record, where)
        count += bool(record.crc)
        if progress is not None:
            progress(record.size)
    return count


def _inflate(packed: memoryview, size: int) -> np.ndarray:
    whole = np.empty(size, np.uint8)
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    done = start = 0
    for start in range(0, len(packed), CHUNK):
        piece: Any = packed[start : start + CHUNK]
        while len(piece):
            # One byte more than is left shows a record that is longer than announced.
            out = engine.decompress(piece, min(CHUNK, size - done) + 1)
            whole[done : done + len(out)] = np.frombuffer(out, np.uint8)
            done += len(out)
            piece = engine.unconsumed_tail
        if engine.eof:
            break
    if done != size or not engine.eof or engine.unused_data or start + CHUNK < len(packed):
        raise ValueError(done)
    return whole


def _bad(where: str, name: str, reason: str) -> FileError:
    return FileError(f"{where}: the record {printable(name)!r} {reason}")


def _find_directory(data: memoryview, where: str) -> tuple[int, int, int]:
    """Offset, size and number of entries of the directory."""
    tail_start = max(0, len(data) - _END.size - MARK16)
    tail = bytes(data[tail_start:])
    found = tail.rfind(b"PK\5\6")
    if found < 0:
        raise FileError(f"{where}: the zip directory is missing; the file is probably cut off")
    at = tail_start + found
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(data, at)
    if at + _END.size + comment != len(data):
        raise FileError(f"{where}: data follows the zip directory, or the file is cut off")
    end = at
    values = [disk, first_disk, here, count, size, start]
    if at >= _LOCATOR64.size and bytes(data[at - _LOCATOR64.size :][:4]) == b"PK\6\7":
        _, _, end, disks = _LOCATOR64.unpack_from(data, at - _LOCATOR64.size)
        if end > at - _LOCATOR64.size - _END64.size:
            raise FileError(f"{where}: the zip64 directory lies outside the file")
        signature, rest, _, _, *wide = _END64.unpack_from(data, end)
        if signature != b"PK\6\6" or disks > 1 or end + 12 + rest != at - _LOCATOR64.size:
            raise FileError(f"{where}: the zip64 directory is damaged")
        marks = [MARK16] * 4 + [MARK32] * 2
        for narrow, mark, full in zip(values, marks, wide, strict=True):
            if narrow not in (mark, full):
                raise FileError(f"{where}: the zip and zip64 directories contradict each other")
        values = wide
    elif MARK16 in values[:4] or MARK32 in values[4:]:
        raise FileError(f"{where}: a zip64 directory is announced but missing")
    disk, first_disk, here, count, size, start = values
    if disk or first_disk or here != count:
        raise FileError(f"{where}: the zip file is one part of several")
    if count > MAX_RECORDS or count * _ENTRY.size > size:
        raise FileError(f"{where}: the zip directory announces {count} records")
    if start + size != end:
        raise FileError(f"{where}: the zip directory is not where it should be")
    return start, size, count


def _read_entries(
    data: memoryview, where: str, start: int, size: int, count: int
) -> dict[str, Record]:
    records: dict[str, Record] = {}
    extents: list[tuple[int, int, str]] = []
    directory = bytes(data[start : start + size])
    at = 0
    for _ in range(count):
        fields = _ENTRY.unpack_from(directory, at)
        signature, _, _, flags, method, _, _, crc, packed, full, names, extras, comment = fields[
            :13
        ]
        disk, offset = fields[13], fields[16]
        at += _ENTRY.size
        raw = directory[at : at + names]
        name = _decode(raw, flags)
        extra = directory[at + names : at + names + extras]
        at += names + extras + comment
        if signature != b"PK\1\2" or len(raw) != names or len(extra) != extras:
            raise FileError(f"{where}: the zip directory is damaged")
        if "\0" in name or not name:
            raise _bad(where, name, "has a name that not every reader reads alike")
        if name in records:
            raise _bad(where, name, "is there twice")
        if flags & ENCRYPTED:
            raise _bad(where, name, "is encrypted")
        full, packed, offset, disk = _widen(where, name, extra, [full, packed, offset, disk])
        if disk or offset + _LOCAL.size > start:
            raise _bad(where, name, "lies outside the file")
        begin = _local_data(data, where, name, raw, fields, offset, (packed, full))
        if begin + packed > start:
            raise _bad(where, name, "is longer than the file")
        if method == STORED and packed != full:
            raise _bad(where, name, "is stored in another size than announced")
        extents.append((offset, begin + packed, name))
        records[name] = Record(name, begin, packed, full, method, crc)
    if at != size:
        raise FileError(f"{where}: the zip directory has more in it than its records")
    extents.sort()
    for (_, end, name), (following, _, _) in itertools.pairwise(extents):
        if following < end:
            raise _bad(where, name, "overlaps another one")
    return records


def _decode(raw: bytes, flags: int) -> str:
    if flags & UTF8:
        return raw.decode("utf-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp437")


def _widen(where: str, name: str, extra: bytes, values: list[int]) -> list[int]:
    """Replace the fields that are marked as too large by those of the zip64 extra field."""
    marks = [MARK32, MARK32, MARK32, MARK16]
    wanted = [i for i, mark in enumerate(marks) if values[i] == mark]
    if not wanted:
        return values
    at, found = 0, None
    while at + _EXTRA.size <= len(extra):
        kind, length = _EXTRA.unpack_from(extra, at)
        if kind == 1:
            if found is not None:
                raise _bad(where, name, "has two zip64 fields")
            found = extra[at + _EXTRA.size : at + _EXTRA.size + length]
        at += _EXTRA.size + length
    need = sum(4 if i == 3 else 8 for i in wanted)
    if found is None or len(found) < need:
        raise _bad(where, name, "announces a zip64 field that is missing")
    at = 0
    for i in wanted:
        width = 4 if i == 3 else 8
        values[i] = int.from_bytes(found[at : at + width], "little")
        at += width
    return values


def _local_data(
    data: memoryview,
    where: str,
    name: str,
    raw: bytes,
    entry: tuple[Any, ...],
    offset: int,
    sizes: tuple[int, int],
) -> int:
    """Check the local header against the directory and return where the data begins."""
    local = _LOCAL.unpack_from(data, offset)
    signature, _, flags, method, _, _, crc, packed, full, names, extras = local
    begin = offset + _LOCAL.size + names + extras
    here = bytes(data[offset + _LOCAL.size : offset + _LOCAL.size + names])
    if signature != b"PK\3\4" or here != raw or method != entry[4] or flags & ENCRYPTED:
        raise _bad(where, name, "is described differently in its header and in the directory")
    if flags & STREAMED and crc == packed == full == 0:
        return begin
    for got, expected in zip((packed, full), sizes, strict=True):
        if got not in (expected, MARK32):
            raise _bad(where, name, "has different sizes in its header and in the directory")
    if crc != entry[7]:
        raise _bad(where, name, "has different checksums in its header and in the directory")
    return begin
