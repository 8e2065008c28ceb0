"""Write a zip file of stored records whose data all starts at multiples of 64 bytes."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .atomic import replacing, write_at
from .checksum import crc32, summing
from .tensorfile import flat_bytes

__all__ = ["write_zip"]

_ALIGN = 64
_MARK16, _MARK32 = 0xFFFF, 0xFFFFFFFF
_UTF8_NAMES = 1 << 11
# Zip times start in 1980; a fixed one makes equal contents equal files.
_DATE = (1 << 5) | 1
_PLAIN, _ZIP64 = 20, 45

_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")


class _Place(NamedTuple):
    """Where a record goes: its local header (with padding) and right behind it its data."""

    name: bytes
    header: int
    data: int
    size: int


def write_zip(
    records: Sequence[tuple[str, np.ndarray]],
    path: str | os.PathLike[str],
    *,
    sync: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write a zip file, atomically.

    Args:
        records: names and contents, in order; contents that are not row-major are copied one at a
            time.
        path: the target, replaced only when everything is on disk.
        sync: wait for the disk.
        progress: called with the number of bytes after each piece that is written.

    Raises:
        OSError: if the disk is full or the directory is not writable.
    """
    places: list[_Place] = []
    at = 0
    for name, content in records:
        raw = name.encode("utf-8")
        data = _align(at + _LOCAL.size + len(raw) + 4 + _wide_bytes(content.nbytes))
        places.append(_Place(raw, at, data, content.nbytes))
        at = data + content.nbytes
    size = at + len(_directory(places, [0] * len(places), at))
    with replacing(path, size, sync=sync) as fd:
        sums = _write_contents(fd, places, [content for _, content in records], progress)
        write_at(fd, at, [np.frombuffer(_directory(places, sums, at), np.uint8)])


def _align(at: int) -> int:
    return -(-at // _ALIGN) * _ALIGN


def _wide_bytes(size: int) -> int:
    return 20 if size >= _MARK32 else 0


def _write_contents(
    fd: int,
    places: list[_Place],
    contents: list[np.ndarray],
    progress: Callable[[int], Any] | None,
) -> list[int]:
    """Write every record, while a second thread sums those that need no copy."""
    sums = dict.fromkeys(range(len(places)), 0)
    views = {i: flat_bytes(array) for i, array in enumerate(contents) if array.flags.c_contiguous}
    with summing(views, sums):
        # Headers lie between the contents; those that stand here get their checksums below.
        batch: list[np.ndarray] = []
        start = at = 0
        for i, place in enumerate(places):
            header = np.frombuffer(_local(place, 0), np.uint8)
            view = views.get(i)
            batch += [header] if view is None else [header, view]
            at = place.data + (0 if view is None else place.size)
            if view is None:
                write_at(fd, start, batch, progress)
                copy = flat_bytes(contents[i])
                sums[i] = crc32(copy)
                write_at(fd, at, [copy], progress)
                start, batch = at + place.size, []
        write_at(fd, start, batch, progress)
    for i, place in enumerate(places):
        os.pwrite(fd, struct.pack("<L", sums[i]), place.header + 14)
    return list(sums.values())


def _local(place: _Place, crc: int) -> bytes:
    """The local header of a record, with its name and the padding that aligns its data."""
    wide = place.size >= _MARK32
    extra = struct.pack("<2H2Q", 1, 16, place.size, place.size) if wide else b""
    padding = place.data - place.header - _LOCAL.size - len(place.name) - len(extra) - 4
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    size = _MARK32 if wide else place.size
    version = _ZIP64 if wide else _PLAIN
    numbers = (version, _UTF8_NAMES, 0, 0, _DATE, crc, size, size)
    return _LOCAL.pack(b"PK\3\4", *numbers, len(place.name), len(extra)) + place.name + extra


def _entry(place: _Place, crc: int) -> bytes:
    """What the directory says of a record."""
    large, far = place.size >= _MARK32, place.header >= _MARK32
    wide = [place.size, place.size] * large + [place.header] * far
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size = _MARK32 if large else place.size
    version = _ZIP64 if wide else _PLAIN
    numbers = (version, version, _UTF8_NAMES, 0, 0, _DATE, crc, size, size)
    header = _MARK32 if far else place.header
    lengths = (len(place.name), len(extra), 0)
    return _ENTRY.pack(b"PK\1\2", *numbers, *lengths, 0, 0, 0, header) + place.name + extra


def _directory(places: list[_Place], sums: list[int], start: int) -> bytes:
    entries = b"".join(_entry(place, crc) for place, crc in zip(places, sums, strict=True))
    count, size, end = len(places), len(entries), b""
    if count >= _MARK16 or size >= _MARK32 or start >= _MARK32:
        versions = (_ZIP64, _ZIP64)
        end = _END64.pack(b"PK\6\6", _END64.size - 12, *versions, 0, 0, count, count, size, start)
        end += _LOCATOR64.pack(b"PK\6\7", 0, start + size, 1)
    short = min(count, _MARK16)
    end += _END.pack(b"PK\5\6", 0, 0, short, short, min(size, _MARK32), min(start, _MARK32), 0)
    return entries + end
