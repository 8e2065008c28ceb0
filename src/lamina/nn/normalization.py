"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._core.errors import ShapeError, format_shape
from .._core.parameter import Buffer, Parameter
from .._core.shapes import as_sharding
from .._core.walk import own_boxes
from . import functional as F
from .containers import Module
from .init import Ones, Zeros

__all__ = ["BatchNorm1d", "BatchNorm2d", "LayerNorm", "LazyBatchNorm1d", "LazyBatchNorm2d"]


class _BatchNorm(Module):
    """Batch normalisation of any number of axes; subclasses check the rank of the input."""

    _version = 2
    _ranks: tuple[int, ...]

    def __init__(
        self,
        num_features: int | None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        options: dict[str, Any] = {"sharding": as_sharding(device)}
        shape = (num_features,)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        if affine:
            self.weight = Parameter(shape=shape, init=Ones(), dtype=dtype, **options)
        else:
            self.register_parameter("weight", None)
        if affine and bias:
            self.bias = Parameter(shape=shape, init=Zeros(), dtype=dtype, **options)
        else:
            self.register_parameter("bias", None)
        if track_running_stats:
            self.running_mean = Buffer(shape=shape, init=Zeros(), dtype=dtype, **options)
            self.running_var = Buffer(shape=shape, init=Ones(), dtype=dtype, **options)
            self.num_batches_tracked = Buffer(shape=(), init=Zeros(), dtype=np.int64, **options)
        else:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                self.__dict__[name] = None

    def reset_running_stats(self) -> None:
        """Forget the running statistics."""
        if self.track_running_stats:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                self.get_buffer(name).initialize()

    def infer_shapes(self, input: Any) -> None:
        """Take ``num_features`` from axis 1 of the input."""
        self._check(input)
        self.num_features = input.shape[1]
        for _, box in own_boxes(self):
            if box.is_unshaped:
                box.shape = (self.num_features,)

    def extra_repr(self) -> str:
        """Return the options."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}"
        )

    def _check(self, input: Any) -> None:
        if len(input.shape) not in self._ranks:
            ranks = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ShapeError(
                f"{type(self).__name__}: expected {ranks} input, got shape "
                f"{format_shape(input.shape)}"
            )

    def forward(self, input: Any) -> Any:
        """Normalise ``input`` and, in training, update the running statistics."""
        self._check(input)
        update = self.training and self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if update:
            self.num_batches_tracked += 1
            if self.momentum is None:  # the mean over all batches so far
                momentum = 1 / self.num_batches_tracked
        mean = variance = None
        if self.track_running_stats:
            mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(
            input,
            mean,
            variance,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            momentum,  # type: ignore[arg-type]
            self.eps,
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = prefix + "num_batches_tracked"
        if (
            self.track_running_stats
            and name not in state_dict
            and prefix + "running_mean" in state_dict
        ):
            state_dict[name] = np.zeros((), np.int64)  # files from before PyTorch 0.4.1
        super()._load_from_state_dict(state_dict, prefix, *args)


class BatchNorm1d(_BatchNorm):
    """Normalise each feature by its statistics over the batch.

    Args:
        num_features: size of axis 1 of the input, or ``None`` to infer it.
        eps: added to the variance (default 1e-5).
        momentum: weight of the new batch in the running statistics (default 0.1); ``None`` for
            the plain mean over all batches.
        affine: learn a scale and a shift (default True).
        track_running_stats: keep running statistics for evaluation (default True).
        device: where the parameters go.
        dtype: dtype of the parameters (default float32).
        bias: learn the shift as well (default True).

    Shape:
        Input ``(batch, num_features)`` or ``(batch, num_features, length)``.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> norm = nn.BatchNorm1d(3)
        >>> norm(jnp.ones((4, 3))).shape, int(norm.num_batches_tracked)
        ((4, 3), 1)

    Source: the interface of ``torch.nn.BatchNorm1d``; Ioffe and Szegedy,
    https://arxiv.org/abs/1502.03167
    """

    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Normalise each channel of images by its statistics over the batch.

    Args:
        num_features: channels of the input, or ``None`` to infer them.
        eps, momentum, affine, track_running_stats, device, dtype, bias: as for
            :class:`BatchNorm1d`.

    Shape:
        Input ``(batch, num_features, height, width)``.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.BatchNorm2d(3)(jnp.ones((4, 3, 8, 8))).shape
        (4, 3, 8, 8)

    Source: the interface of ``torch.nn.BatchNorm2d``; Ioffe and Szegedy,
    https://arxiv.org/abs/1502.03167
    """

    _ranks = (4,)


class _LazyBatchNorm(_BatchNorm):
    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(None, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.num_features = 0  # as PyTorch shows it
        self._links.pending = True  # also without parameters: the size is shown


class LazyBatchNorm1d(_LazyBatchNorm, BatchNorm1d):
    """A :class:`BatchNorm1d` whose ``num_features`` is inferred.

    Args:
        eps, momentum, affine, track_running_stats, device, dtype, bias: as for
            :class:`BatchNorm1d`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> net = nn.LazyBatchNorm1d()
        >>> _ = net(jnp.ones((4, 3)))
        >>> net.num_features
        3

    Source: the interface of ``torch.nn.LazyBatchNorm1d``.
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNorm, BatchNorm2d):
    """A :class:`BatchNorm2d` whose ``num_features`` is inferred.

    Args:
        eps, momentum, affine, track_running_stats, device, dtype, bias: as for
            :class:`BatchNorm1d`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> net = nn.LazyBatchNorm2d()
        >>> _ = net(jnp.ones((4, 3, 8, 8)))
        >>> net.num_features
        3

    Source: the interface of ``torch.nn.LazyBatchNorm2d``.
    """

    cls_to_become = BatchNorm2d


class LayerNorm(Module):
    """Normalise each sample over its last axes.

    Args:
        normalized_shape: sizes of the last axes, an int for one; ``None`` or ``(None, ...)`` for
            sizes to be inferred.
        eps: added to the variance (default 1e-5).
        elementwise_affine: learn a scale and a shift (default True).
        bias: learn the shift as well (default True).
        device: where the parameters go.
        dtype: dtype of the parameters (default float32).

    Shape:
        Input ``(*, *normalized_shape)``, parameters ``normalized_shape``.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.LayerNorm(None)(jnp.ones((2, 5))).shape
        (2, 5)

    Source: the interface of ``torch.nn.LayerNorm``; Ba, Kiros and Hinton,
    https://arxiv.org/abs/1607.06450
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int | None] | None,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "sharding": as_sharding(device)}
        self.normalized_shape: tuple[int | None, ...] = (
            (normalized_shape,)
            if isinstance(normalized_shape, int) or normalized_shape is None
            else tuple(normalized_shape)
        )
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if elementwise_affine:
            self.weight = Parameter(shape=self.normalized_shape, init=Ones(), **options)
            if bias:
                self.bias = Parameter(shape=self.normalized_shape, init=Zeros(), **options)
        self._links.pending = None in self.normalized_shape

    def infer_shapes(self, input: Any) -> None:
        """Take the sizes from the last axes of the input."""
        count = len(self.normalized_shape)
        if len(input.shape) < count:
            raise ShapeError(
                f"LayerNorm: expected at least {count} axes, got shape {format_shape(input.shape)}"
            )
        self.normalized_shape = tuple(input.shape[-count:])
        for parameter in self.parameters(recurse=False):
            parameter.shape = self.normalized_shape

    def extra_repr(self) -> str:
        """Return the options."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        )

    def forward(self, input: Any) -> Any:
        """Normalise ``input``."""
        return F.layer_norm(
            input,
            self.normalized_shape,  # type: ignore[arg-type]
            self.weight,
            self.bias,
            self.eps,
        )
