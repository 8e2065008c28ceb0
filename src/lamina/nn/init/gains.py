"""Gains of nonlinearities and fans of shapes: the arithmetic behind Xavier's and Kaiming's laws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..._core.errors import DeferredError, ShapeError, did_you_mean, format_shape

GAINS = {
    "linear": 1.0,
    "conv1d": 1.0,
    "conv2d": 1.0,
    "conv3d": 1.0,
    "conv_transpose1d": 1.0,
    "conv_transpose2d": 1.0,
    "conv_transpose3d": 1.0,
    "sigmoid": 1.0,
    "tanh": 5.0 / 3,
    "relu": math.sqrt(2.0),
    "selu": 3.0 / 4,
}


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """Return the factor by which initial weights make up for a nonlinearity.

    Args:
        nonlinearity: ``"linear"``, ``"conv1d"`` to ``"conv_transpose3d"`` and ``"sigmoid"`` (1),
            ``"tanh"`` (5/3), ``"relu"`` (sqrt 2), ``"leaky_relu"``, ``"selu"`` (3/4).
        param: negative slope of the leaky ReLU (default 0.01).

    Returns:
        The gain; for the leaky ReLU ``sqrt(2 / (1 + slope^2))``.

    Raises:
        ValueError: for an unknown nonlinearity, or a slope that is no number.

    Example:
        >>> from lamina import nn
        >>> nn.init.calculate_gain("leaky_relu", 0.0) == nn.init.calculate_gain("relu")
        True

    Source: He et al., "Delving deep into rectifiers", https://arxiv.org/abs/1502.01852
    """
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        if isinstance(slope, bool) or not isinstance(slope, (int, float)):
            raise ValueError(f"calculate_gain: negative_slope {slope!r} not a valid number")
        return math.sqrt(2.0 / (1 + slope**2))
    if nonlinearity not in GAINS:
        known = [*GAINS, "leaky_relu"]
        hint = did_you_mean(str(nonlinearity), known)
        raise ValueError(
            f"Unsupported nonlinearity {nonlinearity!r}: expected one of {', '.join(known)}.{hint}"
        )
    return GAINS[nonlinearity]


def fans(shape: Sequence[int | None]) -> tuple[int, int]:
    """Return fan in and fan out of a weight of this shape, PyTorch's ``(out, in, *kernel)``.

    Raises:
        ShapeError: for fewer than two dimensions.
        DeferredError: if a size is unknown.

    Example:
        >>> fans((6, 3, 5, 5))
        (75, 150)
    """
    if len(shape) < 2:
        raise ShapeError(
            f"fan in and fan out can not be computed for shape {format_shape(shape)}, "
            f"expected two or more dimensions."
        )
    sizes = [size for size in shape if size is not None]
    if len(sizes) < len(shape):
        raise DeferredError(
            f"fan in and fan out of shape {format_shape(shape)} are not known yet. Pass data "
            f"through the model once, or lamina.infer(net, spec)."
        )
    receptive_field = math.prod(sizes[2:])
    return sizes[1] * receptive_field, sizes[0] * receptive_field


def _calculate_fan_in_and_fan_out(tensor: Any) -> tuple[int, int]:
    """Return fan in and fan out of a parameter or array.

    Raises:
        ShapeError: for fewer than two dimensions.
        DeferredError: if a size is unknown.

    Example:
        >>> import numpy as np
        >>> _calculate_fan_in_and_fan_out(np.zeros((4, 3)))
        (3, 4)
    """
    return fans(tensor.shape)


def _calculate_correct_fan(tensor: Any, mode: str) -> int:
    """Return the fan in or fan out of a parameter or array.

    Args:
        tensor: anything with a shape.
        mode: ``"fan_in"`` or ``"fan_out"``.

    Raises:
        ValueError: for another mode.

    Example:
        >>> import numpy as np
        >>> _calculate_correct_fan(np.zeros((4, 3)), "fan_out")
        4
    """
    mode = mode.lower()
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"Mode {mode} not supported, please use one of ['fan_in', 'fan_out']")
    return fans(tensor.shape)[mode == "fan_out"]
