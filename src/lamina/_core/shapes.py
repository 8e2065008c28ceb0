"""Shapes, dtypes and places, as users write them and as JAX holds them."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import ShapeError

__all__ = [
    "Shape",
    "Size",
    "as_sharding",
    "canonical",
    "check_shape",
    "fits",
    "is_floating",
    "is_inexact",
    "parse_targets",
    "weakest",
]

Shape = tuple[int | None, ...]


class Size(int):
    """The number of elements; called, the sizes, as PyTorch's ``tensor.size()``."""

    shape: tuple[int, ...]

    def __new__(cls, shape: tuple[int, ...]) -> Size:
        self = super().__new__(cls, math.prod(shape))
        self.shape = shape
        return self

    def __call__(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]


def canonical(dtype: Any) -> np.dtype:
    """Return the dtype as JAX holds it: 64-bit types become 32-bit unless x64 is enabled."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def check_shape(shape: Any) -> Shape:
    """Return ``shape`` as a tuple of non-negative ints and ``None``, or raise."""
    dims = (shape,) if isinstance(shape, int) or shape is None else tuple(shape)
    result = []
    for dim in dims:
        if dim is not None:
            dim = operator.index(dim)
            if dim < 0:
                raise ShapeError(f"a shape has no negative sizes, got {dims}")
        result.append(dim)
    return tuple(result)


def fits(known: Shape | None, shape: Any) -> bool:
    """Tell whether a shape agrees with what is known of another; ``None`` is unknown.

    Example:
        >>> fits((3, None), (3, 5)), fits((3, None), (2, 5)), fits(None, (2, 5))
        (True, False, True)
    """
    return known is None or (
        len(known) == len(shape)
        and all(None in pair or pair[0] == pair[1] for pair in zip(known, shape, strict=True))
    )


def is_inexact(dtype: Any) -> bool:
    """Tell whether a dtype is floating or complex."""
    return jnp.issubdtype(dtype, jnp.inexact)


def is_floating(dtype: Any) -> bool:
    """Tell whether a dtype is floating, of any width."""
    return jnp.issubdtype(dtype, jnp.floating)


def as_sharding(place: Any) -> Any:
    """Return a device, a platform name (``"cpu"``) or a sharding as a ``jax.sharding.Sharding``."""
    if isinstance(place, str):
        name, _, index = place.partition(":")
        place = jax.devices({"cuda": "gpu"}.get(name, name))[int(index or 0)]
    if isinstance(place, jax.Device):
        return jax.sharding.SingleDeviceSharding(place)
    return place


def weakest(dtype: Any) -> np.dtype:
    """Return the narrowest dtype of a kind, so that a cast within the kind is always allowed."""
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float16)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex64)
    if jnp.issubdtype(dtype, jnp.bool_):
        return np.dtype(np.bool_)
    return np.dtype(np.int8)


def parse_targets(targets: Any, dtype: Any, device: Any) -> tuple[Any, Any]:
    """Sort what ``to(...)`` was given into a dtype and a device or sharding."""
    for target in targets:
        place = getattr(target, "sharding", None)
        if isinstance(target, str) and target in _DTYPE_NAMES:
            dtype = target
        elif isinstance(target, (str, jax.Device, jax.sharding.Sharding)):
            device = target
        elif place is not None:
            dtype, device = getattr(target, "dtype", None), place
        elif target is not None:
            dtype = target
    return dtype, device


_DTYPE_NAMES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
