"""Taking apart the arguments of a transformed function, and storing what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from .._core import bind
from .._core.bind import Retry
from .._core.errors import LaminaError
from .._core.parameter import Box

_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)
_MOST_TRIES = 20


class Split:
    """The leaves of a pytree of arguments, with modules and other constants set apart."""

    def __init__(self, tree: Any) -> None:
        self.leaves, self.treedef = jax.tree.flatten(tree)
        self.is_array = [isinstance(leaf, _ARRAYS) for leaf in self.leaves]

    @property
    def arrays(self) -> list[Any]:
        return [leaf for leaf, use in zip(self.leaves, self.is_array, strict=True) if use]

    @property
    def owners(self) -> list[Any]:
        return [leaf for leaf in self.leaves if hasattr(leaf, "_state_boxes")]

    def join(self, arrays: Iterable[Any]) -> Any:
        """Return the tree with other arrays in their places."""
        values = iter(arrays)
        return jax.tree.unflatten(
            self.treedef,
            [
                next(values) if use else leaf
                for leaf, use in zip(self.leaves, self.is_array, strict=True)
            ],
        )


class Constants:
    """Carries the leaves that are no arrays around a JAX transform."""

    def __init__(self) -> None:
        self.split: Split | None = None

    def take(self, tree: Any) -> list[Any]:
        self.split = Split(tree)
        return self.split.arrays

    def give(self, arrays: list[Any]) -> Any:
        assert self.split is not None
        return self.split.join(arrays)


def settle(attempt: Callable[[], Any], name: str) -> Any:
    """Run ``attempt`` until its trace knows enough."""
    for _ in range(_MOST_TRIES):
        try:
            return attempt()
        except Retry:
            continue
    raise LaminaError(
        f"{name}: the function makes new parameters each time it is traced "
        f"({_MOST_TRIES} times); build its modules outside of it"
    )


def store_all(boxes: Iterable[Box], values: Iterable[Any]) -> None:
    """Write what a transformed function wrote into the enclosing context."""
    for box, value in zip(boxes, values, strict=True):
        bind.store(box, value)
