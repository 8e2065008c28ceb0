"""Convolution (cross-correlation) over batches of images."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax

from ..._core.errors import ShapeError, format_shape
from ._arguments import Tensor, per_channel, same_dtype, spatial_tuple

_LAYOUTS = {1: ("NCH", "OIH", "NCH"), 2: ("NCHW", "OIHW", "NCHW"), 3: ("NCDHW", "OIDHW", "NCDHW")}


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    """Two-dimensional cross-correlation.

    Args:
        input: shape ``(batch, in_channels, height, width)``, or without the batch.
        weight: shape ``(out_channels, in_channels / groups, kernel_height, kernel_width)``.
        bias: shape ``(out_channels,)``, or None (default).
        stride: step of the kernel, in pixels (default 1).
        padding: zeros added on each side, in pixels (default 0); ``"valid"`` for none, ``"same"``
            for as many as keep the size (stride 1 only; an odd one goes to the right).
        dilation: distance of neighbouring kernel elements, in pixels (default 1).
        groups: number of blocks that the channels are split into (default 1).

    Returns:
        An array of shape ``(batch, out_channels, out_height, out_width)``, or without the batch,
        where ``out = (size + 2 padding - dilation (kernel - 1) - 1) // stride + 1``.

    Raises:
        ShapeError: if ranks, channels, groups or kernel size don't fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina.nn import functional as F
        >>> F.conv2d(jnp.ones((1, 3, 8, 8)), jnp.ones((6, 3, 3, 3)), padding=1).shape
        (1, 6, 8, 8)

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning",
    https://arxiv.org/abs/1603.07285
    """
    return _conv(2, "conv2d", input, weight, bias, stride, padding, dilation, groups)


def _conv(
    spatial: int,
    function: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> jax.Array:
    x, w = same_dtype(input, weight)
    strides = spatial_tuple(stride, spatial, function, "stride")
    dilations = spatial_tuple(dilation, spatial, function, "dilation")
    if min(strides) < 1 or min(dilations) < 1:
        raise ValueError(
            f"{function}: stride and dilation expected to be positive, "
            f"got {stride!r} and {dilation!r}."
        )
    _check_channels(spatial, function, x, w, groups)
    kernel = [d * (k - 1) + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    pads = _pads(function, padding, kernel, strides)
    padded = [n + sum(pad) for n, pad in zip(x.shape[-spatial:], pads, strict=True)]
    if any(n < k for n, k in zip(padded, kernel, strict=True)):
        raise ShapeError(
            f"{function}: the kernel, {format_shape(kernel)} with its dilation, expected to fit "
            f"into the padded input, got {format_shape(padded)}. Pass padding=, or use fewer "
            f"strided or pooling layers before this one."
        )
    batched = x.ndim == spatial + 2
    y = lax.conv_general_dilated(
        x if batched else x[None],
        w,
        window_strides=strides,
        padding=pads,
        rhs_dilation=dilations,
        dimension_numbers=_LAYOUTS[spatial],
        feature_group_count=groups,
    )
    if bias is not None:
        y, b = same_dtype(y, bias)
        if b.shape != (w.shape[0],):
            raise ShapeError(
                f"{function}: bias expected shape ({w.shape[0]},), got {format_shape(b.shape)}."
            )
        y = y + per_channel(b, y.ndim)
    return y if batched else y[0]


def _check_channels(spatial: int, function: str, x: jax.Array, w: jax.Array, groups: int) -> None:
    dims = ", ".join(("depth", "height", "width")[3 - spatial :])
    if w.ndim != spatial + 2:
        raise ShapeError(
            f"{function}: weight expected shape (out_channels, in_channels / groups, {dims}), "
            f"got {format_shape(w.shape)}."
        )
    if x.ndim not in (spatial + 1, spatial + 2):
        raise ShapeError(
            f"{function}: expected input (batch, channels, {dims}) or (channels, {dims}), "
            f"got {format_shape(x.shape)}. Add a missing channel dimension: x[:, None]."
        )
    if groups < 1 or w.shape[0] % groups:
        raise ShapeError(
            f"{function}: out_channels expected to be a multiple of groups, "
            f"got out_channels={w.shape[0]} and groups={groups}."
        )
    channels, expected = x.shape[-spatial - 1], w.shape[1] * groups
    if channels != expected:
        hint = (
            "Images with channels last need x.transpose(0, 3, 1, 2)."
            if spatial == 2 and x.ndim == 4 and x.shape[-1] == expected
            else f"Build the layer with in_channels={channels}."
        )
        raise ShapeError(
            f"{function}: expected in_channels={expected}, got {channels} "
            f"(input {format_shape(x.shape)}, weight {format_shape(w.shape)}, groups={groups}). "
            f"{hint}"
        )


def _pads(
    function: str,
    padding: int | Sequence[int] | str,
    kernel: Sequence[int],
    strides: Sequence[int],
) -> list[tuple[int, int]]:
    """Return the zeros before and after each spatial dimension."""
    if isinstance(padding, str):
        if padding == "valid":
            return [(0, 0)] * len(kernel)
        if padding != "same":
            raise ValueError(
                f"{function}: padding expected 'same', 'valid' or ints, got {padding!r}."
            )
        if any(step != 1 for step in strides):
            raise ValueError(
                f"{function}: padding='same' is not supported for strided convolutions; "
                f"pass the padding in pixels."
            )
        return [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in kernel]
    values = spatial_tuple(padding, len(kernel), function, "padding")
    if min(values) < 0:
        raise ValueError(f"{function}: negative padding is not supported, got {padding!r}.")
    return [(value, value) for value in values]
