"""Activation functions: applied to each element, or along one dimension."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from ..._core.box import array
from ._arguments import Tensor, float_array, resolve_axis, widen


def relu(input: Tensor, inplace: bool = False) -> jax.Array:
    """Rectified linear unit, ``max(0, x)``; its gradient at 0 is 0.

    Args:
        input: any shape.
        inplace: accepted for PyTorch's sake; arrays never change in place.

    Returns:
        An array of the input's shape and dtype.

    Example:
        >>> from lamina.nn import functional as F
        >>> F.relu([-1.0, 0.0, 2.0]).tolist()
        [0.0, 0.0, 2.0]
    """
    return jax.nn.relu(array(input))


def sigmoid(input: Tensor) -> jax.Array:
    """Logistic function, ``1 / (1 + exp(-x))``.

    Args:
        input: any shape; integers are taken as float32.

    Returns:
        An array of the input's shape, values in [0, 1].

    Example:
        >>> from lamina.nn import functional as F
        >>> float(F.sigmoid(0.0))
        0.5
    """
    return jax.nn.sigmoid(float_array(input))


def tanh(input: Tensor) -> jax.Array:
    """Hyperbolic tangent.

    Args:
        input: any shape; integers are taken as float32.

    Returns:
        An array of the input's shape, values in [-1, 1].

    Example:
        >>> from lamina.nn import functional as F
        >>> float(F.tanh(0.0))
        0.0
    """
    return jnp.tanh(float_array(input))


def gelu(input: Tensor, approximate: str = "none") -> jax.Array:
    """Gaussian error linear unit, ``x * Phi(x)`` with ``Phi`` the normal distribution function.

    Args:
        input: any shape.
        approximate: ``"none"`` (default) for the exact function, ``"tanh"`` for
            ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``.

    Returns:
        An array of the input's shape and dtype; half precision is computed in float32.

    Raises:
        ValueError: if ``approximate`` is neither of the two.

    Example:
        >>> from lamina.nn import functional as F
        >>> f"{F.gelu(1.0):.4f}"
        '0.8413'

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate expected 'none' or 'tanh', got {approximate!r}.")
    x = float_array(input)
    return jax.nn.gelu(widen(x), approximate=approximate == "tanh").astype(x.dtype)


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> jax.Array:
    """Exponentials along one dimension, scaled to sum to 1.

    Args:
        input: any shape.
        dim: the dimension that sums to 1. Leaving it out is deprecated, as in PyTorch.
        _stacklevel: of the warning about a missing ``dim``.
        dtype: cast the input to this dtype first.

    Returns:
        An array of the input's shape; half precision is computed in float32.

    Raises:
        IndexError: if the input has no dimension ``dim``.

    Example:
        >>> from lamina.nn import functional as F
        >>> F.softmax([0.0, 0.0], dim=0).tolist()
        [0.5, 0.5]
    """
    x = _cast(input, dtype)
    axis = _axis(dim, x.ndim, "softmax", _stacklevel)
    if x.ndim == 0:
        return jax.nn.softmax(x[None], axis=axis)[0]
    return jax.nn.softmax(widen(x), axis=axis).astype(x.dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> jax.Array:
    """Logarithm of :func:`softmax`, computed without overflow or underflow.

    Args:
        input: any shape.
        dim: the dimension whose exponentials sum to 1. Leaving it out is deprecated.
        _stacklevel: of the warning about a missing ``dim``.
        dtype: cast the input to this dtype first.

    Returns:
        An array of the input's shape; half precision is computed in float32.

    Raises:
        IndexError: if the input has no dimension ``dim``.

    Example:
        >>> from lamina.nn import functional as F
        >>> F.log_softmax([1000.0, 0.0], dim=0).tolist()
        [0.0, -1000.0]
    """
    x = _cast(input, dtype)
    axis = _axis(dim, x.ndim, "log_softmax", _stacklevel)
    if x.ndim == 0:
        return jax.nn.log_softmax(x[None], axis=axis)[0]
    return jax.nn.log_softmax(widen(x), axis=axis).astype(x.dtype)


def _cast(input: Tensor, dtype: Any) -> jax.Array:
    return float_array(input) if dtype is None else array(input).astype(dtype)


def _axis(dim: int | None, ndim: int, function: str, stacklevel: int) -> int:
    if dim is None:
        dim = 0 if ndim in (0, 1, 3) else 1
        warnings.warn(
            f"{function}: the implicit choice of dim={dim} is deprecated; "
            f"say {function}(x, dim=-1) for the last dimension.",
            UserWarning,
            stacklevel=stacklevel,
        )
    return resolve_axis(dim, ndim, function)
