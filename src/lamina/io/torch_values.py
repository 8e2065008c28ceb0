"""The inert values that stand for Python objects of a pickle."""

from __future__ import annotations

from typing import Any

__all__ = ["Opaque", "Ref", "StateDict", "describe", "printable"]


class Ref:
    """The name of a global in a pickle; nothing is imported. One object per name in a pickle.

    >>> Ref("os", "system")
    <os.system>
    """

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def __repr__(self) -> str:
        return f"<{printable(f'{self.module}.{self.name}')}>"


class Opaque:
    """What a call of an unknown global would have made: a record of the call, and no more.

    ``items`` and ``mapping`` hold what was appended or set by key (subclasses of list and dict),
    ``state`` what ``__setstate__`` would have been given.
    """

    __slots__ = ("args", "items", "mapping", "ref", "state")

    def __init__(self, ref: Ref, args: Any = ()) -> None:
        self.ref = ref
        self.args = args
        self.items: list[Any] = []
        self.mapping: dict[Any, Any] = {}
        self.state: Any = None

    def __repr__(self) -> str:
        return repr(self.ref)

    def set_state(self, state: Any) -> None:
        self.state = state

    def attributes(self) -> dict[Any, Any]:
        """The attributes the object would have had, as far as they are plain dicts."""
        if type(self.state) is dict:
            return self.state
        if type(self.state) is tuple and len(self.state) == 2:
            parts = [part for part in self.state if type(part) is dict]
            return {name: value for part in parts for name, value in part.items()}
        return {}


class StateDict(dict[Any, Any]):
    """An ``OrderedDict`` of a file, with the attributes it carried (``_metadata``)."""

    __slots__ = ("attributes",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.attributes: dict[Any, Any] = {}

    def set_state(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


def printable(text: str, limit: int = 200) -> str:
    """Return ``text`` fit for a terminal: control characters escaped, long text cut."""
    text = text if len(text) <= limit else text[:limit] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def describe(value: Any) -> str:
    """A few words on a value of a file, whatever it is: containers are not looked into."""
    if isinstance(value, str):
        return repr(printable(value))
    if isinstance(value, (Ref, Opaque, int, float)):
        return printable(repr(value))
    return f"a {type(value).__name__}"
