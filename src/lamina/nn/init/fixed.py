"""Recipes without chance: constants, given arrays, identities."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.box import Box
from ..._core.errors import ShapeError, format_shape
from ..._core.recipe import Checked, Key, Number, Shape, check_matrix, static


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zeros(Checked):
    """All elements 0.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> nn.init.Zeros()(jax.random.key(0), (2,), "float32").tolist()
        [0.0, 0.0]
    """

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros(shape, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ones(Checked):
    """All elements 1.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> nn.init.Ones()(jax.random.key(0), (2,), "float32").tolist()
        [1.0, 1.0]
    """

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.ones(shape, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constant(Checked):
    """All elements equal.

    Args:
        value: the number.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> nn.init.Constant(0.5)(jax.random.key(0), (2,), "float32").tolist()
        [0.5, 0.5]
    """

    value: Number

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(self.value).astype(dtype), shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Value(Checked):
    """A given array, for instance a table computed with NumPy.

    Args:
        array: the value; its shape must be the parameter's.

    Raises:
        ShapeError: when drawn for another shape.

    Example:
        >>> import jax, numpy as np
        >>> from lamina import nn
        >>> nn.init.Value(np.arange(3.0))(jax.random.key(0), (3,), "float32").tolist()
        [0.0, 1.0, 2.0]
    """

    array: Any

    def __post_init__(self) -> None:
        if isinstance(self.array, (list, tuple, Box)):
            # A list would be taken apart by pytree operations, and a box could change.
            object.__setattr__(self, "array", np.asarray(self.array))

    def check(self, shape: Sequence[int | None]) -> None:
        """Raise :class:`ShapeError` if the array has another shape."""
        got = jnp.shape(self.array)
        if len(got) != len(shape) or any(
            size is not None and size != own for size, own in zip(shape, got, strict=True)
        ):
            raise ShapeError(
                f"Value: expected an array of shape {format_shape(shape)}, got {format_shape(got)}."
            )

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        self.check(shape)
        return jnp.asarray(self.array).astype(dtype)

    def __repr__(self) -> str:
        dtype = getattr(self.array, "dtype", type(self.array).__name__)
        return f"Value({dtype}{list(np.shape(self.array))})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eye(Checked):
    """The identity matrix: a linear layer that passes on as many inputs as it can.

    Raises:
        ShapeError: for anything but a matrix.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> nn.init.Eye()(jax.random.key(0), (2, 3), "float32").tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """

    def check(self, shape: Sequence[int | None]) -> None:
        """Raise :class:`ShapeError` for anything but a matrix."""
        check_matrix("Eye", shape)

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        self.check(shape)
        return jnp.eye(*shape, dtype=dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dirac(Checked):
    """Convolution kernels that pass on as many channels as they can.

    Args:
        groups: number of channel groups, each with the identity of its own (default 1).

    Raises:
        ValueError: if ``groups`` is not positive.
        ShapeError: unless there are 3, 4 or 5 dimensions, the first a multiple of ``groups``.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> nn.init.Dirac()(jax.random.key(0), (2, 2, 3), "float32")[0].tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """

    groups: int = static(default=1)

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"Dirac: expected groups >= 1, got {self.groups}.")

    def check(self, shape: Sequence[int | None]) -> None:
        """Raise :class:`ShapeError` unless the shape is a convolution kernel's."""
        if len(shape) not in (3, 4, 5):
            raise ShapeError(
                f"Dirac: expected a kernel of 3, 4 or 5 dimensions, got {format_shape(shape)}."
            )
        if shape[0] is not None and shape[0] % self.groups:
            raise ShapeError(
                f"Dirac: expected dimension 0 to be a multiple of groups={self.groups}, "
                f"got {shape[0]}."
            )

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        self.check(shape)
        per_group = shape[0] // self.groups
        identity = jnp.eye(per_group, shape[1], dtype=dtype)
        centre = tuple(size // 2 for size in shape[2:])
        kernel = jnp.zeros(shape, dtype)
        return kernel.at[(slice(None), slice(None), *centre)].set(
            jnp.tile(identity, (self.groups, 1))
        )
