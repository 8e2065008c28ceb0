"""Linear maps."""

from __future__ import annotations

import math
from typing import Any

from .._core.parameter import Parameter
from .._core.shapes import as_sharding
from . import functional as F
from .containers import Module
from .init import FanInUniform, KaimingUniform

__all__ = ["Identity", "LazyLinear", "Linear"]


class Identity(Module):
    """Return the input. Takes any arguments and ignores them.

    Example:
        >>> from lamina import nn
        >>> nn.Identity(54, unused=0.1)(3)
        3

    Source: the interface of ``torch.nn.Identity``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def forward(self, input: Any) -> Any:
        """Return ``input``."""
        return input


class Linear(Module):
    """``y = x @ weight.T + bias``.

    Args:
        in_features: size of the last axis of the input, or ``None`` to infer it.
        out_features: size of the last axis of the output.
        bias: whether to add a bias (default True).
        device: where the parameters go.
        dtype: dtype of the parameters (default float32).

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``, ``weight``
        ``(out_features, in_features)``, ``bias`` ``(out_features,)``. Both are drawn from
        U(±1/sqrt(in_features)).

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.Linear(3, 5)(jnp.ones((2, 3))).shape
        (2, 5)

    Source: the interface of ``torch.nn.Linear``.
    """

    def __init__(
        self,
        in_features: int | None,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "sharding": as_sharding(device)}
        self.in_features = in_features
        self.out_features = out_features
        self.weight = Parameter(
            shape=(out_features, in_features), init=KaimingUniform(a=math.sqrt(5)), **options
        )
        if bias:
            self.bias = Parameter(
                shape=(out_features,), init=FanInUniform(of=self.weight), **options
            )
        else:
            self.register_parameter("bias", None)

    def infer_shapes(self, input: Any) -> None:
        """Take ``in_features`` from the last axis of the input."""
        self.in_features = input.shape[-1]
        self.weight.shape = (self.out_features, self.in_features)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )

    def forward(self, input: Any) -> Any:
        """Map the last axis of ``input``."""
        return F.linear(input, self.weight, self.bias)


class LazyLinear(Linear):
    """A :class:`Linear` whose ``in_features`` is inferred.

    Args:
        out_features, bias, device, dtype: as for :class:`Linear`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> net = nn.LazyLinear(5)
        >>> net.weight.shape
        (5, None)
        >>> _ = net(jnp.ones((2, 3)))
        >>> net
        Linear(in_features=3, out_features=5, bias=True)

    Source: the interface of ``torch.nn.LazyLinear``.
    """

    cls_to_become = Linear

    def __init__(
        self, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(None, out_features, bias, device, dtype)
        self.in_features = 0  # as PyTorch shows it
