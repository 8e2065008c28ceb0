"""Normalisation by the statistics of a batch or of a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ..._core.box import Box, array
from ..._core.errors import ShapeError, TypeMismatchError, format_shape
from ._arguments import Tensor, float_array, per_channel, widen


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> jax.Array:
    """Normalise each channel by its mean and variance over the batch, or by running ones.

    With ``training`` the batch's own statistics are used, and the running ones, which must be
    buffers (``nn.Buffer``), are moved towards them: ``(1 - momentum) * old + momentum * new``,
    with the unbiased variance.

    Args:
        input: shape ``(batch, channels, *)``.
        running_mean: shape ``(channels,)``, or None.
        running_var: shape ``(channels,)``, or None.
        weight: factor of each channel, shape ``(channels,)``, or None (default).
        bias: shift of each channel, shape ``(channels,)``, or None (default).
        training: whether to use the statistics of the batch (default False).
        momentum: weight of the new statistics (default 0.1).
        eps: added to the variance (default 1e-5).

    Returns:
        An array of the input's shape and dtype; statistics are computed in float32 at least.

    Raises:
        ShapeError: if the number of channels doesn't fit, or a channel has only one value to
            compute a variance from.
        ValueError: if not training and a running statistic is None.
        TypeMismatchError: if running statistics to be updated are arrays, which can't change.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina.nn import functional as F
        >>> F.batch_norm(jnp.array([[1.0], [3.0]]), None, None, training=True, eps=0.0).tolist()
        [[-1.0], [1.0]]

    Source: Ioffe and Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167
    """
    x = float_array(input)
    if x.ndim < 2:
        raise ShapeError(
            f"batch_norm: expected input (batch, channels, ...), got {format_shape(x.shape)}."
        )
    channels = x.shape[1]
    for name, value in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if value is None:
            continue
        shape = value.shape if isinstance(value, Box) else jnp.shape(value)
        if shape != (channels,):
            raise ShapeError(
                f"batch_norm: {name} expected shape ({channels},) for input "
                f"{format_shape(x.shape)}, got {format_shape(shape)}. "
                f"Build the layer with num_features={channels}."
            )
    wide = widen(x)
    if training:
        mean, variance = _batch_statistics(wide, running_mean, running_var, momentum)
    elif running_mean is None or running_var is None:
        raise ValueError(
            "batch_norm: expected running_mean and running_var when training=False, got None. "
            "Pass both, or training=True to use the statistics of the batch."
        )
    else:
        mean, variance = array(running_mean), array(running_var)
    scale = lax.rsqrt(widen(variance) + eps)
    y = (wide - per_channel(widen(mean), x.ndim)) * per_channel(scale, x.ndim)
    if weight is not None:
        y = y * per_channel(widen(array(weight)), x.ndim)
    if bias is not None:
        y = y + per_channel(widen(array(bias)), x.ndim)
    return y.astype(x.dtype)


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """Normalise each sample by its mean and variance over the last dimensions.

    Args:
        input: shape ``(*, *normalized_shape)``.
        normalized_shape: sizes of the last dimensions, over which statistics are taken.
        weight: factor of each element, shape ``normalized_shape``, or None (default).
        bias: shift of each element, shape ``normalized_shape``, or None (default).
        eps: added to the variance (default 1e-5).

    Returns:
        An array of the input's shape and dtype; statistics are computed in float32 at least.

    Raises:
        ShapeError: if the input doesn't end in ``normalized_shape``, or weight or bias have
            another shape.

    Example:
        >>> from lamina.nn import functional as F
        >>> F.layer_norm([[1.0, 3.0]], (2,), eps=0.0).tolist()
        [[-1.0, 1.0]]

    Source: Ba, Kiros and Hinton, "Layer Normalization", https://arxiv.org/abs/1607.06450
    """
    x = float_array(input)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise ShapeError(
            f"layer_norm: expected input (*, {', '.join(map(str, shape))}), "
            f"got {format_shape(x.shape)}. Build the layer with normalized_shape equal to the last "
            f"sizes of the input."
        )
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    wide = widen(x)
    mean = wide.mean(axes, keepdims=True)
    centred = wide - mean
    variance = jnp.square(centred).mean(axes, keepdims=True)
    y = centred * lax.rsqrt(variance + eps)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        values = array(value)
        if values.shape != shape:
            raise ShapeError(
                f"layer_norm: {name} expected shape {format_shape(shape)}, "
                f"got {format_shape(values.shape)}."
            )
        values = widen(values).reshape((1,) * (x.ndim - len(shape)) + shape)
        y = y * values if name == "weight" else y + values
    return y.astype(x.dtype)


def _batch_statistics(
    x: jax.Array, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[jax.Array, jax.Array]:
    """Return mean and biased variance of each channel, and update the running ones."""
    count = math.prod(x.shape) // max(x.shape[1], 1)
    if count == 1:
        raise ShapeError(
            f"batch_norm: expected more than 1 value per channel when training, "
            f"got input {format_shape(x.shape)}. Use a larger batch (drop a last one of size 1), "
            f"or net.eval()."
        )
    axes = (0, *range(2, x.ndim))
    mean = x.mean(axes)
    variance = jnp.square(x - per_channel(mean, x.ndim)).mean(axes)
    for name, running, new in (
        ("running_mean", running_mean, mean),
        ("running_var", running_var, variance * (count / max(count - 1, 1))),
    ):
        if running is None:
            continue
        if not isinstance(running, Box):
            raise TypeMismatchError(
                f"batch_norm: {name} expected an nn.Buffer when training, because it is updated, "
                f"got {type(running).__name__}. Pass nn.Buffer({name}), or None."
            )
        # Running statistics are no part of the function that gradients are taken of.
        old = widen(running.data)
        running.copy_(lax.stop_gradient((1 - momentum) * old + momentum * new))
    return mean, variance
