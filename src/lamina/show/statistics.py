"""``describe``: what is in a parameter, and in its gradient, as numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.box import Box
from .._core.errors import TypeMismatchError, format_shape
from .._core.walk import describe as label
from .record import recipe_text

__all__ = ["Description", "Statistics", "describe"]

_BINS = 32
_BLOCK = 1 << 20
_BARS = " ▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of one array; those of a complex one are of its absolute values.

    Of an array that is spread over several hosts they cover what is on this one.

    Attributes:
        minimum, maximum, mean, std, norm: over the finite elements (``std`` with divisor n,
            ``norm`` the square root of the sum of squares); NaN if there are none.
        zeros, nans, infs: numbers of such elements.
        histogram: numbers of finite elements in equal steps from ``minimum`` to ``maximum``.

    Example:
        >>> import lamina.show
        >>> found = lamina.show.describe([3.0, -4.0]).value
        >>> found.norm, found.mean, found.bars().strip()[0]
        (5.0, -0.5, '█')
    """

    minimum: float
    maximum: float
    mean: float
    std: float
    norm: float
    zeros: int
    nans: int
    infs: int
    histogram: tuple[int, ...]

    def bars(self) -> str:
        """Return the histogram as one line of text; a bin that holds anything shows something."""
        most = max(self.histogram, default=0)
        if not most:
            return ""
        steps = len(_BARS) - 1
        return "".join(_BARS[math.ceil(count / most * steps)] for count in self.histogram)


@dataclasses.dataclass(frozen=True)
class Description:
    """What :func:`describe` found; made to be printed.

    Attributes:
        label: kind and dotted name.
        shape: sizes, ``None`` for an unknown one.
        dtype: name of the dtype.
        recipe: what draws the value, as text.
        trainable: whether it requires a gradient; ``None`` for what is no parameter.
        value: statistics of the value; ``None`` while there is none.
        grad: statistics of the gradient; ``None`` if there is none.

    Example:
        >>> import lamina.show
        >>> from lamina import nn
        >>> layer = nn.LayerNorm(3)
        >>> print(lamina.show.describe(layer.bias))
        parameter 'bias': float32 (3,), recipe Zeros(), trainable
          no value yet
    """

    label: str
    shape: tuple[int | None, ...]
    dtype: str
    recipe: str
    trainable: bool | None
    value: Statistics | None
    grad: Statistics | None

    def __str__(self) -> str:
        facts = [f"{self.dtype} {format_shape(self.shape)}"]
        if self.recipe:
            facts.append(f"recipe {self.recipe}")
        if self.trainable is not None:
            facts.append("trainable" if self.trainable else "frozen")
        lines = [f"{self.label}: {', '.join(facts)}"]
        columns = [("value", self.value), ("gradient", self.grad)]
        shown = [(name, found) for name, found in columns if found is not None]
        if not shown:
            return lines[0] + "\n  no value yet"
        lines.append(f"  {'':9}" + "".join(f"{name:>14}" for name, _ in shown))
        for field in ("minimum", "maximum", "mean", "std", "norm"):
            numbers = "".join(f"{getattr(found, field):>14.6g}" for _, found in shown)
            lines.append(f"  {field:9}{numbers}")
        for field, name in (("zeros", "zeros"), ("nans", "NaN"), ("infs", "Inf")):
            numbers = "".join(f"{getattr(found, field):>14,}" for _, found in shown)
            lines.append(f"  {name:9}{numbers}")
        for name, found in shown:
            if found.bars():
                ends = f"{found.minimum:.3g} |{found.bars()}| {found.maximum:.3g}"
                lines.append(f"  {name:9}  {ends}")
        return "\n".join(lines)

    __repr__ = __str__


def describe(parameter: Any, grad: Any = None) -> Description:
    """Return statistics of a parameter's value and gradient; ``print`` shows them.

    A parameter that has no value yet is not given one.

    Args:
        parameter: a parameter, a buffer or an array of any shape.
        grad: its gradient; default ``parameter.grad``.

    Returns:
        A :class:`Description`.

    Raises:
        TypeError: for what is neither a box nor an array of numbers.

    Example:
        >>> import jax.numpy as jnp, lamina.show
        >>> found = lamina.show.describe(jnp.array([[1.0, -3.0], [0.0, jnp.nan]]))
        >>> found.value.minimum, found.value.maximum, found.value.zeros, found.value.nans
        (-3.0, 1.0, 1, 1)
    """
    if isinstance(parameter, Box):
        value = parameter.data if parameter.is_material else None
        grad = getattr(parameter, "grad", None) if grad is None else grad
        return Description(
            label=label(parameter),
            shape=parameter.shape,
            dtype=str(parameter.dtype),
            recipe=recipe_text(parameter.init),
            trainable=getattr(parameter, "requires_grad", None),
            value=None if value is None else _statistics(value),
            grad=None if grad is None else _statistics(jnp.asarray(grad)),
        )
    value = _as_array(parameter)
    return Description(
        label="array",
        shape=tuple(value.shape),
        dtype=str(value.dtype),
        recipe="",
        trainable=None,
        value=_statistics(value),
        grad=None if grad is None else _statistics(jnp.asarray(grad)),
    )


def _as_array(value: Any) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeMismatchError(
            f"describe: expected a parameter, a buffer or an array of numbers, got "
            f"{type(value).__name__}"
        ) from None


def _statistics(value: jax.Array) -> Statistics:
    """Go through the array twice, block by block, in double precision."""
    count = zeros = nans = infs = 0
    total = squares = 0.0
    low, high = math.inf, -math.inf
    for block in _blocks(value):
        finite = block[np.isfinite(block)]
        bad = int(np.isnan(block).sum())
        zeros += int((block == 0).sum())
        nans += bad
        infs += block.size - finite.size - bad
        if finite.size:
            count += finite.size
            total += float(finite.sum())
            squares += float((finite**2).sum())
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if not count:
        nan = math.nan
        return Statistics(nan, nan, nan, nan, nan, zeros, nans, infs, ())
    mean = total / count
    deviations, histogram = 0.0, np.zeros(_BINS, np.int64)
    for block in _blocks(value):
        finite = block[np.isfinite(block)]
        deviations += float(((finite - mean) ** 2).sum())
        histogram += np.histogram(finite, _BINS, (low, high))[0]
    std = math.sqrt(deviations / count)
    bins = tuple(histogram.tolist())
    return Statistics(low, high, mean, std, math.sqrt(squares), zeros, nans, infs, bins)


def _blocks(value: jax.Array) -> Iterator[np.ndarray]:
    """Yield all elements in pieces, so that no large array is copied as a whole."""
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            flat = np.asarray(shard.data).reshape(-1)
            for start in range(0, flat.size, _BLOCK):
                block = flat[start : start + _BLOCK]
                yield (np.abs(block) if np.iscomplexobj(block) else block).astype(np.float64)
