"""Materialising: giving abstract boxes their values; and inferring the shapes of unshaped ones.

A value is drawn by one small compiled program per distinct (recipe, shape, dtype, sharding), with
the recipe's numbers and the key's ingredients as run-time scalars.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .bind import Frame
from .errors import DeferredError, ShapeError, format_shape
from .module import Module
from .parameter import Box, as_sharding, canonical
from .random import BIRTHS, is_key, origin_of, seed_key
from .walk import identify, walk

__all__ = ["abstractify", "infer", "materialize", "name_words"]


def infer(net: Module, *specs: Any, **kwargs: Any) -> Module:
    """Find unknown shapes by running ``forward`` abstractly: no arithmetic, no memory.

    Args:
        net: the model.
        *specs: what ``net`` would be called with: arrays or ``jax.ShapeDtypeStruct``.
        **kwargs: keyword arguments of the call, likewise.

    Returns:
        ``net``, with every shape known that ``forward`` reaches.

    Raises:
        Exception: whatever ``forward`` raises; the model is then as it was.

    Example:
        >>> import jax, jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> net = nn.LazyLinear(4)
        >>> _ = lamina.infer(net, jax.ShapeDtypeStruct((8, 3), jnp.float32))
        >>> net.weight.shape, net.weight.is_material
        ((4, 3), False)
    """
    leaves, treedef = jax.tree.flatten((specs, kwargs))
    dynamic = [_is_spec(leaf) for leaf in leaves]

    def forward(values: list[Any]) -> None:
        remaining = iter(values)
        filled = [
            next(remaining) if use else leaf for use, leaf in zip(dynamic, leaves, strict=True)
        ]
        args, keywords = jax.tree.unflatten(treedef, filled)
        with Frame("infer", abstract=True):
            net(*args, **keywords)

    jax.eval_shape(forward, [abstractify(x) for x, use in zip(leaves, dynamic, strict=True) if use])
    return net


def abstractify(value: Any) -> Any:
    """Return the shape and dtype of an array as a ``jax.ShapeDtypeStruct``."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return value
    if isinstance(value, Box):
        return jax.ShapeDtypeStruct(value.shape, value.dtype)
    if isinstance(value, jax.Array):
        return jax.ShapeDtypeStruct(value.shape, value.dtype)
    value = np.asarray(value)
    return jax.ShapeDtypeStruct(value.shape, canonical(value.dtype))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, (jax.ShapeDtypeStruct, jax.Array, np.ndarray, np.generic))


def materialize(
    net: Module,
    *specs: Any,
    key: jax.Array | None = None,
    dtype: Any = None,
    shardings: Any = None,
    overwrite: bool = False,
) -> Module:
    """Give every abstract parameter and buffer its value, straight into its place.

    Args:
        net: the model.
        *specs: inputs (arrays or ``jax.ShapeDtypeStruct``), needed while sizes are unknown.
        key: a PRNG key from which, with the names below ``net``, all values follow. Default: the
            seed under which the model was built.
        dtype: dtype for all floating-point parameters and buffers (default: as declared).
        shardings: where the values go: a sharding or device for all, a dict of name globs to
            shardings, or a function ``(name, box) -> sharding | None``.
        overwrite: also draw anew what has a value already (default False).

    Returns:
        ``net``.

    Raises:
        DeferredError: if shapes are still unknown, or a box has neither value nor recipe. All such
            names are listed.

    Example:
        >>> import jax, lamina
        >>> from lamina import nn
        >>> net = lamina.materialize(nn.Linear(3, 4), key=jax.random.key(0))
        >>> net.weight.is_material
        True
    """
    if specs:
        infer(net, *specs)
    names = walk(net).names
    place = _placer(shardings)
    problems = []
    for box, name in names.items():
        if dtype is not None and jnp.issubdtype(box._dtype, jnp.floating):
            box._cast(dtype)
        sharding = place(name, box)
        if sharding is not None:
            box.sharding = as_sharding(sharding)
        if box._is_free or (box.is_material and not overwrite):
            continue
        if box._awaits_shapes:
            problems.append(f"  {name}: shape {format_shape(box.shape)} is not known yet")
        elif box._init is None and not box.is_material:
            problems.append(f"  {name}: has no value and no recipe to make one")
    if problems:
        raise DeferredError(
            "these can't get values:\n"
            + "\n".join(problems)
            + "\n  mend: pass an input, lamina.materialize(net, "
            "jax.ShapeDtypeStruct((batch, features), jnp.float32)), or set p.init"
        )
    for box, name in names.items():
        if box._is_free or (box.is_material and not (overwrite and box._init is not None)):
            continue
        value = draw(box) if key is None else _draw_named(box, key, 0, name)
        box._value = value
    return net


def _placer(shardings: Any) -> Callable[[str, Box], Any]:
    if shardings is None:
        return lambda name, box: None
    if isinstance(shardings, Mapping):

        def by_glob(name: str, box: Box) -> Any:
            for pattern, sharding in shardings.items():
                if fnmatch.fnmatchcase(name, pattern):
                    return sharding
            return None

        return by_glob
    if callable(shardings) and not isinstance(shardings, jax.sharding.Sharding):
        return shardings
    return lambda name, box: shardings


def name_words(name: str) -> tuple[int, int]:
    """Return the 64-bit hash of a name as two 32-bit words."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def draw(box: Box) -> jax.Array:
    """Draw a box's value from its recipe, its model's seed and number, and its name."""
    root, name = identify(box)
    seed, number = origin_of(box, root)
    return _draw_named(box, seed, number, name)


def _draw_named(box: Box, seed: Any, number: int, name: str) -> jax.Array:
    recipe = box._init
    if recipe is None:
        raise DeferredError(
            f"{box._describe()} has no value and no recipe to make one.\n"
            f"    mend:  nn.Parameter(shape={box.shape}, init=nn.init.Normal(std=0.02))"
        )
    shape = tuple(int(size) for size in box.shape)  # type: ignore[arg-type]
    dtype = np.dtype(box.dtype)
    sharding = box._sharding
    words = np.array([number, *name_words(name)], np.uint32)
    if not is_key(seed):
        words = np.array([*seed, *words], np.uint32)
        seed = None
    with jax.ensure_compile_time_eval():
        try:
            value = _run(recipe, seed, words, shape, dtype, sharding)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
            key = _key(seed, words)  # a recipe in plain NumPy can't be compiled
            value = jax.device_put(jnp.asarray(recipe(key, shape, dtype), dtype), sharding)
    if value.shape != shape or value.dtype != dtype:
        raise ShapeError(
            f"{box._describe()}: its recipe {recipe!r} returned {value.dtype}{list(value.shape)}, "
            f"expected {dtype}{list(shape)}; a recipe is (key, shape, dtype) -> Array"
        )
    return value


def _key(seed: Any, words: Any) -> jax.Array:
    if seed is None:
        seed, words = seed_key(words[0], words[1]), words[2:]
    elif not jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.wrap_key_data(seed)
    root = jax.random.fold_in(seed, words[0])
    return jax.random.fold_in(jax.random.fold_in(root, words[1]), words[2])


def _run(recipe: Any, seed: Any, words: Any, shape: Any, dtype: Any, sharding: Any) -> jax.Array:
    leaves, treedef = jax.tree.flatten(recipe)
    if leaves and leaves[0] is recipe:  # a plain function
        return _program(recipe, None, shape, dtype, sharding)(seed, words, ())
    return _program(None, treedef, shape, dtype, sharding)(seed, words, leaves)


@functools.lru_cache(maxsize=4096)
def _program(function: Any, treedef: Any, shape: Any, dtype: Any, sharding: Any) -> Any:
    small = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    drawn = np.dtype(np.float32) if small else dtype  # so that casting before or after is the same

    def program(seed: Any, words: jax.Array, leaves: Any) -> jax.Array:
        recipe = function if treedef is None else jax.tree.unflatten(treedef, leaves)
        value = recipe(_key(seed, words), shape, drawn)
        return value if drawn == dtype else jnp.asarray(value).astype(dtype)

    return jax.jit(program, out_shardings=sharding)


class _Maker:
    draw = staticmethod(draw)
    seed = staticmethod(BIRTHS.seed)


Box._maker = _Maker()
