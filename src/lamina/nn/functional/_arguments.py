"""What the functional forms share: reading arguments, and the shapes and dtypes they agree on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ..._core.box import Box, array
from ..._core.errors import ShapeError

Tensor: TypeAlias = Box | ArrayLike

REDUCTIONS = ("none", "mean", "sum")


def same_dtype(*values: Tensor) -> list[jax.Array]:
    """Return the values as arrays of their common dtype, by JAX's promotion rules."""
    arrays = [array(value) for value in values]
    dtype = jnp.result_type(*arrays)
    return [value.astype(dtype) for value in arrays]


def float_array(value: Tensor) -> jax.Array:
    """Return the value as a floating-point array, integers and booleans in the default dtype."""
    result = array(value)
    if jnp.issubdtype(result.dtype, jnp.inexact):
        return result
    return result.astype(jnp.result_type(float))


def widen(value: jax.Array) -> jax.Array:
    """Return half precision as float32, everything else unchanged.

    Sums and exponentials lose too much in 16 bits; callers cast their result back.
    """
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def per_channel(value: jax.Array, ndim: int, axis: int = 1) -> jax.Array:
    """Shape a vector to broadcast along ``axis`` of an array with ``ndim`` dimensions."""
    return value.reshape([-1 if i == axis else 1 for i in range(ndim)])


def spatial_tuple(
    value: int | Sequence[int], ndim: int, function: str, argument: str
) -> tuple[int, ...]:
    """Return one integer per spatial dimension; a single one counts for all."""
    values = (value,) * ndim if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) == 1:
        values *= ndim
    if len(values) != ndim:
        raise ShapeError(f"{function}: {argument} expected an int or {ndim} ints, got {value!r}.")
    return values


def resolve_axis(dim: int, ndim: int, function: str) -> int:
    """Return ``dim`` counted from the front; a scalar has one axis, as in PyTorch."""
    size = max(ndim, 1)
    if not -size <= dim < size:
        raise IndexError(
            f"{function}: dim expected to be in [{-size}, {size - 1}] for an input of rank {ndim}, "
            f"got {dim}."
        )
    return dim % size


def resolve_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Check ``reduction``, or translate the two flags that came before it."""
    if size_average is not None or reduce is not None:
        if reduce is False:
            reduction = "none"
        else:
            reduction = "sum" if size_average is False else "mean"
        warnings.warn(
            f"size_average and reduce are deprecated, use reduction={reduction!r} instead.",
            DeprecationWarning,
            stacklevel=3,
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{reduction!r} is not a valid value for reduction: use one of {REDUCTIONS}"
        )
    return reduction
