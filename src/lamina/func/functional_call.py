"""``functional_call``: a module as a pure function of its parameters, for plain JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._core.bind import Frame
from .._core.errors import ForeignTransformError, LoadError, did_you_mean, format_shape
from .._core.module import Module
from .._core.parameter import Box, array
from .._core.walk import describe, walk
from ._args import store_all

__all__ = ["functional_call"]


def functional_call(
    net: Module,
    params: Mapping[str, Any] | tuple[Mapping[str, Any], ...],
    *args: Any,
    return_state: bool = False,
    **kwargs: Any,
) -> Any:
    """Call a module with other values in place of its parameters and buffers.

    A pure function of ``params`` and ``args``, fit for any plain JAX transform.

    Args:
        net: the module; its own values are not changed.
        params: ``{name: array}``, or a tuple of such dicts. Names may be any of a tied box's; what
            is not given keeps the module's own value.
        *args: arguments of the call.
        return_state: also return what ``forward`` wrote, as ``{name: array}`` (default False).
        **kwargs: keyword arguments of the call.

    Returns:
        The output, or ``(output, state)``.

    Raises:
        LoadError: for unknown names and wrong shapes; all are listed.
        ForeignTransformError: if ``forward`` writes state and ``return_state`` is not set.

    Example:
        >>> import jax, jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> net = nn.Linear(3, 1)
        >>> params = dict(net.state_dict())
        >>> loss = lambda params, x: lamina.functional_call(net, params, x).sum()
        >>> jax.jit(jax.grad(loss))(params, jnp.ones((2, 3)))["bias"]
        Array([2.], dtype=float32)

    Source: the interface of ``torch.func.functional_call``.
    """
    given: dict[str, Any] = {}
    for part in (params,) if isinstance(params, Mapping) else params:
        given.update(part)
    tree = walk(net)
    by_name = {name: box for name, box, _ in tree.entries}
    problems, values = [], {}
    for name, value in given.items():
        box = by_name.get(name)
        if box is None:
            problems.append(f"  unexpected: {name}.{did_you_mean(name, by_name)}")
            continue
        shape = tuple(np.shape(value)) if not isinstance(value, Box) else value.shape
        if not _fits(box, shape):
            problems.append(
                f"  {name}: expected shape {format_shape(box.shape)}, got {format_shape(shape)}"
            )
        values.setdefault(box, array(value))
    if problems:
        raise LoadError(
            f"functional_call: these do not fit {type(net).__name__}:\n" + "\n".join(problems)
        )
    with Frame("functional_call") as frame:
        frame.bind(values.keys(), values.values())
        out = net(*args, **kwargs)
        state = {name: box._value for box, name in tree.names.items() if box in frame.written}
        others = [
            box
            for box in frame.written
            if box not in values and not (return_state and box in tree.names)
        ]
        rest = [box._value for box in others]
        lost = [] if return_state else [box for box in frame.written if box in values]
    if lost:
        raise ForeignTransformError(_LOST.format(boxes=", ".join(map(describe, lost))))
    store_all(others, rest)
    return (out, state) if return_state else out


def _fits(box: Box, shape: tuple[int | None, ...]) -> bool:
    if box._shape is None and not box.is_material:
        return True
    own = box.shape
    return len(own) == len(shape) and all(
        a is None or a == b for a, b in zip(own, shape, strict=True)
    )


_LOST = """forward writes {boxes}, and functional_call would lose the new values.
    mend:  out, state = lamina.functional_call(net, params, x, return_state=True)
           params = {{**params, **state}}
    or:    net.eval(), if no new state is needed"""
