"""What authors of lazy layers in the PyTorch style subclass."""

from __future__ import annotations

from typing import Any

from .._core.errors import LaminaError
from .._core.parameter import Buffer, Parameter
from .._core.shapes import as_sharding
from .containers import Module

__all__ = ["LazyModuleMixin", "UninitializedBuffer", "UninitializedParameter"]


class LazyModuleMixin(Module):
    """A layer whose ``initialize_parameters(*inputs)`` runs once, before the first ``forward``.

    For layers written for PyTorch. A new layer just defines ``infer_shapes``. Set
    ``cls_to_become`` to the class that the layer turns into.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> class Scale(nn.Module):
        ...     def __init__(self, size):
        ...         self.weight = nn.Parameter(shape=(size,), init=nn.init.Ones())
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> class LazyScale(nn.LazyModuleMixin, Scale):
        ...     cls_to_become = Scale
        ...     def __init__(self):
        ...         super().__init__(None)
        ...     def initialize_parameters(self, x):
        ...         if self.has_uninitialized_params():
        ...             self.weight.materialize((x.shape[-1],))
        >>> net = LazyScale()
        >>> net(jnp.ones((2, 3))).shape, type(net).__name__
        ((2, 3), 'Scale')

    Source: the interface of ``torch.nn.modules.lazy.LazyModuleMixin``.
    """

    def initialize_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Give the unknown sizes of the parameters, from the inputs of ``forward``."""
        raise LaminaError(
            f"{type(self).__name__} defines neither initialize_parameters nor infer_shapes; "
            f"write: def initialize_parameters(self, x): self.weight.materialize((x.shape[-1],))"
        )

    def infer_shapes(self, *args: Any, **kwargs: Any) -> None:
        """Run ``initialize_parameters``."""
        self.initialize_parameters(*args, **kwargs)

    def _infer_parameters(self, module: Any, args: Any, kwargs: Any = None) -> None:
        module._infer_own(args, kwargs or {})


def UninitializedParameter(
    requires_grad: bool = True, device: Any = None, dtype: Any = None
) -> Parameter:
    """Return a parameter of which nothing is known yet, not even the number of dimensions.

    Example:
        >>> from lamina import nn
        >>> p = nn.UninitializedParameter()
        >>> p.materialize((2, 3))
        >>> p.shape
        (2, 3)

    Source: the interface of ``torch.nn.UninitializedParameter``.
    """
    return Parameter(requires_grad=requires_grad, dtype=dtype, sharding=as_sharding(device))


def UninitializedBuffer(device: Any = None, dtype: Any = None, persistent: bool = True) -> Buffer:
    """Return a buffer that takes an array of any shape later.

    Example:
        >>> from lamina import nn
        >>> nn.UninitializedBuffer().is_material
        False

    Source: the interface of ``torch.nn.UninitializedBuffer``.
    """
    return Buffer(persistent=persistent, dtype=dtype, sharding=as_sharding(device))
