"""What a model can be filled from: an open file or a mapping, seen in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.box import Box
from .._core.errors import LoadError
from .arrays import to_numpy
from .tensorfile import TensorFile, TensorHandle

__all__ = ["EXTRA", "Source"]

EXTRA = "_extra_state"
_MOST_PARTS = 10_000


class Source:
    """Names and tensors of a file or a mapping.

    Args:
        given: an open file, or a mapping of names to arrays, nested or not.

    Attributes:
        label: what to call it in messages.
        tensors: ``{dotted name: handle or array}``.
        extras: ``{dotted name: value}`` of extra state that is no tensor.
        parts: the prefixes of nested dicts and lists, each ending in a dot.

    Raises:
        LoadError: if the mapping holds something that is no array.
    """

    def __init__(self, given: TensorFile | Mapping[str, Any]) -> None:
        self.tensors: dict[str, Any] = {}
        self.extras: dict[str, Any] = {}
        self.parts: set[str] = set()
        if isinstance(given, TensorFile):
            self.label = given.path
            self.tensors.update(given)
            if given.nested:
                self._look(given.tree, "", 0)
            return
        if not isinstance(given, Mapping):
            raise TypeError(
                f"load_into: expected a path, an open file or a mapping of names to arrays, got "
                f"{type(given).__name__}"
            )
        self.label = "the mapping"
        self._collect(given, "")

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self.tensors)

    def array(self, name: str) -> Any:
        """Read one tensor on the host."""
        value = self.tensors[name]
        return to_numpy([value], copy=True)[0] if isinstance(value, TensorHandle) else value

    def refused(self, name: str) -> bool:
        """Whether a tensor is of a type that cannot be read."""
        value = self.tensors[name]
        return isinstance(value, TensorHandle) and bool(value.refused)

    def _look(self, tree: Any, prefix: str, depth: int) -> None:
        """Find the parts of a file's structure, and extra state in it."""
        if not isinstance(tree, dict | list | tuple) or len(self.parts) > _MOST_PARTS or depth > 20:
            return
        if prefix:
            self.parts.add(prefix)
        for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            name = f"{prefix}{key}"
            if name.split(".")[-1] == EXTRA and not isinstance(child, TensorHandle):
                self.extras[name] = child
            else:
                self._look(child, f"{name}.", depth + 1)

    def _collect(self, given: Mapping[Any, Any], prefix: str) -> None:
        if prefix:
            self.parts.add(prefix)
        for key, value in given.items():
            name = f"{prefix}{key}"
            if name.split(".")[-1] == EXTRA and not hasattr(value, "shape"):
                self.extras[name] = value
            elif isinstance(value, Mapping):
                self._collect(value, f"{name}.")
            elif isinstance(value, TensorHandle):
                self.tensors[name] = value
            elif (array := _as_array(name, value)) is not None:
                self.tensors[name] = array


def _as_array(name: str, value: Any) -> Any:
    """Return an array of JAX or numpy; ``None`` for settings beside the weights."""
    if isinstance(value, Box):
        return value.data
    if isinstance(value, jax.Array | np.ndarray):
        return value
    if value is None or isinstance(value, bool | int | float | str | list | tuple):
        return None
    if hasattr(value, "detach"):  # a PyTorch tensor; numpy refuses some of its dtypes
        value = value.detach()
    try:
        return np.asarray(value) if hasattr(value, "__array__") else jnp.asarray(value)
    except TypeError as error:
        if hasattr(value, "__dlpack__"):
            return jnp.from_dlpack(value)
        raise LoadError(f"{name}: expected an array, got {type(value).__name__}") from error
