"""Drawing a value from its recipe: one small compiled program per distinct law, shape and dtype.

The recipe's numbers and the key's ingredients are run-time scalars, so that layers of one shape
share a program whatever their seeds, names and standard deviations are.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .bind import is_tracer
from .errors import ShapeError, StaticWriteError

__all__ = ["Origin", "Recipe", "TracedSeed", "draw", "name_words", "seed_key"]

Recipe = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

Origin = tuple[Any, int, str]
"""From what a value follows: a seed (two 32-bit words, or a JAX key), the number of the model under
that seed, and the parameter's name."""


class TracedSeed:
    """A seed inside a transform, where its words are an input.

    Attributes:
        words: the random state, a tracer.
        fresh: whether uncompiled another value would be drawn at each call, since each call builds
            another model; the number of that model is not known inside.
    """

    def __init__(self, words: Any, fresh: bool) -> None:
        self.words, self.fresh = words, fresh

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TracedSeed) and self.words is other.words

    def __hash__(self) -> int:
        return id(self.words)


def name_words(name: str) -> tuple[int, int]:
    """Return the 64-bit hash of a name as two 32-bit words."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def seed_key(low: Any, high: Any) -> jax.Array:
    """Return the root key of a 64-bit seed given as two 32-bit words."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), low), high)


def draw(
    recipe: Recipe, origin: Origin, shape: tuple[int, ...], dtype: Any, sharding: Any, label: str
) -> jax.Array:
    """Return the value that a recipe gives for an origin, straight in its place.

    Args:
        recipe: ``(key, shape, dtype) -> Array``.
        origin: see ``Origin``.
        shape: all sizes.
        dtype: dtype of the value.
        sharding: where it goes, ``None`` for JAX's default device.
        label: what to call it in messages.

    Raises:
        ShapeError: if the recipe returns another shape or dtype.
    """
    seed, number, name = origin
    words: Any = np.array([number, *name_words(name)], np.uint32)
    if isinstance(seed, TracedSeed):
        if seed.fresh and _varies(recipe, shape, dtype):
            raise StaticWriteError(_FRESH.format(label=label))
        words = jnp.concatenate([seed.words[:2], words])
        return _run(recipe, None, words, shape, dtype, sharding)
    if is_tracer(seed):
        return _run(recipe, seed, words, shape, dtype, sharding)
    if isinstance(seed, tuple):
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
            f"{label}: its recipe {recipe!r} returned {value.dtype}{list(value.shape)}, "
            f"expected {dtype}{list(shape)}\n"
            f"    fix: a recipe is (key, shape, dtype) -> Array of that shape and dtype"
        )
    return value


def _varies(recipe: Recipe, shape: tuple[int, ...], dtype: Any) -> bool:
    """Tell whether a recipe gives random values."""
    words = np.arange(10, dtype=np.uint32)
    with jax.ensure_compile_time_eval():
        one, two = (_run(recipe, None, w, shape, dtype, None) for w in (words[:5], words[5:]))
        return not np.array_equal(one, two, equal_nan=True)


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


_FRESH = """{label} is drawn in a module that is built inside a compiled function: each call would \
draw the same values, while tracing, and uncompiled each call draws others.
    fix: build its modules outside, or under a key: with lamina.rng(lamina.next_key()): ..."""
