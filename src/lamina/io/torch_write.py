"""Write files that ``torch.load`` reads, without PyTorch.

What comes out is what ``torch.save`` writes: a zip file with the object as a pickle of protocol 2
that stays within ``weights_only=True``, and every storage as raw bytes, 64-byte aligned.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .._core.errors import TypeMismatchError
from .arrays import host_array, is_array
from .torch_tensors import ELEMENTS, STORAGES
from .zip_write import write_zip

__all__ = ["save_torch"]

MAX_DEPTH = 100
_TYPED = {
    element.dtype: word
    for word, element in STORAGES.items()
    if not element.refused and word != "UntypedStorage"
}
_UNTYPED = {
    element.dtype: name
    for name, element in ELEMENTS.items()
    if not element.refused and element.dtype not in _TYPED
}
_ORDERED = ("collections", "OrderedDict")
_INT32 = 1 << 31
_MAX_INT_BYTES = 255


def save_torch(
    obj: Any,
    path: str | os.PathLike[str],
    *,
    ties: Mapping[str, str] | None = None,
    sync: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Save an object so that ``torch.load(path)`` gives it back, with tensors for the arrays.

    Arrays that are one object, or the same memory, become tensors that share one storage.

    Args:
        obj: an array or a module, or nested dicts, lists and tuples of arrays, numbers, strings,
            bytes, sets and ``None``. Modules become their state dicts.
        path: the target, replaced in one step when everything is on disk.
        ties: ``{alias: name}`` of dotted names: ``alias`` becomes the same tensor as ``name``. An
            alias that is not in ``obj`` is added beside its tensor.
        sync: wait for the disk.
        progress: called with the number of bytes after each piece that is written.

    Raises:
        TypeMismatchError: naming the path of the first thing that PyTorch has no type for.
        OSError: if the disk is full or the directory is not writable.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "model.pt")
        >>> weight = np.ones((2, 3), np.float32)
        >>> save_torch({"embed.weight": weight}, path, ties={"head.weight": "embed.weight"})
        >>> import torch  # doctest: +SKIP
        >>> torch.load(path)["head.weight"].shape  # doctest: +SKIP
        torch.Size([2, 3])
    """
    pickler = _Pickler(dict(ties or {}))
    content = pickler.dump(obj)
    records: list[tuple[str, np.ndarray]] = [("archive/data.pkl", _text(content))]
    records += [("archive/.format_version", _text(b"1"))]
    records += [("archive/.storage_alignment", _text(b"64"))]
    records += [("archive/byteorder", _text(b"little"))]
    records += [(f"archive/data/{i}", array) for i, array in enumerate(pickler.storages)]
    records += [("archive/version", _text(b"3\n"))]
    write_zip(records, path, sync=sync, progress=progress)


def _text(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


class _Pickler:
    """Writes the opcodes of one object and collects the storages it refers to."""

    def __init__(self, ties: dict[str, str]) -> None:
        self.out = bytearray(b"\x80\x02")
        self.ties = ties
        self.storages: list[np.ndarray] = []
        self._memo: dict[Any, int] = {}
        self._keys: dict[Any, tuple[int, np.ndarray]] = {}
        self._keep: list[Any] = []
        self._aliases: dict[str, list[str]] = {}
        self._late: dict[str, Any] = {}

    def dump(self, obj: Any) -> bytes:
        arrays: dict[str, Any] = {}
        if self.ties:
            _find_arrays(obj, (), arrays, 0)
            self._plan_ties(arrays)
        self._save(obj, (), 0)
        self.out += b"."
        return bytes(self.out)

    def _plan_ties(self, arrays: dict[str, Any]) -> None:
        """Decide for every alias which array it is, and where it is added if it is not there."""
        for alias, name in self.ties.items():
            if name not in arrays:
                raise TypeMismatchError(f"ties: {name!r}, the name of {alias!r}, is no array here")
            self._late[alias] = arrays[name][1]
            if alias in arrays:
                shapes = [np.shape(arrays[key][1]) for key in (alias, name)]
                if shapes[0] != shapes[1]:
                    raise TypeMismatchError(
                        f"ties: {alias!r} has shape {shapes[0]}, but {name!r} has {shapes[1]}"
                    )
                continue
            parent = arrays[name][0]
            if not alias.startswith(parent):
                raise TypeMismatchError(
                    f"ties: {alias!r} is not in the object and cannot be put beside {name!r}"
                )
            self._aliases.setdefault(parent, []).append(alias[len(parent) :])

    def _save(self, value: Any, path: tuple[str, ...], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise TypeMismatchError(
                f"{_dotted(path)[:200]}: nested more than {MAX_DEPTH} deep, or contains itself"
            )
        if isinstance(value, np.generic):
            value = _python_scalar(value, path)
        save = _ATOMS.get(type(value))
        if save is not None:
            save(self, value)
        elif (named := _module_tensors(value)) is not None:
            self._mapping(named, path, depth)
        elif isinstance(value, Mapping):
            self._mapping(value, path, depth)
        elif isinstance(value, list):
            self._list(value, path, depth)
        elif type(value) in (tuple, set):
            self._fixed(value, path, depth)
        elif is_array(value):
            self._array(value, path)
        else:
            raise _not_data(value, path)

    def _global(self, module: str, name: str) -> None:
        self._once((module, name), b"c" + f"{module}\n{name}\n".encode())

    def _once(self, key: Any, code: bytes) -> None:
        """Write a constant the first time, and refer to it after that."""
        index = self._memo.get(key)
        if index is None:
            index = self._memo[key] = len(self._memo)
            self.out += code
            self.out += struct.pack("<cB", b"q", index) if index < 256 else _long(b"r", index)
        else:
            self.out += struct.pack("<cB", b"h", index) if index < 256 else _long(b"j", index)

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += struct.pack("<cB", b"K", value)
        elif -_INT32 <= value < _INT32:
            self.out += struct.pack("<ci", b"J", value)
        else:
            size = value.bit_length() // 8 + 1
            if size > _MAX_INT_BYTES:
                raise TypeMismatchError(f"cannot save an integer of {size} bytes")
            self.out += struct.pack("<cB", b"\x8a", size)
            self.out += value.to_bytes(size, "little", signed=True)

    def _str(self, value: str) -> None:
        raw = value.encode("utf-8", "surrogatepass")
        code = _long(b"X", len(raw)) + raw
        if len(raw) < 64:
            self._once(value, code)
        else:
            self.out += code

    def _byte_string(self, value: bytes) -> None:
        """Protocol 2 has no bytes; Python writes them as an encoded text."""
        self._global("_codecs", "encode")
        self._str(value.decode("latin-1"))
        self._str("latin1")
        self.out += b"\x86R"

    def _complex(self, value: complex) -> None:
        self._global("__builtin__", "complex")
        self.out += struct.pack(">cdcd", b"G", value.real, b"G", value.imag) + b"\x86R"

    def _mapping(self, value: Mapping[Any, Any], path: tuple[str, ...], depth: int) -> None:
        items = dict(value)
        parent = _prefix(path)
        added = self._aliases.get(parent, ())
        for key in added:
            items[key] = None
        if isinstance(value, OrderedDict) or (items and _is_state_dict(value)):
            self._global(*_ORDERED)
            self.out += b")R"
        else:
            self.out += b"}"
        if not items:
            return
        self.out += b"("
        for key, item in items.items():
            if not (key is None or type(key) in (str, int, float, bool)):
                raise TypeMismatchError(
                    f"{_dotted(path)}: cannot save a dict key of type {type(key).__name__}; "
                    f"use str or int keys"
                )
            inner = (*path, str(key))
            _ATOMS[type(key)](self, key)
            late = self._late.get(".".join(inner)) if self._late else None
            self._save(item if late is None else late, inner, depth + 1)
        self.out += b"u"

    def _list(self, value: list[Any], path: tuple[str, ...], depth: int) -> None:
        self.out += b"]"
        if value:
            self.out += b"("
            for i, item in enumerate(value):
                inner = (*path, str(i))
                late = self._late.get(".".join(inner)) if self._late else None
                self._save(item if late is None else late, inner, depth + 1)
            self.out += b"e"

    def _fixed(self, value: Any, path: tuple[str, ...], depth: int) -> None:
        """A tuple, or a set, which protocol 2 makes from a list."""
        if type(value) is set:
            self._global("__builtin__", "set")
            self._list(sorted(value, key=repr), path, depth)
            self.out += b"\x85R"
            return
        self.out += b"("
        for i, item in enumerate(value):
            inner = (*path, str(i))
            late = self._late.get(".".join(inner)) if self._late else None
            self._save(item if late is None else late, inner, depth + 1)
        self.out += b"t"

    def _array(self, value: Any, path: tuple[str, ...]) -> None:
        index, array = self._storage(value, path)
        typed = _TYPED.get(array.dtype)
        self._global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += b"(("
        self._str("storage")
        self._global(*(("torch", typed) if typed else ("torch.storage", "UntypedStorage")))
        self._str(str(index))
        self._str("cpu")
        self._int(array.size if typed else array.nbytes)
        self.out += b"tQ"
        self._int(0)
        for numbers in (array.shape, _row_major(array.shape)):
            self.out += b"("
            for number in numbers:
                self._int(number)
            self.out += b"t"
        self.out += b"\x89"
        self._global(*_ORDERED)
        self.out += b")R"
        if not typed:
            self._global("torch", _UNTYPED[array.dtype])
        self.out += b"tR"

    def _storage(self, value: Any, path: tuple[str, ...]) -> tuple[int, np.ndarray]:
        """The number of the storage of an array; the same for arrays that are the same memory."""
        identity = _identity(value)
        known = self._keys.get(identity)
        if known is not None:
            return known
        array, prng = host_array(value, _dotted(path))
        if prng:
            raise TypeMismatchError(
                f"{_dotted(path)}: PyTorch has no random keys; save jax.random.key_data(key)"
            )
        if array.dtype not in _TYPED and array.dtype not in _UNTYPED:
            raise TypeMismatchError(
                f"{_dotted(path)}: PyTorch has no dtype {array.dtype.name}; "
                f"save as safetensors, or convert it with .astype(...)"
            )
        known = (len(self.storages), array)
        self.storages.append(array)
        self._keys[identity] = known
        self._keep.append(value)
        return known


def _long(code: bytes, number: int) -> bytes:
    return struct.pack("<cI", code, number)


def _row_major(shape: tuple[int, ...]) -> list[int]:
    steps = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        steps[i - 1] = steps[i] * max(shape[i], 1)
    return steps


def _identity(value: Any) -> Any:
    """Equal for arrays that are one object, or one piece of memory seen in the same way."""
    if isinstance(value, np.ndarray) and value.size:
        return (value.ctypes.data, value.shape, value.strides, value.dtype)
    return id(value)


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    """PyTorch's state dicts are ordered dicts of tensors with text keys."""
    return all(type(key) is str and is_array(item) for key, item in value.items())


def _module_tensors(value: Any) -> OrderedDict[str, Any] | None:
    """The state dict of a module, tied names included."""
    say: Callable[[], Any] | None = getattr(value, "__lamina_tensors__", None)
    if say is None or isinstance(value, type):
        return None
    tensors, ties, wide = say()
    named = OrderedDict((name, tensors[name]) for name in tensors if name not in ties)
    for name, dtype in wide.items():
        if name in named:
            named[name] = np.asarray(named[name]).astype(dtype)
    for alias, name in ties.items():
        named[alias] = named[name]
    # Aliases keep the place that the module gave them.
    order = [name for name in tensors if name in named]
    return OrderedDict((name, named[name]) for name in dict.fromkeys([*order, *named]))


def _find_arrays(value: Any, path: tuple[str, ...], found: dict[str, Any], depth: int) -> None:
    """Collect ``{dotted name: (prefix of its container, array)}``."""
    if depth > MAX_DEPTH:
        return
    named = _module_tensors(value)
    value = value if named is None else named
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        if not isinstance(value, (str, bytes)) and is_array(value):
            found[".".join(path)] = (_prefix(path[:-1]), value)
        return
    for key, item in items:
        _find_arrays(item, (*path, key), found, depth + 1)


def _prefix(path: tuple[str, ...]) -> str:
    return ".".join(path) + "." if path else ""


def _python_scalar(value: np.generic, path: tuple[str, ...]) -> Any:
    """``weights_only=True`` refuses numpy's numbers; Python's own are the same values."""
    if value.dtype.kind in "biufc":
        return value.item()
    if value.dtype.kind == "V" and value.dtype.names is None:
        return float(value)  # pyright: ignore
    raise _not_data(value, path)


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path) or "the object"


def _not_data(value: Any, path: tuple[str, ...]) -> TypeMismatchError:
    kind = type(value)
    return TypeMismatchError(
        f"{_dotted(path)}: cannot save an object of type {kind.__module__}.{kind.__qualname__}; "
        f"a file holds arrays, numbers, strings, bytes, None, lists, tuples, sets and dicts"
    )


def _save_none(pickler: _Pickler, value: None) -> None:
    pickler.out += b"N"


def _save_bool(pickler: _Pickler, value: bool) -> None:
    pickler.out += b"\x88" if value else b"\x89"


def _save_float(pickler: _Pickler, value: float) -> None:
    pickler.out += struct.pack(">cd", b"G", value)


_ATOMS: dict[type, Callable[[_Pickler, Any], None]] = {
    type(None): _save_none,
    bool: _save_bool,
    int: _Pickler._int,
    float: _save_float,
    str: _Pickler._str,
    bytes: _Pickler._byte_string,
    complex: _Pickler._complex,
}
