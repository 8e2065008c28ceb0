"""``lamina.vmap``, and ensembles: models stacked along a new axis."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._core.bind import Frame, Retry
from .._core.errors import ForeignTransformError, ShapeError
from .._core.module import Module
from .._core.parameter import Box
from .._core.walk import describe, walk
from ._args import Constants, settle, store_all

__all__ = ["stack", "unstack", "vmap"]


def vmap(
    fn: Callable[..., Any],
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    axis_size: int | None = None,
    axis_name: Any = None,
) -> Callable[..., Any]:
    """Return a function that maps ``fn`` over an axis of its arguments.

    Args:
        fn: a function of arrays and modules, or a module.
        in_axes: as in ``jax.vmap``. A module with an axis is an ensemble made by :func:`stack`:
            each lane sees its own slice, and what a lane writes goes back to its slice. A module
            with ``None`` is shared by all lanes.
        out_axes: as in ``jax.vmap``.
        axis_size: as in ``jax.vmap``.
        axis_name: as in ``jax.vmap``.

    Returns:
        The mapped function. Dropout draws differently in each lane.

    Raises:
        ForeignTransformError: if lanes write different values into a shared box.

    Example:
        >>> import jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> models = lamina.stack([nn.Linear(3, 2) for _ in range(5)])
        >>> x = jnp.ones((4, 3))
        >>> lamina.vmap(lambda net, x: net(x), in_axes=(0, None))(models, x).shape
        (5, 4, 2)
    """

    def mapped(*args: Any, **kwargs: Any) -> Any:
        return settle(lambda: _once(args, kwargs), "vmap")

    def _once(args: Any, kwargs: Any) -> Any:
        axes = _axes(in_axes, args)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        axis_of = [*axes, *([0] * (len(leaves) - len(axes)))]
        arrays, array_axes, stacked, stacked_axes = [], [], [], []
        for leaf, axis in zip(leaves, axis_of, strict=True):
            if hasattr(leaf, "_state_boxes"):
                if axis is not None:
                    new = [box for box in leaf._state_boxes() if not _is_empty(box)]
                    stacked += new
                    stacked_axes += [axis] * len(new)
            elif _is_array(leaf):
                arrays.append(leaf)
                array_axes.append(axis)
        is_array = [_is_array(leaf) for leaf in leaves]
        out_constants = Constants()
        plain: list[Box] = []
        changed: list[Box] = []
        size = _size(arrays, array_axes, stacked, stacked_axes, axis_size)
        state_axes = list(stacked_axes)
        # The structure of the result is known only after the trace, so out_axes is spread then.

        def pure(values: list[Any], inner: list[Any], lane: Any) -> Any:
            with Frame("lamina.vmap") as frame:
                frame.lane = lane
                frame.bind(stacked, inner)
                source = iter(values)
                filled = [
                    next(source) if use else leaf
                    for use, leaf in zip(is_array, leaves, strict=True)
                ]
                full, keywords = jax.tree.unflatten(treedef, filled)
                out = fn(*full, **keywords)
                if frame.stale:
                    raise Retry
                own = set(stacked)
                changed[:] = [box for box in frame.written if box in own]
                plain[:] = [box for box in frame.written if box not in own]
                return (
                    out_constants.take(out),
                    [box._value for box in changed],
                    [box._value for box in plain],
                )

        outs = _Axes(out_axes, out_constants)
        try:
            result, own_values, plain_values = jax.vmap(
                pure,
                in_axes=(array_axes, state_axes, 0),
                out_axes=(outs.prefix(), 0, None),
                axis_size=axis_size,
                axis_name=axis_name,
            )(arrays, [box._read() for box in stacked], jnp.arange(size))
        except ValueError as error:
            if plain and "out_axes" in str(error):
                raise ForeignTransformError(
                    _LANES.format(boxes=", ".join(map(describe, plain)))
                ) from error
            raise
        axis_by_box = dict(zip(stacked, stacked_axes, strict=True))
        store_all(
            changed,
            [jnp.moveaxis(v, 0, axis_by_box[b]) for b, v in zip(changed, own_values, strict=True)],
        )
        store_all(plain, plain_values)
        return out_constants.give(outs.finish(result))

    if hasattr(fn, "__name__"):
        mapped = functools.wraps(fn, updated=())(mapped)
    return mapped


class _Axes:
    """Applies ``out_axes``: directly if it is one number, else after the call."""

    def __init__(self, out_axes: Any, constants: Constants) -> None:
        self.out_axes = out_axes
        self.constants = constants

    def prefix(self) -> Any:
        return self.out_axes if isinstance(self.out_axes, int) else 0

    def finish(self, arrays: list[Any]) -> list[Any]:
        if isinstance(self.out_axes, int):
            return arrays
        split = self.constants.split
        assert split is not None
        tree = jax.tree.unflatten(split.treedef, split.leaves)
        spread = jax.tree.leaves(
            jax.tree.broadcast(self.out_axes, tree, is_leaf=lambda x: x is None),
            is_leaf=lambda x: x is None,
        )
        chosen = [axis for axis, use in zip(spread, split.is_array, strict=True) if use]
        return [
            array[0] if axis is None else jnp.moveaxis(array, 0, axis)
            for array, axis in zip(arrays, chosen, strict=True)
        ]


def _axes(in_axes: Any, args: tuple[Any, ...]) -> list[Any]:
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    if not isinstance(in_axes, tuple):
        in_axes = (in_axes,) * len(args)
    if len(in_axes) != len(args):
        raise ValueError(
            f"vmap: in_axes has {len(in_axes)} entries for {len(args)} positional arguments"
        )
    spread = jax.tree.broadcast(in_axes, args, is_leaf=lambda x: x is None)
    return jax.tree.leaves(spread, is_leaf=lambda x: x is None)


def _size(
    arrays: list[Any], axes: list[Any], boxes: list[Box], box_axes: list[int], given: int | None
) -> int:
    for array, axis in zip(arrays, axes, strict=True):
        if axis is not None:
            return jnp.shape(array)[axis]
    for box, axis in zip(boxes, box_axes, strict=True):
        return box._read().shape[axis]
    if given is None:
        raise ValueError("vmap: nothing is mapped; give an axis in in_axes, or axis_size")
    return given


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") or isinstance(leaf, (bool, int, float, complex))


def _is_empty(box: Box) -> bool:
    return box._is_free and box._value is None


def stack(models: Sequence[Module]) -> Module:
    """Return one module whose values are those of several models, stacked along a new first axis.

    Args:
        models: at least one model, all of the same structure, with known shapes.

    Returns:
        A copy of the first model holding the stacked values; use it through :func:`vmap`.

    Raises:
        ShapeError: if the models have different names or shapes; all differences are listed.

    Example:
        >>> import lamina
        >>> from lamina import nn
        >>> lamina.stack([nn.Linear(3, 2), nn.Linear(3, 2)]).weight.shape
        (2, 2, 3)

    Source: the idea of ``torch.func.stack_module_state``.
    """
    models = list(models)
    if not models:
        raise ValueError("stack: expected at least one model, got none")
    columns = [{name: box for box, name in walk(model).names.items()} for model in models]
    problems = []
    for place, other in enumerate(columns[1:], 1):
        for name in sorted(columns[0].keys() ^ other.keys()):
            where = 0 if name in columns[0] else place
            problems.append(f"  {name}: only in model {where}")
        for name in columns[0].keys() & other.keys():
            if columns[0][name].shape != other[name].shape:
                problems.append(
                    f"  {name}: {columns[0][name].shape} in model 0, {other[name].shape} in model "
                    f"{place}"
                )
    if problems:
        raise ShapeError("these models can't be stacked:\n" + "\n".join(problems))
    twin = copy.deepcopy(models[0])
    for box, name in walk(twin).names.items():
        if not _is_empty(box):
            _replace(box, jnp.stack([column[name]._read() for column in columns]))
    return twin


def unstack(model: Module) -> list[Module]:
    """Return the models that :func:`stack` put together.

    Example:
        >>> import lamina
        >>> from lamina import nn
        >>> models = lamina.unstack(lamina.stack([nn.Linear(3, 2), nn.Linear(3, 2)]))
        >>> len(models), models[0].weight.shape
        (2, (2, 3))
    """
    sizes = {box._read().shape[0] for box in walk(model).names if not _is_empty(box)}
    if len(sizes) != 1:
        raise ShapeError(f"unstack: expected one common first axis, got sizes {sorted(sizes)}")
    result = []
    for place in range(sizes.pop()):
        twin = copy.deepcopy(model)
        for box in walk(twin).names:
            if not _is_empty(box):
                _replace(box, box._read()[place])
        result.append(twin)
    return result


def _replace(box: Box, value: jax.Array) -> None:
    box._value = box._exposed = value
    box._shape = tuple(value.shape)


_LANES = """the lanes of lamina.vmap may write different values into {boxes}, which all lanes share.
    mend:  stack the model, so that each lane has its own:  lamina.vmap(f, in_axes=(0, ...))
    or:    net.eval(), if the layer needs no new state
    or:    write after vmap, from the returned values"""
