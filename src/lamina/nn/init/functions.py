"""PyTorch's ``nn.init`` functions: each gives a parameter or buffer a recipe, in place.

They work before shapes are known and before there is a value; the recipe is then kept, and used
when the value is made. Common to all:

Args:
    tensor: a parameter or buffer.
    generator: a JAX key or a ``lamina.Generator``; without it the value follows from the model's
        seed and the parameter's name.

Returns:
    ``tensor``.

Raises:
    TypeMismatchError: if ``tensor`` is an array, which can't change in place.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from ..._core.box import Box
from ..._core.errors import TypeMismatchError
from ..._core.random import Generator
from ..._core.recipe import Checked, Normal, Uniform
from .distributions import Orthogonal, Sparse, TruncatedNormal
from .fixed import Constant, Dirac, Eye, Ones, Zeros
from .scaled import KaimingNormal, KaimingUniform, XavierNormal, XavierUniform

Tensor = TypeVar("Tensor", bound=Box)


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Any = None) -> Tensor:
    """Fill with values from U(a, b).

    Args:
        a: lower bound (default 0).
        b: upper bound (default 1).

    Example:
        >>> from lamina import nn
        >>> nn.init.uniform_(nn.Linear(3, 2).weight, -0.1, 0.1).init
        Uniform(a=-0.1, b=0.1)
    """
    return _fill(tensor, Uniform(a, b), generator)


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Tensor:
    """Fill with values from a normal distribution.

    Args:
        mean: default 0.
        std: standard deviation (default 1).

    Example:
        >>> from lamina import nn
        >>> nn.init.normal_(nn.LazyLinear(2).weight, std=0.01).init
        Normal(mean=0.0, std=0.01)
    """
    return _fill(tensor, Normal(mean, std), generator)


def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: Any = None,
) -> Tensor:
    """Fill with values from a normal distribution restricted to [a, b].

    Args:
        mean: of the distribution before it is cut (default 0).
        std: of the distribution before it is cut (default 1).
        a: lower bound, a value and not a multiple of ``std`` (default -2).
        b: upper bound (default 2).

    Example:
        >>> from lamina import nn
        >>> nn.init.trunc_normal_(nn.Linear(3, 2).weight, std=0.02).init
        TruncatedNormal(mean=0.0, std=0.02, a=-2.0, b=2.0)
    """
    return _fill(tensor, TruncatedNormal(mean, std, a, b), generator)


def constant_(tensor: Tensor, val: float) -> Tensor:
    """Fill with one number.

    Args:
        val: the number.

    Example:
        >>> from lamina import nn
        >>> nn.init.constant_(nn.Linear(3, 2).bias, 0.5).data.tolist()
        [0.5, 0.5]
    """
    return _fill(tensor, Constant(val))


def ones_(tensor: Tensor) -> Tensor:
    """Fill with 1.

    Example:
        >>> from lamina import nn
        >>> nn.init.ones_(nn.Linear(3, 2).bias).data.tolist()
        [1.0, 1.0]
    """
    return _fill(tensor, Ones())


def zeros_(tensor: Tensor) -> Tensor:
    """Fill with 0.

    Example:
        >>> from lamina import nn
        >>> nn.init.zeros_(nn.Linear(3, 2).bias).data.tolist()
        [0.0, 0.0]
    """
    return _fill(tensor, Zeros())


def eye_(tensor: Tensor) -> Tensor:
    """Fill a matrix with the identity.

    Args:
        tensor: parameter or buffer with two dimensions.

    Raises:
        ShapeError: for another number of dimensions.

    Example:
        >>> from lamina import nn
        >>> nn.init.eye_(nn.Linear(2, 2).weight).data.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return _fill(tensor, Eye())


def dirac_(tensor: Tensor, groups: int = 1) -> Tensor:
    """Fill a convolution kernel so that it passes on as many channels as it can.

    Args:
        tensor: parameter or buffer with 3, 4 or 5 dimensions.
        groups: number of channel groups (default 1).

    Raises:
        ShapeError: for another number of dimensions, or one that ``groups`` does not divide.

    Example:
        >>> from lamina import nn
        >>> nn.init.dirac_(nn.Conv2d(1, 1, 3).weight).data[0, 0].tolist()
        [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    return _fill(tensor, Dirac(groups))


def xavier_uniform_(tensor: Tensor, gain: float = 1.0, generator: Any = None) -> Tensor:
    """Fill with values from U(-c, c), ``c = gain * sqrt(6 / (fan_in + fan_out))``.

    Args:
        tensor: parameter or buffer with two dimensions or more.
        gain: factor (default 1).

    Raises:
        ShapeError: for fewer dimensions.

    Example:
        >>> from lamina import nn
        >>> nn.init.xavier_uniform_(nn.LazyLinear(2).weight).init
        XavierUniform(gain=1.0)
    """
    return _fill(tensor, XavierUniform(gain), generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Any = None) -> Tensor:
    """Fill with normal values, ``std = gain * sqrt(2 / (fan_in + fan_out))``.

    Args:
        tensor: parameter or buffer with two dimensions or more.
        gain: factor (default 1).

    Raises:
        ShapeError: for fewer dimensions.

    Example:
        >>> from lamina import nn
        >>> nn.init.xavier_normal_(nn.LazyLinear(2).weight).init
        XavierNormal(gain=1.0)
    """
    return _fill(tensor, XavierNormal(gain), generator)


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Any = None,
) -> Tensor:
    """Fill with values from U(-c, c), ``c = gain * sqrt(3 / fan)``.

    Args:
        tensor: parameter or buffer with two dimensions or more.
        a: negative slope of the leaky ReLU that follows (default 0).
        mode: ``"fan_in"`` (default) or ``"fan_out"``.
        nonlinearity: as for :func:`calculate_gain` (default ``"leaky_relu"``).

    Raises:
        ValueError: for an unknown mode or nonlinearity.
        ShapeError: for fewer dimensions.

    Example:
        >>> from lamina import nn
        >>> nn.init.kaiming_uniform_(nn.LazyLinear(2).weight, nonlinearity="relu").init
        KaimingUniform(nonlinearity='relu') ~ U(±sqrt(6)/sqrt(fan_in))
    """
    return _fill(tensor, KaimingUniform(a, mode.lower(), nonlinearity), generator)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Any = None,
) -> Tensor:
    """Fill with normal values, ``std = gain / sqrt(fan)``.

    Args:
        tensor: parameter or buffer with two dimensions or more.
        a: negative slope of the leaky ReLU that follows (default 0).
        mode: ``"fan_in"`` (default) or ``"fan_out"``.
        nonlinearity: as for :func:`calculate_gain` (default ``"leaky_relu"``).

    Raises:
        ValueError: for an unknown mode or nonlinearity.
        ShapeError: for fewer dimensions.

    Example:
        >>> from lamina import nn
        >>> nn.init.kaiming_normal_(nn.LazyLinear(2).weight, mode="fan_out").init
        KaimingNormal(mode='fan_out') ~ N(0, std=sqrt(2)/sqrt(fan_out))
    """
    return _fill(tensor, KaimingNormal(a, mode.lower(), nonlinearity), generator)


def orthogonal_(tensor: Tensor, gain: float = 1, generator: Any = None) -> Tensor:
    """Fill with a (semi-)orthogonal matrix, all dimensions but the first as columns.

    Args:
        tensor: parameter or buffer with two dimensions or more.
        gain: factor (default 1).

    Raises:
        ShapeError: for fewer dimensions.

    Example:
        >>> from lamina import nn
        >>> w = nn.init.orthogonal_(nn.Linear(3, 3).weight)
        >>> round(float((w @ w.T).sum()), 3)
        3.0
    """
    return _fill(tensor, Orthogonal(gain), generator)


def sparse_(tensor: Tensor, sparsity: float, std: float = 0.01, generator: Any = None) -> Tensor:
    """Fill a matrix with normal values, a share of each column with 0.

    Args:
        tensor: parameter or buffer with two dimensions.
        sparsity: share of zeros in each column, rounded up to whole elements.
        std: standard deviation of the others (default 0.01).

    Raises:
        ShapeError: for another number of dimensions.

    Example:
        >>> from lamina import nn
        >>> w = nn.init.sparse_(nn.Linear(3, 10).weight, sparsity=0.1)
        >>> (w.data == 0).sum(0).tolist()
        [1, 1, 1]
    """
    return _fill(tensor, Sparse(sparsity, std), generator)


def _fill(tensor: Tensor, recipe: Checked, generator: Any = None) -> Tensor:
    name = type(recipe).__name__
    if not isinstance(tensor, Box):
        raise TypeMismatchError(
            f"nn.init: expected a parameter or buffer to change in place, got "
            f"{type(tensor).__name__}, which can't change. Draw an array instead: "
            f"nn.init.{name}(...)(key, shape, dtype)."
        )
    if isinstance(recipe, TruncatedNormal):
        _warn_if_far(recipe)
    # (None,) also stands for a shape of which nothing is known, not even the rank.
    if tensor.shape != (None,):
        recipe.check(tensor.shape)
    if 0 in tensor.shape:
        warnings.warn("Initializing zero-element tensors is a no-op", UserWarning, stacklevel=3)
    if isinstance(generator, Generator):
        generator = generator.next_key()
    return tensor.initialize(recipe, key=generator)  # type: ignore[arg-type]


def _warn_if_far(recipe: TruncatedNormal) -> None:
    if not recipe.a - 2 * recipe.std <= recipe.mean <= recipe.b + 2 * recipe.std:
        warnings.warn(
            f"trunc_normal_: mean={recipe.mean} is more than 2 std from "
            f"[{recipe.a}, {recipe.b}], so nearly all values lie at one bound.",
            UserWarning,
            stacklevel=4,
        )
