"""Recipes whose scale follows from the numbers of inputs and outputs of a layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..._core.errors import DeferredError, format_shape
from ..._core.recipe import (
    Checked,
    Key,
    Number,
    Shape,
    check_fans,
    draw_normal,
    draw_uniform,
    drawing_dtype,
    is_number,
    static,
)
from .gains import GAINS, calculate_gain, fans


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class XavierUniform(Checked):
    """U(-c, c) with ``c = gain * sqrt(6 / (fan_in + fan_out))``.

    Args:
        gain: factor, for instance from :func:`calculate_gain` (default 1).

    Raises:
        ShapeError: for fewer than two dimensions.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> draw = nn.init.XavierUniform()(jax.random.key(0), (2, 4), "float32")
        >>> bool((abs(draw) <= 1).all())
        True

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", https://proceedings.mlr.press/v9/glorot10a.html
    """

    gain: Number = 1.0

    def check(self, shape: Sequence[int | None]) -> None:
        """Raise :class:`ShapeError` for fewer than two dimensions."""
        check_fans(self, shape)

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        self.check(shape)
        bound = self.gain * math.sqrt(6 / max(sum(fans(shape)), 1))
        return draw_uniform(key, shape, dtype, -bound, bound)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class XavierNormal(Checked):
    """Normal with mean 0 and ``std = gain * sqrt(2 / (fan_in + fan_out))``.

    Args:
        gain: factor, for instance from :func:`calculate_gain` (default 1).

    Raises:
        ShapeError: for fewer than two dimensions.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> nn.init.XavierNormal(gain=2.0)(jax.random.key(0), (2, 4), "float32").shape
        (2, 4)

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", https://proceedings.mlr.press/v9/glorot10a.html
    """

    gain: Number = 1.0

    def check(self, shape: Sequence[int | None]) -> None:
        """Raise :class:`ShapeError` for fewer than two dimensions."""
        check_fans(self, shape)

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        self.check(shape)
        std = self.gain * math.sqrt(2 / max(sum(fans(shape)), 1))
        return draw_normal(key, shape, dtype, 0.0, std)


class _Kaiming(Checked):
    """What the two Kaiming laws share: the gain over the square root of the chosen fan."""

    a: Number
    mode: str
    nonlinearity: str

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.mode not in ("fan_in", "fan_out"):
            raise ValueError(f"{name}: mode expected 'fan_in' or 'fan_out', got {self.mode!r}.")
        if self.nonlinearity != "leaky_relu" and self.nonlinearity not in GAINS:
            calculate_gain(self.nonlinearity)  # raises, and lists what there is

    def check(self, shape: Sequence[int | None]) -> None:
        """Raise :class:`ShapeError` for fewer than two dimensions."""
        check_fans(self, shape)

    def _std(self, shape: Shape) -> Number:
        self.check(shape)
        fan = fans(shape)[self.mode == "fan_out"]
        return self._gain() / math.sqrt(max(fan, 1))

    def _gain(self) -> Number:
        if self.nonlinearity != "leaky_relu":
            return GAINS[self.nonlinearity]
        if is_number(self.a):
            return math.sqrt(2 / (1 + self.a**2))
        return jnp.sqrt(2 / (1 + self.a**2))

    def _repr(self, law: str) -> str:
        arguments = [] if self.a == 0 else [f"a={_radical(self.a)}"]
        if self.mode != "fan_in":
            arguments.append(f"mode={self.mode!r}")
        if self.nonlinearity != "leaky_relu":
            arguments.append(f"nonlinearity={self.nonlinearity!r}")
        return f"{type(self).__name__}({', '.join(arguments)}) ~ {law}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class KaimingUniform(_Kaiming):
    """U(-c, c) with ``c = gain * sqrt(3 / fan)``.

    With ``a=sqrt(5)`` this is PyTorch's default for weights, in truth U(-c, c) with
    ``c = 1 / sqrt(fan_in)``; the ``repr`` shows the law that results.

    Args:
        a: negative slope of the leaky ReLU that follows (default 0; only for ``leaky_relu``).
        mode: ``"fan_in"`` (default) keeps the variance of activations, ``"fan_out"`` of gradients.
        nonlinearity: as for :func:`calculate_gain` (default ``"leaky_relu"``).

    Raises:
        ValueError: for an unknown mode or nonlinearity.
        ShapeError: for fewer than two dimensions.

    Example:
        >>> from lamina import nn
        >>> nn.init.KaimingUniform(a=5**0.5)
        KaimingUniform(a=sqrt(5)) ~ U(±1/sqrt(fan_in))

    Source: He et al., "Delving deep into rectifiers", https://arxiv.org/abs/1502.01852
    """

    a: Number = 0.0
    mode: str = static(default="fan_in")
    nonlinearity: str = static(default="leaky_relu")

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        bound = math.sqrt(3) * self._std(shape)
        return draw_uniform(key, shape, dtype, -bound, bound)

    def __repr__(self) -> str:
        if not is_number(self.a):
            return self._repr("U")
        return self._repr(f"U(±{_radical(math.sqrt(3) * self._gain())}/sqrt({self.mode}))")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class KaimingNormal(_Kaiming):
    """Normal with mean 0 and ``std = gain / sqrt(fan)``.

    Args:
        a: negative slope of the leaky ReLU that follows (default 0; only for ``leaky_relu``).
        mode: ``"fan_in"`` (default) keeps the variance of activations, ``"fan_out"`` of gradients.
        nonlinearity: as for :func:`calculate_gain` (default ``"leaky_relu"``).

    Raises:
        ValueError: for an unknown mode or nonlinearity.
        ShapeError: for fewer than two dimensions.

    Example:
        >>> from lamina import nn
        >>> nn.init.KaimingNormal(nonlinearity="relu")
        KaimingNormal(nonlinearity='relu') ~ N(0, std=sqrt(2)/sqrt(fan_in))

    Source: He et al., "Delving deep into rectifiers", https://arxiv.org/abs/1502.01852
    """

    a: Number = 0.0
    mode: str = static(default="fan_in")
    nonlinearity: str = static(default="leaky_relu")

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return draw_normal(key, shape, dtype, 0.0, self._std(shape))

    def __repr__(self) -> str:
        if not is_number(self.a):
            return self._repr("N")
        return self._repr(f"N(0, std={_radical(self._gain())}/sqrt({self.mode}))")


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, repr=False)
class FanInUniform(Checked):
    """U(-c, c) with ``c = 1 / sqrt(fan_in)``: PyTorch's default for biases.

    Args:
        fan_in: number of inputs of each output of the layer; a bias does not know it from its own
            shape.
        of: in place of it, the weight that knows it, as soon as its own shape is known.

    Raises:
        DeferredError: when drawn while ``fan_in`` is unknown.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> draw = nn.init.FanInUniform(4)(jax.random.key(0), (100,), "float32")
        >>> bool((abs(draw) <= 0.5).all())
        True
        >>> nn.LazyLinear(3).bias.init
        FanInUniform(of weight (3, ?))
    """

    fan_in: int | None = None
    of: Any = None

    @property
    def is_ready(self) -> bool:
        """Whether a value can be drawn."""
        return self.fan_in is not None if self.of is None else None not in self.of.shape

    def tree_flatten(self) -> Any:
        """Be a number by the time of drawing, so that all layers share a program."""
        return (self._fan_in(),), None

    @classmethod
    def tree_unflatten(cls, _: Any, leaves: Any) -> FanInUniform:
        """Put the number back."""
        return cls(*leaves)

    def with_weight(self, weight: Any) -> FanInUniform:
        """Return the law for another weight."""
        return FanInUniform(of=weight)

    def _fan_in(self) -> Any:
        if self.of is None:
            return self.fan_in
        return None if None in self.of.shape else fans(self.of.shape)[0]

    def __repr__(self) -> str:
        fan_in = None if self.of is not None and len(self.of.shape) < 2 else self._fan_in()
        if fan_in is None and self.of is not None:
            return f"FanInUniform(of weight {format_shape(self.of.shape)})"
        return f"FanInUniform(fan_in={fan_in})"

    def __post_init__(self) -> None:
        if is_number(self.fan_in) and self.fan_in < 0:  # type: ignore[operator]
            raise ValueError(f"FanInUniform: expected fan_in >= 0, got {self.fan_in}.")

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        fan_in = self._fan_in()
        if fan_in is None:
            raise DeferredError(
                "FanInUniform: fan_in is not known yet; FanInUniform(fan_in=...) gives it\n"
                "    fix: pass data through the model once, or give it: FanInUniform(in_features)"
            )
        fan_in = jnp.asarray(fan_in, drawing_dtype(dtype))
        bound = jnp.where(fan_in > 0, 1 / jnp.sqrt(jnp.maximum(fan_in, 1)), 0)
        return draw_uniform(key, shape, dtype, -bound, bound)


def _radical(value: Any) -> str:
    """Write a number as ``sqrt(n)`` where it is the root of a small integer."""
    square = value**2
    if abs(value - round(value)) < 1e-9:
        return str(round(value))
    if value > 0 and abs(square - round(square)) < 1e-9 and square < 100:
        return f"sqrt({round(square)})"
    return f"{value:.4g}"
