"""Arrays reduced to their shapes and dtypes, and shapes as text."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from .._core.box import Box
from .._core.errors import format_shape

__all__ = ["abstract", "describe_shapes"]


def abstract(tree: Any) -> Any:
    """Replace every array in a nested structure by its shape and dtype."""
    return jax.tree.map(_abstract_leaf, tree, is_leaf=lambda leaf: isinstance(leaf, Box))


def _abstract_leaf(leaf: Any) -> Any:
    if isinstance(leaf, (Box, jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)
    return leaf


def describe_shapes(tree: Any) -> str:
    """Write the shapes in a nested structure: ``(8, 10)``, ``[(8, 10), (8,)]``."""
    if isinstance(tree, jax.ShapeDtypeStruct):
        return format_shape(tree.shape)
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {describe_shapes(v)}" for key, v in tree.items()) + "}"
    if isinstance(tree, (list, tuple)):
        return "[" + ", ".join(map(describe_shapes, tree)) + "]"
    return repr(tree) if isinstance(tree, (int, float, str, type(None))) else type(tree).__name__
