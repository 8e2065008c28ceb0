"""What errors raised in and around modules say: where it was, what came in, what mends it."""

from __future__ import annotations

from typing import Any

import jax

from .bind import STATE
from .errors import DataDependentError, ForeignTransformError, did_you_mean, note_box_in_lax
from .walk import path_of

__all__ = ["NoAttribute", "explained"]


class NoAttribute(AttributeError):
    """Computes what may have been meant only when it is shown: ``hasattr`` should cost nothing."""

    def __init__(self, module: Any, name: str) -> None:
        super().__init__(name=name, obj=None)  # else Python adds a guess of its own
        self.module = module

    def __str__(self) -> str:
        kind, name = type(self.module).__name__, str(self.name)
        if name in _REPLACED:
            return f"a module has no {name}\n    fix: {_REPLACED[name]}"
        known = [key for key in dir(self.module) if not key.startswith("_")]
        return f"{kind!r} object has no attribute {name!r}." + did_you_mean(name, known)

    def __reduce__(self) -> Any:
        return AttributeError, (str(self),)


def explained(error: Exception, module: Any, args: Any, kwargs: Any) -> Exception:
    """Add to an error raised in ``forward`` where it happened and what the module received."""
    traceback = error.__traceback__
    if traceback is not None and STATE.depth == 1:
        while (inner := traceback.tb_next) is not None:  # the lines shown are the user's
            if _is_own(inner.tb_frame) and inner.tb_next is not None:
                traceback.tb_next = inner.tb_next
            else:
                traceback = inner
    if getattr(error, "_lamina_path", None) is not None:
        return error
    path = path_of(module)
    shapes = ", ".join(
        [_shape_of(arg) for arg in args] + [f"{k}={_shape_of(v)}" for k, v in kwargs.items()]
    )
    text = repr(module)
    if "\n" in text:
        text = f"{type(module).__name__}(...)"
    where = f"in module {path!r}: {text}, called with ({shapes})"
    better = error
    if isinstance(error, _DATA_DEPENDENT):
        better = DataDependentError(_NOT_WHILE_TRACING.format(where=where))
        better.__traceback__ = error.__traceback__
    elif isinstance(error, jax.errors.UnexpectedTracerError):
        better = ForeignTransformError(_TRACER_KEPT.format(where=where))
        better.__traceback__ = error.__traceback__
    else:
        note_box_in_lax(error)
        error.add_note(where)
    try:
        better._lamina_path = path  # type: ignore[attr-defined]
    except AttributeError:
        pass
    return better


def _is_own(frame: Any) -> bool:
    """Tell whether a frame is a module's ``__call__``, which says nothing to users."""
    return frame.f_code.co_name == "__call__" and frame.f_globals.get("__name__") == _MODULE


_MODULE = f"{__package__}.module"

_DATA_DEPENDENT = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def _shape_of(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shape_of, value))}]"
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__


_REPLACED = {
    "cuda": "net.to('gpu'); without a GPU everything is on the CPU already",
    "share_memory": "arrays never change; pass net.state_dict() to another process",
    "register_backward_hook": "net.register_full_backward_hook(hook)",
}

_NOT_WHILE_TRACING = """{where}:
its Python control flow (if, while, int(), bool(), a boolean index) depends on a value that is not \
known while tracing.
    or:  if cond: a() else b()  ->  jax.lax.cond(cond, a, b)  or  jnp.where(cond, a, b)
    or:  while cond: body()     ->  jax.lax.while_loop(cond, body, state)
    or:  for over a known number of steps that reads or writes state  ->  lamina.scan
    or:  a size kept in an array attribute  ->  keep it as an int or a tuple of ints
    fix: call the module outside of lamina.jit, or write the control flow as above"""

_TRACER_KEPT = """{where}:
it uses an array that was kept (by a hook, in a list) from a transform that has ended, and exists \
only there.
    fix: return the array from the transformed function (has_aux=True), or keep it in a buffer"""
