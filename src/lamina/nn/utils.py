"""Tools for gradients and parameters as a whole, with PyTorch's names."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp

from .._core.box import array
from .._core.errors import ShapeError
from .._core.parameter import Parameter

__all__ = [
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_total_norm",
    "parameters_to_vector",
    "vector_to_parameters",
]

Gradients = Parameter | Iterable[Parameter] | MutableMapping[str, Any]


def get_total_norm(
    tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> jax.Array:
    """Return the norm of all arrays taken together, as if they were one vector.

    Args:
        tensors: an array or an iterable of arrays.
        norm_type: the p of the p-norm, ``float("inf")`` for the largest element (default 2).
        error_if_nonfinite: raise if the norm is NaN or infinite (default False; uncompiled only).

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.utils.get_total_norm([jnp.array([3.0]), jnp.array([4.0])])
        Array(5., dtype=float32)

    Source: the interface of ``torch.nn.utils.get_total_norm``.
    """
    arrays = [tensors] if hasattr(tensors, "shape") else list(tensors)
    if not arrays:
        return jnp.zeros(())
    flat = [
        jnp.ravel(array(a)).astype(jnp.promote_types(array(a).dtype, jnp.float32)) for a in arrays
    ]
    norm = jnp.linalg.norm(jnp.stack([jnp.linalg.norm(a, norm_type) for a in flat]), norm_type)
    if error_if_nonfinite and not bool(jnp.isfinite(norm)):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {norm}, so they can't be "
            f"clipped; pass error_if_nonfinite=False to go on all the same"
        )
    return norm


def clip_grad_norm_(
    parameters: Gradients,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> jax.Array:
    """Scale gradients down, in place, so that their total norm is at most ``max_norm``.

    Args:
        parameters: parameters, whose ``.grad`` is scaled; or the dict of gradients that
            :func:`lamina.value_and_grad` returned, whose entries are replaced.
        max_norm: the largest norm allowed.
        norm_type: the p of the p-norm (default 2).
        error_if_nonfinite: raise if the norm is NaN or infinite (default False; uncompiled only).
        foreach: accepted for PyTorch's sake.

    Returns:
        The total norm before clipping.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> grads = {"weight": jnp.array([3.0, 4.0])}
        >>> nn.utils.clip_grad_norm_(grads, 1.0)
        Array(5., dtype=float32)
        >>> [round(float(g), 2) for g in grads["weight"]]
        [0.6, 0.8]

    Source: the interface of ``torch.nn.utils.clip_grad_norm_``.
    """
    grads, put = _gradients(parameters)
    norm = get_total_norm(grads.values(), norm_type, error_if_nonfinite)
    factor = jnp.minimum(max_norm / (norm + 1e-6), 1.0)
    for key, grad in grads.items():
        put(key, grad * factor.astype(grad.dtype))
    return norm


def clip_grad_value_(parameters: Gradients, clip_value: float, foreach: bool | None = None) -> None:
    """Limit every element of the gradients, in place, to ``[-clip_value, clip_value]``.

    Args:
        parameters: as for :func:`clip_grad_norm_`.
        clip_value: the largest absolute value allowed.
        foreach: accepted for PyTorch's sake.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> grads = {"weight": jnp.array([3.0, -4.0])}
        >>> nn.utils.clip_grad_value_(grads, 1.0)
        >>> grads["weight"]
        Array([ 1., -1.], dtype=float32)

    Source: the interface of ``torch.nn.utils.clip_grad_value_``.
    """
    grads, put = _gradients(parameters)
    for key, grad in grads.items():
        put(key, jnp.clip(grad, -clip_value, clip_value))


def _gradients(parameters: Gradients) -> tuple[dict[Any, jax.Array], Any]:
    """Return the gradients, and how to put new ones in their places."""
    if isinstance(parameters, MutableMapping):
        return {k: array(v) for k, v in parameters.items()}, parameters.__setitem__
    chosen = [parameters] if isinstance(parameters, Parameter) else list(parameters)
    grads = {p: p.grad for p in dict.fromkeys(chosen) if p.grad is not None}
    return grads, lambda parameter, grad: setattr(parameter, "grad", grad)


def parameters_to_vector(parameters: Iterable[Parameter]) -> jax.Array:
    """Return all values as one vector, in order.

    Example:
        >>> from lamina import nn
        >>> nn.utils.parameters_to_vector(nn.Linear(2, 3).parameters()).shape
        (9,)

    Source: the interface of ``torch.nn.utils.parameters_to_vector``.
    """
    return jnp.concatenate([jnp.ravel(array(p)) for p in parameters])


def vector_to_parameters(vec: Any, parameters: Iterable[Parameter]) -> None:
    """Write consecutive pieces of a vector into parameters; nothing is written if it doesn't fit.

    Raises:
        ShapeError: if the vector is longer or shorter than the parameters together.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> net = nn.Linear(2, 3)
        >>> nn.utils.vector_to_parameters(jnp.arange(9.0), net.parameters())
        >>> net.bias.data
        Array([6., 7., 8.], dtype=float32)

    Source: the interface of ``torch.nn.utils.vector_to_parameters``.
    """
    vec, chosen = array(vec), list(parameters)
    total = sum(p.numel() for p in chosen)
    if vec.shape != (total,):
        raise ShapeError(f"vector_to_parameters: expected shape ({total},), got {vec.shape}")
    start = 0
    for p in chosen:
        stop = start + p.numel()
        p.copy_(vec[start:stop].reshape(p.size()))
        start = stop
