"""Read and write numpy's ``.npy`` and ``.npz`` files; Python objects in them are never unpickled.

``.npz`` is a zip file of ``.npy`` records
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html). What we write,
``numpy.load`` reads; a type that numpy cannot name (bfloat16, float8) is stored as unsigned
integers of the same bytes, and a record ``__lamina__.json`` says so, and describes nested objects.
"""

from __future__ import annotations

import ast
import io
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .._core.errors import FileError
from .atomic import replacing
from .strict_json import parse_json
from .tensorfile import FileBytes, LazyBytes, TensorFile, TensorHandle
from .tree import restore
from .zip_records import Record, check_records, read_directory, record_bytes

__all__ = ["numpy_names", "open_npy", "open_npz", "write_npz"]

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 1 << 16
_ALIGN = 64
_LOCAL_HEADER = 30
_DESCRIPTION = "__lamina__.json"
_PLAIN = re.compile(r"[<>|=][?biufc]\d{1,2}")


def numpy_names(dtype: np.dtype) -> bool:
    """Whether numpy's format has a name for ``dtype``."""
    return dtype.isbuiltin == 1 and dtype.kind in "biufc"


class _NpzFile(TensorFile):
    """An ``.npz`` file, whose checksums are those of the zip records."""

    records: dict[str, Record]
    bytes: FileBytes

    def verify(self, progress: Callable[[int], Any] | None = None) -> int:
        data = self.bytes.buffer().data
        return check_records(data, self.records.values(), self.path, progress)


def open_npy(path: str | os.PathLike[str]) -> TensorFile:
    """Open a ``.npy`` file: one tensor, named ``"array"``.

    Raises:
        FileError: if it is damaged.
    """
    source = FileBytes(path)
    try:
        head = source.pread(_MAX_HEADER + 16, 0)
        handle = _handle("array", head, source, 0, source.size)
    except BaseException:
        source.close()
        raise
    return TensorFile(source.path, "npy", {"array": handle}, tree=handle, sources=[source])


def open_npz(path: str | os.PathLike[str]) -> TensorFile:
    """Open an ``.npz`` file; only the headers of its records are read.

    Raises:
        FileError: if the zip file or one of its records is damaged. Arrays of Python objects are
            listed, and refused when they are read.
    """
    source = FileBytes(path)
    try:
        data = source.buffer().data
        records = read_directory(data, source.path)
        sources: list[FileBytes | LazyBytes] = [source]
        tensors: dict[str, TensorHandle] = {}
        for record in records.values():
            if not record.name.endswith(".npy"):
                continue
            name = record.name.removesuffix(".npy")
            if record.method == zipfile.ZIP_STORED:
                head = bytes(data[record.offset :][: min(record.size, _MAX_HEADER + 16)])
                tensors[name] = _handle(name, head, source, record.offset, record.size)
            else:
                inflated = _inflated(source, record)
                sources.append(inflated)
                head = _inflate_head(source.path, data, record)
                tensors[name] = _handle(name, head, inflated, 0, record.size)
        ties: dict[str, str] = {}
        tree, nested = None, False
        if _DESCRIPTION in records:
            text = record_bytes(data, records[_DESCRIPTION], source.path).tobytes()
            ties, tensors, tree, nested = _describe(source.path, text, tensors)
        del data
        file = _NpzFile(
            source.path, "npz", tensors, ties=ties, tree=tree, nested=nested, sources=sources
        )
        file.records, file.bytes = records, source
        return file
    except BaseException:
        source.close()
        raise


def write_npz(
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    *,
    description: str = "",
    ties: Mapping[str, str] | None = None,
    sync: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write an ``.npz`` file (not compressed), atomically, its data 64-byte aligned.

    Args:
        tensors: names and arrays of types that numpy can name.
        path: the target.
        description: what ``lamina.io.tree`` needs to give nested objects back.
        ties: ``{alias: name}``.
        sync: wait for the disk.
        progress: called with the number of bytes after each tensor.

    Raises:
        FileError: if a name cannot be one in a zip file.
        OSError: if the disk is full or the directory is not writable.
    """
    for name in tensors:
        if "\0" in name or len(name.encode("utf-8", "replace")) > 60_000:
            raise FileError(f"{os.fspath(path)}: {name[:80]!r} cannot be a name in a zip file")
    size = sum(array.nbytes + len(name) * 2 + 512 for name, array in tensors.items())
    with replacing(path, size, sync=sync) as fd, os.fdopen(os.dup(fd), "w+b") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            if description or ties:
                words = {"description": description, "ties": dict(ties or {})}
                archive.writestr(_entry(_DESCRIPTION, 0, file.tell()), json.dumps(words))
            for name, array in tensors.items():
                _write_record(archive, file, f"{name}.npy", array)
                if progress is not None:
                    progress(array.nbytes)
        file.flush()
        os.ftruncate(fd, file.tell())


def _write_record(
    archive: zipfile.ZipFile, file: io.BufferedRandom, name: str, array: np.ndarray
) -> None:
    header = io.BytesIO()
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    np.lib.format.write_array_header_2_0(
        header,
        {"descr": array.dtype.str, "fortran_order": fortran, "shape": array.shape},
    )
    head = header.getvalue()
    flat = array.T if fortran else np.ascontiguousarray(array)
    body = flat.reshape(-1).view(np.uint8)
    with archive.open(_entry(name, len(head) + body.nbytes, file.tell()), "w") as record:
        record.write(head)
        record.write(body.data)


def _entry(name: str, size: int, position: int) -> zipfile.ZipInfo:
    """Describe a record whose data starts 64-byte aligned when its header is at ``position``."""
    entry = zipfile.ZipInfo(name)
    entry.file_size = size
    encoded = len(name.encode("utf-8", "replace"))
    zip64 = 20 if size > zipfile.ZIP64_LIMIT / 1.05 else 0
    padding = -(position + _LOCAL_HEADER + encoded + zip64 + 4) % _ALIGN
    entry.extra = b"la" + padding.to_bytes(2, "little") + bytes(padding)
    return entry


def _inflated(source: FileBytes, record: Record) -> LazyBytes:
    def produce() -> memoryview:
        return record_bytes(source.buffer().data, record, source.path).data

    return LazyBytes(source.path, record.size, produce)


def _inflate_head(path: str, data: memoryview, record: Record) -> bytes:
    packed = data[record.offset : record.offset + min(record.packed, 2 * _MAX_HEADER)]
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, _MAX_HEADER + 16)
    except zlib.error as error:
        raise FileError(f"{path}: record {record.name!r} is damaged: {error}") from None


def _handle(
    name: str, head: bytes, source: FileBytes | LazyBytes, offset: int, size: int
) -> TensorHandle:
    """Make the handle of one ``.npy`` record of ``size`` bytes, its header checked."""
    where = f"{source.path}: tensor {name!r}"
    start, header = _parse_header(where, head)
    descr, fortran, shape = header.get("descr"), header.get("fortran_order"), header.get("shape")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise FileError(f"{where} has a bad shape: {str(shape)[:200]}")
    if len(header) != 3 or not isinstance(fortran, bool):
        raise FileError(f"{where} has a bad header")
    if len(shape) > 64:
        raise FileError(f"{where} has {len(shape)} axes, at most 64")
    stored, refused = _dtype(descr)
    if stored is None:
        return TensorHandle(
            name, shape, np.dtype(np.uint8), source, offset + start,
            kind=str(descr)[:40], refused=refused, nbytes=size - start,
        )  # fmt: skip
    needed = math.prod(shape) * stored.itemsize
    if needed != size - start:
        raise FileError(
            f"{where} of dtype {stored} and shape {shape} needs {needed} bytes, "
            f"but has {size - start}"
        )
    strides = None
    if fortran and len(shape) > 1:
        steps = [stored.itemsize]
        for n in shape[:-1]:
            steps.append(steps[-1] * max(n, 1))
        strides = tuple(steps)
    native = stored.newbyteorder("=")
    swapped = None if stored == native else stored
    return TensorHandle(
        name, shape, native, source, offset + start, strides=strides, stored=swapped
    )


def _parse_header(where: str, head: bytes) -> tuple[int, dict[str, Any]]:
    """Return where the data starts and the header's dict."""
    if len(head) < 10 or not head.startswith(_MAGIC):
        raise FileError(f"{where} does not start with numpy's magic bytes")
    version = head[6]
    if version not in (1, 2, 3):
        raise FileError(f"{where} has version {version} of numpy's format, expected 1 to 3")
    begin = 10 if version == 1 else 12
    length = int.from_bytes(head[8:begin], "little")
    if length > _MAX_HEADER or begin + length > len(head):
        raise FileError(f"{where} is said to have a header of {length} bytes; it is truncated")
    text = head[begin : begin + length]
    # Longer literals than this need many axes or field names; parsing them costs memory.
    if len(text.strip()) > 4096:
        raise FileError(f"{where} has a header of {len(text.strip())} bytes, expected under 4096")
    try:
        header = ast.literal_eval(text.decode("utf-8" if version == 3 else "latin1").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise FileError(f"{where} has a header that is not a Python literal") from None
    if not isinstance(header, dict):
        raise FileError(f"{where} has a bad header")
    return begin + length, header


def _dtype(descr: Any) -> tuple[np.dtype | None, str]:
    """Return the dtype, or why there is none."""
    if isinstance(descr, str) and _PLAIN.fullmatch(descr):
        try:
            dtype = np.dtype(descr)
        except TypeError:
            dtype = None
        if dtype is not None and dtype.itemsize <= 16 and dtype.name in np.sctypeDict:
            return dtype, ""
    if isinstance(descr, str) and "O" in descr:
        return None, "holds pickled Python objects, which are never loaded"
    if isinstance(descr, str) and descr[1:2] == "V":
        return None, (
            f"has the raw type {descr}, as numpy writes bfloat16 and float8; "
            f"read it with numpy.load and .view(ml_dtypes.bfloat16), and save it with lamina"
        )
    return None, f"has the type {str(descr)[:80]}, which is no plain number type"


def _describe(
    path: str, text: bytes, tensors: dict[str, TensorHandle]
) -> tuple[dict[str, str], dict[str, TensorHandle], Any, bool]:
    words = parse_json(path, text, f"the record {_DESCRIPTION}", inexact=True)
    ties = words.get("ties", {}) if isinstance(words, dict) else None
    description = words.get("description", "") if isinstance(words, dict) else None
    if not isinstance(ties, dict) or not isinstance(description, str):
        raise FileError(f"{path}: the record {_DESCRIPTION} is malformed")
    for alias, name in ties.items():
        if not isinstance(name, str) or name not in tensors or alias in tensors:
            raise FileError(f"{path}: the tie {alias!r:.80} -> {name!r:.80} names no tensor")
    if not description:
        return ties, tensors, None, False
    return (ties, *restore(path, description, tensors))
