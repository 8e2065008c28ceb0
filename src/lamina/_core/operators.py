"""Arithmetic and comparison with boxes, as with the arrays in them; ``+=`` and its like write."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import jax

__all__ = ["Operators"]


class Operators:
    """The operators of a class whose ``data`` can be read and written."""

    __slots__ = ()

    if TYPE_CHECKING:  # defined below, all in the same way
        data: Any

        def __add__(self, other: Any) -> jax.Array: ...
        def __sub__(self, other: Any) -> jax.Array: ...
        def __mul__(self, other: Any) -> jax.Array: ...
        def __truediv__(self, other: Any) -> jax.Array: ...
        def __pow__(self, other: Any) -> jax.Array: ...
        def __matmul__(self, other: Any) -> jax.Array: ...
        def __radd__(self, other: Any) -> jax.Array: ...
        def __rsub__(self, other: Any) -> jax.Array: ...
        def __rmul__(self, other: Any) -> jax.Array: ...
        def __rtruediv__(self, other: Any) -> jax.Array: ...
        def __rmatmul__(self, other: Any) -> jax.Array: ...
        def __iadd__(self, other: Any) -> Self: ...
        def __isub__(self, other: Any) -> Self: ...
        def __imul__(self, other: Any) -> Self: ...
        def __itruediv__(self, other: Any) -> Self: ...
        def __neg__(self) -> jax.Array: ...
        def __lt__(self, other: Any) -> jax.Array: ...
        def __le__(self, other: Any) -> jax.Array: ...
        def __gt__(self, other: Any) -> jax.Array: ...
        def __ge__(self, other: Any) -> jax.Array: ...


def _binary(function: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    def forward(self: Any, other: Any) -> Any:
        return function(self.data, other.data if isinstance(other, Operators) else other)

    def backward(self: Any, other: Any) -> Any:
        return function(other, self.data)

    return forward, backward


def _in_place(function: Callable[[Any, Any], Any]) -> Any:
    def update(self: Any, other: Any) -> Any:
        self.data = function(self.data, other.data if isinstance(other, Operators) else other)
        return self

    return update


def _unary(function: Callable[[Any], Any]) -> Any:
    return lambda self: function(self.data)


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
):
    _function = getattr(operator, f"__{_name}__")
    _forward, _backward = _binary(_function)
    setattr(Operators, f"__{_name}__", _forward)
    setattr(Operators, f"__r{_name}__", _backward)
    setattr(Operators, f"__i{_name}__", _in_place(_function))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Operators, f"__{_name}__", _binary(getattr(operator, f"__{_name}__"))[0])
for _name in ("neg", "pos", "abs", "invert"):
    setattr(Operators, f"__{_name}__", _unary(getattr(operator, f"__{_name}__")))
