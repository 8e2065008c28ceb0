"""Arithmetic, comparison and PyTorch's methods of boxes, as with the arrays in them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from .errors import ShapeError, TypeMismatchError, format_shape
from .recipe import Normal, Uniform
from .shapes import as_sharding, parse_targets, weakest

__all__ = ["Operators"]


class Operators:
    """The operators of a class whose ``data`` can be read and written."""

    __slots__ = ()

    if TYPE_CHECKING:  # defined below, all in the same way
        data: Any
        shape: Any
        ndim: int
        dtype: Any

        def describe(self) -> str: ...
        def _updated(self, value: Any) -> Self: ...
        def numel(self) -> int: ...
        def initialize(self, recipe: Any, key: Any = None) -> Self: ...
        def _mismatch(self, what: str, expected: Any, got: Any) -> str: ...
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

    def _sizes(self) -> tuple[int, ...]:
        self.numel()  # raises while a size is unknown
        return self.shape

    def copy_(self, value: Any) -> Self:
        """Write ``value``, broadcast to the box's shape and cast to its dtype."""
        return self._updated(jnp.broadcast_to(plain_array(value), self._sizes()))

    def fill_(self, value: Any) -> Self:
        """Set every element to ``value``."""
        return self._updated(jnp.full(self._sizes(), plain_array(value), self.dtype))

    def zero_(self) -> Self:
        """Set every element to zero."""
        return self.fill_(0)

    def add_(self, other: Any, *, alpha: Any = 1) -> Self:
        """Add ``alpha * other`` in place."""
        return self._updated(self.data + _scaled(other, alpha))

    def sub_(self, other: Any, *, alpha: Any = 1) -> Self:
        """Subtract ``alpha * other`` in place."""
        return self._updated(self.data - _scaled(other, alpha))

    def mul_(self, other: Any) -> Self:
        """Multiply in place."""
        return self._updated(self.data * plain_array(other))

    def div_(self, other: Any) -> Self:
        """Divide in place."""
        return self._updated(self.data / plain_array(other))

    def lerp_(self, end: Any, weight: Any) -> Self:
        """Move towards ``end``: ``self + weight * (end - self)``, in place."""
        value = self.data
        return self._updated(value + plain_array(weight) * (plain_array(end) - value))

    def clamp_(self, min: Any = None, max: Any = None) -> Self:
        """Limit every element to ``[min, max]``, in place; one of the two may be left out."""
        if min is None and max is None:
            raise TypeError("clamp_: give min, max or both")
        bounds = [None if bound is None else plain_array(bound) for bound in (min, max)]
        return self._updated(jnp.clip(self.data, *bounds))

    def normal_(self, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Self:
        """Draw from a normal distribution; recorded as the recipe."""
        return self.initialize(Normal(mean, std), generator)

    def uniform_(self, a: float = 0.0, b: float = 1.0, *, generator: Any = None) -> Self:
        """Draw from U(a, b); recorded as the recipe."""
        return self.initialize(Uniform(a, b), generator)

    def to(self, *targets: Any, dtype: Any = None, device: Any = None) -> jax.Array:
        """Return the value with another dtype or at another place; the box stays as it is."""
        dtype, device = parse_targets(targets, dtype, device)
        value = self.data if dtype is None else self.data.astype(dtype)
        return value if device is None else jax.device_put(value, as_sharding(device))

    def __getitem__(self, index: Any) -> jax.Array:
        return self.data[_plain(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        value = jnp.asarray(plain_array(value))
        if not np.can_cast(weakest(value.dtype), np.dtype(self.dtype), "same_kind"):
            raise TypeMismatchError(self._mismatch("dtype", self.dtype, value.dtype))
        self.data = self.data.at[_plain(index)].set(value.astype(self.dtype))

    __array_priority__ = 1000  # a NumPy array on the left leaves the operation to the box

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.data, dtype=dtype)

    def __jax_array__(self) -> jax.Array:
        return self.data

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def clone(self) -> jax.Array:
        """Return the value; a ``jax.Array`` never changes."""
        return self.data

    def t(self) -> jax.Array:
        """Return the value transposed; at most two axes."""
        if self.ndim > 2:
            raise ShapeError(
                f"{self.describe()}: t() expects at most two axes, got {format_shape(self.shape)}\n"
                f"    fix: p.swapaxes(a, b), or p.mT for the last two axes"
            )
        return self.data.T

    def norm(self, p: Any = 2, dim: Any = None, keepdim: bool = False) -> jax.Array:
        """Return the p-norm of all elements, or along ``dim``."""
        value, order = self.data, 2 if p == "fro" else p
        if dim is None and not keepdim:
            return jnp.linalg.norm(value.ravel(), order)
        power = jnp.abs(value)
        if order in (math.inf, -math.inf):
            return (jnp.max if order > 0 else jnp.min)(power, axis=dim, keepdims=keepdim)
        if order == 0:
            return jnp.sum(power != 0, axis=dim, keepdims=keepdim).astype(power.dtype)
        return jnp.sum(power**order, axis=dim, keepdims=keepdim) ** (1 / order)

    def new_zeros(self, *size: Any, dtype: Any = None) -> jax.Array:
        """Return zeros of another shape and this dtype."""
        shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
        return jnp.zeros(tuple(shape), self.dtype if dtype is None else dtype)

    def numpy(self) -> np.ndarray:
        """Return the value as a NumPy array."""
        return np.asarray(self.data)

    def detach(self) -> jax.Array:
        """Return the value without gradient."""
        return jax.lax.stop_gradient(self.data)

    def item(self) -> Any:
        """Return the only element as a Python number."""
        return self.data.item()

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        return iter(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __float__(self) -> float:
        return float(self.data)

    def __int__(self) -> int:
        return int(self.data)

    def __index__(self) -> int:
        return operator.index(self.data)


def plain_array(value: Any) -> jax.Array:
    """Return a box, NumPy array, list or scalar as a ``jax.Array`` (or tracer)."""
    if isinstance(value, Operators):
        return value.data
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def _scaled(other: Any, alpha: Any) -> Any:
    return plain_array(other) if alpha == 1 else plain_array(other) * alpha


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


def _plain(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_plain(part) for part in index)
    return index.data if isinstance(index, Operators) else index
