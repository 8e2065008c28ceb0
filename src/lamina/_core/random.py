"""Randomness: streams of keys for dropout and its like, and the numbers of models under a seed.

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

from . import bind, changes
from .bind import STATE, Cell, trace_mark
from .draw import TracedSeed, seed_key
from .errors import ForeignTransformError
from .messages import INNER_WRITE

__all__ = ["BIRTHS", "DEFAULT", "Births", "Generator", "manual_seed", "next_key", "rng"]

Seed = tuple[int, int]


class _Stream(Cell):
    """Three 32-bit words: a seed's two, and the number of keys drawn.

    Outside of traces they are NumPy's: importing and seeding start no JAX backend, and any device
    or mesh can take them. Inside, draws are counted as they are traced and the count is added when
    the transform has ended, so that no program has to hand a counter back.
    """

    __slots__ = ()
    is_fixed = True  # type: ignore[assignment]

    def describe(self) -> str:
        return "the random state"

    def advance(self, count: int) -> None:
        """Count draws that were made by a program."""
        words = np.array(bind.read(self))
        words[2] += np.uint32(count)
        bind.write(self, words)


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
        self.stream = _Stream(_words(seed, 0))

    def manual_seed(self, seed: Any) -> Generator:
        """Start the stream anew from ``seed``, an int of up to 64 bits; returns the generator."""
        return self._restart(seed, 0)

    def _restart(self, seed: Any, offset: Any) -> Generator:
        # What was drawn in open traces is counted in the end: not on top of the new start.
        drawn = sum(frame.draws.get(self.stream, 0) for frame in STATE.frames)
        bind.write(self.stream, _words(seed, offset - np.uint32(drawn) if drawn else offset))
        return self

    def next_key(self) -> jax.Array:
        """Return a fresh PRNG key and advance the stream.

        Inside :func:`lamina.vmap` each lane gets its own key.
        """
        words = bind.read(self.stream)
        if not STATE.frames:
            self.stream.advance(1)
            return _key(words, np.uint32(0))
        count, lanes = draws_before(self.stream)
        key = _key(words, jnp.asarray(count, jnp.uint32))
        for lane in lanes:
            key = jax.random.fold_in(key, lane)
        return key

    def get_state(self) -> dict[str, jax.Array]:
        """Return the state as a dict of two arrays, ready to be saved."""
        words = jnp.asarray(bind.read(self.stream))
        drawn = sum(frame.draws.get(self.stream, 0) for frame in STATE.frames)
        return {"seed": words[:2], "offset": words[2] + np.uint32(drawn)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`get_state` returned."""
        seed = np.asarray(state["seed"]) if not bind.is_tracer(state["seed"]) else state["seed"]
        self._restart(seed, state["offset"])

    def __getstate__(self) -> Any:
        return np.array(bind.read(self.stream))

    def __setstate__(self, words: Any) -> None:
        self.stream = _Stream(words)

    def __deepcopy__(self, memo: Any) -> Generator:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = self.get_state()
        twin.stream = _Stream(_words(state["seed"], state["offset"]))
        return twin

    def __lamina_reach__(self) -> tuple[Any, list[Cell], list[Any]]:
        """Tell compiled functions what they may touch: no static facts, one cell, no parts."""
        return (), [self.stream], []


@jax.jit
def _key(words: jax.Array, drawn: Any) -> jax.Array:
    return jax.random.fold_in(seed_key(words[0], words[1]), words[2] + drawn)


def _words(seed: Any, offset: Any) -> Any:
    """Return a seed (an int, a key, or its words) and an offset as three words."""
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.key_data(seed)
    if hasattr(seed, "ndim") and seed.ndim:
        parts = [seed.astype(np.uint32).ravel()[0], seed.astype(np.uint32).ravel()[-1], offset]
    elif hasattr(seed, "ndim") and bind.is_tracer(seed):
        parts = [seed, 0, offset]
    else:
        number = int(seed) & (2**64 - 1)
        parts = [number & 0xFFFFFFFF, number >> 32, offset]
    if any(map(bind.is_tracer, parts)):
        return jnp.stack([jnp.asarray(part).astype(jnp.uint32) for part in parts])
    return np.array([int(part) & 0xFFFFFFFF for part in parts], np.uint32)


class Births:
    """Numbers models under a seed: 0, 1, 2 ... in the order in which they are built.

    A part that is put into a larger model gives its number up, so that only whole models count.
    """

    def __init__(self) -> None:
        self.number = 0
        self.free: set[int] = set()
        self.used: set[Any] = set()
        """Numbers under which values were drawn or promised: never given to another model."""
        self._seed: Seed = (0, 0)

    def restart(self) -> None:
        """Begin at 0 again."""
        self.number = 0
        self.free, self.used = set(), set()

    def set_aside(self) -> Any:
        """Begin at 0 for a while; returns what :meth:`resume` goes on from."""
        kept = (self.number, self.free, self.used, self._seed)
        self.restart()
        return kept

    def resume(self, kept: Any) -> None:
        """Go on from where :meth:`set_aside` left off."""
        self.number, self.free, self.used, self._seed = kept

    def mark(self) -> Any:
        """Return where the numbering stands, for :meth:`resume` after a trial run."""
        return self.number, set(self.free), set(self.used), self._seed

    def seed(self) -> Seed:
        """Return the seed in force as two 32-bit words."""
        words = bind.raw_values([DEFAULT.stream])[0]
        if bind.is_tracer(words):
            words = bind.settled_value(DEFAULT.stream)
        seed = (int(words[0]), int(words[1]))
        if seed != self._seed:
            self.restart()
            self._seed = seed
        return self._seed

    def seed_inside(self, fresh: bool = False) -> Any:
        """Return the seed in force for what ends with the open trace: there it is an input."""
        words = bind.read(DEFAULT.stream)
        if not bind.is_tracer(words):
            return self.seed()
        home = next(f for f in reversed(STATE.frames) if DEFAULT.stream in f.values)
        return TracedSeed(words, fresh and home.kind != "rng")

    def use(self, seed: Any, number: int) -> None:
        """Note that values are drawn under a number."""
        if isinstance(seed, tuple):
            self.used.add((seed, number))

    def take(self, born: tuple[int, ...] = ()) -> tuple[Any, int]:
        """Return the origin of a new model."""
        seed = self.seed_inside(fresh=True) if changes.is_born_inside(born) else self.seed()
        number = self.number
        self.number += 1
        return seed, number

    def give_back(self, origin: tuple[Any, int]) -> None:
        """Free the number of a part that has become a piece of a larger model."""
        seed, number = origin
        old = isinstance(seed, tuple) and seed != self._seed
        if old or number >= self.number or origin in self.used:
            return
        self.free.add(number)
        while self.number - 1 in self.free:
            self.number -= 1
            self.free.discard(self.number)


BIRTHS = Births()
DEFAULT = Generator(0)


def draws_before(stream: Cell) -> tuple[Any, list[Any]]:
    """Count a draw from a stream; return how many came before it, and the lanes it is made in."""
    frames = STATE.frames
    frame = frames[-1]
    if trace_mark() != frame.trace:
        raise ForeignTransformError(INNER_WRITE.format(box=stream.describe(), kind=frame.kind))
    count: Any = 0
    lanes: list[Any] = []
    counting = True
    for outer in reversed(frames):
        if counting:
            count += outer.draws.get(stream, 0)
            count += outer.drawn_before.get(stream, 0)
        lanes += outer.lanes
        if outer.compiled:
            break  # its inputs are the stream's words and the lanes around it
        counting = counting and stream not in outer.values  # else the stream starts here
    frame.draws[stream] = frame.draws.get(stream, 0) + 1
    return count, lanes


def note_draws(draws: dict[Any, int]) -> None:
    """Count the draws of a closed frame in the one around it, or advance the streams."""
    for stream, count in draws.items():
        if STATE.frames:
            outer = STATE.frames[-1].draws
            outer[stream] = outer.get(stream, 0) + count
        else:
            stream.advance(count)


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
    stream, words = DEFAULT.stream, _words(seed, 0)
    if not STATE.frames and not bind.is_tracer(words) and not bind.under_foreign():
        former = bind.read(stream)
        births = BIRTHS.set_aside()
        bind.write(stream, words)
        try:
            yield DEFAULT
        finally:
            bind.write(stream, former)
            BIRTHS.resume(births)
        return
    births = BIRTHS.set_aside()
    with bind.Frame("rng") as frame:
        frame.bind([stream], [words])
        try:
            yield DEFAULT
        finally:
            BIRTHS.resume(births)
        written = [cell for cell in frame.written if cell is not stream]
        values = frame.collect(written)
    for cell, value in zip(written, values, strict=True):
        bind.write(cell, value)
    frame.draws.pop(stream, None)
    note_draws(frame.draws)
