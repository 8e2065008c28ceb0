"""Read GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

A file is a header of typed facts, the list of its tensors, and aligned data. GGUF writes shapes
with the fastest axis first; here they are in row-major order, as in PyTorch and numpy, so that a
``(out, in)`` weight is ``(out, in)``. Quantised types are listed and refused when read.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .._core.errors import FileError
from .tensorfile import FileBytes, TensorFile, TensorHandle

__all__ = ["open_gguf"]

MAX_AXES = 8
MAX_NESTING = 4
MAX_LISTED = 64
MAX_ALIGNMENT = 1 << 20
MAX_SIZE = 1 << 62

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    code: struct.Struct(f"<{letter}")
    for code, letter in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_PLAIN = {
    0: ("F32", np.dtype(np.float32)),
    1: ("F16", np.dtype(np.float16)),
    24: ("I8", np.dtype(np.int8)),
    25: ("I16", np.dtype(np.int16)),
    26: ("I32", np.dtype(np.int32)),
    27: ("I64", np.dtype(np.int64)),
    28: ("F64", np.dtype(np.float64)),
    30: ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
# Name, elements of a block, bytes of a block.
# fmt: off
_BLOCKS = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}
# fmt: on
_BYTES = np.dtype(np.uint8)


def open_gguf(path: str | os.PathLike[str]) -> TensorFile:
    """Open a GGUF file; only its header is read.

    Args:
        path: the file.

    Returns:
        The tensors with their names in the file and shapes in row-major order (the reverse of what
        the file says). ``metadata`` has the facts as text; long lists are only counted.

    Raises:
        FileError: if the file is damaged, or of a version before 2.
        OSError: if it cannot be opened.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "empty.gguf")
        >>> _ = path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
        >>> open_gguf(path)  # doctest: +ELLIPSIS
        <gguf file ...empty.gguf: 0 tensors, 0 bytes>
    """
    source = FileBytes(path)
    try:
        return _Reader(source).open()
    except struct.error:
        source.close()
        raise FileError(f"{source.path}: the GGUF header is cut off") from None
    except BaseException:
        source.close()
        raise


class _Info(NamedTuple):
    """What the header says of a tensor; the shape is in row-major order."""

    name: str
    shape: tuple[int, ...]
    code: int
    offset: int


class _Reader:
    def __init__(self, source: FileBytes) -> None:
        self.source = source
        self.where = source.path
        self.data = source.buffer().data
        self.at = 0

    def open(self) -> TensorFile:
        if bytes(self._take(4)) != b"GGUF":
            raise self._error("is not a GGUF file")
        version = self._number(_U32)
        if version not in (2, 3):
            big = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "is big-endian" if big in (2, 3) else f"has version {version}"
            raise self._error(f"{what}; versions 2 and 3 are read, little-endian")
        tensors = self._count(24)
        facts = self._facts(self._count(13))
        alignment = facts.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT:
            raise self._error(f"has an alignment of {alignment!r:.40}")
        infos = [self._info() for _ in range(tensors)]
        start = -(-self.at // alignment) * alignment
        handles: dict[str, TensorHandle] = {}
        for info in infos:
            if info.name in handles:
                raise self._error(f"has two tensors that are named {info.name!r:.200}")
            if info.offset % alignment:
                raise self._error(f"has a tensor {info.name!r:.200} that is not aligned")
            handles[info.name] = self._handle(info, start)
        self._check_overlaps(list(handles.values()))
        metadata = {key: _text(value) for key, value in facts.items()}
        return TensorFile(self.where, "gguf", handles, metadata=metadata, sources=[self.source])

    def _error(self, reason: str) -> FileError:
        return FileError(f"{self.where}: {reason}")

    def _take(self, count: int) -> memoryview:
        start = self.at
        if count > len(self.data) - start:
            raise self._error(f"the header announces {count} bytes at {start}, past its end")
        self.at = start + count
        return self.data[start : self.at]

    def _number(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def _count(self, smallest: int) -> int:
        """A number of things that take at least ``smallest`` bytes each."""
        count = self._number(_U64)
        if count * smallest > len(self.data) - self.at:
            raise self._error(f"the header announces {count} entries, more than fit in the file")
        return count

    def _name(self) -> str:
        try:
            return str(self._take(self._number(_U64)), "utf-8")
        except UnicodeDecodeError:
            raise self._error("has a name that is not UTF-8") from None

    def _facts(self, count: int) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for _ in range(count):
            key = self._name()
            if key in facts:
                raise self._error(f"has two facts that are named {key!r:.200}")
            facts[key] = self._read_value(self._number(_U32), 0)
        return facts

    def _read_value(self, code: int, depth: int) -> Any:
        if code == _STRING:
            return str(self._take(self._number(_U64)), "utf-8", "replace")
        if code == _ARRAY:
            return self._list(depth)
        layout = _NUMBERS.get(code)
        if layout is None:
            raise self._error(f"has a fact of the unknown type {code}")
        return self._number(layout)

    def _list(self, depth: int) -> Any:
        """A short list, or for a long one how many of what it has."""
        code, count = self._number(_U32), self._number(_U64)
        if depth >= MAX_NESTING:
            raise self._error("nests lists too deeply")
        layout = _NUMBERS.get(code)
        if layout is not None and count > MAX_LISTED:
            self._take(count * layout.size)
            return _Counted(count, "numbers")
        if count > len(self.data) - self.at:
            raise self._error(f"has a list of {count} entries, more than fit in the file")
        if count <= MAX_LISTED:
            return [self._read_value(code, depth + 1) for _ in range(count)]
        for _ in range(count):
            if code == _STRING:
                self._take(self._number(_U64))
            else:
                self._read_value(code, depth + 1)
        return _Counted(count, "strings" if code == _STRING else "lists")

    def _info(self) -> _Info:
        name = self._name()
        axes = self._number(_U32)
        if axes > MAX_AXES:
            raise self._error(f"has a tensor {name!r:.200} with {axes} axes, at most {MAX_AXES}")
        sizes = [self._number(_U64) for _ in range(axes)]
        code = self._number(_U32)
        if math.prod(size for size in sizes if size) >= MAX_SIZE:
            raise self._error(f"has a tensor {name!r:.200} that is larger than any memory")
        return _Info(name, tuple(reversed(sizes)), code, self._number(_U64))

    def _handle(self, info: _Info, start: int) -> TensorHandle:
        place = start + info.offset
        plain = _PLAIN.get(info.code)
        if plain is not None:
            kind, dtype = plain
            return TensorHandle(info.name, info.shape, dtype, self.source, place, kind=kind)
        kind, elements, size = _BLOCKS.get(info.code, (f"type {info.code}", 1, 0))
        row = info.shape[-1] if info.shape else 1
        if row % elements:
            raise self._error(f"has a tensor {info.name!r:.200} with a row of half a {kind} block")
        refused = f"is quantised as {kind}; use a file with F32, F16 or BF16 weights"
        if not size:
            refused = f"has a type that is not known here ({info.code})"
        nbytes = math.prod(info.shape) // elements * size
        return TensorHandle(
            info.name,
            info.shape,
            _BYTES,
            self.source,
            place,
            kind=kind,
            refused=refused,
            nbytes=nbytes,
        )

    def _check_overlaps(self, handles: list[TensorHandle]) -> None:
        placed = sorted((h for h in handles if h.nbytes), key=lambda h: h.offset)
        for first, second in itertools.pairwise(placed):
            if first.offset + first.nbytes > second.offset:
                names = f"{first.name!r:.200} and {second.name!r:.200}"
                raise self._error(f"has tensors that overlap: {names}")


class _Counted(NamedTuple):
    """A list that is too long to keep."""

    count: int
    what: str


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, _Counted):
        return f"[{value.count} {value.what}]"
    return json.dumps(value, ensure_ascii=False, default=str)
