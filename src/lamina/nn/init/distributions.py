"""Recipes whose law is given outright, whatever layer the parameter belongs to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..._core.errors import ShapeError, format_shape
from ..._core.recipe import (
    Checked,
    Key,
    Number,
    Shape,
    check_matrix,
    check_std,
    draw_normal,
    drawing_dtype,
    is_number,
    static,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TruncatedNormal(Checked):
    """Normal distribution restricted to [a, b].

    The bounds are values, as in PyTorch, and not multiples of ``std``.

    Args:
        mean: of the normal distribution before it is cut (default 0).
        std: of the normal distribution before it is cut (default 1).
        a: lower bound (default -2).
        b: upper bound (default 2).

    Raises:
        ValueError: if ``std`` is not positive, or not ``a < b``.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> law = nn.init.TruncatedNormal(std=0.02, a=-0.04, b=0.04)
        >>> draw = law(jax.random.key(0), (100,), "float32")
        >>> bool((abs(draw) <= 0.04).all())
        True
    """

    mean: Number = 0.0
    std: Number = 1.0
    a: Number = -2.0
    b: Number = 2.0

    def __post_init__(self) -> None:
        if is_number(self.std) and not self.std > 0:
            raise ValueError(f"TruncatedNormal: expected std > 0, got {self.std}.")
        if is_number(self.a) and is_number(self.b) and not self.a < self.b:
            raise ValueError(f"TruncatedNormal: expected a < b, got a={self.a} and b={self.b}.")

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        wide = drawing_dtype(dtype)
        mean, std, a, b = (jnp.asarray(v, wide) for v in (self.mean, self.std, self.a, self.b))
        low, high = (a - mean) / std, (b - mean) / std
        # The distribution function is exact to the last digits only in its lower tail, so an
        # interval above the mean is drawn from as its mirror image.
        mirrored = low + high > 0
        low, high = jnp.where(mirrored, -high, low), jnp.where(mirrored, -low, high)
        below_low, below_high = jax.scipy.special.ndtr(low), jax.scipy.special.ndtr(high)
        quantile = jax.random.uniform(key, shape, wide, below_low, below_high)
        draw = jnp.clip(jax.scipy.special.ndtri(quantile), low, high)
        draw = jnp.where(mirrored, -draw, draw) * std + mean
        return jnp.clip(draw, a, b).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Orthogonal(Checked):
    """A (semi-)orthogonal matrix, uniformly distributed, times ``gain``.

    All dimensions but the first count as columns. The QR factorisation inside can't be split over
    devices: a sharded parameter is drawn whole on each device and cut after.

    Args:
        gain: factor (default 1).

    Raises:
        ShapeError: for fewer than two dimensions.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> q = nn.init.Orthogonal()(jax.random.key(0), (3, 3), "float32")
        >>> bool(abs(q @ q.T - jax.numpy.eye(3)).max() < 1e-5)
        True

    Source: Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in
    deep linear neural networks", https://arxiv.org/abs/1312.6120
    """

    gain: Number = 1.0

    def check(self, shape: Sequence[int | None]) -> None:
        """Raise :class:`ShapeError` for fewer than two dimensions."""
        if len(shape) < 2:
            raise ShapeError(
                f"Orthogonal: expected two or more dimensions, got shape {format_shape(shape)}."
            )

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        self.check(shape)
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        wide = drawing_dtype(dtype)
        rows, columns = shape[0], math.prod(shape[1:])
        draw = jax.random.normal(key, (max(rows, columns), min(rows, columns)), wide)
        q, r = jnp.linalg.qr(draw)
        # Without the signs of R's diagonal the distribution would depend on the algorithm.
        q = q * jnp.sign(jnp.diagonal(r))[None, :]
        q = q if rows >= columns else q.T
        return (q.reshape(shape) * jnp.asarray(self.gain, wide)).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse(Checked):
    """Normal with mean 0, a share of the elements of each column set to 0.

    Args:
        sparsity: share of zeros in each column, rounded up to whole elements.
        std: standard deviation of the others (default 0.01).

    Raises:
        ValueError: if ``sparsity`` is not in [0, 1] or ``std`` is negative.
        ShapeError: for anything but a matrix.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> draw = nn.init.Sparse(0.5)(jax.random.key(0), (4, 3), "float32")
        >>> (draw == 0).sum(0).tolist()
        [2, 2, 2]

    Source: Martens, "Deep learning via Hessian-free optimization",
    https://icml.cc/Conferences/2010/papers/458.pdf
    """

    sparsity: float = static()
    std: Number = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"Sparse: expected sparsity in [0, 1], got {self.sparsity}.")
        check_std("Sparse", self.std)

    def check(self, shape: Sequence[int | None]) -> None:
        """Raise :class:`ShapeError` for anything but a matrix."""
        check_matrix("Sparse", shape)

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        self.check(shape)
        values_key, places_key = jax.random.split(key)
        zeros = math.ceil(self.sparsity * shape[0])
        # Sorting noise gives each column a random order of its rows.
        order = jnp.argsort(jax.random.uniform(places_key, shape), axis=0)
        values = draw_normal(values_key, shape, dtype, 0.0, self.std)
        return jnp.where(order < zeros, jnp.zeros((), dtype), values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Function(Checked):
    """A user's function inside a mixture: metadata, as a function is no array."""

    function: Callable[[Key, Shape, Any], jax.Array] = static()  # noqa: RUF009 (it returns a field)

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(self.function(key, shape, dtype)).astype(dtype)

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Mixture(Checked):
    """Each element drawn from one of several recipes, chosen by chance.

    Args:
        components: pairs ``(probability, recipe)``; the probabilities sum to 1.

    Raises:
        ValueError: if there is no component, or the probabilities are no distribution.

    Example:
        >>> import jax
        >>> from lamina import nn
        >>> high, low = nn.init.Uniform(5, 10), nn.init.Uniform(-10, -5)
        >>> law = nn.init.Mixture([(1 / 4, high), (1 / 2, nn.init.Zeros()), (1 / 4, low)])
        >>> draw = law(jax.random.key(0), (100,), "float32")
        >>> bool(((draw == 0) | ((abs(draw) >= 5) & (abs(draw) <= 10))).all())
        True
    """

    components: Sequence[tuple[Number, Any]]

    def __post_init__(self) -> None:
        if not isinstance(self.components, (list, tuple)):
            return  # a placeholder of a pytree operation
        components = tuple((chance, _as_pytree(recipe)) for chance, recipe in self.components)
        object.__setattr__(self, "components", components)
        if not components:
            raise ValueError("Mixture: expected at least one (probability, recipe).")
        chances = [chance for chance, _ in components]
        if all(map(is_number, chances)) and (
            min(chances) < 0 or not math.isclose(sum(chances), 1, rel_tol=1e-6)
        ):
            raise ValueError(
                f"Mixture: probabilities expected to be non-negative and to sum to 1, "
                f"got {chances}."
            )

    def check(self, shape: Sequence[int | None]) -> None:
        """Raise :class:`ShapeError` if some component can't be drawn in this shape."""
        for _, recipe in self.components:
            if isinstance(recipe, Checked):
                recipe.check(shape)

    def __call__(self, key: Key, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        choice_key, *keys = jax.random.split(key, len(self.components) + 1)
        choice = jax.random.uniform(choice_key, shape)
        result = None
        threshold = 1.0
        # From the last component down, so that rounding of the sum leaves no gap at the top.
        for (chance, recipe), draw_key in zip(
            reversed(self.components), reversed(keys), strict=True
        ):
            draw = recipe(draw_key, shape, dtype)
            result = draw if result is None else jnp.where(choice < threshold, draw, result)
            threshold = threshold - chance
        assert result is not None
        return result

    def __repr__(self) -> str:
        pairs = ", ".join(f"({chance:g}, {recipe!r})" for chance, recipe in self.components)
        return f"Mixture([{pairs}])"


def _as_pytree(recipe: Any) -> Any:
    if not callable(recipe) or jax.tree.structure(recipe) != jax.tree.structure(0):
        return recipe
    function: Any = recipe
    return _Function(function)
