"""``lamina.vmap``, and ensembles: models stacked along a new axis."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._core import bind
from .._core.bind import Cell
from .._core.box import Box
from .._core.errors import ForeignTransformError, ShapeError
from .._core.fingerprint import plain_attributes, value_key
from .._core.module import Module
from .._core.trees import Carrier, Partition
from .._core.walk import cells_of, walk
from ._effects import Effects

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
        axes = _axes(in_axes, args)
        inputs = Partition((args, kwargs))
        axis_of = [*axes, *([0] * (len(inputs.leaves) - len(axes)))]
        array_axes = [axis for axis, use in zip(axis_of, inputs.mask, strict=True) if use]
        stacked: dict[Cell, int] = {}
        for leaf, axis in zip(inputs.leaves, axis_of, strict=True):
            if isinstance(leaf, Module) and axis is not None:
                stacked.update((c, axis) for c in cells_of(leaf) if not c.is_vacant)
        out_rest, effects = Carrier(), Effects("lamina.vmap")
        changed: list[Cell] = []
        values = list(map(bind.read, stacked))
        size = _size(inputs.chosen, array_axes, values, stacked.values(), axis_size)

        def pure(arrays: list[Any], slices: list[Any], lane: Any) -> Any:
            with effects.frame(lane) as frame:
                frame.bind(stacked, slices)
                full, keywords = inputs.combine(arrays)
                out = fn(*full, **keywords)
                changed[:] = [cell for cell in frame.written if cell in stacked]
                mine = frame.collect(changed)
                for cell in changed:
                    del frame.written[cell]
                out = out_rest.take(out)
                shared = effects.collect(frame, out_rest)
                count = len(effects.written)
                return out, (mine, shared[count:]), shared[:count]

        outs = _Axes(out_axes, out_rest)
        try:
            result, (mine, made), shared = jax.vmap(
                pure,
                in_axes=(array_axes, list(stacked.values()), 0),
                out_axes=(outs.prefix(), 0, None),
                axis_size=axis_size,
                axis_name=axis_name,
            )(inputs.chosen, values, jnp.arange(size))
        except ValueError as error:
            if effects.written and "out_axes" in str(error):
                names = ", ".join(cell.describe() for cell in effects.written)
                raise ForeignTransformError(_LANES.format(boxes=names)) from error
            raise
        for cell, value in zip(changed, mine, strict=True):
            bind.write(cell, jnp.moveaxis(value, 0, stacked[cell]))
        effects.pass_on([*shared, *made])
        return out_rest.give(outs.finish(result))

    if hasattr(fn, "__name__"):
        mapped = functools.wraps(fn, updated=())(mapped)
    return mapped


class _Axes:
    """Applies ``out_axes``: directly if it is one number, else after the call."""

    def __init__(self, out_axes: Any, rest: Carrier) -> None:
        self.out_axes = out_axes
        self.rest = rest

    def prefix(self) -> Any:
        return self.out_axes if isinstance(self.out_axes, int) else 0

    def finish(self, arrays: list[Any]) -> list[Any]:
        if isinstance(self.out_axes, int):
            return arrays
        parts = self.rest.parts
        tree = jax.tree.unflatten(parts.treedef, parts.leaves)
        spread = jax.tree.leaves(
            jax.tree.broadcast(self.out_axes, tree, is_leaf=lambda x: x is None),
            is_leaf=lambda x: x is None,
        )
        chosen = [axis for axis, use in zip(spread, parts.mask, strict=True) if use]
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


def _size(arrays: Any, axes: Any, values: Any, value_axes: Any, given: int | None) -> int:
    for array, axis in [*zip(arrays, axes, strict=True), *zip(values, value_axes, strict=True)]:
        if axis is not None:
            return jnp.shape(array)[axis]
    if given is None:
        raise ValueError("vmap: nothing is mapped; give an axis in in_axes, or axis_size")
    return given


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
    columns = [dict(walk(model).entries) for model in models]
    problems = []
    for place, other in enumerate(columns[1:], 1):
        for name in sorted(columns[0].keys() ^ other.keys()):
            where = 0 if name in columns[0] else place
            problems.append(f"  {name}: only in model {where}")
        for name in columns[0].keys() & other.keys():
            for fact in ("shape", "dtype", "requires_grad"):
                one, two = (getattr(boxes[name], fact) for boxes in (columns[0], other))
                if one != two:
                    what = "" if fact == "shape" else f"{fact} "
                    problems.append(f"  {name}: {what}{one} in model 0, {two} in model {place}")
        if walk(models[0]).aliases != walk(models[place]).aliases:
            problems.append(f"  the ties of model 0 and of model {place} differ")
        problems += _different_attributes(models[0], models[place], place)
    if problems:
        raise ShapeError(
            "these models can't be stacked:\n"
            + "\n".join(problems)
            + "\n    fix: build them alike; what shall differ between them belongs in a parameter "
            "or buffer"
        )
    twin = copy.deepcopy(models[0])
    for name, box in walk(twin).entries:
        if box.state != "empty" and walk(twin).names[box] == name:
            box.replace(jnp.stack([column[name].data for column in columns]))
    for name, module in walk(twin).modules:
        for key, cell in module._array_attributes.items():
            values = [getattr(model.get_submodule(name), key) for model in models]
            bind.write(cell, jnp.stack(list(map(jnp.asarray, values))))
    return twin


def _different_attributes(first: Module, other: Module, place: int) -> list[str]:
    """List the plain attributes, types and modes in which two models of the same names differ."""
    problems = []
    others = dict(walk(other).modules)
    for name, module in walk(first).modules:
        twin = others.get(name)
        if twin is None:
            continue
        prefix = f"{name}." if name else ""
        facts, theirs = plain_attributes(module), plain_attributes(twin)
        for key in facts.keys() | theirs.keys():
            if value_key(facts.get(key)) != value_key(theirs.get(key)):
                problems.append(
                    f"  {prefix}{key}: {facts.get(key)!r} in model 0, {theirs.get(key)!r} in model "
                    f"{place}"
                )
        if type(module) is not type(twin):
            problems.append(
                f"  {name or 'the model'}: {type(module).__name__} in model 0, "
                f"{type(twin).__name__} in model {place}"
            )
    return problems


def unstack(model: Module) -> list[Module]:
    """Return the models that :func:`stack` put together.

    Example:
        >>> import lamina
        >>> from lamina import nn
        >>> models = lamina.unstack(lamina.stack([nn.Linear(3, 2), nn.Linear(3, 2)]))
        >>> len(models), models[0].weight.shape
        (2, (2, 3))
    """
    sizes = {jnp.shape(bind.read(c))[0] for c in cells_of(model) if not c.is_vacant}
    if len(sizes) != 1:
        raise ShapeError(f"unstack: expected one common first axis, got sizes {sorted(sizes)}")
    result = []
    for place in range(sizes.pop()):
        twin = copy.deepcopy(model)
        for cell in cells_of(twin):
            if isinstance(cell, Box) and not cell.is_vacant:
                cell.replace(cell.data[place])
            elif not cell.is_vacant:
                bind.write(cell, bind.read(cell)[place])
        result.append(twin)
    return result


_LANES = """the lanes of lamina.vmap may write different values into {boxes}, which all lanes share.
    right:  stack the models, so that each lane has its own:  lamina.vmap(f, in_axes=(0, ...))
    fix: stack the models, or net.eval() if the layer needs no new state, or write after vmap, \
from the returned values"""
