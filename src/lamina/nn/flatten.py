"""Reshaping."""

from __future__ import annotations

from typing import Any

from . import functional as F
from .containers import Module

__all__ = ["Flatten"]


class Flatten(Module):
    """Merge consecutive axes into one.

    Args:
        start_dim: first axis to merge (default 1, which keeps the batch).
        end_dim: last axis to merge (default -1).

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.Flatten()(jnp.ones((2, 3, 4))).shape
        (2, 12)

    Source: the interface of ``torch.nn.Flatten``.
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim = start_dim
        self.end_dim = end_dim

    def extra_repr(self) -> str:
        """Return the axes."""
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"

    def forward(self, input: Any) -> Any:
        """Reshape ``input``."""
        return F.flatten(input, self.start_dim, self.end_dim)
