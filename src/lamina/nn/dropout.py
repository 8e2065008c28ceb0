"""Dropout."""

from __future__ import annotations

from typing import Any

from . import functional as F
from .containers import Module

__all__ = ["Dropout"]


class Dropout(Module):
    """In training, set elements to zero with probability ``p`` and scale the others by 1/(1-p).

    Draws from lamina's default generator (:func:`lamina.manual_seed`, :func:`lamina.rng`), also
    inside compiled functions.

    Args:
        p: probability of zero (default 0.5).
        inplace: accepted for PyTorch's sake; arrays do not change in place.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.Dropout(0.5).eval()(jnp.ones(3))
        Array([1., 1., 1.], dtype=float32)

    Source: the interface of ``torch.nn.Dropout``; Srivastava et al.,
    https://jmlr.org/papers/v15/srivastava14a.html
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.p = p
        self.inplace = inplace

    def extra_repr(self) -> str:
        """Return the probability."""
        return f"p={self.p}, inplace={self.inplace}"

    def forward(self, input: Any) -> Any:
        """Drop elements in training mode."""
        return F.dropout(input, self.p, self.training, self.inplace)
