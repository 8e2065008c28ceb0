"""``lamina.scan`` and ``lamina.remat``: loops and recomputation around modules with state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from .._core.bind import Frame, Retry
from .._core.parameter import Box
from ._args import Constants, Split, settle, store_all

__all__ = ["remat", "scan"]


def scan(
    fn: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    *,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """Loop over the first axis of ``xs``, carrying a value and whatever ``fn`` writes.

    Args:
        fn: ``(carry, x) -> (carry, y)``; may call modules, which may write state.
        init: the first carry.
        xs: arrays to loop over, and stacked modules (:func:`lamina.stack`): each step sees its own
            slice of them, so a deep model of equal blocks compiles as one block.
        length: number of steps, needed if ``xs`` has no arrays.
        reverse: from the last to the first (default False).
        unroll: as in ``jax.lax.scan``.

    Returns:
        ``(carry, ys)``, as ``jax.lax.scan``.

    Example:
        >>> import jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> blocks = lamina.stack([nn.Linear(4, 4) for _ in range(3)])
        >>> h, _ = lamina.scan(lambda h, block: (block(h), None), jnp.ones((2, 4)), blocks)
        >>> h.shape
        (2, 4)
    """
    split = Split(xs)
    stacked = [
        box
        for owner in split.owners
        for box in owner._state_boxes()
        if not (box._is_free and box._value is None)
    ]
    carried: list[Box] = []

    def attempt() -> Any:
        carry_constants, out_constants = Constants(), Constants()
        changed: list[Box] = []

        def body(state: Any, x: Any) -> Any:
            carry, kept = state
            arrays, slices = x
            with Frame("lamina.scan") as frame:
                frame.bind(carried, kept)
                frame.bind(stacked, slices)
                carry, y = fn(carry_constants.give(carry), split.join(arrays))
                known = {*carried, *stacked}
                new = [box for box in frame.written if box not in known]
                if new or frame.stale:
                    carried.extend(new)
                    raise Retry
                own = set(stacked)
                changed[:] = [box for box in frame.written if box in own]
                return (
                    (carry_constants.take(carry), [box._value for box in carried]),
                    (out_constants.take(y), [box._value for box in changed]),
                )

        first = carry_constants.take(init), [box._read() for box in carried]
        rows = split.arrays, [box._read() for box in stacked]
        (carry, kept), (ys, slices) = jax.lax.scan(
            body, first, rows, length=length, reverse=reverse, unroll=unroll
        )
        store_all(carried, kept)
        store_all(changed, slices)
        return carry_constants.give(carry), out_constants.give(ys)

    return settle(attempt, "scan")


def remat(
    fn: Callable[..., Any], *, policy: Any = None, prevent_cse: bool = True
) -> Callable[..., Any]:
    """Return a function whose intermediate values are computed again for the gradient.

    Saves memory in training at the price of time. Random draws and written state are the same in
    both computations.

    Args:
        fn: a function of arrays and modules, or a module.
        policy: what to keep, from ``jax.checkpoint_policies`` (default: nothing).
        prevent_cse: as in ``jax.checkpoint``.

    Example:
        >>> import jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> grads = lamina.grad(lambda net: lamina.remat(net)(jnp.ones((2, 3))).sum())(net)
        >>> len(grads)
        4

    Source: ``jax.checkpoint``.
    """

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        split = Split((args, kwargs))

        def attempt() -> Any:
            constants = Constants()
            written: list[Box] = []

            def pure(arrays: list[Any]) -> Any:
                with Frame("lamina.remat") as frame:
                    full, keywords = split.join(arrays)
                    out = fn(*full, **keywords)
                    if frame.stale:
                        raise Retry
                    written[:] = frame.written
                    return constants.take(out), frame.collect()

            out, values = jax.checkpoint(pure, policy=policy, prevent_cse=prevent_cse)(split.arrays)
            store_all(written, values)
            return constants.give(out)

        return settle(attempt, "remat")

    return functools.wraps(fn, updated=())(recomputed) if hasattr(fn, "__name__") else recomputed
