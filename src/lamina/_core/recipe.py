"""What recipes are made of: an initialiser is data, called as ``recipe(key, shape, dtype)``.

A recipe is a frozen dataclass and a pytree. Its numbers (a standard deviation, a bound) are leaves,
so that one compiled program serves all of their values; what decides the program (a mode, a number
of groups) is metadata. Inside ``__call__`` the numbers may therefore be tracers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .errors import ShapeError, format_shape

Key: TypeAlias = jax.Array
Shape: TypeAlias = tuple[int, ...]
Number: TypeAlias = float | jax.Array


class Checked:
    """What every recipe here has besides ``__call__``: a check that needs no value and no key."""

    def check(self, shape: Sequence[int | None]) -> None:
        """Raise :class:`ShapeError` if no array of this shape can be drawn; ``None`` is unknown."""


def static(**options: Any) -> Any:
    """Declare a field that is metadata: part of the program and not a number in it."""
    return dataclasses.field(metadata={"static": True}, **options)


def is_number(value: Any) -> bool:
    """Tell numbers from tracers and from the placeholders that pytree operations put in."""
    return isinstance(value, (int, float, np.number))


def are_equal(one: Any, other: Any) -> bool:
    """Tell whether two recipes follow one law."""
    return one is other or (type(one) is type(other) and repr(one) == repr(other))


def drawing_dtype(dtype: Any) -> Any:
    """Return float32 for narrower floats: a draw has the same bits whenever it is narrowed."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        return jnp.dtype(jnp.float32)
    return dtype


def flat(shape: Shape) -> Shape:
    """Return the shape with all axes but the first merged: the same draws, compiled faster."""
    return shape if len(shape) <= 2 else (shape[0], math.prod(shape[1:]))


def draw_uniform(key: Key, shape: Shape, dtype: Any, low: Number, high: Number) -> jax.Array:
    """Draw from U(low, high)."""
    wide = drawing_dtype(dtype)
    low, high = jnp.asarray(low, wide), jnp.asarray(high, wide)
    return jax.random.uniform(key, flat(shape), wide, low, high).reshape(shape).astype(dtype)


def draw_normal(key: Key, shape: Shape, dtype: Any, mean: Number, std: Number) -> jax.Array:
    """Draw from a normal distribution."""
    wide = drawing_dtype(dtype)
    draw = jax.random.normal(key, flat(shape), wide).reshape(shape)
    return (draw * jnp.asarray(std, wide) + jnp.asarray(mean, wide)).astype(dtype)


def check_std(name: str, std: Any) -> None:
    """Raise ValueError for a negative standard deviation."""
    if is_number(std) and std < 0:
        raise ValueError(f"{name}: expected std >= 0, got {std}.")


def check_fans(recipe: Any, shape: Sequence[int | None]) -> None:
    """Raise ShapeError for a shape that has no fan in and fan out."""
    if len(shape) < 2:
        raise ShapeError(
            f"{type(recipe).__name__}: fan in and fan out can not be computed for shape "
            f"{format_shape(shape)}, expected two or more dimensions. For a bias use "
            f"nn.init.Zeros() or nn.init.FanInUniform(fan_in)."
        )


def check_matrix(name: str, shape: Sequence[int | None]) -> None:
    """Raise ShapeError for anything but two dimensions."""
    if len(shape) != 2:
        raise ShapeError(f"{name}: expected two dimensions, got shape {format_shape(shape)}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform(Checked):
    """Uniform on [a, b).

    Args:
        a: lower bound (default 0).
        b: upper bound (default 1).

    Raises:
        ValueError: if ``a > b``.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> draw = nn.init.Uniform(-0.1, 0.1)(jax.random.key(0), (100,), "float32")
        >>> bool((abs(draw) <= 0.1).all())
        True
    """

    a: Number = 0.0
    b: Number = 1.0

    def __post_init__(self) -> None:
        if is_number(self.a) and is_number(self.b) and self.a > self.b:
            raise ValueError(f"Uniform: expected a <= b, got a={self.a} and b={self.b}.")

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return draw_uniform(key, shape, dtype, self.a, self.b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normal(Checked):
    """Normal distribution.

    Args:
        mean: default 0.
        std: standard deviation (default 1).

    Raises:
        ValueError: if ``std`` is negative.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> nn.init.Normal(std=0.01)
        Normal(mean=0.0, std=0.01)
        >>> nn.init.Normal(std=0.01)(jax.random.key(0), (2, 3), "float32").shape
        (2, 3)
    """

    mean: Number = 0.0
    std: Number = 1.0

    def __post_init__(self) -> None:
        check_std("Normal", self.std)

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return draw_normal(key, shape, dtype, self.mean, self.std)
