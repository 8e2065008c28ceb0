"""``lamina.scan`` and ``lamina.remat``: loops and recomputation around modules with state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core import bind
from .._core.bind import Cell
from .._core.errors import DeferredError
from .._core.module import Module
from .._core.trees import Carrier, Partition
from .._core.walk import cells_of
from ._effects import Effects

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
        ``(carry, ys)``, as ``jax.lax.scan``. Random draws differ from step to step.

    Raises:
        DeferredError: if ``fn`` writes a buffer that holds nothing before the loop.

    Example:
        >>> import jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> blocks = lamina.stack([nn.Linear(4, 4) for _ in range(3)])
        >>> h, _ = lamina.scan(lambda h, block: (block(h), None), jnp.ones((2, 4)), blocks)
        >>> h.shape
        (2, 4)
    """
    inputs = Partition(xs)
    owners = [leaf for leaf in inputs.rest if isinstance(leaf, Module)]
    stacked = list(dict.fromkeys(c for owner in owners for c in cells_of(owner) if not c.is_vacant))
    rows = inputs.chosen, list(map(bind.read, stacked))
    if length is None:
        leaves = jax.tree.leaves(rows)
        if not leaves:
            raise ValueError("scan: give xs with a first axis to loop over, or length")
        length = jnp.shape(leaves[0])[0]
    carried: list[Cell] = []
    carry_rest, out_rest = Carrier(), Carrier()
    effects, look = Effects("lamina.scan"), Effects("lamina.scan", abstract=True)

    def body(effects: Effects, state: Any, row: Any) -> Any:
        carry, kept = state
        (arrays, slices), step = row
        with effects.frame() as frame:
            frame.drawn_before = {stream: step * count for stream, count in look.draws.items()}
            frame.bind(carried, kept)
            frame.bind(stacked, slices)
            carry, y = fn(carry_rest.give(carry), inputs.combine(arrays))
            out = carry_rest.take(carry), out_rest.take(y)
            effects.note(frame, out_rest)
            own = set(carried)
            changed = [c for c in effects.written if c not in own] + effects.returned
            return (out[0], frame.collect(carried)), (out[1], frame.collect(changed))

    first = carry_rest.take(init)
    steps = jnp.arange(length, dtype=jnp.uint32)
    rows = rows, steps[::-1] if reverse else steps
    start = carry_rest.parts
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], x.dtype), rows)
    jax.eval_shape(functools.partial(body, look), (first, []), row)
    carried += [cell for cell in look.written if cell not in set(stacked)]
    carry_rest.parts = start
    (carry, kept), (ys, slices) = jax.lax.scan(
        functools.partial(body, effects), (first, list(map(_first, carried))), rows,
        length=length, reverse=reverse, unroll=unroll,
    )  # fmt: skip
    own = set(carried)
    effects.written = [*carried, *(cell for cell in effects.written if cell not in own)]
    effects.draws = {stream: count * length for stream, count in effects.draws.items()}
    effects.pass_on([*kept, *slices])
    return carry_rest.give(carry), out_rest.give(ys)


def _first(cell: Cell) -> Any:
    value = bind.read(cell)
    if value is None:
        raise DeferredError(
            f"{cell.describe()} is written in lamina.scan and holds nothing before the loop\n"
            f"    fix: give it a first value of the shape that the steps write"
        )
    return jnp.asarray(value)


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
        inputs, outputs, effects = Partition((args, kwargs)), Carrier(), Effects("lamina.remat")

        def pure(arrays: list[Any]) -> Any:
            with effects.frame() as frame:
                full, keywords = inputs.combine(arrays)
                out = fn(*full, **keywords)
                return outputs.take(out), effects.collect(frame, outputs)

        remade = jax.checkpoint(pure, policy=policy, prevent_cse=prevent_cse)
        out, values = remade(inputs.chosen)
        effects.pass_on(values)
        return outputs.give(out)

    return functools.wraps(fn, updated=())(recomputed) if hasattr(fn, "__name__") else recomputed
