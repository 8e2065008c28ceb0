"""Losses: how far predictions are from their targets."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp

from ..._core.box import array
from ..._core.errors import ShapeError, TypeMismatchError, format_shape
from ._arguments import Tensor, float_array, per_channel, resolve_reduction, same_dtype, widen


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> jax.Array:
    """Squared error, ``(input - target)^2``.

    Args:
        input: predictions, any shape.
        target: same shape as ``input``; another one is broadcast, with a warning.
        size_average: deprecated, use ``reduction``.
        reduce: deprecated, use ``reduction``.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.
        weight: factor of each element, same shape as ``input``; the mean is then weighted.

    Returns:
        A scalar, or an array of the input's shape for ``"none"``; half precision is summed in
        float32.

    Raises:
        ShapeError: if shapes don't broadcast, or ``weight`` has another shape.
        ValueError: if ``reduction`` is none of the three.

    Example:
        >>> from lamina.nn import functional as F
        >>> float(F.mse_loss([1.0, 2.0], [1.0, 4.0]))
        2.0
    """
    reduction = resolve_reduction(size_average, reduce, reduction)
    x, y = same_dtype(float_array(input), target)
    if x.shape != y.shape:
        warnings.warn(
            f"mse_loss: target {format_shape(y.shape)} and input {format_shape(x.shape)} have "
            f"different shapes and are broadcast, which is rarely meant. Reshape one of them.",
            UserWarning,
            stacklevel=2,
        )
        try:
            shape = jnp.broadcast_shapes(x.shape, y.shape)
        except ValueError:
            raise ShapeError(
                f"mse_loss: expected target {format_shape(x.shape)}, the shape of the input, "
                f"got {format_shape(y.shape)}."
            ) from None
        x, y = jnp.broadcast_to(x, shape), jnp.broadcast_to(y, shape)
    errors = jnp.square(widen(x) - widen(y))
    if weight is None:
        return _reduced(errors, reduction).astype(x.dtype)
    weights = array(weight)
    if weights.shape != errors.shape:
        raise ShapeError(
            f"mse_loss: weight expected shape {format_shape(errors.shape)}, the input's, "
            f"got {format_shape(weights.shape)}."
        )
    errors = errors * widen(weights)
    if reduction == "mean":
        return (errors.sum() / widen(weights).sum()).astype(x.dtype)
    return _reduced(errors, reduction).astype(x.dtype)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Cross-entropy of logits and classes, or of logits and class probabilities.

    Args:
        input: unnormalised logits, shape ``(classes,)``, ``(batch, classes)`` or
            ``(batch, classes, d1, ...)``.
        target: class indices, of the input's shape without its class dimension, or class
            probabilities (floating point), of exactly the input's shape.
        weight: factor of each class, shape ``(classes,)``, or None (default).
        size_average: deprecated, use ``reduction``.
        ignore_index: targets of this class count for nothing, not in the mean either
            (default -100; for class indices only).
        reduce: deprecated, use ``reduction``.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``. The mean over class indices is
            weighted by ``weight``; the mean over probabilities is over samples.
        label_smoothing: share of the target that is spread over all classes (default 0).

    Returns:
        A scalar, or an array of the input's shape without its class dimension for ``"none"``.
        Half precision is computed in float32. A class index outside ``[0, classes)`` gives NaN.

    Raises:
        ShapeError: if target or weight don't fit the input.
        TypeMismatchError: if targets of the input's shape are not floating point, or class indices
            not integers.
        ValueError: if ``reduction`` or ``label_smoothing`` are out of range.

    Example:
        >>> from lamina.nn import functional as F
        >>> f"{F.cross_entropy([[0.0, 0.0], [0.0, 0.0]], [0, 1]):.4f}"
        '0.6931'
        >>> f"{F.cross_entropy([[0.0, 9.0]], [[0.5, 0.5]]):.4f}"
        '4.5001'

    Source: label smoothing is equation (7) and after of Szegedy et al., "Rethinking the Inception
    Architecture", https://arxiv.org/abs/1512.00567
    """
    reduction = resolve_reduction(size_average, reduce, reduction)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"cross_entropy: label_smoothing expected in [0, 1], got {label_smoothing}."
        )
    x, y = float_array(input), array(target)
    axis = _class_axis(x, "cross_entropy")
    weights = _class_weights(weight, x, axis, "cross_entropy")
    log_p = jax.nn.log_softmax(widen(x), axis=axis)
    if y.shape == x.shape:
        if not jnp.issubdtype(y.dtype, jnp.floating):
            raise TypeMismatchError(
                f"cross_entropy: a target of the input's shape {format_shape(x.shape)} is class "
                f"probabilities, expected floating point, got {y.dtype}. Class indices have the "
                f"input's shape without its class dimension."
            )
        if ignore_index >= 0:
            raise ValueError("cross_entropy: ignore_index is for class indices, not probabilities.")
        losses = _soft_losses(log_p, widen(y), weights, axis, label_smoothing)
        if reduction == "mean":
            return (losses.sum() / max(losses.size, 1)).astype(x.dtype)
        return _reduced(losses, reduction).astype(x.dtype)
    losses, counts = _hard_losses(log_p, y, weights, axis, ignore_index, "cross_entropy")
    if label_smoothing:
        smooth = -(log_p if weights is None else log_p * weights).sum(axis)
        smooth = jnp.where(y == ignore_index, 0, smooth)
        losses = (1 - label_smoothing) * losses + label_smoothing / x.shape[axis] * smooth
    return _mean_by_counts(losses, counts, reduction).astype(x.dtype)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Negative log-likelihood of classes under log-probabilities.

    Args:
        input: log-probabilities (as from ``log_softmax``), shape ``(classes,)``,
            ``(batch, classes)`` or ``(batch, classes, d1, ...)``.
        target: class indices, of the input's shape without its class dimension.
        weight: factor of each class, shape ``(classes,)``, or None (default).
        size_average: deprecated, use ``reduction``.
        ignore_index: targets of this class count for nothing (default -100).
        reduce: deprecated, use ``reduction``.
        reduction: ``"mean"`` (default, weighted by ``weight``), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or an array of the target's shape for ``"none"``. A class index outside
        ``[0, classes)`` gives NaN.

    Raises:
        ShapeError: if target or weight don't fit the input.
        TypeMismatchError: if class indices are not integers.
        ValueError: if ``reduction`` is none of the three.

    Example:
        >>> from lamina.nn import functional as F
        >>> float(F.nll_loss([[-1.0, -2.0], [-3.0, -4.0]], [0, 1]))
        2.5
    """
    reduction = resolve_reduction(size_average, reduce, reduction)
    x, y = float_array(input), array(target)
    axis = _class_axis(x, "nll_loss")
    weights = _class_weights(weight, x, axis, "nll_loss")
    losses, counts = _hard_losses(widen(x), y, weights, axis, ignore_index, "nll_loss")
    return _mean_by_counts(losses, counts, reduction).astype(x.dtype)


def _class_axis(x: jax.Array, function: str) -> int:
    if x.ndim == 0:
        raise ShapeError(
            f"{function}: expected input (classes,), (batch, classes) or "
            f"(batch, classes, d1, ...), got a scalar."
        )
    return 0 if x.ndim == 1 else 1


def _class_weights(
    weight: Tensor | None, x: jax.Array, axis: int, function: str
) -> jax.Array | None:
    """Return the weights shaped to broadcast against the input."""
    if weight is None:
        return None
    weights = array(weight)
    if weights.shape != (x.shape[axis],):
        raise ShapeError(
            f"{function}: weight expected one value per class, shape ({x.shape[axis]},), "
            f"got {format_shape(weights.shape)}."
        )
    return per_channel(widen(weights), x.ndim, axis)


def _hard_losses(
    log_p: jax.Array,
    target: jax.Array,
    weights: jax.Array | None,
    axis: int,
    ignore_index: int,
    function: str,
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of each sample, and what each counts for in the mean."""
    expected = (*log_p.shape[:axis], *log_p.shape[axis + 1 :])
    if target.shape != expected:
        raise ShapeError(
            f"{function}: expected target {format_shape(expected)} of class indices for input "
            f"{format_shape(log_p.shape)}, got {format_shape(target.shape)}."
        )
    if not jnp.issubdtype(target.dtype, jnp.integer):
        raise TypeMismatchError(
            f"{function}: class indices expected to be integers, got {target.dtype}; "
            f"convert them: y.astype('int32')."
        )
    classes = log_p.shape[axis]
    ignored = target == ignore_index
    # Negative indices would count from the end; sent past the end they give NaN, not a wrong class.
    index = jnp.expand_dims(jnp.where(ignored, 0, jnp.where(target < 0, classes, target)), axis)
    losses = -jnp.take_along_axis(log_p, index, axis, mode="fill").squeeze(axis)
    if weights is None:
        counts = jnp.ones_like(losses)
    else:
        spread = jnp.broadcast_to(weights, log_p.shape)
        counts = jnp.take_along_axis(spread, index, axis, mode="clip").squeeze(axis)
        losses = losses * counts
    return jnp.where(ignored, 0, losses), jnp.where(ignored, 0, counts)


def _soft_losses(
    log_p: jax.Array,
    target: jax.Array,
    weights: jax.Array | None,
    axis: int,
    label_smoothing: float,
) -> jax.Array:
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / log_p.shape[axis]
    products = log_p * target
    return -(products if weights is None else products * weights).sum(axis)


def _mean_by_counts(losses: jax.Array, counts: jax.Array, reduction: str) -> jax.Array:
    return losses.sum() / counts.sum() if reduction == "mean" else _reduced(losses, reduction)


def _reduced(losses: jax.Array, reduction: str) -> jax.Array:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
