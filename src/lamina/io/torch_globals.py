"""What the globals in PyTorch's pickles mean, as pure functions of lamina's own.

The table is everything that can be called; any other call stays an inert record.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from .torch_pickle import Machine
from .torch_tensors import (
    ELEMENTS,
    MAX_RANK,
    STORAGES,
    Element,
    Storage,
    TensorRecord,
)
from .torch_values import Opaque, Ref, StateDict, describe

__all__ = ["NumpyArray", "call_global", "is_parameter", "storage_element"]

_NUMBER = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|S[1-9][0-9]{0,6})")
_ML_DTYPES = frozenset({"bfloat16", *(n for n in ELEMENTS if n.startswith("float8_"))})
_PARAMETERS = frozenset(
    {
        ("torch.nn.parameter", "Parameter"),
        ("torch.nn.parameter", "Buffer"),
        ("torch.autograd.variable", "Variable"),
    }
)

Answer = Any


class NumpyDtype:
    """A numpy number type in a pickle; ``set_state`` brings the byte order."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def set_state(self, state: Any) -> None:
        if type(state) is tuple and len(state) > 1 and state[1] == ">":
            # Extension types have no other byte order; read as they are, they would be wrong.
            if self.dtype.kind == "V" and self.dtype.itemsize > 1:
                raise ValueError(state)
            self.dtype = self.dtype.newbyteorder(">")

    def __repr__(self) -> str:
        return f"<numpy.dtype {self.dtype}>"


class NumpyArray:
    """A numpy array of plain numbers whose bytes lie in the pickle."""

    __slots__ = ("content", "dtype", "fortran", "shape")

    def __init__(self) -> None:
        self.dtype: np.dtype[Any] | None = None
        self.shape: Any = ()
        self.fortran = False
        self.content = b""

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or len(state) not in (4, 5):
            raise ValueError("the state of an array")
        shape, dtype, fortran, content = state[-4:]
        if type(dtype) is NumpyDtype and type(content) is bytes:
            self.dtype, self.shape, self.fortran = dtype.dtype, shape, fortran is True
            self.content = content

    def __repr__(self) -> str:
        return "<numpy.ndarray>"


def call_global(machine: Machine, ref: Ref, args: tuple[Any, ...]) -> Any:
    """Answer the call of a global, or ``NotImplemented`` if it stays an inert record."""
    function = _TABLE.get((ref.module, ref.name))
    if function is None:
        return NotImplemented
    return function(machine, args)


def storage_element(ref: Any) -> Element | None:
    """The element type of a storage class such as ``torch.FloatStorage``."""
    if type(ref) is not Ref or ref.module.split(".")[0] != "torch":
        return None
    return STORAGES.get(ref.name)


def is_parameter(ref: Ref) -> bool:
    """Whether a class only wraps a tensor: Parameter, Buffer, and Variable of old."""
    return (ref.module, ref.name) in _PARAMETERS


def _tensor(machine: Machine, storage: Any, element: Element | None, *place: Any, **more: Any):
    if type(storage) is not Storage:
        raise machine.error("has a tensor without a storage")
    if element is None:
        if storage.element is STORAGES["UntypedStorage"]:
            raise machine.error("has a tensor of unknown type")
        element = storage.element
    return TensorRecord(storage, element, *place, **more)


def _flags(machine: Machine, metadata: Any) -> dict[str, bool]:
    if metadata is None:
        return {}
    if type(metadata) not in (dict, StateDict):
        raise machine.error("has a tensor with unknown metadata")
    return {flag: metadata.get(flag) is True for flag in ("conj", "neg")}


def _rebuild(machine: Machine, args: tuple[Any, ...]) -> Answer:
    storage, offset, size, stride = args
    return _tensor(machine, storage, None, offset, size, stride)


def _rebuild_v2(machine: Machine, args: tuple[Any, ...]) -> Answer:
    storage, offset, size, stride = args[:4]
    flags = _flags(machine, args[6] if len(args) > 6 else None)
    return _tensor(machine, storage, None, offset, size, stride, **flags)


def _rebuild_v3(machine: Machine, args: tuple[Any, ...]) -> Answer:
    storage, offset, size, stride, _, _, dtype = args[:7]
    element = _dtype(dtype)
    if element is None:
        raise machine.error(f"has a tensor of unknown type {describe(dtype)}")
    flags = _flags(machine, args[7] if len(args) > 7 else None)
    return _tensor(machine, storage, element, offset, size, stride, **flags)


def _dtype(ref: Any) -> Element | None:
    if type(ref) is Ref and ref.module == "torch":
        return ELEMENTS.get(ref.name)
    return None


def _rebuild_quantised(machine: Machine, args: tuple[Any, ...]) -> Answer:
    storage, offset, size, stride = args[:4]
    return _tensor(machine, storage, None, offset, size, stride)


def _rebuild_sparse(machine: Machine, args: tuple[Any, ...]) -> Answer:
    """A sparse tensor is listed under its full shape, and refused when read."""
    _, parts = args
    if type(parts) is not tuple or len(parts) > 5:
        return NotImplemented
    tensors = [part for part in parts if type(part) is TensorRecord]
    sizes = [part for part in parts if type(part) is tuple]
    if len(tensors) < 2 or not sizes:
        raise machine.error("has a sparse tensor without its parts")
    return _listed(machine, tensors[-1].element, sizes[-1], "is sparse; save tensor.to_dense()")


def _rebuild_meta(machine: Machine, args: tuple[Any, ...]) -> Answer:
    element = _dtype(args[0])
    if element is None:
        return NotImplemented
    return _listed(machine, element, args[1], "is on the meta device and has no data")


def _rebuild_nested(machine: Machine, args: tuple[Any, ...]) -> Answer:
    if type(args[0]) is not TensorRecord:
        return NotImplemented
    return _listed(machine, args[0].element, (), "is a nested tensor; save its parts")


def _listed(machine: Machine, element: Element, size: Any, reason: str) -> TensorRecord:
    """A record that can be listed but not read, with no bytes of its own."""
    if type(size) not in (tuple, list) or len(size) > MAX_RANK:
        raise machine.error("has a tensor whose size is not a size")
    storage = Storage("", element, 0)
    return TensorRecord(storage, element, 0, size, (0,) * len(size), refused=reason)


def _first(machine: Machine, args: tuple[Any, ...]) -> Answer:
    """A parameter, or a tensor of another device: the tensor in it."""
    if args and type(args[0]) in (TensorRecord, NumpyArray):
        return args[0]
    return NotImplemented


def _rebuild_from_type(machine: Machine, args: tuple[Any, ...]) -> Answer:
    """A subclass of Tensor: only the known ways to make a tensor are followed."""
    function, _, inner = args[:3]
    if type(function) is Ref and function.name.startswith("_rebuild") and type(inner) is tuple:
        if function.name != "_rebuild_from_type_v2":
            return machine.apply(function, inner)
    return NotImplemented


def _ordered_dict(machine: Machine, args: tuple[Any, ...]) -> Answer:
    return StateDict(_pairs(machine, args))


def _dict(machine: Machine, args: tuple[Any, ...]) -> Answer:
    return dict(_pairs(machine, args))


def _default_dict(machine: Machine, args: tuple[Any, ...]) -> Answer:
    return dict(_pairs(machine, args[1:]))


def _pairs(machine: Machine, args: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    if not args:
        return []
    (items,) = args
    if type(items) in (dict, StateDict):
        return list(items.items())
    if type(items) not in (list, tuple):
        raise machine.error("makes a dict of something else")
    return [(machine.key(key), value) for key, value in map(_pair, items)]


def _pair(item: Any) -> Any:
    if type(item) not in (list, tuple) or len(item) != 2:
        raise ValueError("a pair")
    return item


def _sequence(kind: Callable[[Any], Any], keys: bool) -> Callable[[Machine, Any], Answer]:
    def make(machine: Machine, args: tuple[Any, ...]) -> Answer:
        if not args:
            return kind(())
        (items,) = args
        if type(items) not in (list, tuple, set, frozenset):
            raise machine.error(f"makes a {kind.__name__} of something else")
        return kind([machine.key(item) for item in items] if keys else items)

    return make


def _encode(machine: Machine, args: tuple[Any, ...]) -> Answer:
    """How protocol 2 spells bytes."""
    text, *rest = args
    if type(text) is not str or rest not in (["latin1"], ["latin-1"]):
        return NotImplemented
    return text.encode("latin-1")


def _bytes(machine: Machine, args: tuple[Any, ...]) -> Answer:
    """``bytes`` and ``bytearray``, of bytes or of text; never of a number."""
    if not args:
        return b""
    if type(args[0]) is bytes and len(args) == 1:
        return args[0]
    return _encode(machine, args)


def _complex(machine: Machine, args: tuple[Any, ...]) -> Answer:
    if not args or len(args) > 2 or any(type(arg) not in (int, float) for arg in args):
        return NotImplemented
    return complex(*args)


def _reconstructor(machine: Machine, args: tuple[Any, ...]) -> Answer:
    if not args or type(args[0]) is not Ref:
        return NotImplemented
    return Opaque(args[0], args[1:])


def _numpy_dtype(machine: Machine, args: tuple[Any, ...]) -> Answer:
    spec = args[0] if args else None
    if type(spec) is Ref and spec.module == "ml_dtypes" and spec.name in _ML_DTYPES:
        return NumpyDtype(np.dtype(getattr(ml_dtypes, spec.name)))
    if type(spec) is not str or not _NUMBER.fullmatch(spec):
        return NotImplemented
    return NumpyDtype(np.dtype(spec))


def _numpy_scalar(machine: Machine, args: tuple[Any, ...]) -> Answer:
    dtype, content = args if len(args) == 2 else (None, None)
    if type(dtype) is not NumpyDtype or type(content) is not bytes:
        return NotImplemented
    if len(content) != dtype.dtype.itemsize:
        raise machine.error("has a number of the wrong size")
    return np.frombuffer(content, dtype.dtype)[0]


def _numpy_array(machine: Machine, args: tuple[Any, ...]) -> Answer:
    return NumpyArray()


def _numpy_from_buffer(machine: Machine, args: tuple[Any, ...]) -> Answer:
    content, dtype, shape, order = args
    array = NumpyArray()
    array.set_state((shape, dtype, order == "F", content))
    return array if array.dtype is not None else NotImplemented


def _table() -> dict[tuple[str, str], Callable[[Machine, tuple[Any, ...]], Answer]]:
    torch_utils = {
        "_rebuild_tensor": _rebuild,
        "_rebuild_tensor_v2": _rebuild_v2,
        "_rebuild_tensor_v3": _rebuild_v3,
        "_rebuild_qtensor": _rebuild_quantised,
        "_rebuild_sparse_tensor": _rebuild_sparse,
        "_rebuild_sparse_csr_tensor": _rebuild_sparse,
        "_rebuild_meta_tensor_no_storage": _rebuild_meta,
        "_rebuild_nested_tensor": _rebuild_nested,
        "_rebuild_parameter": _first,
        "_rebuild_parameter_with_state": _first,
        "_rebuild_device_tensor_from_numpy": _first,
        "_rebuild_device_tensor_from_cpu_tensor": _first,
        "_rebuild_xla_tensor": _first,
    }
    found = {("torch._utils", name): function for name, function in torch_utils.items()}
    found |= dict.fromkeys(_PARAMETERS, _first)
    found |= {
        ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
        ("torch", "Size"): _sequence(tuple, keys=False),
        ("collections", "OrderedDict"): _ordered_dict,
        ("collections", "Counter"): _dict,
        ("collections", "defaultdict"): _default_dict,
        ("_codecs", "encode"): _encode,
    }
    for module in ("copyreg", "copy_reg"):
        found[module, "_reconstructor"] = _reconstructor
    for module in ("builtins", "__builtin__"):
        found |= {
            (module, "set"): _sequence(set, keys=True),
            (module, "frozenset"): _sequence(frozenset, keys=True),
            (module, "list"): _sequence(list, keys=False),
            (module, "tuple"): _sequence(tuple, keys=False),
            (module, "dict"): _dict,
            (module, "complex"): _complex,
            (module, "bytes"): _bytes,
            (module, "bytearray"): _bytes,
        }
    found["numpy", "dtype"] = _numpy_dtype
    for package in ("numpy.core", "numpy._core"):
        found |= {
            (f"{package}.multiarray", "scalar"): _numpy_scalar,
            (f"{package}.multiarray", "_reconstruct"): _numpy_array,
            (f"{package}.numeric", "_frombuffer"): _numpy_from_buffer,
        }
    return found


_TABLE = _table()
