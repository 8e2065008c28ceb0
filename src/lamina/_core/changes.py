"""Changes that are no writes of values: of structure, attributes, shapes and flags.

A compiled function would make them once, while tracing; they are refused, or taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .bind import STATE, Cell, is_tracer, level_of, raw_values
from .errors import StaticWriteError

__all__ = ["is_born_inside", "on_error", "outlives_compiled", "refuse_static_change"]


def outlives_compiled(born: tuple[int, ...]) -> bool:
    """Tell whether a compiled function is being traced that ends before an object does."""
    compiled = STATE.compiled
    return compiled is not None and level_of(born) < compiled.level


def is_born_inside(born: tuple[int, ...]) -> bool:
    """Tell whether an object ends with the trace that is open now."""
    return bool(born) and level_of(born) > 0


def refuse_static_change(born: tuple[int, ...], message: str, **words: Any) -> None:
    """Refuse a change that a compiled function would make once, while tracing, and then lose."""
    if outlives_compiled(born):
        raise StaticWriteError(message.format(**words))


def refuse_tracer_part(cls: str, name: str, cells: Iterable[Cell]) -> None:
    """Refuse parts that hold arrays which would outlive the trace that they belong to."""
    if any(map(is_tracer, raw_values(cells))):
        raise StaticWriteError(_TRACER_PART.format(cls=cls, name=name, kind=STATE.frames[-1].kind))


def refuse_tracer_attribute(cls: str, name: str) -> None:
    """Refuse an array that would outlive, in a plain attribute, the trace that it belongs to."""
    frame = STATE.frames[-1]
    if frame.abstract and STATE.compiled is None:
        return  # it is taken back at the end
    kind = frame.kind
    raise StaticWriteError(_TRACER_ATTRIBUTE.format(cls=cls, name=name, kind=kind))


def on_error(action: Callable[[], None], always: bool = False) -> None:
    """Have a change of shapes or structure taken back if the trace that is open fails.

    ``always``: also if it succeeds and was only made to infer shapes.
    """
    if STATE.frames:
        frame = STATE.frames[-1]
        (frame.undo_always if always and frame.abstract else frame.undo).append(action)


_TRACER_ATTRIBUTE = """{cls}.{name} is a plain attribute, and under `{kind}` the array assigned to \
it exists only while tracing.
    fix: declare it in __init__: self.register_buffer({name!r}, None, persistent=False); then \
`self.{name} = array` works everywhere and the value comes out"""

_TRACER_PART = """{cls}.{name} is to hold an array that was computed under `{kind}` and exists \
only while tracing.
    fix: give it a recipe, nn.Parameter(shape=..., init=nn.init.Constant(0.5)), or assign it \
outside"""
