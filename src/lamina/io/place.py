"""From a tensor in a file to an array where its box wants it.

A box with a sharding gets its shards one by one from the mapped file: no host holds the tensor
twice. All others are read in one go, as ``lamina.load`` does.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._core.box import Box
from .._core.errors import LoadError
from .._core.shapes import canonical
from .arrays import to_jax
from .mounts import on_network
from .tensorfile import TensorHandle, same_bytes

__all__ = ["Item", "place_all", "same_data"]


class Item(NamedTuple):
    """One tensor on its way into a model.

    Attributes:
        name: the model's name for it.
        source: its name in the source.
        box: what it goes into.
        value: a handle or an array.
        dtype: what the box will declare; 64-bit types are held as 32-bit unless x64 is on.
    """

    name: str
    source: str
    box: Box
    value: Any
    dtype: np.dtype


def place_all(items: list[Item], copy: bool | None, assign: bool) -> dict[str, Any]:
    """Read every tensor, cast it, and put it where its box says.

    Args:
        items: what to read.
        copy: as for ``lamina.load``.
        assign: the boxes will take over the dtypes; 64-bit ones then come as numpy arrays, which
            say so where JAX has 32 bits only.

    Returns:
        ``{name: array}``.

    Raises:
        FileError: if a tensor cannot be read.
        LoadError: if integers do not fit.
    """
    made: dict[str, Any] = {}
    together: dict[np.dtype | None, list[Item]] = {}
    for item in items:
        target = canonical(item.dtype)
        wide = assign and target != item.dtype
        sharding = None if wide else _sharding(item.box)
        if not isinstance(item.value, TensorHandle):
            value = item.value if isinstance(item.value, jax.Array) else np.array(item.value)
            made[item.name] = value = _cast(value, item.dtype if wide else target, item)
            if not wide:
                made[item.name] = jax.device_put(value, sharding)
        elif wide:
            made[item.name] = _cast(np.array(item.value.read()), item.dtype, item)
        elif sharding is not None:
            made[item.name] = _shards(item, target, sharding, copy)
        elif jnp.issubdtype(item.value.dtype, jnp.floating) and _floats(target):
            together.setdefault(target, []).append(item)
        elif canonical(item.value.dtype) == target:
            together.setdefault(None, []).append(item)
        else:
            made[item.name] = jax.device_put(_cast(item.value.read(), target, item))
    for target, group in together.items():
        with warnings.catch_warnings():
            # The report says what was narrowed.
            warnings.filterwarnings("ignore", message=".*64-bit tensors were loaded as 32-bit")
            arrays = to_jax([item.value for item in group], dtype=target, copy=copy)
        made.update(zip((item.name for item in group), arrays, strict=True))
    return {item.name: made[item.name] for item in items}


def same_data(first: Any, second: Any) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit, a piece at a time."""
    if first is second:
        return True
    if tuple(first.shape) != tuple(second.shape) or first.dtype != second.dtype:
        return False
    if not (isinstance(first, TensorHandle) and isinstance(second, TensorHandle)):
        pair = [h.read() if isinstance(h, TensorHandle) else np.asarray(h) for h in (first, second)]
        return same_bytes(pair[0], pair[1])
    if first.key == second.key:
        return True
    if first.refused or second.refused:
        return False
    if first.splittable and second.splittable:
        pieces = itertools.zip_longest(first.chunks(), second.chunks())
        return all(same_bytes(a, b) for a, b in pieces)
    return same_bytes(first.read(), second.read())


def _floats(dtype: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _sharding(box: Box) -> Any:
    """Where a box wants its value: as told, or where its present value is."""
    if box.declared_sharding is not None or not box.is_material:
        return box.declared_sharding
    default = jax.config.jax_default_device or jax.local_devices()[0]  # pyright: ignore
    return None if box.sharding.device_set == {default} else box.sharding


def _shards(item: Item, target: np.dtype, sharding: Any, copy: bool | None) -> jax.Array:
    handle = item.value
    own = copy if copy is not None else on_network(handle.file)

    def part(index: Any) -> np.ndarray:
        piece = _cast(handle.read(index), target, item)
        return np.array(piece) if own else piece

    return jax.make_array_from_callback(handle.shape, sharding, part)


def _cast(value: Any, dtype: np.dtype, item: Item) -> Any:
    if value.dtype == dtype:
        return value
    if np.dtype(dtype).kind in "iu" and value.dtype.kind in "iu" and value.size:
        limits = np.iinfo(dtype)
        low, high = int(value.min()), int(value.max())
        if low < limits.min or high > limits.max:
            raise LoadError(
                f"{item.name}: its {value.dtype.name} values from {low} to {high} do not fit "
                f"{np.dtype(dtype).name}; nothing was loaded. Turn x64 on with "
                f'jax.config.update("jax_enable_x64", True)'
            )
    with np.errstate(over="ignore", invalid="ignore"):
        return value.astype(dtype)
