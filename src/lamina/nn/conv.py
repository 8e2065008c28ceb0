"""Convolutions."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from .._core.box import array
from .._core.parameter import Parameter
from .._core.shapes import as_sharding
from . import functional as F
from .containers import Module
from .functional._arguments import spatial_tuple
from .init import FanInUniform, KaimingUniform

__all__ = ["Conv2d", "LazyConv2d"]

_PADDING_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class _Conv(Module):
    """What convolutions of every number of dimensions share."""

    _ndim: int

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        name, ndim = type(self).__name__, self._ndim
        if groups <= 0:
            raise ValueError(f"{name}: groups must be a positive integer, got {groups}")
        if in_channels is not None and in_channels % groups:
            raise ValueError(f"{name}: in_channels must be divisible by groups")
        if out_channels % groups:
            raise ValueError(f"{name}: out_channels must be divisible by groups")
        if padding_mode != "zeros" and padding_mode not in _PADDING_MODES:
            raise ValueError(
                f"{name}: padding_mode expected 'zeros', 'reflect', 'replicate' or 'circular', "
                f"got {padding_mode!r}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = spatial_tuple(kernel_size, ndim, name, "kernel_size")
        self.stride = spatial_tuple(stride, ndim, name, "stride")
        self.padding = (
            padding if isinstance(padding, str) else spatial_tuple(padding, ndim, name, "padding")
        )
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(
                    f"{name}: padding expected 'same', 'valid' or ints, got {padding!r}"
                )
            if padding == "same" and any(step != 1 for step in self.stride):
                raise ValueError(
                    f"{name}: padding='same' is not supported for strided convolutions"
                )
        self.dilation = spatial_tuple(dilation, ndim, name, "dilation")
        self.groups = groups
        self.padding_mode = padding_mode
        options: dict[str, Any] = {"dtype": dtype, "sharding": as_sharding(device)}
        self.weight = Parameter(
            shape=self._weight_shape(), init=KaimingUniform(a=math.sqrt(5)), **options
        )
        if bias:
            self.bias = Parameter(
                shape=(out_channels,), init=FanInUniform(of=self.weight), **options
            )
        else:
            self.register_parameter("bias", None)

    def _weight_shape(self) -> tuple[int | None, ...]:
        per_group = self.in_channels // self.groups if self.in_channels else None
        return (self.out_channels, per_group, *self.kernel_size)

    def infer_shapes(self, input: Any) -> None:
        """Take ``in_channels`` from the channel axis of the input."""
        channels = input.shape[-self._ndim - 1]
        if channels % self.groups:
            raise ValueError(
                f"{type(self).__name__}: in_channels must be divisible by groups, the input has "
                f"{channels} channels and groups={self.groups}"
            )
        self.in_channels = channels
        self.weight.shape = self._weight_shape()

    def extra_repr(self) -> str:
        """Return the sizes and the options that are not the default."""
        zeros, ones = (0,) * self._ndim, (1,) * self._ndim
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        if self.padding != zeros:
            text += f", padding={self.padding}"
        if self.dilation != ones:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return text

    def _padded(self, input: Any) -> tuple[Any, Any]:
        """Return the input and the padding still to be done with zeros."""
        if self.padding_mode == "zeros":
            return input, self.padding
        x = array(input)
        if self.padding == "valid":
            sides: Any = [(0, 0)] * self._ndim
        elif self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            sides = [(size, size) for size in self.padding]
        widths = [(0, 0)] * (x.ndim - self._ndim) + sides
        return jnp.pad(x, widths, mode=_PADDING_MODES[self.padding_mode]), 0


class Conv2d(_Conv):
    """A two-dimensional cross-correlation.

    Args:
        in_channels: channels of the input, or ``None`` to infer them.
        out_channels: channels of the output.
        kernel_size: height and width of the kernel, one int for both.
        stride: step (default 1).
        padding: rows and columns added on each side (default 0), ``"same"`` or ``"valid"``.
        dilation: distance of the kernel's elements (default 1).
        groups: blocks of channels that do not mix (default 1).
        bias: whether to add a bias (default True).
        padding_mode: ``"zeros"`` (default), ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: where the parameters go.
        dtype: dtype of the parameters (default float32).

    Shape:
        Input ``(batch, in_channels, height, width)`` or without the batch; ``weight``
        ``(out_channels, in_channels / groups, *kernel_size)``, ``bias`` ``(out_channels,)``. Both
        are drawn from U(±1/sqrt(fan_in)), ``fan_in = in_channels / groups * kernel area``.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.Conv2d(3, 6, 5, padding=2)(jnp.ones((1, 3, 28, 28))).shape
        (1, 6, 28, 28)

    Source: the interface of ``torch.nn.Conv2d``.
    """

    _ndim = 2

    def forward(self, input: Any) -> Any:
        """Convolve ``input``."""
        x, padding = self._padded(input)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class LazyConv2d(Conv2d):
    """A :class:`Conv2d` whose ``in_channels`` is inferred.

    Args:
        out_channels, kernel_size, ...: as for :class:`Conv2d`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> net = nn.LazyConv2d(6, 5)
        >>> net.weight.shape
        (6, None, 5, 5)
        >>> net(jnp.ones((1, 3, 28, 28))).shape
        (1, 6, 24, 24)

    Source: the interface of ``torch.nn.LazyConv2d``.
    """

    cls_to_become = Conv2d

    def __init__(
        self,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            None, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.in_channels = 0  # as PyTorch shows it
