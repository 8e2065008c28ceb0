"""Read and write safetensors files with numpy alone.

A file is an 8-byte length, a JSON header ``{name: {dtype, shape, data_offsets}}`` and the data
(https://github.com/huggingface/safetensors#format). Everything in the header is checked before any
of the data is touched. What we write, every other reader of the format reads; beyond the format:

* the data starts 64-byte aligned and tensors whose size is a multiple of 64 come first, so that
  they can be mapped without a copy;
* a tie is ``__metadata__[alias] = name``, as ``safetensors.torch.save_model`` writes it;
* ``__metadata__["lamina.crc32"]`` has a checksum for every tensor, and ``__metadata__["lamina"]``
  what ``lamina.io.tree`` needs to give nested objects back.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from .._core.errors import FileError
from .atomic import replacing, write_at
from .checksum import crc32, summing
from .strict_json import parse_json
from .tensorfile import FileBytes, TensorFile, TensorHandle, flat_bytes
from .tree import DESCRIPTION, restore

__all__ = ["CHECKSUMS", "dtype_name", "open_safetensors", "storable", "write_safetensors"]

CHECKSUMS = "lamina.crc32"
_RESERVED = {"format", DESCRIPTION, CHECKSUMS}
_FIELDS = {"dtype", "shape", "data_offsets"}
_ALIGN = 64
_MAX_HEADER = 100_000_000

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }.items()
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SUB_BYTE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def dtype_name(dtype: np.dtype) -> str:
    """Return the format's word for a dtype (``"BF16"``), or ``""`` if it has none."""
    return _NAMES.get(dtype, "")


def storable(dtype: np.dtype) -> bool:
    """Whether the format has this dtype."""
    return dtype in _NAMES


def open_safetensors(path: str | os.PathLike[str]) -> TensorFile:
    """Open a safetensors file; only its header is read.

    Args:
        path: the file.

    Returns:
        The mapping of names to lazy tensors, with the ties that the metadata records.

    Raises:
        FileError: if anything about the file is wrong.

    Example:
        >>> import numpy as np, tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "x.safetensors")
        >>> write_safetensors({"w": np.ones((2, 3), np.float32)}, path)
        >>> open_safetensors(path)["w"]  # doctest: +ELLIPSIS
        <tensor 'w' F32 (2, 3) in ...>
    """
    source = FileBytes(path)
    try:
        header, start = _read_header(source)
        metadata = _metadata(source.path, header.pop("__metadata__", {}))
        tensors = _tensors(source, header, start)
        ties = {alias: name for alias, name in metadata.items()
                if alias not in _RESERVED and alias not in tensors and name in tensors}  # fmt: skip
        stored = tensors
        tree, nested = None, False
        if DESCRIPTION in metadata:
            tensors, tree, nested = restore(source.path, metadata[DESCRIPTION], tensors)
        return TensorFile(
            source.path,
            "safetensors",
            tensors,
            metadata=metadata,
            ties=ties,
            tree=tree,
            nested=nested,
            sources=[source],
            checksums=lambda: _checksums(source.path, metadata, stored),
        )
    except BaseException:
        source.close()
        raise


def write_safetensors(
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    ties: Mapping[str, str] | None = None,
    checksums: bool = True,
    sync: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write a safetensors file, atomically.

    Args:
        tensors: names and arrays; arrays that are not row-major are copied one at a time.
        path: the target, replaced only when everything is on disk.
        metadata: text for ``__metadata__``.
        ties: ``{alias: name}``, recorded in the metadata.
        checksums: record a crc32 for each tensor, computed beside the writing.
        sync: wait for the disk.
        progress: called with the number of bytes after each piece that is written.

    Raises:
        FileError: if a dtype is not one of the format's, or a name is reserved.
        OSError: if the disk is full or the directory is not writable.
    """
    words = {"format": "pt", **(metadata or {})}
    for alias, name in (ties or {}).items():
        if alias in words or alias in _RESERVED or name not in tensors or alias in tensors:
            raise FileError(f"{os.fspath(path)}: cannot record the tie {alias!r} -> {name!r}")
        words[alias] = name
    for name, array in tensors.items():
        if name == "__metadata__":
            raise FileError(f"{os.fspath(path)}: no tensor can be called '__metadata__'")
        if not storable(array.dtype):
            raise FileError(
                f"{os.fspath(path)}: tensor {name!r} has dtype {array.dtype}, which the "
                f"safetensors format has not"
            )
    order = sorted(tensors, key=lambda name: _layout_key(tensors[name]))
    offsets, size = {}, 0
    for name in order:
        offsets[name] = size
        size += tensors[name].nbytes
    sums = dict.fromkeys(order, 0) if checksums and tensors else {}
    entries = _entries(tensors, offsets)
    start = len(_header(entries, words, sums))
    with replacing(path, start + size, sync=sync) as fd:
        _write_data(fd, start, tensors, order, sums, progress)
        write_at(fd, 0, [np.frombuffer(_header(entries, words, sums), np.uint8)])


def _layout_key(array: np.ndarray) -> tuple[bool, int]:
    """Multiples of 64 bytes first, the others by falling alignment; stable otherwise."""
    if array.nbytes % _ALIGN == 0:
        return (False, 0)
    return (True, -array.dtype.itemsize)


def _entries(tensors: Mapping[str, np.ndarray], offsets: Mapping[str, int]) -> str:
    """Return the header's text about the tensors, with a comma before each."""
    entries = {
        name: {
            "dtype": dtype_name(array.dtype),
            "shape": array.shape,
            "data_offsets": (offsets[name], offsets[name] + array.nbytes),
        }
        for name, array in tensors.items()
    }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    return f",{text[1:-1]}" if entries else ""


def _header(entries: str, metadata: dict[str, str], checksums: dict[str, int]) -> bytes:
    """Return length and header; its size does not depend on the values of the checksums."""
    words = dict(metadata)
    if checksums:
        words[CHECKSUMS] = json.dumps({name: f"{crc:08x}" for name, crc in checksums.items()})
    start = json.dumps({"__metadata__": words}, separators=(",", ":"), ensure_ascii=False)
    text = f"{start[:-1]}{entries}}}".encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    if len(text) > _MAX_HEADER:
        raise FileError(f"the header would have {len(text)} bytes, at most {_MAX_HEADER}")
    return struct.pack("<Q", len(text)) + text


def _write_data(
    fd: int,
    start: int,
    tensors: Mapping[str, np.ndarray],
    order: list[str],
    checksums: dict[str, int],
    progress: Callable[[int], Any] | None,
) -> None:
    """Write the tensors one after another, while a second thread sums them."""
    views = {name: flat_bytes(tensors[name]) for name in order if tensors[name].flags.c_contiguous}
    with summing(views if checksums else {}, checksums):
        batch: list[np.ndarray] = []
        offset = start
        for name in order:
            view = views.get(name)
            if view is None:
                write_at(fd, offset, batch, progress)
                offset += sum(piece.nbytes for piece in batch)
                batch = [flat_bytes(tensors[name])]
                if checksums:
                    checksums[name] = crc32(batch[0])
            else:
                batch.append(view)
        write_at(fd, offset, batch, progress)


def _read_header(source: FileBytes) -> tuple[dict[str, Any], int]:
    path = source.path
    if source.size < 8:
        raise FileError(f"{path}: has {source.size} bytes, too few for a safetensors file")
    (length,) = struct.unpack("<Q", source.pread(8, 0))
    if length > _MAX_HEADER:
        raise FileError(f"{path}: the header is said to have {length} bytes, at most {_MAX_HEADER}")
    if 8 + length > source.size:
        raise FileError(
            f"{path}: the header is said to have {length} bytes, but the file has only "
            f"{source.size}; it is truncated or not a safetensors file"
        )
    text = source.pread(length, 8)
    if not text.startswith(b"{"):
        raise FileError(f"{path}: the header does not start with '{{': not a safetensors file")
    header = parse_json(path, text, "the header")
    if not isinstance(header, dict):
        raise FileError(f"{path}: the header is not an object")
    return header, 8 + length


def _metadata(path: str, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{path}: __metadata__ must map names to strings")
    return metadata


def _tensors(source: FileBytes, header: dict[str, Any], start: int) -> dict[str, TensorHandle]:
    path, available = source.path, source.size - start
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorHandle] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != _FIELDS:
            raise FileError(
                f"{path}: tensor {name!r} must have exactly dtype, shape and data_offsets"
            )
        shape, offsets, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
        if not _sizes(shape):
            raise FileError(f"{path}: tensor {name!r} has a bad shape: {str(shape)[:200]}")
        if not _sizes(offsets) or len(offsets) != 2:
            raise FileError(f"{path}: tensor {name!r} has bad offsets: {str(offsets)[:200]}")
        begin, end = offsets
        if not begin <= end <= available:
            raise FileError(
                f"{path}: tensor {name!r} is said to lie at bytes {begin} to {end} of the data, "
                f"which has {available} bytes"
            )
        count, refused = math.prod(shape), ""
        kind = kind if isinstance(kind, str) else str(kind)[:40]
        dtype = _DTYPES.get(kind)
        if dtype is not None:
            bits = count * dtype.itemsize * 8
        elif kind in _SUB_BYTE_BITS:
            dtype, bits = np.dtype(np.uint8), count * _SUB_BYTE_BITS[kind]
            refused = f"has the sub-byte type {kind}, which numpy and JAX do not store"
        else:
            raise FileError(f"{path}: tensor {name!r} has the unknown dtype {kind[:40]!r}")
        if bits != (end - begin) * 8:
            raise FileError(
                f"{path}: tensor {name!r} of dtype {kind} and shape {shape} needs "
                f"{bits / 8:g} bytes, but has {end - begin}"
            )
        spans.append((begin, end, name))
        tensors[name] = TensorHandle(
            name,
            tuple(shape),
            dtype,
            source,
            start + begin,
            kind=kind,
            refused=refused,
            nbytes=end - begin,
        )
    _check_cover(path, sorted(spans), available)
    return tensors


def _sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 64:
        return False
    # A loop takes half the time of all(...), and a file may have a hundred thousand of these.
    for number in value:  # noqa: SIM110
        if type(number) is not int or number < 0:
            return False
    return True


def _check_cover(path: str, spans: list[tuple[int, int, str]], available: int) -> None:
    position = 0
    for begin, end, name in spans:
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise FileError(f"{path}: tensor {name!r} at byte {begin} {what} (expected {position})")
        position = end
    if position != available:
        raise FileError(f"{path}: the tensors end at byte {position} of {available} bytes of data")


def _checksums(
    path: str, metadata: dict[str, str], tensors: dict[str, TensorHandle]
) -> dict[str, int]:
    if CHECKSUMS not in metadata:
        return {}
    recorded = parse_json(path, metadata[CHECKSUMS].encode(), "the list of checksums")
    try:
        return {name: int(crc, 16) for name, crc in recorded.items() if name in tensors}
    except (AttributeError, TypeError, ValueError):
        raise FileError(f"{path}: the list of checksums is malformed") from None
