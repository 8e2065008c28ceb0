"""What a compiled program may depend on besides arrays, as values that can be compared.

Two things that must not share a program have different keys; no key holds a thing alive that is
not immutable, except classes and code.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import pathlib
import re
import types
import uuid
import weakref
from typing import Any

import jax
import numpy as np

__all__ = ["Same", "is_plain", "plain_attributes", "value_key"]

_PLAIN = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type(Ellipsis), type(NotImplemented)}
    | {range, slice, types.CodeType, types.BuiltinFunctionType, np.dtype, uuid.UUID, re.Pattern}
    | {decimal.Decimal, fractions.Fraction, datetime.date, datetime.datetime, datetime.timedelta}
)
_PLAIN_BASES = (enum.Enum, np.generic, np.dtype, pathlib.PurePath, jax.sharding.PartitionSpec)


def is_plain(value: Any) -> bool:
    """Tell whether a value never changes and is told apart by what it is: a number, a string,
    an enum, or a tuple of such.
    """
    kind = type(value)
    if kind in _PLAIN:
        return kind is not types.BuiltinFunctionType or isinstance(
            value.__self__, (types.ModuleType, type(None))
        )
    if kind is tuple or kind is frozenset:
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN_BASES)


def value_key(value: Any) -> Any:
    """Return a hashable stand-in for a value: equal for values that a program can't tell apart.

    Numbers of different types differ, and so do zeros of different signs.
    """
    kind = type(value)
    if kind is float or kind is complex:
        return kind, repr(value)
    if kind is tuple or kind is list:
        return kind, tuple(map(value_key, value))
    if kind is frozenset or kind is set:
        return kind, frozenset(map(value_key, value))
    if kind is dict:
        return kind, tuple((value_key(k), value_key(v)) for k, v in value.items())
    if kind is slice:
        return kind, value_key((value.start, value.stop, value.step))
    if isinstance(value, np.ndarray):
        return array_key(value)
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    if is_plain(value):
        return kind, value
    return Same(value)


def array_key(array: np.ndarray) -> Any:
    """Return a stand-in for the content of an array."""
    if array.dtype.kind == "O":
        return np.ndarray, array.shape, value_key(array.ravel().tolist())
    return np.ndarray, array.shape, array.dtype.str, array.tobytes()


class Same:
    """Compares by identity, without keeping the object alive where that is possible."""

    __slots__ = ("number", "reference")

    def __init__(self, thing: Any) -> None:
        self.number = id(thing)
        try:
            self.reference: Any = weakref.ref(thing)
        except TypeError:
            self.reference = lambda: thing

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same):
            return False
        mine = self.reference()
        return mine is not None and mine is other.reference()

    def __hash__(self) -> int:
        return self.number


INTERNAL = frozenset(
    {"_links", "_parameters", "_buffers", "_modules"}
    | {"_array_attributes", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"}
    | {"_backward_pre_hooks", "_load_hooks", "_load_pre_hooks", "_state_dict_hooks"}
    | {"_state_dict_pre_hooks"}
)
"""Entries of a module's ``__dict__`` that are not the user's."""


def plain_attributes(module: Any) -> dict[str, Any]:
    """Return a module's attributes that are no parts of it."""
    return {k: v for k, v in module.__dict__.items() if k not in INTERNAL}
