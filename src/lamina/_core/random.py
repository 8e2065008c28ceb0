"""Randomness: one default generator for dropout and its like, and the seeds of initial values.

Initial values depend on the seed, the number of the model under that seed, and the parameter's
name. A model is numbered when its first box is registered, so two models built under one seed
differ, while nothing that happens inside a model changes the number of another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import bind
from .bind import STATE, VERSION
from .parameter import Box, Buffer

__all__ = ["DEFAULT", "Births", "Generator", "manual_seed", "next_key", "rng"]

Seed = tuple[int, int]


class _Words(Buffer):
    """A box of 32-bit words whose first array is made when it is read: importing lamina and
    seeding start no JAX backend, so that ``jax.distributed`` can be set up afterwards.
    """

    __slots__ = ("words",)

    def __init__(self, words: Any) -> None:
        super().__init__(shape=np.shape(words), dtype=np.uint32)
        self.words = words

    def reset(self, words: Any) -> None:
        """Begin with other words."""
        if STATE.frames or isinstance(words, jax.Array):
            self._write(jnp.asarray(words))
            return
        self.words, self._value = words, None
        VERSION.static += 1

    def _make_value(self) -> None:
        with jax.ensure_compile_time_eval():
            bind.settle(self, jnp.asarray(self.words))

    def host_words(self) -> Any:
        """Return what stands in the box outside of all frames, without making an array."""
        value = bind.settled_value(self)
        return self.words if value is None else value


class Generator:
    """A stream of random keys whose state travels through lamina's transforms like any buffer.

    Args:
        seed: an int of up to 64 bits (default 0), or a JAX PRNG key.

    Example:
        >>> import lamina
        >>> generator = lamina.Generator(7)
        >>> first, second = generator.next_key(), generator.next_key()
        >>> bool((first == second).all())
        False

    Source: the interface of ``torch.Generator``; keys as in ``jax.random``.
    """

    def __init__(self, seed: Any = 0) -> None:
        self._seed = _Words(_seed_words(seed))
        self._offset = _Words(np.uint32(0))

    def manual_seed(self, seed: Any) -> Generator:
        """Start the stream anew from ``seed``, an int of up to 64 bits; returns the generator."""
        self._seed.reset(_seed_words(seed))
        self._offset.reset(np.uint32(0))
        return self

    def next_key(self) -> jax.Array:
        """Return a fresh PRNG key and advance the stream.

        Inside :func:`lamina.vmap` each lane gets its own key.
        """
        key, offset = _advance(self._seed._read(), self._offset._read())
        bind.store(self._offset, offset)
        for frame in STATE.frames:
            if frame.lane is not None:
                key = jax.random.fold_in(key, frame.lane)
        return key

    def get_state(self) -> dict[str, jax.Array]:
        """Return the state as a dict of two arrays, ready to be saved."""
        return {"seed": self._seed.data, "offset": self._offset.data}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`get_state` returned."""
        self._seed._write(jnp.asarray(state["seed"], jnp.uint32))
        self._offset._write(jnp.asarray(state["offset"], jnp.uint32))


@jax.jit
def _advance(seed: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.random.fold_in(seed_key(seed[0], seed[1]), offset), offset + jnp.uint32(1)


def seed_key(low: Any, high: Any) -> jax.Array:
    """Return the root key of a 64-bit seed given as two 32-bit words."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), low), high)


def _seed_words(seed: Any) -> Any:
    if isinstance(seed, jax.Array) and (
        seed.ndim or jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    ):
        words = jax.random.key_data(seed).astype(jnp.uint32).ravel()
        return jnp.stack([words[0], words[-1]])
    if isinstance(seed, jax.Array):
        return jnp.stack([seed.astype(jnp.uint32), jnp.zeros((), jnp.uint32)])
    seed = int(seed) & (2**64 - 1)
    return np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)


DEFAULT = Generator(0)


def manual_seed(seed: int) -> Generator:
    """Seed the default generator and the initial values of models built from now on.

    Args:
        seed: an int of up to 64 bits. Without this call the seed is 0.

    Returns:
        The default generator.

    Example:
        >>> import lamina
        >>> from lamina import nn
        >>> _ = lamina.manual_seed(1)
        >>> a = nn.Linear(2, 2).weight.data
        >>> _ = lamina.manual_seed(1)
        >>> b = nn.Linear(2, 2).weight.data
        >>> bool((a == b).all())
        True
    """
    DEFAULT.manual_seed(seed)
    BIRTHS.restart()
    return DEFAULT


def next_key() -> jax.Array:
    """Return a fresh key from the default generator.

    Example:
        >>> import jax, lamina
        >>> jax.random.uniform(lamina.next_key(), (2,)).shape
        (2,)
    """
    return DEFAULT.next_key()


@contextlib.contextmanager
def rng(seed: Any) -> Iterator[Generator]:
    """Draw from ``seed`` inside the block; the default stream goes on unchanged after it.

    Args:
        seed: an int, or a JAX PRNG key (also a traced one, so that dropout works under plain JAX
            transforms).

    Example:
        >>> import jax.numpy as jnp, lamina
        >>> from lamina.nn import functional as F
        >>> with lamina.rng(3):
        ...     a = F.dropout(jnp.ones(8))
        >>> with lamina.rng(3):
        ...     b = F.dropout(jnp.ones(8))
        >>> bool((a == b).all())
        True
    """
    boxes = (DEFAULT._seed, DEFAULT._offset)
    words, start = jnp.asarray(_seed_words(seed)), jnp.zeros((), jnp.uint32)
    if not STATE.frames and not bind.is_tracer(words) and not bind.under_foreign_trace():
        former = [box._read() for box in boxes]
        births = BIRTHS.set_aside()
        for box, value in zip(boxes, (words, start), strict=True):
            box._write(value)
        try:
            yield DEFAULT
        finally:
            for box, value in zip(boxes, former, strict=True):
                box._write(value)
            BIRTHS.resume(births)
        return
    with bind.Frame("rng") as frame:
        frame.bind(boxes, (words, start))
        yield DEFAULT
        written = [box for box in frame.written if box not in set(boxes)]
        values = [box._value for box in written]
    for box, value in zip(written, values, strict=True):
        bind.store(box, value)


class Births:
    """Numbers models under a seed: 0, 1, 2 ... in the order in which they are built.

    A part that is put into a larger model gives its number up, so that only whole models count.
    """

    def __init__(self) -> None:
        self.number = 0
        self.free: set[int] = set()
        self._words: Any = None
        self._seed: Seed = (0, 0)

    def restart(self) -> None:
        """Begin at 0 again."""
        self.number = 0
        self.free.clear()

    def set_aside(self) -> Any:
        """Begin at 0 for a while; returns what :meth:`resume` goes on from."""
        kept = (self.number, self.free, self._seed)
        self.number, self.free, self._words = 0, set(), None
        return kept

    def resume(self, kept: Any) -> None:
        """Go on from where :meth:`set_aside` left off."""
        self.number, self.free, self._seed = kept
        self._words = None

    def seed(self) -> Seed:
        """Return the seed in force as two 32-bit words."""
        words = DEFAULT._seed.host_words()
        if words is not self._words:
            low, high = (int(word) for word in np.array(words))
            if (low, high) != self._seed:
                self.restart()
            self._words, self._seed = words, (low, high)
        return self._seed

    def take(self) -> tuple[Seed, int]:
        """Return the origin of a new model."""
        seed = self.seed()
        number = self.number
        self.number += 1
        return seed, number

    def give_back(self, origin: tuple[Seed, int]) -> None:
        """Free the number of a part that has become a piece of a larger model."""
        seed, number = origin
        if seed != self._seed or number >= self.number:
            return
        self.free.add(number)
        while self.number - 1 in self.free:
            self.number -= 1
            self.free.discard(self.number)


BIRTHS = Births()


def is_key(seed: Any) -> bool:
    """Tell whether a recorded seed is a JAX PRNG key rather than two words."""
    return not isinstance(seed, tuple)


def origin_of(box: Box, root: Any) -> tuple[Any, int]:
    """Return the seed and the model number from which a box's value is drawn."""
    holder = box.__dict__ if root is None else root.__dict__
    origin = holder.get("_origin")
    if origin is None:
        origin = holder["_origin"] = BIRTHS.take()
    if box._seed is None:
        return origin
    return box._seed, 0 if is_key(box._seed) else origin[1]
