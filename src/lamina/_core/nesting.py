"""Room for deep models: Python's recursion limit is raised while calls are nested deeply."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["CALLS", "DEEP", "far_below", "made_after", "nested", "repr_of"]

DEEP = 100
"""From this many nested calls of one kind on there is more room."""


class Room:
    """Raises the recursion limit from when the first thread enters until the last one leaves."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def enter(self) -> None:
        with _LOCK:
            if not _USERS:
                _USERS.append(sys.getrecursionlimit())
            _USERS.append(self.frames)
            sys.setrecursionlimit(max(_USERS))

    def leave(self) -> None:
        with _LOCK:
            _USERS.remove(self.frames)
            sys.setrecursionlimit(max(_USERS))
            if len(_USERS) == 1:
                _USERS.clear()


_LOCK = threading.Lock()
_USERS: list[int] = []
"""The user's own limit, and one more for each user of a room."""

CALLS = Room(6_000)
"""For ``module(x)``, which passes through C, so that too many calls end the process."""
METHODS = Room(30_000)
"""For methods that go through all children in Python alone."""


class _Depth(threading.local):
    calls = 0


_DEPTH = _Depth()
Method = TypeVar("Method", bound=Callable[..., Any])


def nested(method: Method) -> Method:
    """Give a method room that calls itself on every child."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        depth = _DEPTH
        depth.calls += 1
        deep = depth.calls == DEEP
        if deep:
            METHODS.enter()
        try:
            return method(*args, **kwargs)
        finally:
            if deep:
                METHODS.leave()
            depth.calls -= 1

    return call  # type: ignore[return-value]


def far_below(module: Any) -> list[Any]:
    """Return some of the modules far below a deep one, the deepest first.

    Written before it, they spare pickle the way down, which is in C and has little room.
    """
    found = []
    level = {id(module): module}
    seen: set[int] = set()
    depth = 0
    while level:
        seen |= level.keys()
        parts = [part for m in level.values() for part in m._modules.values() if part is not None]
        level = {id(part): part for part in parts if id(part) not in seen}
        depth += 1
        if depth % _STEP == 0:
            found += level.values()
    return found[::-1]


_STEP = 25


def made_after(below: list[Any], function: Callable[..., Any], args: Any) -> Any:
    """Make a module whose parts far below are made already."""
    return function(*args)


def repr_of(child: Any) -> str:
    """Return ``repr(child)`` without passing through C, where there is less room."""
    method: Any = type(child).__repr__
    return method(child)
