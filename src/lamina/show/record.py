"""Recording: what a model consists of, as plain rows, found without computing a single value.

The model is run once by :func:`lamina.infer`, which needs shapes only, while hooks note every call.
Rows are data; ``summary.py`` and ``html.py`` draw them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from .._core.bind import STATE, trace_mark
from .._core.box import Box
from .._core.materialize import infer
from .._core.module import Module
from .._core.parameter import Parameter
from .._core.walk import Tree, join, own_boxes, walk
from .flops import Call, count_flops
from .shapes import abstract, describe_shapes

__all__ = ["BoxRow", "ModuleRow", "Record", "Size", "record"]


@dataclasses.dataclass(frozen=True)
class Size:
    """Numbers of elements and bytes; tied values count once, where their canonical name is.

    Attributes:
        trainable: elements of parameters that require a gradient.
        frozen: elements of the other parameters.
        nbytes: memory of all parameters, as their dtypes and shapes say.
        state: elements of buffers.
        state_nbytes: memory of all buffers.
        unknown: how many parameters have unknown sizes, and so are not in the above.
        state_unknown: likewise for buffers.
    """

    trainable: int = 0
    frozen: int = 0
    nbytes: int = 0
    state: int = 0
    state_nbytes: int = 0
    unknown: int = 0
    state_unknown: int = 0

    @property
    def parameters(self) -> int:
        """Elements of all parameters of known shape."""
        return self.trainable + self.frozen

    def __add__(self, other: Size) -> Size:
        mine, theirs = vars(self), vars(other)
        return Size(**{name: mine[name] + theirs[name] for name in mine})


@dataclasses.dataclass(frozen=True)
class BoxRow:
    """A parameter or a buffer.

    Attributes:
        name: dotted name.
        kind: ``"parameter"`` or ``"buffer"``.
        shape: sizes, ``None`` for an unknown one; ``None`` in place of all if nothing is known.
        dtype: name of the dtype.
        trainable: whether it requires a gradient.
        recipe: what draws the value, as text; empty if the value was given.
        state: ``"unshaped"``, ``"abstract"``, ``"material"`` or ``"empty"``.
        tied_to: the canonical name if this is a further name of the same box, else ``None``.
        elements, nbytes: ``None`` while a size is unknown.
    """

    name: str
    kind: str
    shape: tuple[int | None, ...] | None
    dtype: str
    trainable: bool
    recipe: str
    state: str
    tied_to: str | None
    elements: int | None
    nbytes: int | None

    @property
    def size(self) -> Size:
        """What this row adds to the totals."""
        if self.tied_to is not None or self.state == "empty":
            return Size()
        if self.elements is None or self.nbytes is None:
            return Size(unknown=1) if self.kind == "parameter" else Size(state_unknown=1)
        if self.kind == "buffer":
            return Size(state=self.elements, state_nbytes=self.nbytes)
        if self.trainable:
            return Size(trainable=self.elements, nbytes=self.nbytes)
        return Size(frozen=self.elements, nbytes=self.nbytes)


@dataclasses.dataclass(frozen=True)
class ModuleRow:
    """A module.

    Attributes:
        name: dotted name; empty for the model itself.
        kind: name of the class.
        depth: 0 for the model, 1 for its children.
        boxes: its own parameters and buffers, in order.
        size: totals of this module and all below it.
        calls: how often it was called; a loop that JAX traces once counts once.
        output: shapes of what the last call returned, as text; ``None`` if it was not called.
        flops: floating-point operations of all its calls together; ``None`` if not known.
        shared_with: its first name if this is a further name of the same module, else ``None``.
    """

    name: str
    kind: str
    depth: int
    boxes: tuple[BoxRow, ...]
    size: Size
    calls: int
    output: str | None
    flops: float | None
    shared_with: str | None


@dataclasses.dataclass(frozen=True)
class Record:
    """All rows of a model.

    Attributes:
        modules: every name of every module, in definition order.
        ties: further name -> canonical name of each tied parameter and buffer.
        inputs: what the model was called with, as text; ``None`` if it was not.
        mode: ``"training"`` or ``"evaluation"``.
    """

    modules: tuple[ModuleRow, ...]
    ties: dict[str, str]
    inputs: str | None
    mode: str

    @property
    def total(self) -> ModuleRow:
        """The row of the model itself."""
        return self.modules[0]


def record(net: Module, specs: tuple[Any, ...], kwargs: dict[str, Any], flops: bool) -> Record:
    """Return the rows of a model; with ``specs`` or ``kwargs``, shapes are inferred first."""
    tree = walk(net)
    calls: list[Call] = []
    inputs = None
    if specs or kwargs:
        calls = _calls(net, specs, kwargs)
        inputs = ", ".join(
            [describe_shapes(abstract(spec)) for spec in specs]
            + [f"{key}={describe_shapes(abstract(spec))}" for key, spec in kwargs.items()]
        )
    by_module: dict[Module, list[Call]] = {}
    for call in calls:
        by_module.setdefault(call.module, []).append(call)
    counts = count_flops(calls) if flops else {}
    boxes = _box_rows(tree)
    sizes = _sizes(boxes)
    rows: list[ModuleRow] = []
    first: dict[Module, str] = {}
    for name, module in tree.modules:
        own = by_module.get(module, [])
        canonical = first.setdefault(module, name)
        known = [counts.get(call) for call in own]
        rows.append(
            ModuleRow(
                name=name,
                kind=type(module).__name__,
                depth=name.count(".") + 1 if name else 0,
                boxes=tuple(boxes[join(name, key)] for key, _ in own_boxes(module)),
                size=sizes.get(name, Size()),
                calls=len(own),
                output=describe_shapes(own[-1].output) if own else None,
                flops=_sum(known) if own else None,
                shared_with=None if canonical == name else canonical,
            )
        )
    mode = "training" if net.training else "evaluation"
    return Record(tuple(_with_containers(rows)), dict(tree.aliases), inputs, mode)


def _calls(net: Module, specs: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    """Run the model abstractly and return every call of every module, in order."""
    recorder = _Recorder()
    handles = []
    try:
        for _, module in net.named_modules():
            handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
            handles.append(
                module.register_forward_hook(recorder.leave, with_kwargs=True, always_call=True)
            )
        infer(net, *specs, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [call for call in recorder.calls if call.done and not call.dead]


class _Recorder:
    """Two hooks that note calls and how they are nested."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.stack: list[Call] = []

    def enter(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        while self.stack and self.stack[-1].dead:
            self.stack.pop()
        trace = (tuple(STATE.frames), trace_mark())
        call = Call(module, abstract(args), abstract(kwargs), trace)
        if self.stack:
            parent = self.stack[-1]
            call.is_plain = parent.trace == trace
            parent.children.append(call)
        for frame in STATE.frames[1:]:
            # A transform that has to trace its function again forgets the calls of the first try.
            frame.undo_always.append(call.forget)
        self.calls.append(call)
        self.stack.append(call)

    def leave(self, module: Module, args: Any, kwargs: Any, output: Any) -> None:
        while self.stack:
            call = self.stack.pop()
            if call.module is module and not call.dead:
                call.output = abstract(output)
                call.done = True
                return


def _box_rows(tree: Tree) -> dict[str, BoxRow]:
    return {name: _box_row(name, box, tree.aliases.get(name)) for name, box in tree.entries}


def _box_row(name: str, box: Box, tied_to: str | None) -> BoxRow:
    known = not box.is_unshaped
    return BoxRow(
        name=name,
        kind="parameter" if isinstance(box, Parameter) else "buffer",
        shape=box.known_shape,
        dtype=str(box.dtype),
        trainable=bool(getattr(box, "requires_grad", False)),
        recipe=recipe_text(box.init),
        state=box.state if known or box.state == "empty" else "unshaped",
        tied_to=tied_to,
        elements=box.numel() if known else None,
        nbytes=box.nbytes if known else None,
    )


def recipe_text(recipe: Any) -> str:
    """Write a recipe: a function by its name, anything else as its ``repr``."""
    if recipe is None:
        return ""
    return getattr(recipe, "__qualname__", None) or repr(recipe)


def _sizes(boxes: dict[str, BoxRow]) -> dict[str, Size]:
    """Return, for each module's name, the sizes of all boxes below it."""
    sizes: dict[str, Size] = {}
    for row in boxes.values():
        for name in _ancestors(row.name):
            sizes[name] = sizes.get(name, Size()) + row.size
    return sizes


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _with_containers(rows: list[ModuleRow]) -> list[ModuleRow]:
    """Give modules that are never called themselves (lists, dicts) what their children sum to."""
    below: dict[str, list[float | None]] = {}
    result = []
    for row in reversed(rows):
        parts = below.pop(row.name, [])
        if not row.calls and parts and row.shared_with is None:
            row = dataclasses.replace(row, flops=_sum(parts))
        if row.name and row.shared_with is None and (row.calls or parts):
            below.setdefault(row.name.rpartition(".")[0], []).append(row.flops)
        result.append(row)
    return result[::-1]


def _sum(parts: list[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None
