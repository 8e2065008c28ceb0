"""Dropout: noise that keeps a network from relying on single activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..._core.box import array
from ..._core.random import next_key
from ._arguments import Tensor


def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> jax.Array:
    """Zero each element with probability ``p`` and divide the others by ``1 - p``.

    Args:
        input: any shape.
        p: probability of zeroing an element (default 0.5).
        training: without it the input is returned as it is (default True).
        inplace: accepted for PyTorch's sake; arrays never change in place.

    Returns:
        An array of the input's shape and dtype. The random numbers come from lamina's default
        generator (``lamina.manual_seed``), also in compiled functions.

    Raises:
        ValueError: if ``p`` is not in [0, 1].

    Example:
        >>> from lamina.nn import functional as F
        >>> F.dropout([1.0, 2.0], training=False).tolist()
        [1.0, 2.0]
        >>> F.dropout([1.0, 2.0], p=1.0).tolist()
        [0.0, 0.0]

    Source: Srivastava et al., "Dropout", https://jmlr.org/papers/v15/srivastava14a.html
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    x = array(input)
    if not training or p == 0:
        return x
    if p == 1:
        return jnp.zeros_like(x)
    keep = jax.random.bernoulli(next_key(), 1 - p, x.shape)
    return jnp.where(keep, x / (1 - p), 0).astype(x.dtype)
