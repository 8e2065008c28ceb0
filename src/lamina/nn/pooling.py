"""Pooling."""

from __future__ import annotations

from typing import Any

from . import functional as F
from .containers import Module

__all__ = ["AvgPool2d", "MaxPool2d"]


class MaxPool2d(Module):
    """The maximum over windows of an image.

    Args:
        kernel_size: height and width of the window, one int for both.
        stride: step of the window (default: ``kernel_size``).
        padding: minus infinity added on each side (default 0).
        dilation: distance of the window's elements (default 1).
        return_indices: also return the flat positions of the maxima (default False).
        ceil_mode: also use windows that reach over the edge (default False).

    Shape:
        Input ``(batch, channels, height, width)`` or without the batch.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.MaxPool2d(2)(jnp.ones((1, 3, 8, 8))).shape
        (1, 3, 4, 4)

    Source: the interface of ``torch.nn.MaxPool2d``.
    """

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        self.kernel_size = kernel_size
        self.stride = stride if stride is not None else kernel_size
        self.padding = padding
        self.dilation = dilation
        self.return_indices = return_indices
        self.ceil_mode = ceil_mode

    def extra_repr(self) -> str:
        """Return the options."""
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )

    def forward(self, input: Any) -> Any:
        """Pool ``input``."""
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class AvgPool2d(Module):
    """The mean over windows of an image.

    Args:
        kernel_size: height and width of the window, one int for both.
        stride: step of the window (default: ``kernel_size``).
        padding: zeros added on each side (default 0).
        ceil_mode: also use windows that reach over the edge (default False).
        count_include_pad: count added zeros in the mean (default True).
        divisor_override: divide by this instead of the number of elements.

    Shape:
        Input ``(batch, channels, height, width)`` or without the batch.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.AvgPool2d(2)(jnp.ones((1, 3, 8, 8))).shape
        (1, 3, 4, 4)

    Source: the interface of ``torch.nn.AvgPool2d``.
    """

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        self.kernel_size = kernel_size
        self.stride = stride if stride is not None else kernel_size
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.divisor_override = divisor_override

    def extra_repr(self) -> str:
        """Return the options."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"

    def forward(self, input: Any) -> Any:
        """Pool ``input``."""
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )
