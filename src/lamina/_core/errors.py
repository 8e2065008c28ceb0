"""Every error lamina raises, and the two helpers that word them.

An error says where (the dotted path), what was expected, what was got, and, on its last line, after
``fix:``, the code that mends it. Each class also derives from the built-in exception that
a PyTorch user would have caught.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataDependentError",
    "DeferredError",
    "FileError",
    "ForeignTransformError",
    "LaminaError",
    "LoadError",
    "RuleError",
    "ShapeError",
    "StaticWriteError",
    "TypeMismatchError",
    "UnprovenError",
]


class LaminaError(Exception):
    """Base class of all errors that lamina raises on purpose."""


class ShapeError(LaminaError, ValueError):
    """A value has another shape than the parameter, buffer or layer it is meant for."""


class TypeMismatchError(LaminaError, TypeError):
    """A value has another dtype or kind than the parameter or buffer it is meant for."""


class DeferredError(LaminaError, RuntimeError):
    """A value or a size was needed that is not known yet."""


class ForeignTransformError(LaminaError, RuntimeError):
    """A module was used under a plain JAX transform that would lose or freeze its state."""


class StaticWriteError(LaminaError, RuntimeError):
    """A plain attribute of a module was changed inside a compiled function, which would lose it."""


class UnprovenError(LaminaError, RuntimeError):
    """A compiled function depends on something that can't be checked again at every call."""


class DataDependentError(LaminaError, TypeError):
    """Python control flow in ``forward`` depends on a value that is not known while tracing."""


class RuleError(LaminaError, ValueError):
    """A rule (for initialisation, sharding or renaming) matched nothing or is malformed."""


class Problem(str):
    """One thing that is wrong with one name; printed, ``name: what``."""

    name: str

    def __new__(cls, name: str, what: str, where: str = "") -> Problem:
        problem = super().__new__(cls, f"{name}{where}: {what}")
        problem.name = name
        return problem


class LoadError(LaminaError, RuntimeError):
    """A state dict does not fit the model; the model is unchanged.

    Attributes:
        problems: what is wrong besides missing and unexpected names.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


class FileError(LaminaError, ValueError):
    """A file is damaged, hostile or of a kind that lamina does not read."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def format_shape(shape: Iterable[int | None]) -> str:
    """Write a shape as PyTorch users read it, with ``?`` for what is not known: ``(256, ?)``."""
    dims = ["?" if dim is None else str(dim) for dim in shape]
    return f"({dims[0]},)" if len(dims) == 1 else f"({', '.join(dims)})"


def note_box_in_lax(error: BaseException) -> None:
    """Say to an error of JAX's about a parameter given to ``jax.lax`` what such functions take."""
    if isinstance(error, (TypeError, ValueError)) and _BOX_IN_LAX not in _notes(error):
        text = str(error)
        if "__jax_array__" in text or ("Parameter" in text and "lax" in text):
            error.add_note(_BOX_IN_LAX)


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


_BOX_IN_LAX = """jax.lax functions take arrays only
    fix: pass the parameter's value: p.data"""
