"""Embeddings."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from .._core.box import array
from .._core.parameter import Parameter
from .._core.shapes import as_sharding
from . import functional as F
from .containers import Module
from .init import Normal

__all__ = ["Embedding"]


class Embedding(Module):
    """A table of vectors, looked up by index.

    Args:
        num_embeddings: number of rows.
        embedding_dim: size of each row.
        padding_idx: a row that is zero at the start and gets no gradient.
        max_norm: rows longer than this are scaled down to it when looked up. (PyTorch changes the
            table itself as well.)
        norm_type: the p of the p-norm for ``max_norm`` (default 2).
        scale_grad_by_freq: divide a row's gradient by how often it was looked up.
        sparse: accepted for PyTorch's sake; gradients are dense.
        device: where the table goes.
        dtype: dtype of the table (default float32).

    Shape:
        Input any shape ``(*)`` of integers, output ``(*, embedding_dim)``, ``weight``
        ``(num_embeddings, embedding_dim)``, drawn from N(0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> nn.Embedding(10, 3)(jnp.array([[1, 2], [4, 5]])).shape
        (2, 2, 3)

    Source: the interface of ``torch.nn.Embedding``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Any = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if num_embeddings is None or embedding_dim is None:
            raise TypeError(
                "Embedding: num_embeddings and embedding_dim can't be inferred from indices; "
                "state both"
            )
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(
                    f"Embedding: padding_idx={padding_idx} is not within "
                    f"num_embeddings={num_embeddings}"
                )
            padding_idx %= num_embeddings
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        shape = (num_embeddings, embedding_dim)
        if _weight is None:
            self.weight = Parameter(
                shape=shape,
                init=Normal() if padding_idx is None else _NormalExceptRow(padding_idx),
                dtype=dtype,
                sharding=as_sharding(device),
                requires_grad=not _freeze,
            )
        else:
            self.weight = Parameter(_weight, requires_grad=not _freeze)
            if self.weight.shape != shape:
                raise ValueError(
                    f"Embedding: _weight has shape {self.weight.shape}, expected {shape}"
                )

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Any,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Embedding:
        """Return an embedding with the rows of a given table, frozen by default."""
        table = array(embeddings)
        if table.ndim != 2:
            raise ValueError(f"from_pretrained: expected a table (rows, size), got {table.shape}")
        return cls(
            *table.shape,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            _weight=table,
            _freeze=freeze,
        )

    def extra_repr(self) -> str:
        """Return the sizes and the options that are not the default."""
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.max_norm is not None:
            text += f", max_norm={self.max_norm}"
        if self.norm_type != 2:
            text += f", norm_type={self.norm_type}"
        if self.scale_grad_by_freq is not False:
            text += f", scale_grad_by_freq={self.scale_grad_by_freq}"
        if self.sparse is not False:
            text += ", sparse=True"
        return text

    def forward(self, input: Any) -> Any:
        """Look the indices up."""
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class _NormalExceptRow:
    """N(0, 1) with one row of zeros."""

    def __init__(self, row: int) -> None:
        self.row = row

    def __call__(self, key: Any, shape: Any, dtype: Any) -> Any:
        return Normal()(key, shape, dtype).at[self.row].set(jnp.zeros((), dtype))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NormalExceptRow) and other.row == self.row

    def __hash__(self) -> int:
        return hash((_NormalExceptRow, self.row))

    def __repr__(self) -> str:
        return f"Normal(mean=0.0, std=1.0), row {self.row} zero"
