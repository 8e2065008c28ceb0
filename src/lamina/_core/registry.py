"""``Registry``: the parts of one module by name, in definition order."""

from __future__ import annotations

from typing import Any, Self

from . import changes
from .bind import STATE, Cell
from .walk import cells_of, touch

__all__ = ["Registry"]


class Registry(dict):
    """The parameters, buffers or children of one module, by name, in definition order.

    An ordinary dict, except that changes are noticed wherever they are made.
    """

    __slots__ = ("owner",)

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = owner

    def __setitem__(self, name: str, value: Any) -> None:
        owner = self.owner()
        lasts = STATE.frames and owner is not None and not changes.is_born_inside(owner._links.born)
        if lasts and value is not None:
            cells = [value] if isinstance(value, Cell) else cells_of(value)
            changes.refuse_tracer_part(type(owner).__name__, name, cells)
        self._changing(name)
        super().__setitem__(name, value)
        if owner is not None and value is not None:
            owner._adopt(value)

    def __delitem__(self, name: str) -> None:
        self._changing(name)
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        self._changing(name)
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, Any]:
        name = next(reversed(self))
        return name, self.pop(name)

    def clear(self) -> None:
        self._changing("*")
        super().clear()

    def update(self, *others: Any, **named: Any) -> None:
        for name, value in dict(*others, **named).items():
            self[name] = value

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def _put_back(self, former: dict[str, Any]) -> None:
        dict.clear(self)
        dict.update(self, former)
        touch((self.owner,), structure=True)

    def _changing(self, name: str) -> None:
        owner = self.owner()
        if owner is None:
            return
        if STATE.frames:
            changes.refuse_static_change(
                owner._links.born, _STRUCTURE, cls=type(owner).__name__, name=name
            )
            former = dict(self)
            changes.on_error(lambda: self._put_back(former))
        touch((self.owner,), structure=True)


_STRUCTURE = """{cls}.{name} is added, replaced or removed inside a compiled function: the change \
would happen once, while tracing, and be lost.
    fix: change the structure of a model outside of the compiled function"""
