"""From the inert values of a pickle to named tensors.

One walk over the object gives every tensor its dotted name, finds the ties, and copies the nested
dicts, lists and tuples with lazy handles at their leaves. A pickled module becomes its state dict,
with the names and the order that ``module.state_dict()`` would give.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from .._core.errors import FileError
from .tensorfile import FileBytes, LazyBytes, TensorHandle
from .torch_globals import NumpyArray, is_parameter
from .torch_tensors import Storage, TensorRecord, check_geometry
from .torch_values import Opaque, StateDict, printable

__all__ = ["NamedTensors"]

MAX_DEPTH = 200
MAX_NAME = 4096
MAX_NAMES = 64 << 20
FREE_NODES = 100_000
NODES_PER_BYTE = 4
# All tensors together may be this many times the file (expanded ones), or FREE_BYTES.
MAX_EXPANSION = 64
FREE_BYTES = 1 << 30

Path = tuple["Path", Any] | None

_MODULE_DICTS = ("_parameters", "_buffers", "_modules")


class NamedTensors:
    """The outcome of the walk.

    Args:
        value: what the pickle held.
        source: the file, for tensors without bytes and for messages.
        pickle_bytes: size of the pickle, which bounds the work.

    Attributes:
        tree: the nested object, with handles as leaves and inert values elsewhere.
        tensors: every name and its handle; tied names have one handle.
        ties: ``{alias: first name}``.

    Raises:
        FileError: if a tensor does not fit its storage, or the object contains itself or is too
            deep or too large.
    """

    def __init__(self, value: Any, source: FileBytes, pickle_bytes: int) -> None:
        self.source = source
        self.where = source.path
        self.tensors: dict[str, TensorHandle] = {}
        self.ties: dict[str, str] = {}
        self._first: dict[Any, str] = {}
        self._counts: dict[str, int] = {}
        self._found = 0
        self._nodes = FREE_NODES + NODES_PER_BYTE * pickle_bytes
        self._names = MAX_NAMES
        self._bytes = max(FREE_BYTES, MAX_EXPANSION * source.size)
        self._inside: set[int] = set()
        self._objects: set[int] = set()
        try:
            self.tree = self._visit(value, None, 0)
        except RecursionError:
            raise self._error("nests objects too deeply") from None

    def _error(self, reason: str) -> FileError:
        return FileError(f"{self.where}: the saved object {reason}")

    def _visit(self, value: Any, path: Path, depth: int) -> Any:
        visit = _VISITS.get(type(value))
        return value if visit is None else visit(self, value, path, depth)

    def _enter(self, value: Any, count: int, depth: int) -> None:
        self._nodes -= count + 1
        if self._nodes < 0:
            raise self._error("repeats its parts too often to be a real checkpoint")
        if depth > MAX_DEPTH:
            raise self._error(f"nests objects more than {MAX_DEPTH} deep")
        if id(value) in self._inside:
            raise self._error("contains itself")
        self._inside.add(id(value))

    def _leave(self, value: Any) -> None:
        self._inside.discard(id(value))

    def _mapping(self, value: dict[Any, Any], path: Path, depth: int) -> dict[Any, Any]:
        self._enter(value, len(value), depth)
        copy: dict[Any, Any] = OrderedDict() if type(value) is StateDict else {}
        for position, (key, item) in enumerate(value.items()):
            copy[key] = self._visit(item, (path, _key(key, position)), depth + 1)
        if type(value) is StateDict and type(value.attributes.get("_metadata")) is StateDict:
            # Where torch keeps the version of every module; an attribute, as there.
            copy._metadata = value.attributes["_metadata"]  # pyright: ignore
        self._leave(value)
        return copy

    def _sequence(self, value: Any, path: Path, depth: int) -> Any:
        self._enter(value, len(value), depth)
        items = [self._visit(item, (path, i), depth + 1) for i, item in enumerate(value)]
        self._leave(value)
        return items if type(value) is list else tuple(items)

    def _object(self, value: Opaque, path: Path, depth: int) -> Any:
        """A module becomes its state dict; other objects stay, and their tensors get names."""
        attributes = value.attributes()
        if any(type(attributes.get(name)) in (dict, StateDict) for name in _MODULE_DICTS):
            found: dict[str, Any] = OrderedDict()
            self._module(attributes, path, None, found, depth)
            return found
        if value.ref.module.split(".")[0] == "__torch__":
            found = OrderedDict()
            self._script_module(value, path, None, found, depth)
            return found
        if is_parameter(value.ref):
            for state in (value.args, value.state):
                if type(state) is tuple and state and type(state[0]) is TensorRecord:
                    return self._visit(state[0], path, depth)
        return self._other(value, attributes, path, depth)

    def _other(self, value: Opaque, attributes: dict[Any, Any], path: Path, depth: int) -> Any:
        """A subclass of dict or list with tensors counts as a plain one; attributes count once."""
        before = self._found
        parts = [part for part in (value.mapping, value.items) if part]
        copies = [self._visit(part, path, depth + 1) for part in parts]
        if self._found > before and len(parts) == 1:
            return copies[0]
        if attributes and id(value) not in self._objects:
            self._objects.add(id(value))
            self._visit(attributes, path, depth + 1)
        return value

    def _module(
        self, attributes: dict[Any, Any], path: Path, inner: Path, found: dict[str, Any], depth: int
    ) -> None:
        parameters, buffers, modules = (_dict(attributes.get(name)) for name in _MODULE_DICTS)
        self._enter(attributes, len(parameters) + len(buffers) + len(modules), depth)
        hidden = attributes.get("_non_persistent_buffers_set")
        hidden = hidden if type(hidden) in (set, frozenset) else ()
        for part in (parameters, buffers):
            for name, tensor in part.items():
                if tensor is None or (part is buffers and name in hidden):
                    continue
                leaf = self._visit(tensor, (path, name), depth + 1)
                if type(leaf) is TensorHandle:
                    found[_join((inner, name))] = leaf
        for name, child in modules.items():
            if type(child) is Opaque:
                self._module(child.attributes(), (path, name), (inner, name), found, depth + 1)
        self._leave(attributes)

    def _script_module(
        self, value: Opaque, path: Path, inner: Path, found: dict[str, Any], depth: int
    ) -> None:
        """TorchScript keeps parameters, buffers and submodules as plain attributes."""
        attributes = value.attributes()
        self._enter(value, len(attributes), depth)
        for name, item in attributes.items():
            if type(item) in (TensorRecord, Storage):
                found[_join((inner, name))] = self._visit(item, (path, name), depth + 1)
        for name, item in attributes.items():
            if type(item) is Opaque and item.ref.module.split(".")[0] == "__torch__":
                self._script_module(item, (path, name), (inner, name), found, depth + 1)
        self._leave(value)

    def _name(self, path: Path) -> str:
        name = _join(path) if path else "array"
        self._names -= len(name)
        if len(name) > MAX_NAME or self._names < 0:
            raise self._error(f"has a tensor with too long a name: {printable(name)!r}")
        stem = name
        while name in self.tensors:
            # {"a.b": x, "a": {"b": y}} gives one name twice; no tensor may hide another.
            self._counts[stem] = self._counts.get(stem, 1) + 1
            name = f"{stem}~{self._counts[stem]}"
        return name

    def _tensor(self, record: TensorRecord, path: Path, depth: int) -> TensorHandle:
        name = self._name(path)
        known = self._first.get(id(record))
        if known is not None:
            return self._tie(name, known)
        handle = self._handle(record, name)
        first = self._first[id(record)] = self._first.setdefault(record.tie, name)
        if first != name:
            return self._tie(name, first)
        self._bytes -= handle.nbytes
        if self._bytes < 0:
            raise self._error("has tensors that expand to far more than the file")
        return self._add(name, handle)

    def _add(self, name: str, handle: TensorHandle) -> TensorHandle:
        self._found += 1
        self.tensors[name] = handle
        return handle

    def _tie(self, name: str, first: str) -> TensorHandle:
        self.ties[name] = first
        return self._add(name, self.tensors[first])

    def _handle(self, record: TensorRecord, name: str) -> TensorHandle:
        if record.storage.source is not None or record.storage.nbytes or not record.refused:
            return record.handle(name, self.where)
        what = f"{self.where}: tensor {printable(name)!r}"
        item = record.element.dtype.itemsize
        # Nothing lies in the file, so only the numbers themselves can be wrong.
        check_geometry(what, 0, record.size, record.stride, item, item)
        return TensorHandle(
            name,
            tuple(record.size),
            record.element.dtype,
            self.source,
            0,
            kind=record.element.name,
            refused=record.refused,
            nbytes=0,
        )

    def _storage(self, storage: Storage, path: Path, depth: int) -> TensorHandle:
        """A storage saved on its own is a tensor of one axis."""
        count = storage.nbytes // storage.element.dtype.itemsize
        return self._tensor(TensorRecord(storage, storage.element, 0, (count,), (1,)), path, depth)

    def _array(self, array: NumpyArray, path: Path, depth: int) -> Any:
        """A numpy array inside the pickle is a tensor like the others."""
        dtype, content = array.dtype, array.content
        if dtype is None:
            return array
        name = self._name(path)
        what = f"{self.where}: array {printable(name)!r}"
        stride = _row_major(array.shape, what)
        check_geometry(what, 0, array.shape, stride, dtype.itemsize, len(content))
        shape = tuple(array.shape)
        if math.prod(shape) * dtype.itemsize != len(content):
            raise FileError(f"{what} has {len(content)} bytes, its shape {shape} asks for others")
        known = self._first.setdefault(id(array), name)
        if known != name:
            return self._tie(name, known)
        strides = None
        if array.fortran and len(shape) > 1:
            strides = tuple(dtype.itemsize * math.prod(shape[:i]) for i in range(len(shape)))
        return self._add(
            name,
            TensorHandle(
                name,
                shape,
                dtype.newbyteorder("="),
                LazyBytes(self.where, len(content), lambda: content),
                0,
                strides=strides,
                stored=None if dtype.isnative else dtype,
            ),
        )


def _row_major(shape: Any, what: str) -> tuple[int, ...]:
    if type(shape) not in (tuple, list) or len(shape) > 64:
        raise FileError(f"{what} has a shape that is not a tuple of sizes")
    if any(type(n) is not int or n < 0 for n in shape):
        raise FileError(f"{what} has a shape that is not a tuple of sizes")
    steps = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        steps[i - 1] = steps[i] * max(shape[i], 1)
    return tuple(steps)


def _dict(value: Any) -> dict[Any, Any]:
    return value if type(value) in (dict, StateDict) else {}


def _key(key: Any, position: int) -> Any:
    """A key as a part of a name; objects count by their position."""
    return key if isinstance(key, (str, int, float, bool, type(None))) else position


def _join(path: Path) -> str:
    parts: list[str] = []
    while path is not None:
        path, part = path
        parts.append(part if type(part) is str else str(part)[:MAX_NAME])
    return ".".join(reversed(parts))


_VISITS: dict[type, Callable[[NamedTensors, Any, Path, int], Any]] = {
    TensorRecord: NamedTensors._tensor,
    Storage: NamedTensors._storage,
    NumpyArray: NamedTensors._array,
    dict: NamedTensors._mapping,
    StateDict: NamedTensors._mapping,
    list: NamedTensors._sequence,
    tuple: NamedTensors._sequence,
    Opaque: NamedTensors._object,
}
