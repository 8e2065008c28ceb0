"""PyTorch's storages and tensors as they lie in a file: element types, geometry, handles."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .._core.errors import FileError
from .tensorfile import FileBytes, LazyBytes, TensorHandle
from .torch_values import printable

__all__ = ["ELEMENTS", "STORAGES", "Element", "Storage", "TensorRecord", "check_geometry"]

MAX_SIZE = 1 << 62
MAX_RANK = 64
# A tensor may be this many times its storage (an expanded one), or FREE_BYTES, whichever is more.
MAX_EXPANSION = 64
FREE_BYTES = 64 << 20


class Element(NamedTuple):
    """An element type: PyTorch's name, its numpy dtype, and why it cannot be read, if so."""

    name: str
    dtype: np.dtype[Any]
    refused: str = ""


def _elements() -> dict[str, Element]:
    plain = [
        *("float64", "float32", "float16", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    ]
    small = [
        *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
        "float8_e8m0fnu",
    ]
    found = {name: Element(name, np.dtype(name)) for name in plain}
    found |= {name: Element(name, np.dtype(getattr(ml_dtypes, name))) for name in small}
    without = {"complex32": 4, "bits8": 1, "bits16": 2, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1}
    without |= {"float4_e2m1fn_x2": 1, "bit": 1}
    without |= {f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)}
    quantised = {"qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
    for name, size in without.items():
        reason = f"has the type torch.{name}, which numpy does not have"
        found[name] = Element(name, np.dtype(f"V{size}"), reason)
    for name, size in quantised.items():
        reason = f"is quantised (torch.{name}); save tensor.dequantize() or tensor.int_repr()"
        found[name] = Element(name, np.dtype(f"V{size}"), reason)
    return found


ELEMENTS = _elements()
# fmt: off
STORAGES = {
    f"{word}Storage": ELEMENTS[name]
    for word, name in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
        "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
        "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
        "ComplexHalf": "complex32", "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32",
        "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
    }.items()
}
# fmt: on
UNTYPED = Element("uint8", np.dtype(np.uint8))
STORAGES["UntypedStorage"] = UNTYPED


class Storage:
    """One storage of the file; tensors that share it are tied or slices of each other.

    Its place is known at once in a zip file, and only after the pickle in the older formats.
    """

    __slots__ = ("big_endian", "element", "key", "nbytes", "offset", "source")

    def __init__(self, key: str, element: Element, nbytes: int) -> None:
        self.key = key
        self.element = element
        self.nbytes = nbytes
        self.source: FileBytes | LazyBytes | None = None
        self.offset = 0
        self.big_endian = False

    def place(self, source: FileBytes | LazyBytes, offset: int) -> None:
        self.source = source
        self.offset = offset

    def __repr__(self) -> str:
        return f"<storage {printable(self.key)!r} {self.element.name} {self.nbytes} bytes>"


class TensorRecord:
    """A tensor as the pickle describes it, in elements of its storage, before it has a name."""

    __slots__ = ("conj", "element", "neg", "offset", "refused", "size", "storage", "stride")

    def __init__(
        self,
        storage: Storage,
        element: Element,
        offset: Any,
        size: Any,
        stride: Any,
        *,
        conj: bool = False,
        neg: bool = False,
        refused: str = "",
    ) -> None:
        self.storage = storage
        self.element = element
        self.offset = offset
        self.size = size
        self.stride = stride
        self.conj = conj
        self.neg = neg
        self.refused = refused or element.refused

    def __repr__(self) -> str:
        return f"<tensor {self.element.name} of {self.storage!r}>"

    @property
    def tie(self) -> tuple[Any, ...]:
        """Records with equal ties are the same tensor; only for checked geometry."""
        place = (id(self.storage), self.offset, tuple(self.size), tuple(self.stride))
        return (*place, self.element.name, self.conj, self.neg, self.refused)

    @property
    def row_major(self) -> bool:
        step = 1
        for n, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if n != 1 and stride != step:
                return False
            step *= n
        return True

    def handle(self, name: str, where: str) -> TensorHandle:
        """Check everything about the tensor and return its lazy handle.

        Raises:
            FileError: if the tensor does not lie inside its storage, or its storage is missing.
        """
        source = self.storage.source
        what = f"{where}: tensor {printable(name)!r}"
        if source is None:
            raise FileError(f"{what} needs {self.storage!r}, which is not in the file")
        item = self.element.dtype.itemsize
        available = self.storage.nbytes
        check_geometry(what, self.offset, self.size, self.stride, item, available)
        shape = tuple(self.size)
        begin = self.storage.offset + (self.offset * item if 0 not in shape else 0)
        strides = None
        if not self.row_major and 0 not in shape:
            # The stride of an axis of one element is never used, and may not fit into 64 bits.
            steps = zip(shape, self.stride, strict=True)
            strides = tuple(step * item if n > 1 else 0 for n, step in steps)
        stored, finish = self._transforms(what)
        return TensorHandle(
            name,
            shape,
            self.element.dtype,
            source,
            begin,
            strides=strides,
            stored=stored,
            finish=finish,
            kind=self.element.name,
            refused=self.refused,
        )

    def _transforms(
        self, what: str
    ) -> tuple[np.dtype[Any] | None, Callable[[np.ndarray], np.ndarray] | None]:
        """The dtype in the file where the byte order differs, and what is done after reading."""
        dtype = self.element.dtype
        if self.neg and dtype.kind not in "fci":
            raise FileError(f"{what} is marked as negated, but its type is {dtype.name}")
        conj = self.conj and dtype.kind == "c"
        if not self.storage.big_endian or dtype.itemsize == 1 or self.refused:
            return None, _finisher(None, conj, self.neg)
        if dtype.kind == "V":
            return np.dtype(f">u{dtype.itemsize}"), _finisher(dtype, conj, self.neg)
        return dtype.newbyteorder(">"), _finisher(None, conj, self.neg)


def check_geometry(
    what: str, offset: Any, size: Any, stride: Any, itemsize: int, available: int
) -> None:
    """Check with unbounded integers that a tensor lies inside ``available`` bytes.

    Raises:
        FileError: beginning with ``what``.
    """
    if type(size) not in (tuple, list) or type(stride) not in (tuple, list):
        raise FileError(f"{what} has a size or stride that is not a tuple")
    if len(size) != len(stride) or len(size) > MAX_RANK:
        raise FileError(f"{what} has {len(size)} sizes and {len(stride)} strides, at most 64")
    for number in (offset, *size, *stride):
        if type(number) is not int or not 0 <= number < MAX_SIZE:
            raise FileError(f"{what} has an offset, size or stride that is not a size")
    if math.prod(n for n in size if n) * itemsize >= MAX_SIZE:
        raise FileError(f"{what} is larger than any memory")
    if 0 in size:
        return
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (last + 1) * itemsize > available:
        needed = (last + 1) * itemsize
        raise FileError(f"{what} needs {needed} bytes of a storage that has {available}")
    logical = math.prod(size) * itemsize
    if logical > max(FREE_BYTES, MAX_EXPANSION * available):
        raise FileError(f"{what} would expand {available} bytes to {logical}")


@functools.cache
def _finisher(
    view: np.dtype[Any] | None, conj: bool, neg: bool
) -> Callable[[np.ndarray], np.ndarray] | None:
    """One function object per kind of work, so that tied handles compare equal."""
    if view is None and not conj and not neg:
        return None

    def finish(part: np.ndarray) -> np.ndarray:
        part = np.asarray(part)
        if view is not None:
            # Extension types have one byte order: swap as integers, then look at them again.
            part = part.astype(part.dtype.newbyteorder("="), order="C").view(view)
        if conj:
            part = np.conj(part)
        return np.negative(part) if neg else part

    return finish
