"""Pytrees of arrays and other things, taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Carrier", "Partition", "as_array", "is_arraylike"]

_NUMBERS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def is_arraylike(leaf: Any) -> bool:
    """Tell whether a leaf is data: an array of any library, or a number."""
    if isinstance(leaf, _NUMBERS):
        return True
    kind = type(leaf)
    return hasattr(kind, "__dlpack__") or hasattr(kind, "__array__")


def as_array(leaf: Any) -> Any:
    """Return a leaf as JAX takes it: a copy of an array of another library, which may change."""
    if isinstance(leaf, _NUMBERS):
        return leaf
    if hasattr(leaf, "detach"):
        leaf = leaf.detach()  # PyTorch's, which may want a gradient
    try:
        host = np.asarray(leaf)
    except TypeError:  # a dtype that NumPy does not have
        return jnp.copy(jnp.from_dlpack(leaf))
    if host.dtype == object:  # NumPy did not know what to do with it
        return jnp.copy(jnp.from_dlpack(leaf))
    return jnp.asarray(host.copy())


class Partition:
    """A pytree whose leaves of one kind (default: the arrays) are set apart from the others."""

    def __init__(self, tree: Any, belongs: Callable[[Any], bool] = is_arraylike) -> None:
        self.leaves, self.treedef = jax.tree.flatten(tree)
        self.mask = [belongs(leaf) for leaf in self.leaves]

    @property
    def chosen(self) -> list[Any]:
        """The leaves of that kind."""
        return [as_array(leaf) for leaf, use in zip(self.leaves, self.mask, strict=True) if use]

    @property
    def rest(self) -> list[Any]:
        """The other leaves."""
        return [leaf for leaf, use in zip(self.leaves, self.mask, strict=True) if not use]

    def combine(self, chosen: Iterable[Any]) -> Any:
        """Return the tree with other leaves in the places of those set apart."""
        values = iter(chosen)
        pairs = zip(self.leaves, self.mask, strict=True)
        return jax.tree.unflatten(self.treedef, [next(values) if use else x for x, use in pairs])


_TAKEN = object()


class Carrier:
    """Carries what is no array around a JAX transform, which would refuse it."""

    def __init__(self) -> None:
        self.parts = Partition(())

    def take(self, tree: Any) -> list[Any]:
        """Return the arrays of a tree, and keep the rest."""
        self.parts = parts = Partition(tree)
        arrays = parts.chosen
        parts.leaves = [
            _TAKEN if use else x for x, use in zip(parts.leaves, parts.mask, strict=True)
        ]
        return arrays

    def give(self, arrays: Iterable[Any]) -> Any:
        """Return the tree with these arrays."""
        return self.parts.combine(arrays)
