"""Losses as modules."""

from __future__ import annotations

from typing import Any

from .._core.parameter import Buffer
from . import functional as F
from .containers import Module
from .functional._arguments import resolve_reduction

__all__ = ["CrossEntropyLoss", "MSELoss"]


class MSELoss(Module):
    """The mean squared error.

    Args:
        size_average, reduce: PyTorch's former spelling of ``reduction``.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.MSELoss()(jnp.zeros(2), jnp.full(2, 3.0))
        Array(9., dtype=float32)

    Source: the interface of ``torch.nn.MSELoss``.
    """

    def __init__(
        self, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean"
    ) -> None:
        self.reduction = resolve_reduction(size_average, reduce, reduction)

    def forward(self, input: Any, target: Any) -> Any:
        """Compare ``input`` with ``target`` of the same shape."""
        return F.mse_loss(input, target, reduction=self.reduction)


class CrossEntropyLoss(Module):
    """Cross entropy between logits and classes, or class probabilities.

    Args:
        weight: a factor for each class, shape ``(classes,)``.
        size_average, reduce: PyTorch's former spelling of ``reduction``.
        ignore_index: a class that does not count (default -100).
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.
        label_smoothing: between 0 and 1 (default 0).

    Shape:
        Input ``(classes,)``, ``(batch, classes)`` or ``(batch, classes, *)``; target classes
        ``()``, ``(batch,)`` or ``(batch, *)``, or probabilities of the input's shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.CrossEntropyLoss()(jnp.zeros((1, 2)), jnp.array([1]))
        Array(0.6931472, dtype=float32)

    Source: the interface of ``torch.nn.CrossEntropyLoss``.
    """

    def __init__(
        self,
        weight: Any = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        self.register_buffer("weight", weight if weight is None else Buffer(weight))
        self.reduction = resolve_reduction(size_average, reduce, reduction)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, input: Any, target: Any) -> Any:
        """Compare logits with classes or probabilities."""
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
