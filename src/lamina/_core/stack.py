"""What Python's stack tells about who has called."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["kept_by_jax"]

_OPEN_NO_FRAME = frozenset({"__call__", "_slow", "run_inside"})
"""Methods by which compiled functions are called from inside of other transforms."""


def kept_by_jax(framed: bool) -> bool:
    """Tell whether some function on the stack that JAX has called may outlive this call.

    JAX keeps what it records by the identity of the function, so values read in one that lives on
    would be those of its first call. Safe are functions defined in a function that is running now,
    and bound methods, which are made anew whenever they are looked up.
    """
    called: list[Any] = []
    defined: set[Any] = set()
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        ours = name.startswith("lamina.func.") and frame.f_code.co_name not in _OPEN_NO_FRAME
        if framed and ours:
            break  # what is further out was called before lamina's frame was opened
        if not name.startswith(("jax.", "lamina._core.bind", "lamina._core.stack")):
            defined.update(c for c in frame.f_code.co_consts if hasattr(c, "co_code"))
            above = frame.f_back
            caller = above.f_globals.get("__name__", "") if above is not None else ""
            if caller.startswith("jax.") and "tree" not in caller:
                called.append(frame)
        frame = frame.f_back
    return any(f.f_code not in defined and not _is_method(f) for f in called)


def _is_method(frame: Any) -> bool:
    """Tell whether a frame runs a method of its first argument, looked up for the call.

    ``jax.jit(net.block)`` may live on, and its method with it.
    """
    above = frame.f_back
    while above is not None and above.f_globals.get("__name__", "").startswith("jax."):
        if above.f_globals["__name__"].endswith(".pjit"):
            return False
        above = above.f_back
    code = frame.f_code
    if not code.co_argcount or code.co_name == "__call__":
        return False
    me = frame.f_locals.get(code.co_varnames[0])
    found = getattr(type(me), code.co_name, None)
    return getattr(found, "__code__", None) is code
