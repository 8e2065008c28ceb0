"""``functional_call``: a module as a pure function of its parameters, for plain JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._core.bind import is_tracer
from .._core.box import array
from .._core.errors import ForeignTransformError, LoadError, did_you_mean
from .._core.module import Module
from .._core.state_dict import misfit
from .._core.walk import walk
from ._effects import Effects

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
            is not given keeps the module's own value; under a plain JAX transform, which would
            freeze it, all that is used must be given.
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
    by_name = dict(tree.entries)
    problems, values = [], {}
    for name, value in given.items():
        box = by_name.get(name)
        if box is None:
            problems.append(f"  unexpected: {name}.{did_you_mean(name, by_name)}")
            continue
        problem = misfit(box, tuple(np.shape(array(value))))
        if problem:
            problems.append(f"  {name}: {problem}")
        elif box in values and not _same(values[box][1], value):
            problems.append(
                f"  {name}: tied to {values[box][0]}, and two different values are given; drop one "
                f"of the names"
            )
        values.setdefault(box, (name, value))
    if problems:
        raise LoadError(
            f"functional_call: these do not fit {type(net).__name__}:\n"
            + "\n".join(problems)
            + "\n    fix: params = dict(net.state_dict()), with one value for each parameter"
        )
    effects = Effects("functional_call")
    with effects.frame() as frame:
        frame.bind(values, [array(value) for _, value in values.values()])
        out = net(*args, **kwargs)
        state = _own(frame, tree.names)
        lost = [] if return_state else [box for box in frame.written if box in values]
        for box in [box for box in frame.written if box in values or return_state]:
            if box in tree.names:
                del frame.written[box]
        states = effects.collect(frame)
    if lost:
        names = ", ".join(box.describe() for box in lost)
        raise ForeignTransformError(_LOST.format(boxes=names))
    effects.pass_on(states)
    return (out, state) if return_state else out


def _same(first: Any, second: Any) -> bool:
    """Tell whether two values given for one box are the same."""
    if first is second:
        return True
    if is_tracer(first) or is_tracer(second):
        return False
    first, second = np.asarray(first), np.asarray(second)
    return first.shape == second.shape and first.tobytes() == second.tobytes()


def _own(frame: Any, names: Mapping[Any, str]) -> dict[str, Any]:
    """Return what was written into a model's boxes, by name."""
    written = [box for box in names if box in frame.written]
    return dict(zip([names[box] for box in written], frame.collect(written), strict=True))


_LOST = """forward writes {boxes}, and functional_call would lose the new values.
    wrong:  lamina.functional_call(net, params, x)
    right:  out, state = lamina.functional_call(net, params, x, return_state=True)
            params = {{**params, **state}}
    fix: ask for the state with return_state=True, or net.eval() if no new state is needed"""
