"""The proof that a program is still the right one: one generated function per binding.

``Reach`` writes it down step by step while it looks around; run at every call, it walks the same
paths again in plain Python, at about 0.1 us a step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .._core.bind import Cell
from .._core.box import is_array
from .._core.errors import UnprovenError
from .._core.fingerprint import array_key, is_plain, value_key

__all__ = ["EMPTY", "Proof", "any_array_key", "array_form", "cell_form", "contents"]

_MOST_STEPS = 20_000


class Proof:
    """Steps ``v3 = v1.net`` and conditions on what they lead to, as the source of a function.

    Attributes:
        inputs: arrays of which only the form is part of the proof: their variables, and the start
            of a statement that puts another one in its place.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._constants: list[Any] = []
        self._count = 0
        self.inputs: list[tuple[str, str]] = []

    def constant(self, value: Any) -> str:
        """Return the name under which the function knows a value."""
        self._constants.append(value)
        return f"k{len(self._constants) - 1}"

    def step(self, text: str) -> str:
        """Add a step; return the variable that will hold what it leads to."""
        if len(self._lines) > _MOST_STEPS:
            raise UnprovenError(
                f"more than {_MOST_STEPS} things are in reach of a compiled function\n"
                f"    fix: pass what it needs as arguments"
            )
        name = f"v{self._count}"
        self._count += 1
        self._lines.append(f"{name} = {text}")
        return name

    def refute(self, condition: str) -> None:
        """Add a condition under which the proof fails."""
        self._lines.append(f"if {condition}: return None")

    def compile(self, count: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return ``holds`` and ``swap`` (see ``Reach``) for ``count`` roots."""
        if not self._lines:
            return _always_holds, _always_holds
        names = [f"r{i}" for i in range(count + 1)]
        body = [f"({', '.join(names[1:])},) = roots"] if count else []
        found = f"[{', '.join(name for name, _ in self.inputs)}]"
        lines = "\n  ".join([*body, *self._lines, f"return {found}"])
        source = f"def holds(r0, roots):\n try:\n  {lines}\n except failures: return None\n"
        steps = [line for line in self._lines if not line.startswith("if ")]
        places = [
            f"{put}arrays[{i}]" + ")" * put.startswith("put(")
            for i, (_, put) in enumerate(self.inputs)
        ]
        lines = "\n ".join([*body, *steps, f"found = {found}", *places, "return found"])
        source += f"def swap(r0, roots, arrays):\n {lines}"
        scope = _SCOPE | {f"k{i}": value for i, value in enumerate(self._constants)}
        exec(compile(source, "<lamina: what a compiled function depends on>", "exec"), scope)
        return scope["holds"], scope["swap"]


def _always_holds(fn: Any, roots: list[Any], arrays: Any = ()) -> list[Any]:
    return []


EMPTY = object()
"""What a closure's cell holds that was not assigned yet, or whose content was deleted."""


def contents(cell: Any) -> Any:
    """Return what a closure's cell holds."""
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY


def array_form(value: Any) -> Any:
    """Return what a program is specialised to of an array."""
    if not is_array(value):
        return None
    return tuple(value.shape), value.dtype, getattr(value, "weak_type", False)


def cell_form(cell: Cell) -> Any:
    """Return shape and dtype of what a cell holds or is to hold, ``None`` if that is nothing."""
    form = cell.form()
    return None if form is None else (form.shape, form.dtype)


def any_array_key(value: Any) -> Any:
    """Return a stand-in for the content of an array of any library."""
    return array_key(value if isinstance(value, np.ndarray) else np.asarray(value))


def _same_items(items: Any, known: list[Any]) -> bool:
    """Compare plain values: in C as long as they are the same objects."""
    return len(items) == len(known) and (
        not any(map(operator.is_not, items, known))
        or (
            all(map(is_plain, items)) and list(map(value_key, items)) == list(map(value_key, known))
        )
    )


def _differs(value: Any, known: Any) -> bool:
    return not is_plain(value) or value_key(value) != value_key(known)


_SCOPE: dict[str, Any] = {
    "array_key": any_array_key,
    "contents": contents,
    "differs": _differs,
    "empty": EMPTY,
    "failures": (AttributeError, LookupError, TypeError, ValueError),
    "form": array_form,
    "put": object.__setattr__,
    "same_items": _same_items,
}
