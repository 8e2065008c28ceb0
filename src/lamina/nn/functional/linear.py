"""Linear maps, table look-up, and the reshaping that goes between layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._core.box import array
from ..._core.errors import DataDependentError, ShapeError, TypeMismatchError, format_shape
from ._arguments import Tensor, per_channel, resolve_axis, same_dtype, widen


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> jax.Array:
    """Affine map ``x @ weight.T + bias``.

    Args:
        input: shape ``(*, in_features)``, any number of leading dimensions.
        weight: shape ``(out_features, in_features)``, or ``(in_features,)``.
        bias: shape ``(out_features,)``, or None (default).

    Returns:
        An array of shape ``(*, out_features)``, without the last dimension for a vector weight.

    Raises:
        ShapeError: if the last dimension of the input is not ``in_features``.

    Example:
        >>> from lamina.nn import functional as F
        >>> F.linear([[1.0, 2.0]], [[1.0, 1.0], [0.0, 2.0]], [0.5, 0.0]).tolist()
        [[3.5, 4.0]]
    """
    x, w = same_dtype(input, weight)
    if w.ndim not in (1, 2):
        raise ShapeError(
            f"linear: weight expected shape (out_features, in_features), "
            f"got {format_shape(w.shape)}."
        )
    if x.ndim == 0 or x.shape[-1] != w.shape[-1]:
        got = f"{x.shape[-1]} (input {format_shape(x.shape)})" if x.ndim else "a scalar"
        raise ShapeError(
            f"linear: expected in_features={w.shape[-1]} in the last dimension of the input, "
            f"got {got}; weight is {format_shape(w.shape)}. "
            f"Reshape the input, or build the layer with in_features of the input "
            f"(nn.LazyLinear finds it out)."
        )
    y = lax.dot_general(x, w, (((x.ndim - 1,), (w.ndim - 1,)), ((), ())))
    if bias is None:
        return y
    y, b = same_dtype(y, bias)
    if b.ndim > 1 or (b.ndim == 1 and (y.ndim == 0 or b.shape[0] not in (1, y.shape[-1]))):
        raise ShapeError(
            f"linear: bias expected shape {format_shape(w.shape[:-1])}, "
            f"got {format_shape(b.shape)}."
        )
    return y + (per_channel(b, y.ndim, y.ndim - 1) if b.ndim else b)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> jax.Array:
    """Rows of a table, looked up by index.

    Args:
        input: integer indices, any shape, each in ``[0, num_embeddings)``.
        weight: the table, shape ``(num_embeddings, embedding_dim)``.
        padding_idx: rows looked up with this index get no gradient; may count from the end.
        max_norm: looked-up rows longer than this are scaled down to it. The result and the
            gradient are PyTorch's, but the table itself is left as it is: PyTorch also overwrites
            the looked-up rows of the table.
        norm_type: the ``p`` of the norm that ``max_norm`` bounds (default 2).
        scale_grad_by_freq: divide the gradient of a row by the number of times it was looked up.
        sparse: accepted for PyTorch's sake; gradients in JAX are dense.

    Returns:
        An array of shape ``(*input.shape, embedding_dim)``. An index outside the table, which no
        compiled program can raise for, gives a row of NaN, and never another row.

    Raises:
        TypeMismatchError: if the indices are not integers.
        ShapeError: if ``weight`` is not a matrix.
        IndexError: if ``padding_idx`` is outside the table, or if the indices are a NumPy array or
            list with one outside it.

    Example:
        >>> from lamina.nn import functional as F
        >>> F.embedding([1, 0], [[1.0, 2.0], [3.0, 4.0]]).tolist()
        [[3.0, 4.0], [1.0, 2.0]]
    """
    table, index = array(weight), array(input)
    if table.ndim != 2:
        raise ShapeError(
            f"embedding: weight expected shape (num_embeddings, embedding_dim), "
            f"got {format_shape(table.shape)}."
        )
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeMismatchError(
            f"embedding: indices expected to be integers, got {index.dtype}; "
            f"convert them: embedding(x.astype('int32'), weight)."
        )
    rows_total = table.shape[0]
    if not isinstance(input, jax.Array) and isinstance(input, (np.ndarray, list, tuple, int)):
        _check_range(np.asarray(input), rows_total)
    if padding_idx is not None and not -rows_total <= padding_idx < rows_total:
        raise IndexError(
            f"embedding: padding_idx expected in [{-rows_total}, {rows_total}), got {padding_idx}."
        )

    rows = jnp.take(table, _in_range(index, rows_total), axis=0, mode="fill")
    if max_norm is not None:
        norms = jnp.linalg.norm(widen(rows), ord=norm_type, axis=-1, keepdims=True)
        scale = jnp.where(norms > max_norm, max_norm / (norms + 1e-7), 1.0).astype(rows.dtype)
        # PyTorch overwrites the rows outside of the graph, so the scale takes no part in it.
        rows = _with_gradient_of(rows * lax.stop_gradient(scale), rows)
    if scale_grad_by_freq:
        counts = jnp.zeros(rows_total, rows.dtype).at[index].add(1, mode="drop")
        factor = 1 / jnp.take(counts, index, mode="clip")
        rows = _scale_gradient(rows, jnp.broadcast_to(factor[..., None], rows.shape))
    if padding_idx is not None:
        is_padding = (index == padding_idx % rows_total)[..., None]
        rows = jnp.where(is_padding, lax.stop_gradient(rows), rows)
    return rows


def one_hot(tensor: Tensor, num_classes: int = -1) -> jax.Array:
    """Indicator vectors of class indices.

    Args:
        tensor: integer class indices, any shape.
        num_classes: length of the vectors; -1 (default) for one more than the largest index,
            which needs a value and so does not work in a compiled function.

    Returns:
        An int32 array of shape ``(*tensor.shape, num_classes)``, 1 at the index and 0 elsewhere
        (all 0 for an index outside ``[0, num_classes)``).

    Raises:
        TypeMismatchError: if the indices are not integers.
        DataDependentError: if ``num_classes`` is left out in a compiled function.

    Example:
        >>> from lamina.nn import functional as F
        >>> F.one_hot([0, 2], num_classes=3).tolist()
        [[1, 0, 0], [0, 0, 1]]
    """
    index = array(tensor)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeMismatchError(
            f"one_hot: class indices expected to be integers, got {index.dtype}; "
            f"convert them: one_hot(x.astype('int32'))."
        )
    if num_classes == -1:
        if index.size == 0:
            raise ShapeError("one_hot: an empty tensor needs num_classes; pass num_classes=n.")
        try:
            num_classes = int(index.max()) + 1
        except jax.errors.ConcretizationTypeError:
            raise DataDependentError(
                "one_hot: the number of classes can't be read off the values in a compiled "
                "function; pass it: one_hot(x, num_classes=n)."
            ) from None
    return jax.nn.one_hot(index, num_classes, dtype=jnp.int32)


def flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> jax.Array:
    """Merge consecutive dimensions into one.

    Args:
        input: any shape; a scalar becomes a vector of length 1.
        start_dim: first dimension to merge (default 0).
        end_dim: last dimension to merge, included (default -1).

    Returns:
        The same elements in the same order, with fewer dimensions.

    Raises:
        IndexError: if the input has no such dimension.
        ShapeError: if ``start_dim`` comes after ``end_dim``.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina.nn import functional as F
        >>> F.flatten(jnp.zeros((2, 3, 4)), start_dim=1).shape
        (2, 12)
    """
    x = array(input)
    start = resolve_axis(start_dim, x.ndim, "flatten")
    end = resolve_axis(end_dim, x.ndim, "flatten")
    if start > end:
        raise ShapeError(f"flatten: start_dim={start_dim} comes after end_dim={end_dim}.")
    merged = int(np.prod(x.shape[start : end + 1], dtype=np.int64))
    return x.reshape((*x.shape[:start], merged, *x.shape[end + 1 :]))


def _check_range(index: np.ndarray, rows_total: int) -> None:
    outside = index[(index < 0) | (index >= rows_total)]
    if outside.size:
        raise IndexError(
            f"embedding: indices expected in [0, {rows_total}), got {int(outside.flat[0])}; "
            f"build the layer with num_embeddings={max(int(outside.max()) + 1, rows_total + 1)}, "
            f"or correct the indices."
        )


def _in_range(index: jax.Array, rows_total: int) -> jax.Array:
    """Send negative indices outside the table: NumPy's counting from the end hides mistakes."""
    return jnp.where(index < 0, rows_total, index)


@jax.custom_jvp
def _with_gradient_of(value: jax.Array, source: jax.Array) -> jax.Array:
    return value


@jax.custom_jvp
def _scale_gradient(value: jax.Array, factor: jax.Array) -> jax.Array:
    return value


_with_gradient_of.defjvp(lambda primals, tangents: (primals[0], tangents[1]))
_scale_gradient.defjvp(lambda primals, tangents: (primals[0], tangents[0] * primals[1]))
