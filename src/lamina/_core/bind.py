"""Binding: how values travel between boxes and JAX. The only file that touches tracers.

A *frame* is open while lamina traces a function. Inside it a box may hold a tracer in place of its
value; the frame remembers what the box held before, notes what was written, and puts everything
back when it closes, also after an exception. Four verbs, used by every transform:

bind      put a tracer into a box for the time of the frame
capture   note that a box was read which the frame had not bound (a closure)
collect   pick up the values of the boxes that were written
restore   put the former values back
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from .errors import ForeignTransformError, StaticWriteError

if TYPE_CHECKING:
    from .module import Module
    from .parameter import Box

__all__ = ["LOCK", "STATE", "Clock", "Frame", "Retry", "VERSION"]

LOCK = threading.RLock()
"""Held while boxes hold tracers and while a compiled call takes and returns values."""


class Clock:
    """Counters that tell caches when to look again."""

    def __init__(self) -> None:
        self.tree = 0
        """Bumped when a box or a module is added, replaced or removed anywhere."""
        self.static = 0
        """Bumped when anything changes that a compiled program may depend on, except values."""
        self.exposed = 0
        """Bumped when the array in some box becomes visible to the user."""


VERSION = Clock()


class _State(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.capture_level = 0
        self.jit_level = 0
        self.depth = 0
        self.inferring = False


def trace_state() -> Any:
    """Return a mark of the JAX trace that is open now; equal marks mean the same trace."""
    return get_opaque_trace_state(convention="lamina")


STATE = _State()
_SERIAL = itertools.count(1)
_CLEAN = trace_state()


class Retry(BaseException):
    """The trace just finished knew too little and starts again. Never reaches users."""


class Frame:
    """What one transform did to the boxes while its function was traced.

    Args:
        kind: the name of the transform, for messages.
        captures: note boxes that are read but not bound (compiled functions need them as inputs).
        compiled: the traced program is kept and run again, so Python side effects would be lost.
        abstract: boxes without a value read as shapes only; used to infer shapes.
    """

    def __init__(
        self,
        kind: str,
        *,
        captures: bool = False,
        compiled: bool = False,
        abstract: bool = False,
    ) -> None:
        self.serial = next(_SERIAL)
        self.kind = kind
        self.lane: Any = None
        self.captures = captures
        self.compiled = compiled
        self.abstract = abstract
        self.saved: dict[Box, tuple[Any, int]] = {}
        self.written: dict[Box, None] = {}
        self.captured: dict[Box, None] = {}
        self.foreign: dict[Box, None] = {}
        """Captured boxes that were read inside a JAX transform nested in the frame."""
        self.modules: dict[Module, None] = {}
        self.born: list[Box] = []
        self.stale = False
        """Whether a box that was bound empty has been given a value since."""
        self.on_error: list[Callable[[], None]] = []
        self.on_redo: list[Callable[[], None]] = []

    def __enter__(self) -> Frame:
        state = STATE
        LOCK.acquire()
        self.outer = (state.capture_level, state.jit_level, state.depth)
        state.frames.append(self)
        self.level = len(state.frames)
        self.trace = trace_state()
        state.depth = 0
        if self.captures:
            state.capture_level = self.level
        if self.compiled:
            state.jit_level = self.level
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        state = STATE
        for box, (value, level) in self.saved.items():
            box._value = value
            box._level = level
        for box in self.born:
            box._level = 0
        if self.abstract or error_type is not None:
            for restore in reversed(self.on_redo):
                restore()
        if error_type is not None and error_type is not Retry:
            for restore in reversed(self.on_error):
                restore()
        state.frames.pop()
        state.capture_level, state.jit_level, state.depth = self.outer
        LOCK.release()

    def bind(self, boxes: Iterable[Box], values: Iterable[Any], *, watch: bool = False) -> None:
        """Put ``values`` into ``boxes`` until the frame closes; ``watch`` notes which are read."""
        for box, value in zip(boxes, values, strict=True):
            self._own(box)
            box._value = value
            if watch:
                box._level = self.level - 1

    def _own(self, box: Box) -> None:
        if box not in self.saved:
            self.saved[box] = (box._value, box._level)
        box._level = self.level

    def collect(self) -> list[Any]:
        """Return the present values of the boxes that were written, in order of first writing."""
        return [box._value for box in self.written]


def note_read(box: Box) -> None:
    """Tell the innermost capturing frame that a box it has not bound is read."""
    state = STATE
    if box._level < state.capture_level:
        frame = state.frames[state.capture_level - 1]
        frame.captured[box] = None
        if trace_state() != state.frames[-1].trace:
            frame.foreign[box] = None
        frame._own(box)


def note_birth(box: Box) -> None:
    """Count a box made while tracing as known to the frame: it is no closure."""
    frames = STATE.frames
    box._level = len(frames)
    frames[-1].born.append(box)


def outlive(box: Any) -> Any:
    """Let a box made while tracing belong to no frame; it will be captured when it is used."""
    box._level = 0
    return box


def note_module(module: Module) -> None:
    """Tell the compiled function being traced that it depends on a module's attributes."""
    state = STATE
    if state.jit_level:
        state.frames[state.jit_level - 1].modules[module] = None


def note_shape(box: Box) -> None:
    """Remember a box's sizes before they are filled in, in case the trace fails."""
    if STATE.frames:
        former = (box._shape, box._init, box._init_is_default)

        def restore() -> None:
            box._shape, box._init, box._init_is_default = former

        STATE.frames[0].on_error.append(restore)


def placeholder(box: Box) -> Any:
    """Return a tracer of the box's shape while shapes are being inferred, else None."""
    state = STATE
    if not (state.frames and any(frame.abstract for frame in state.frames)):
        return None
    shape = box._shape
    assert shape is not None
    value = jnp.zeros(shape, box.dtype)  # staged: no memory, no arithmetic
    frame = state.frames[-1]
    if trace_state() == frame.trace:
        frame._own(box)
        box._value = value
    return value


def store(box: Box, value: Any) -> None:
    """Write a checked value into a box, so that the write survives every lamina transform."""
    state = STATE
    if not state.frames:
        if trace_state() != _CLEAN and (is_tracer(value) or staging()):
            raise ForeignTransformError(_FOREIGN_WRITE.format(box=box._describe()))
        box._value = value
        box._exposed = value
        VERSION.exposed += 1
        return
    frame = state.frames[-1]
    if trace_state() != frame.trace:
        raise ForeignTransformError(
            _INNER_WRITE.format(box=box._describe(), kind=frame.kind, fix=_fix(frame.kind))
        )
    if box._level < frame.level:
        if frame.captures:
            frame.captured[box] = None
        frame._own(box)
    frame.written[box] = None
    box._value = value


def is_tracer(value: Any) -> bool:
    """Tell whether a value stands for an array that is not known yet."""
    return isinstance(value, jax.core.Tracer)


def holds_tracer(value: Any) -> bool:
    """Tell whether a value is, or contains in lists, tuples and dicts, a tracer."""
    if isinstance(value, (list, tuple, dict)):
        return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))
    return isinstance(value, jax.core.Tracer)


def staging() -> bool:
    """Tell whether operations are now recorded (``jit``, ``scan`` ...) rather than carried out."""
    return is_tracer(jnp.zeros(()))


def under_foreign_trace() -> bool:
    """Tell whether a plain JAX transform is recording, inside or outside of lamina's frames."""
    frames = STATE.frames
    around = frames[-1].trace if frames else _CLEAN
    return trace_state() != around and staging()


def called_by_jax(depth: int) -> bool:
    """Tell whether the function ``depth`` calls up was called by JAX itself."""
    caller = sys._getframe(depth + 1).f_globals.get("__name__", "")
    return caller == "jax" or caller.startswith("jax.")


def settled_value(box: Box) -> Any:
    """Return what the box holds outside of all frames."""
    for frame in STATE.frames:
        if box in frame.saved:
            return frame.saved[box][0]
    return box._value


def settle(box: Box, value: Any) -> None:
    """Give a box that has no value one that outlives the open frames, as if it always had it."""
    box._value = value
    if STATE.frames:
        STATE.frames[0].on_error.append(lambda: setattr(box, "_value", None))
    for frame in STATE.frames:
        if box in frame.saved:
            frame.saved[box] = (value, frame.saved[box][1])
            frame.stale = True


def check_static_write(module: Module, name: str, value: Any, unchanged: bool) -> None:
    """Refuse an attribute write that a transform would lose; called only while frames are open."""
    state = STATE
    frame = state.frames[-1]
    if module.__dict__["_born"] == state.frames[0].serial:
        return  # made inside this trace: it ends with it
    old = module.__dict__.get(name, _ABSENT)

    def restore() -> None:
        _put_back(module, name, old)

    if state.inferring:
        state.frames[0].on_error.append(restore)
        return
    if not frame.abstract:
        if holds_tracer(value):
            raise StaticWriteError(
                _TRACER_ATTRIBUTE.format(cls=type(module).__name__, name=name, kind=frame.kind)
            )
        if state.jit_level and not unchanged:
            raise StaticWriteError(_PLAIN_ATTRIBUTE.format(cls=type(module).__name__, name=name))
    frame.on_redo.append(restore)


def check_structure_write(module: Module, name: str) -> None:
    """Refuse to add, replace or remove parts of a module inside a compiled function."""
    if STATE.jit_level and module.__dict__["_born"] != STATE.frames[0].serial:
        raise StaticWriteError(_STRUCTURE.format(cls=type(module).__name__, name=name))


def _put_back(module: Module, name: str, old: Any) -> None:
    VERSION.static += 1
    if old is _ABSENT:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = old


_ABSENT = object()


def _fix(kind: str) -> str:
    return (
        "Use lamina.scan, lamina.vmap, lamina.grad or lamina.remat in place of the jax transform, "
        "or compute the new value inside, return it, and write it outside."
        if kind != "functional_call"
        else "Return the value and write it outside of the transform."
    )


_FOREIGN_WRITE = """{box} is written under a plain JAX transform, which would lose the new value.
    wrong:  jax.jit(f), jax.vmap(f), jax.grad(f), ... where f writes a parameter or buffer
    right:  lamina.jit(f), lamina.vmap(f), lamina.grad(f), ...
    or:     out, state = lamina.functional_call(net, params, x, return_state=True)
    or:     net.eval() if the layer needs no new state, or `with lamina.rng(key):` for dropout"""

_INNER_WRITE = """{box} is written inside a jax transform nested in lamina's `{kind}`; \
the new value would be lost. {fix}"""

_TRACER_ATTRIBUTE = """{cls}.{name} is a plain attribute, and under `{kind}` the array assigned to \
it exists only while tracing.
    mend:  in __init__, declare it:  self.register_buffer({name!r}, None, persistent=False)
           then `self.{name} = array` works everywhere and the value comes out."""

_PLAIN_ATTRIBUTE = """{cls}.{name} is a plain Python attribute and is changed inside a compiled \
function: the change would happen once, while tracing, and then be lost.
    mend:  keep changing state in a buffer:  self.{name} = nn.Buffer(jnp.asarray(0))
           or change it outside of the compiled function."""

_STRUCTURE = """{cls}.{name} is added, replaced or removed inside a compiled function: the change \
would happen once, while tracing, and be lost. Change the structure of a model outside of it."""
