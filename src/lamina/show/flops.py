"""Counting floating-point operations with XLA's own cost analysis.

Each distinct module (by structure and shapes) is lowered once, alone, with inputs of the program
standing in for what its children return; their operations are then added. So a model of 126 equal
blocks costs one lowering per kind of layer, and its total is still what XLA counts for the whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator
from typing import Any

import jax

from .._core.bind import Frame
from .._core.fingerprint import plain_attributes, value_key
from .._core.module import Module
from .._core.walk import walk
from .shapes import abstract

__all__ = ["Call", "count_flops"]


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module; arrays are kept as shapes and dtypes.

    Attributes:
        trace: tells under which transforms the call was made.
        is_plain: whether no transform (vmap, scan, ...) lies between it and the calling module.
        children: calls made by its ``forward``.
        done: whether it returned.
        dead: whether it belongs to a trace that was thrown away.
    """

    module: Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trace: Any = None
    is_plain: bool = True
    output: Any = None
    children: list[Call] = dataclasses.field(default_factory=list)
    done: bool = False
    dead: bool = False

    def forget(self) -> None:
        """Mark the call as one that will be made again."""
        self.dead = True


def count_flops(calls: list[Call]) -> dict[Call, float | None]:
    """Return the operations of each call, those of its children included.

    Counted is what XLA counts in the forward pass as written, before it optimises: a multiplication
    and an addition are two; an element of an elementwise operation is one; transcendental functions
    and the movement of data are none; the body of a loop counts once. ``None`` means that the call
    could not be lowered on its own.
    """
    cache: dict[Hashable, float | None] = {}
    counts: dict[Call, float | None] = {}
    for call in reversed(calls):  # children come after their parents
        replaced = _replaceable(call)
        parts = [_own(call, replaced, cache), *(counts[child] for child in replaced)]
        counts[call] = None if None in parts else float(sum(part or 0.0 for part in parts))
    return counts


def _replaceable(call: Call) -> list[Call]:
    """Return the children whose results can stand in for them: those under no further transform."""
    inside: set[Module] = set()
    for child in _live(call):
        if not child.is_plain:
            inside.update(_modules(child))
    return [child for child in _live(call) if child.is_plain and child.module not in inside]


def _live(call: Call) -> list[Call]:
    return [child for child in call.children if child.done and not child.dead]


def _modules(call: Call) -> Iterator[Module]:
    yield call.module
    for child in _live(call):
        yield from _modules(child)


def _own(call: Call, replaced: list[Call], cache: dict[Hashable, float | None]) -> float | None:
    key = _key(call)
    if key not in cache:
        try:
            cache[key] = _lower(call, replaced)
        except Exception:
            # The model has run, so this is the count's own problem (Python control flow on a
            # parameter's value, a backend without cost analysis) and no reason to fail.
            cache[key] = None
    return cache[key]


def _key(call: Call) -> Hashable:
    boxes = tuple((box.shape, str(box.dtype)) for box in walk(call.module).names)
    facts = tuple(
        (name, type(module), value_key(plain_attributes(module)))
        for name, module in walk(call.module).modules
    )
    return facts, boxes, _signature(call.args, call.kwargs)


def _signature(args: Any, kwargs: Any) -> Hashable:
    leaves, treedef = jax.tree.flatten((args, kwargs))
    return treedef, tuple(
        (leaf.shape, str(leaf.dtype)) if _is_array(leaf) else value_key(leaf) for leaf in leaves
    )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.ShapeDtypeStruct, jax.Array))


def _lower(call: Call, replaced: list[Call]) -> float | None:
    boxes = [box for box in walk(call.module).names if not box.is_unshaped]
    specs = [jax.ShapeDtypeStruct(box.shape, box.dtype) for box in boxes]
    leaves, treedef = jax.tree.flatten((call.args, call.kwargs))
    stand_ins = _StandIns(replaced)

    def run(values: list[Any], arrays: list[Any], results: list[Any]) -> list[Any]:
        args, kwargs = jax.tree.unflatten(treedef, _fill(leaves, arrays))
        stand_ins.supply(results)
        with Frame("summary", abstract=True) as frame:
            frame.bind(boxes, values)
            output = call.module(*args, **kwargs)
            # What nobody returns would be left out of the program, and so of the count.
            return [*_arrays(output), *_arrays(stand_ins.received), *_arrays(frame.collect())]

    with stand_ins:
        lowered = jax.jit(run).lower(specs, _arrays(leaves), stand_ins.specs)
    analysis = lowered.cost_analysis()
    if not isinstance(analysis, dict):
        return None
    return max(0.0, float(analysis.get("flops", 0.0)))


class _StandIns:
    """Lets modules return, in place of their results, inputs of the program being lowered.

    Attributes:
        specs: shapes and dtypes of those inputs.
        received: what the modules were called with.
    """

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.specs = [_arrays(call.output) for call in calls]
        self.received: list[Any] = []
        self.ready: dict[Hashable, list[Any]] = {}
        self.before: dict[Module, Any] = {}

    def supply(self, results: list[list[Any]]) -> None:
        """Take the inputs, one list for each call."""
        self.received.clear()
        self.ready.clear()
        for call, arrays in zip(self.calls, results, strict=True):
            leaves, treedef = jax.tree.flatten(call.output)
            output = jax.tree.unflatten(treedef, _fill(leaves, arrays))
            key = (call.module, _signature(call.args, call.kwargs))
            self.ready.setdefault(key, []).append(output)

    def __enter__(self) -> None:
        for call in self.calls:
            if call.module not in self.before:
                self.before[call.module] = call.module.__dict__.get("forward")
                call.module.forward = functools.partial(self._forward, call.module)

    def _forward(self, module: Module, *args: Any, **kwargs: Any) -> Any:
        self.received.append((args, kwargs))
        return self.ready[module, _signature(abstract(args), abstract(kwargs))].pop(0)

    def __exit__(self, *_: object) -> None:
        for module, forward in self.before.items():
            if forward is not None:
                module.forward = forward
            elif "forward" in module.__dict__:
                del module.forward


def _fill(leaves: list[Any], arrays: list[Any]) -> list[Any]:
    """Put arrays in place of shapes and dtypes."""
    remaining = iter(arrays)
    return [next(remaining) if _is_array(leaf) else leaf for leaf in leaves]


def _arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if _is_array(leaf)]
