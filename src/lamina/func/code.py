"""What code mentions (names, globals, imports), and which code belongs to a library."""

from __future__ import annotations

import builtins
import dis
import functools
import sys
import types
from typing import Any

__all__ = ["globals_in", "imports_in", "is_library", "names_in"]

LIBRARY = frozenset({"jax", "jaxlib", "numpy", "scipy", "optax", "torch", "ml_dtypes"}) | {
    __name__.partition(".")[0],
    *sys.stdlib_module_names,
} - {"__main__"}  # fmt: skip
"""Packages whose functions and classes hold no state of the user's, so they are not searched."""


def is_library(name: str | None) -> bool:
    """Tell whether a module belongs to a package that holds no state of the user's."""
    return (name or "").partition(".")[0] in LIBRARY


READS_ALL = frozenset(
    {"vars", "__dict__", "asdict", "astuple", "attrgetter", "getattr", "deepcopy"}
)
"""Who mentions one of these may read any field."""


@functools.lru_cache(4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """Return all names that a function mentions, also in strings and in inner functions."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)
        elif isinstance(constant, tuple):
            names.update(c for c in constant if isinstance(c, str) and c.isidentifier())
    return frozenset(names)


@functools.lru_cache(4096)
def imports_in(code: types.CodeType) -> frozenset[str]:
    """Return the modules that a function imports when it runs, also in inner functions."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= imports_in(constant)
    return frozenset(names)


@functools.lru_cache(4096)
def globals_in(code: types.CodeType) -> frozenset[str]:
    """Return the global names that a function looks up, also in inner functions.

    From the instructions: ``code.co_names`` holds names of attributes as well.
    """
    names = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= globals_in(constant)
    return frozenset(names)


BUILTINS = frozenset(dir(builtins))


READS_NAMES = frozenset({"globals", "locals", "eval", "exec", "__import__", "importlib"})


def is_library_thing(value: Any) -> bool:
    """Tell whether a value is a module, class or plain function of a library."""
    if isinstance(value, types.ModuleType):
        return is_library(value.__name__)
    if isinstance(value, type):
        return is_library(value.__module__) or value.__module__ == "builtins"
    if isinstance(value, types.FunctionType):
        local = value.__closure__ or "<locals>" in value.__qualname__  # made anew each time
        return is_library(value.__globals__.get("__name__")) and not local
    if hasattr(value, "__wrapped__"):
        home = getattr(value, "__module__", None)
        return is_library(home) and not type(value).__module__.startswith("lamina")
    return False


def unwrapped(part: Any) -> Any:
    """Return the function of a static method, class method or property."""
    if isinstance(part, (staticmethod, classmethod)):
        return part.__func__
    if isinstance(part, property):
        return part.fget
    return part.func if isinstance(part, functools.cached_property) else part


def slots_of(kind: type) -> list[str]:
    if is_library(kind.__module__):
        return []
    names: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if not name.startswith("__")]
