"""Activation functions as modules."""

from __future__ import annotations

from typing import Any

from . import functional as F
from .containers import Module

__all__ = ["GELU", "ReLU", "Sigmoid", "Softmax", "Tanh"]


class ReLU(Module):
    """``max(x, 0)``.

    Args:
        inplace: accepted for PyTorch's sake; arrays do not change in place.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.ReLU()(jnp.array([-1.0, 2.0]))
        Array([0., 2.], dtype=float32)

    Source: the interface of ``torch.nn.ReLU``.
    """

    def __init__(self, inplace: bool = False) -> None:
        self.inplace = inplace

    def extra_repr(self) -> str:
        """Return ``inplace`` if it is set."""
        return "inplace=True" if self.inplace else ""

    def forward(self, input: Any) -> Any:
        """Apply the function to every element."""
        return F.relu(input)


class Sigmoid(Module):
    """``1 / (1 + exp(-x))``.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.Sigmoid()(jnp.zeros(2))
        Array([0.5, 0.5], dtype=float32)

    Source: the interface of ``torch.nn.Sigmoid``.
    """

    def forward(self, input: Any) -> Any:
        """Apply the function to every element."""
        return F.sigmoid(input)


class Tanh(Module):
    """The hyperbolic tangent.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.Tanh()(jnp.zeros(2))
        Array([0., 0.], dtype=float32)

    Source: the interface of ``torch.nn.Tanh``.
    """

    def forward(self, input: Any) -> Any:
        """Apply the function to every element."""
        return F.tanh(input)


class GELU(Module):
    """The Gaussian error linear unit, ``x * Phi(x)``.

    Args:
        approximate: ``"none"`` (default) or ``"tanh"``.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.GELU()
        GELU(approximate='none')
        >>> nn.GELU()(jnp.zeros(2))
        Array([0., 0.], dtype=float32)

    Source: the interface of ``torch.nn.GELU``.
    """

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = approximate

    def extra_repr(self) -> str:
        """Return which formula is used."""
        return f"approximate={self.approximate!r}"

    def forward(self, input: Any) -> Any:
        """Apply the function to every element."""
        return F.gelu(input, self.approximate)


class Softmax(Module):
    """Exponentials along an axis, divided by their sum.

    Args:
        dim: the axis. Without it PyTorch's old choice is made, with a warning.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.Softmax(dim=-1)(jnp.zeros((1, 2)))
        Array([[0.5, 0.5]], dtype=float32)

    Source: the interface of ``torch.nn.Softmax``.
    """

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim

    def extra_repr(self) -> str:
        """Return the axis."""
        return f"dim={self.dim}"

    def forward(self, input: Any) -> Any:
        """Normalise along the axis."""
        return F.softmax(input, self.dim)
