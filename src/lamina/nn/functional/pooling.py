"""Pooling: the maximum or the mean over windows that slide across an image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._core.box import array
from ..._core.errors import ShapeError, format_shape
from ._arguments import Tensor, spatial_tuple, widen


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Maximum over two-dimensional windows.

    Where a window holds its maximum several times the first one in row order counts, for the index
    and for the gradient, as in PyTorch. A NaN in a window is its maximum.

    Args:
        input: shape ``(batch, channels, height, width)``, or without the batch.
        kernel_size: window size, in pixels.
        stride: step of the window (default: ``kernel_size``).
        padding: border on each side that never is the maximum, at most half a window (default 0).
        dilation: distance of neighbouring window elements (default 1).
        ceil_mode: keep a last window that reaches over the edge (default False).
        return_indices: also return where the maxima were found (default False).

    Returns:
        An array of shape ``(batch, channels, out_height, out_width)``, or without the batch; with
        ``return_indices`` a pair with an int32 array of positions in the flattened image.

    Raises:
        ShapeError: if the rank doesn't fit, the padding is too wide or no window fits.

    Example:
        >>> from lamina.nn import functional as F
        >>> F.max_pool2d([[[1.0, 2.0], [3.0, 0.0]]], 2).tolist()
        [[[3.0]]]
        >>> F.max_pool2d([[[1.0, 2.0], [3.0, 0.0]]], 2, return_indices=True)[1].tolist()
        [[[2]]]
    """
    x = array(input)
    windows = _windows(2, "max_pool2d", x, kernel_size, stride, padding, dilation, ceil_mode)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        lowest = -jnp.inf
    else:
        lowest = jnp.iinfo(x.dtype).min
    widths = [(0, 0)] * (x.ndim - 2) + [(w.padding, w.padding_after) for w in windows]
    best = jnp.pad(x, [(before, max(after, 0)) for before, after in widths], constant_values=lowest)
    index = None
    if return_indices:
        # Clipped, because a window of nothing but -inf finds its maximum in the padding.
        rows, columns = (
            np.clip(np.arange(size) - w.padding, 0, w.size - 1)
            for size, w in zip(best.shape[-2:], windows, strict=True)
        )
        flat = np.add.outer(rows * x.shape[-1], columns).astype(np.int32)
        index = jnp.broadcast_to(flat, best.shape)
    # Rows first and columns after: of several equal maxima this finds the same one as a scan of
    # the whole window, in k + k steps and not k * k. Comparing slices compiles to one fused loop;
    # the gradient of lax.reduce_window is ten times slower on CPU and knows no dilation.
    for axis, window in ((x.ndim - 1, windows[1]), (x.ndim - 2, windows[0])):
        best, index = _max_along(best, index, axis, window)
    return best if index is None else (best, index)


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> jax.Array:
    """Mean over two-dimensional windows.

    Args:
        input: shape ``(batch, channels, height, width)``, or without the batch.
        kernel_size: window size, in pixels.
        stride: step of the window (default: ``kernel_size``).
        padding: zeros on each side, at most half a window (default 0).
        ceil_mode: keep a last window that reaches over the edge (default False).
        count_include_pad: count the zeros of the padding in the mean (default True).
        divisor_override: divide the sum by this number and not by the window's size.

    Returns:
        An array of shape ``(batch, channels, out_height, out_width)``, or without the batch; half
        precision is summed in float32.

    Raises:
        ShapeError: if the rank doesn't fit, the padding is too wide or no window fits.
        ValueError: if ``divisor_override`` is 0.

    Example:
        >>> from lamina.nn import functional as F
        >>> F.avg_pool2d([[[1.0, 2.0], [3.0, 6.0]]], 2).tolist()
        [[[3.0]]]
    """
    if divisor_override == 0:
        raise ValueError("avg_pool2d: divisor_override expected not to be 0.")
    x = array(input)
    windows = _windows(2, "avg_pool2d", x, kernel_size, stride, padding, 1, ceil_mode)
    leading = (1,) * (x.ndim - 2)
    sums = lax.reduce_window(
        widen(x),
        np.zeros((), widen(x).dtype),
        lax.add,
        (*leading, *(w.kernel for w in windows)),
        (*leading, *(w.stride for w in windows)),
        [(0, 0)] * (x.ndim - 2) + [(w.padding, w.padding_after) for w in windows],
    )
    if divisor_override is not None:
        divisors = np.float32(divisor_override)
    else:
        counts = [w.counts(count_include_pad) for w in windows]
        divisors = functools.reduce(np.multiply.outer, counts).astype(np.float32)
        divisors = divisors.reshape((*leading, *divisors.shape))
    return (sums / divisors).astype(x.dtype)


class _Window(NamedTuple):
    """The windows along one dimension."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    out: int

    @property
    def padding_after(self) -> int:
        """Padding that the last window needs; negative if it ends before the edge."""
        reach = (self.out - 1) * self.stride + self.dilation * (self.kernel - 1) + 1
        return reach - self.size - self.padding

    def counts(self, include_padding: bool) -> np.ndarray:
        """Return how many elements each window averages over; what ceil_mode adds never counts."""
        start = np.arange(self.out) * self.stride - self.padding
        end = np.minimum(start + self.kernel, self.size + self.padding)
        if not include_padding:
            start, end = np.maximum(start, 0), np.minimum(end, self.size)
        return end - start


def _windows(
    spatial: int,
    function: str,
    x: jax.Array,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> list[_Window]:
    if x.ndim not in (spatial + 1, spatial + 2):
        dims = ", ".join(("depth", "height", "width")[3 - spatial :])
        raise ShapeError(
            f"{function}: expected input (batch, channels, {dims}) or (channels, {dims}), "
            f"got {format_shape(x.shape)}. Add a missing channel dimension: x[:, None]."
        )
    kernels = spatial_tuple(kernel_size, spatial, function, "kernel_size")
    # An empty stride stands for the default in PyTorch too.
    strides = spatial_tuple(stride, spatial, function, "stride") if stride else kernels
    paddings = spatial_tuple(padding, spatial, function, "padding")
    dilations = spatial_tuple(dilation, spatial, function, "dilation")
    if stride == 0 or min(*kernels, *strides, *dilations) < 1 or min(paddings) < 0:
        raise ValueError(
            f"{function}: kernel_size, stride and dilation expected to be positive and padding not "
            f"negative, got {kernel_size!r}, {stride!r}, {dilation!r} and {padding!r}."
        )
    windows = []
    for n, k, s, p, d in zip(
        x.shape[-spatial:], kernels, strides, paddings, dilations, strict=True
    ):
        reach = d * (k - 1) + 1
        if 2 * p > reach:
            raise ShapeError(
                f"{function}: padding expected to be at most half of the window, "
                f"got padding={padding!r} and kernel_size={kernel_size!r}."
            )
        free = n + 2 * p - reach
        out = (free + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (out - 1) * s >= n + p:
            out -= 1  # the last window would start in the padding
        if out < 1:
            raise ShapeError(
                f"{function}: the window expected to fit into the input, got input "
                f"{format_shape(x.shape)} and kernel_size={kernel_size!r}. Use a smaller "
                f"kernel_size, or fewer strided or pooling layers before this one."
            )
        windows.append(_Window(n, k, s, p, d, out))
    return windows


def _max_along(
    x: jax.Array, index: jax.Array | None, axis: int, window: _Window
) -> tuple[jax.Array, jax.Array | None]:
    def element(values: jax.Array, i: int) -> jax.Array:
        start = i * window.dilation
        return lax.slice_in_dim(
            values, start, start + (window.out - 1) * window.stride + 1, window.stride, axis
        )

    best = element(x, 0)
    where = None if index is None else element(index, 0)
    for i in range(1, window.kernel):
        candidate = element(x, i)
        better = candidate > best
        if jnp.issubdtype(x.dtype, jnp.inexact):
            better |= jnp.isnan(candidate)
        best = jnp.where(better, candidate, best)
        if index is not None and where is not None:
            where = jnp.where(better, element(index, i), where)
    return best, where
