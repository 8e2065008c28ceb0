"""Nested objects as named tensors plus a description of what is around them.

``flatten`` turns arrays in lists, tuples, dicts and modules into ``{name: array}``; a name is the
dotted path. A plain ``{str: array}`` dict (a state dict) needs no more than that. All else gets a
description in JSON, from which ``restore`` makes the same structure again, with lazy tensors as
leaves. The description is data only; nothing in it can name a class or a function.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .._core.errors import FileError, TypeMismatchError
from .arrays import garbage_collector_paused, host_array, is_array
from .strict_json import parse_json
from .tensorfile import TensorHandle

__all__ = ["DESCRIPTION", "Flat", "flatten", "restore"]

DESCRIPTION = "lamina"
_VERSION = 1
_MAX_DEPTH = 100
_SMALL_INT = 1 << 62

# Types that some format has not: there they are stored under another type of the same bytes.
_VIEWS: dict[str, np.dtype] = {
    dtype.name: dtype
    for dtype in map(
        np.dtype,
        (
            np.complex128,
            ml_dtypes.bfloat16,
            ml_dtypes.float8_e4m3fn,
            ml_dtypes.float8_e4m3fnuz,
            ml_dtypes.float8_e5m2,
            ml_dtypes.float8_e5m2fnuz,
            ml_dtypes.float8_e8m0fnu,
            ml_dtypes.float8_e3m4,
            ml_dtypes.float8_e4m3,
            ml_dtypes.float8_e4m3b11fnuz,
            ml_dtypes.float6_e2m3fn,
            ml_dtypes.float6_e3m2fn,
            ml_dtypes.float4_e2m1fn,
            ml_dtypes.int4,
            ml_dtypes.uint4,
            ml_dtypes.int2,
            ml_dtypes.uint2,
        ),
    )
}
_NUMPY_SCALARS: dict[str, np.dtype] = {
    dtype.name: dtype
    for dtype in map(np.dtype, ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8",
                                "f2", "f4", "f8", "c8"))
}  # fmt: skip


class Flat(NamedTuple):
    """A flattened object.

    Attributes:
        tensors: the distinct arrays by name.
        ties: ``{alias: name}`` for arrays that occur more than once.
        description: what to store beside them, or ``""`` if names and ties say everything.
    """

    tensors: dict[str, np.ndarray]
    ties: dict[str, str]
    description: str


@garbage_collector_paused()
def flatten(obj: Any, storable: Callable[[np.dtype], bool]) -> Flat:
    """Take an object apart into named arrays and a description.

    Args:
        obj: an array, module, Python scalar, string, bytes or ``None``, or lists, tuples and dicts
            (with keys of str, int, float, bool or ``None``) of those.
        storable: whether the format has a dtype; others are stored as plain numbers of the same
            bytes, and described.

    Raises:
        TypeMismatchError: naming the path of the first thing that is not data.

    Example:
        >>> flat = flatten({"w": np.ones(2), "steps": [1, 2.5, None]}, bool)
        >>> list(flat.tensors), flat.description
        (['w'], '{"version":1,"tree":{"dict":{"w":{"array":"w"},"steps":[1,2.5,null]}}}')
    """
    builder = _Builder(storable)
    node = builder.encode(obj, (), 0)
    description: dict[str, Any] = {"version": _VERSION}
    if not _is_plain(node, builder.ties):
        description["tree"] = node
    for word, found in (("dtypes", builder.dtypes), ("prng", builder.prng)):
        if found:
            description[word] = found
    text = json.dumps(description, separators=(",", ":")) if len(description) > 1 else ""
    return Flat(builder.tensors, builder.ties, text)


def restore(
    path: str, text: str, tensors: dict[str, TensorHandle]
) -> tuple[dict[str, TensorHandle], Any, bool]:
    """Read a description.

    Args:
        path: the file, for messages.
        text: what ``flatten`` gave.
        tensors: the tensors of the file as they are stored.

    Returns:
        The tensors with their real dtypes, the structure with handles as leaves, and whether there
        is one (else the file is a plain ``{name: tensor}``).

    Raises:
        FileError: if the description is malformed or does not fit the tensors.
    """
    description = parse_json(path, text.encode(), "the description of its structure", inexact=True)
    if not isinstance(description, dict) or description.get("version") != _VERSION:
        raise FileError(
            f"{path}: the description of its structure is not of version {_VERSION}; "
            f"read it with a newer lamina, or name by name with lamina.open"
        )
    made = dict(tensors)
    dtypes, prng = description.get("dtypes", {}), description.get("prng", {})
    if not isinstance(dtypes, dict) or not isinstance(prng, dict):
        raise FileError(f"{path}: the description of its structure is malformed")
    for name in {**dtypes, **prng}:
        if name not in tensors:
            raise FileError(f"{path}: the description names {name!r:.200}, which is not there")
        made[name] = _view(tensors[name], dtypes.get(name), prng.get(name, ""))
    if "tree" not in description:
        return made, None, False
    return made, _Restorer(path, made).decode(description["tree"], 0), True


def _is_plain(node: Any, ties: dict[str, str]) -> bool:
    """Whether the object is a dict of arrays in which every key is the name of its tensor."""
    children = node.get("dict") if isinstance(node, dict) else None
    return children is not None and all(
        isinstance(child, dict) and child.get("array") == ties.get(name, name)
        for name, child in children.items()
    )


def _named_tensors(obj: Any) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]] | None:
    """What a module or a state dict says of itself: tensors, ties, and dtypes to widen to."""
    say = getattr(obj, "__lamina_tensors__", None)
    return None if say is None or isinstance(obj, type) else say()


class _Builder:
    """Collects the tensors of one object while it is walked."""

    def __init__(self, storable: Callable[[np.dtype], bool]):
        self.storable = storable
        self.tensors: dict[str, np.ndarray] = {}
        self.ties: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}
        self.prng: dict[str, str] = {}
        self._names: dict[Any, str] = {}
        self._keep: list[Any] = []

    def encode(self, value: Any, path: tuple[str, ...], depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise TypeMismatchError(
                f"{'.'.join(path)[:200]}: nested more than {_MAX_DEPTH} deep, or contains itself"
            )
        if is_array(value):
            return {"array": self._add(value, path)}
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            return value if -_SMALL_INT < value < _SMALL_INT else {"int": hex(value)}
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if type(value) is complex:
            parts = value.real, value.imag
            return {"complex": [self.encode(part, path, depth) for part in parts]}
        if type(value) is bytes:
            return {"bytes": base64.b64encode(value).decode()}
        if isinstance(value, np.generic):
            return _encode_scalar(value, path)
        named = _named_tensors(value)
        if named is not None:
            return {"dict": self._add_named(*named, path)}
        if isinstance(value, Mapping):
            return self._encode_mapping(value, path, depth)
        if isinstance(value, list):
            return [self.encode(v, (*path, str(i)), depth + 1) for i, v in enumerate(value)]
        if type(value) is tuple:
            return {
                "tuple": [self.encode(v, (*path, str(i)), depth + 1) for i, v in enumerate(value)]
            }
        raise _not_data(value, path)

    def _encode_mapping(self, value: Mapping[Any, Any], path: tuple[str, ...], depth: int) -> Any:
        if all(type(key) is str for key in value):
            return {"dict": {k: self.encode(v, (*path, k), depth + 1) for k, v in value.items()}}
        pairs = []
        for key, item in value.items():
            if not (key is None or type(key) in (str, int, float, bool)):
                raise TypeMismatchError(
                    f"{_dotted(path)}: cannot save a dict key of type {type(key).__name__}; "
                    f"use str or int keys"
                )
            inner = (*path, str(key))
            pairs.append([self.encode(key, inner, depth), self.encode(item, inner, depth + 1)])
        return {"pairs": pairs}

    def _add_named(
        self,
        tensors: dict[str, Any],
        ties: dict[str, str],
        wide: dict[str, Any],
        path: tuple[str, ...],
    ) -> dict[str, Any]:
        nodes = {}
        for name, array in tensors.items():
            if ties.get(name) in nodes:
                nodes[name] = self._alias((*path, name), nodes[ties[name]])
            elif name not in ties:
                nodes[name] = {"array": self._add(array, (*path, name), wide.get(name))}
        for alias, name in ties.items():
            if alias not in nodes:
                nodes[alias] = self._alias((*path, alias), nodes[name])
        return nodes

    def _alias(self, path: tuple[str, ...], node: dict[str, str]) -> dict[str, str]:
        self._tie(path, node["array"])
        return node

    def _add(self, value: Any, path: tuple[str, ...], wide: Any = None) -> str:
        """Store an array once and return its name."""
        identity = _identity(value)
        if identity in self._names:
            self._tie(path, self._names[identity])
            return self._names[identity]
        name = self._unique(path, {"__metadata__"})
        host, prng = host_array(value, _dotted(path))
        if wide is not None:
            host = host.astype(wide)
        if not self.storable(host.dtype):
            self.dtypes[name] = host.dtype.name
            host = _as_storable(host, _dotted(path))
        if prng:
            self.prng[name] = prng
        self.tensors[name] = host
        self._names[identity] = name
        self._keep.append(value)
        return name

    def _tie(self, path: tuple[str, ...], name: str) -> None:
        self.ties[self._unique(path, _TAKEN)] = name

    def _unique(self, path: tuple[str, ...], taken: set[str]) -> str:
        stem = ".".join(path) if path else "array"
        if not stem.isascii():
            stem = stem.encode("utf-8", "replace").decode()
        name, count = stem, 1
        while name in self.tensors or name in self.ties or name in taken:
            count += 1
            name = f"{stem}~{count}"
        return name


# Words that the metadata of a file needs for itself.
_TAKEN = {"__metadata__", "format", "total_size", DESCRIPTION, f"{DESCRIPTION}.crc32"}


def _identity(value: Any) -> Any:
    """Equal for arrays that are one object, or one piece of memory seen in the same way."""
    if isinstance(value, np.ndarray):
        return (value.__array_interface__["data"][0], value.shape, value.strides, value.dtype)
    return id(value)


def _as_storable(host: np.ndarray, where: str) -> np.ndarray:
    if host.dtype.name not in _VIEWS:
        raise TypeMismatchError(f"{where}: cannot save an array of dtype {host.dtype}")
    if host.dtype == np.complex128:
        return np.ascontiguousarray(host).view(np.float64).reshape(*host.shape, 2)
    return host.view(np.dtype(f"u{host.dtype.itemsize}"))


def _encode_scalar(value: np.generic, path: tuple[str, ...]) -> Any:
    name = value.dtype.name
    if name not in _VIEWS and name not in _NUMPY_SCALARS:
        raise _not_data(value, path)
    return {"scalar": [name, value.tobytes().hex()]}


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path) or "the object"


def _not_data(value: Any, path: tuple[str, ...]) -> TypeMismatchError:
    kind = type(value)
    hint = "a file holds arrays, numbers, strings, bytes, None, lists, tuples and dicts"
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        hint = "a named tuple is saved as value._asdict() or tuple(value)"
    return TypeMismatchError(
        f"{_dotted(path)}: cannot save an object of type {kind.__module__}.{kind.__qualname__}; "
        f"{hint}"
    )


def _view(handle: TensorHandle, dtype: Any, prng: Any) -> TensorHandle:
    real = handle.dtype if dtype is None else _VIEWS.get(str(dtype))
    shape = handle.shape
    if real is not None and real.itemsize != handle.dtype.itemsize:
        fits = shape and shape[-1] * handle.dtype.itemsize == real.itemsize and handle.contiguous
        real, shape = (real, shape[:-1]) if fits else (None, shape)
    if real is None or handle.stored is not None or not isinstance(prng, str):
        raise FileError(
            f"{handle.file}: tensor {handle.name!r} of dtype {handle.dtype} and shape "
            f"{handle.shape} cannot be read as {str(dtype)[:40]!r}"
        )
    return TensorHandle(
        handle.name,
        shape,
        real,
        handle.source,
        handle.offset,
        strides=handle.strides if shape == handle.shape else None,
        kind=handle.kind if dtype is None else str(dtype),
        refused=handle.refused,
        prng=prng,
    )


class _Restorer:
    """Makes the structure again, every node checked."""

    def __init__(self, path: str, tensors: dict[str, TensorHandle]):
        self.path = path
        self.tensors = tensors

    def decode(self, node: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise FileError(f"{self.path}: its structure is nested more than {_MAX_DEPTH} deep")
        if node is None or isinstance(node, bool | str | int | float):
            return node
        if isinstance(node, list):
            return [self.decode(child, depth + 1) for child in node]
        if len(node) != 1:
            raise self._bad(node)
        ((word, content),) = node.items()
        try:
            return self._decode_word(word, content, depth)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, FileError):
                raise
            raise self._bad(node) from None

    def _decode_word(self, word: str, content: Any, depth: int) -> Any:
        match word:
            case "array":
                return self.tensors[content]
            case "dict":
                return {key: self.decode(child, depth + 1) for key, child in content.items()}
            case "pairs":
                return {
                    self.decode(key, _MAX_DEPTH): self.decode(child, depth + 1)
                    for key, child in content
                }
            case "tuple":
                return tuple([self.decode(child, depth + 1) for child in content])
            case "int":
                return int(content, 16)
            case "float":
                return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content]
            case "complex":
                real, imag = (self.decode(part, depth) for part in content)
                return complex(real, imag)
            case "bytes":
                return base64.b64decode(content, validate=True)
            case "scalar":
                name, digits = content
                dtype = _VIEWS[name] if name in _VIEWS else _NUMPY_SCALARS[name]
                (scalar,) = np.frombuffer(bytes.fromhex(digits), dtype)
                return scalar
        raise ValueError(word)

    def _bad(self, node: Any) -> FileError:
        return FileError(f"{self.path}: the description of its structure has {str(node)[:80]!r}")
