"""The gate: the one file in which values enter and leave cells, and the only one that sees tracers.

A *cell* holds one value. While lamina traces a function a *frame* is open: cells may then hold
tracers, and the frame puts back what they held when it closes, whatever happened. The verbs:

read, write   the gate itself: every value that users see, and every new one, comes through here
bind          put tracers into cells for the time of a frame
settle        give an empty cell the value it was always meant to have
hand out      note that the user holds a cell's array, which then is never given away
exchange      run a compiled program: values out of the cells, the new values back into them
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

from . import messages
from .errors import ForeignTransformError, StaticWriteError, UnprovenError, note_box_in_lax
from .stack import kept_by_jax

__all__ = ["Cell", "Exchange", "Frame", "LOCK", "STATE", "read", "settle", "write"]

LOCK = threading.RLock()
"""Held while cells hold tracers, and while a compiled call takes and returns values."""


class _State(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.compiled: Frame | None = None
        """The open frame of a compiled function; there is at most one."""
        self.watching: Frame | None = None
        """The innermost open frame that notes every cell that is read."""
        self.abstract = 0
        """How many open frames only infer shapes."""
        self.inferring = False
        """Whether a module's ``infer_shapes`` runs."""
        self.depth = 0
        """How many calls of modules are open since the innermost frame was opened."""
        self.entry: Any = None
        """The JAX trace in which the outermost of these calls was made."""
        self.hooks: dict[int, Any] = {}
        """The user's hooks that ran in the transform that is open."""


STATE = _State()
_SERIAL = itertools.count(1)
_TRACE = jax.make_user_context()
"""Part of the key of JAX's own caches. A function that JAX has kept from an earlier trace, with
old values in it, is traced anew in each compiled function of ours."""


def trace_mark() -> Any:
    """Return what identifies the JAX trace that is open in this thread."""
    return get_opaque_trace_state(convention="lamina")


def _clean_mark() -> Any:
    # Taken in a new thread, where no trace can be open: lamina may be imported inside a jax.jit.
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(trace_mark()))
    thread.start()
    thread.join()
    return found[0]


CLEAN = _clean_mark()


def is_tracer(value: Any) -> bool:
    """Tell whether a value stands for an array that is not known yet."""
    return isinstance(value, jax.core.Tracer)


def holds_tracer(value: Any) -> bool:
    """Tell whether a value is, or contains in lists, tuples and dicts, a tracer."""
    if isinstance(value, (list, tuple, dict)):
        return any(map(is_tracer, jax.tree.leaves(value)))
    return is_tracer(value)


def staging() -> bool:
    """Tell whether operations are now recorded (``jit``, ``scan`` ...) rather than carried out."""
    return is_tracer(jnp.zeros(()))


def under_foreign() -> bool:
    """Tell whether a plain JAX transform that records a program is open around lamina."""
    frames = STATE.frames
    return frames[0].foreign if frames else trace_mark() != CLEAN and staging()


class _Handed:
    """Counts the moments at which users got hold of a cell's array.

    A count that has not moved spares a compiled call the look at each cell.
    """

    count = 0


class Cell:
    """A holder of one value; subclasses say what it is called and how it gets its first value."""

    __slots__ = ("__weakref__", "_handed", "_level", "_value")

    def __init__(self, value: Any = None) -> None:
        frames = STATE.frames
        if frames:
            _SET_LEVEL(self, len(frames))
            frames[-1].born[self] = None
        else:
            _SET_LEVEL(self, 0)
        _SET_VALUE(self, value)
        _SET_HANDED(self, True)  # the user may hold the array it was made from
        _Handed.count += 1

    @property
    def is_empty(self) -> bool:
        """Whether there is no value, not even a tracer."""
        return self._value is None

    def form(self) -> Any:
        """Return something with the shape and dtype of the value, or ``None``."""
        return self._value

    @property
    def is_fixed(self) -> bool:
        """Whether shape and dtype never change, and there is always a value once there is one."""
        return False

    @property
    def is_vacant(self) -> bool:
        """Whether there is no value, and none is meant to be there."""
        return self.is_empty and not self.is_fixed

    def describe(self) -> str:
        """Name the cell for a message."""
        return "a value"

    def first_value(self) -> Any:
        """Return the value of a cell that has none yet, or raise; ``None`` where none is meant."""
        return None

    def stand_in(self) -> jax.ShapeDtypeStruct | None:
        """Return the shape and dtype of the value to come, or raise; ``None`` if none is meant."""
        return None


_SET_VALUE = Cell._value.__set__  # type: ignore[attr-defined]
_SET_LEVEL = Cell._level.__set__  # type: ignore[attr-defined]
_SET_HANDED = Cell._handed.__set__  # type: ignore[attr-defined]
_VALUE = attrgetter("_value")


def _each(function: Callable[..., Any], *columns: Iterable[Any]) -> None:
    """Call a C function for each row. Runs in C: an interrupt comes before it or after it."""
    collections.deque(map(function, *columns), maxlen=0)


class Frame:
    """What one transform did to the cells while its function was traced.

    Args:
        kind: the name of the transform, for messages.
        compiled: the traced program is kept and run again.
        abstract: cells without a value are read as shapes only; changes of attributes are undone.
        look: (compiled) the first, abstract trace, which finds out which cells are touched.
        watch: note every cell that is read.
        lanes: indices that make random draws differ between lanes or steps.
        foreign: whether plain JAX records around lamina; known where frames are open already.
    """

    def __init__(
        self,
        kind: str,
        *,
        compiled: bool = False,
        abstract: bool = False,
        look: bool = False,
        watch: bool = False,
        lanes: tuple[Any, ...] = (),
        foreign: bool | None = None,
    ) -> None:
        self.kind, self.compiled, self.abstract, self.look = kind, compiled, abstract, look
        self.watch = watch
        self.lanes = lanes
        self.foreign = under_foreign() if foreign is None else foreign
        self.serial = next(_SERIAL)
        self.values: dict[Cell, Any] = {}
        """What the cells held that the frame has bound or that were written in it."""
        self.levels: dict[Cell, int] = {}
        self.read: dict[Cell, None] = {}
        self.written: dict[Cell, None] = {}
        self.born: dict[Cell, None] = {}
        """Cells that were made in it: they end with it, unless they are returned."""
        self.met: dict[Cell, None] = {}
        """(compiled) Cells that were reached without having been bound."""
        self.draws: dict[Cell, int] = {}
        """How many keys were drawn from each random stream."""
        self.drawn_before: dict[Cell, Any] = {}
        """In a loop: how many were drawn in the steps before, a tracer."""
        self.undo: list[Callable[[], None]] = []
        self.undo_always: list[Callable[[], None]] = []

    def __enter__(self) -> Frame:
        state = STATE
        LOCK.acquire()
        self.outer = (state.compiled, state.watching, state.depth, state.entry)
        state.frames.append(self)
        self.level = len(state.frames)
        if self.level == 1:
            state.hooks = {}
        self.trace = trace_mark()
        state.depth, state.entry = 0, None
        state.abstract += self.abstract
        if self.watch:
            state.watching = self
        if self.compiled:
            state.compiled = self
            self.context = _TRACE(self.serial)
            self.context.__enter__()
        return self

    def __exit__(self, _: Any, error: BaseException | None, *__: object) -> None:
        _each(_SET_VALUE, self.values, self.values.values())
        _each(_SET_LEVEL, self.levels, self.levels.values())
        state = STATE
        for cell in self.born:
            _SET_LEVEL(cell, min(cell._level, self.level - 1))
        if self.abstract or error is not None:
            _run_backwards(self.undo_always)
        if error is not None:
            _run_backwards(self.undo)
            note_box_in_lax(error)
        elif self.level > 1:
            state.frames[-2].undo += self.undo
            state.frames[-2].born |= self.born
        if self.compiled:
            self.context.__exit__(None, None, None)
        state.frames.pop()
        state.abstract -= self.abstract
        state.compiled, state.watching, state.depth, state.entry = self.outer
        LOCK.release()

    def bind(self, cells: Iterable[Cell], values: Iterable[Any]) -> None:
        """Put ``values`` into ``cells`` until the frame closes."""
        for cell, value in zip(cells, values, strict=True):
            self._own(cell)
            _SET_VALUE(cell, value)

    def _own(self, cell: Cell) -> None:
        if cell not in self.values:
            self.levels[cell] = cell._level
            self.values[cell] = cell._value
        _SET_LEVEL(cell, self.level)

    def collect(self, cells: Iterable[Cell] | None = None) -> list[Any]:
        """Return the present values of ``cells`` (default: of those that were written)."""
        return list(map(_VALUE, self.written if cells is None else cells))


def _run_backwards(actions: list[Callable[[], None]]) -> None:
    for action in reversed(actions):
        action()
    actions.clear()


# The gate.


def read(cell: Cell) -> Any:
    """Return a cell's value to the user, or ``None`` where it is meant to have none.

    An array that is returned here stays valid for ever.
    """
    state = STATE
    frames = state.frames
    if not frames:
        _check_foreign_read(cell)
        return _read_outside(cell)
    frame = frames[-1]
    compiled = state.compiled
    if compiled is None:
        _check_foreign_read(cell)
    else:
        if cell._level < compiled.level:
            _meet(cell, compiled)
        if cell in compiled.values:
            compiled.read[cell] = None
    if state.watching is not None:
        state.watching.read[cell] = None
    value = cell._value
    if value is None:
        value = _stand_in(cell, frame) if state.abstract else fill(cell)
    return value if is_tracer(value) else _hand_out(cell, value)


def _read_outside(cell: Cell) -> Any:
    # The lock is taken since another thread may be tracing, or about to give the value away.
    if not LOCK.acquire(blocking=False):
        if isinstance(threading.current_thread(), threading._DummyThread):  # type: ignore[attr-defined]
            return _read_in_callback(cell)
        LOCK.acquire()
    try:
        value = cell._value
        if value is None:
            value = fill(cell)
        if is_tracer(value):
            if trace_mark() == CLEAN:
                raise ForeignTransformError(messages.ENDED.format(box=cell.describe()))
            return value
        return _hand_out(cell, value)
    finally:
        LOCK.release()


def _read_in_callback(cell: Cell) -> Any:
    """Read on a thread of XLA's own, which must not wait for the call that waits for it."""
    value = cell._value
    if is_tracer(value) or value is None or (hasattr(value, "is_deleted") and value.is_deleted()):
        raise ForeignTransformError(messages.CALLBACK.format(box=cell.describe()))
    return jnp.asarray(np.array(value))


def write(cell: Cell, value: Any) -> None:
    """Store a checked value, so that the write survives every lamina transform."""
    state = STATE
    frames = state.frames
    if not frames:
        if trace_mark() != CLEAN and (is_tracer(value) or staging()):
            raise ForeignTransformError(messages.FOREIGN_WRITE.format(box=cell.describe()))
        if is_tracer(value):
            raise ForeignTransformError(
                messages.ENDED.format(box="the value for " + cell.describe())
            )
        with LOCK:
            _SET_VALUE(cell, value)
            _hand_out(cell, value)
        return
    frame = frames[-1]
    if trace_mark() != frame.trace:
        raise ForeignTransformError(
            messages.INNER_WRITE.format(box=cell.describe(), kind=frame.kind)
        )
    if state.inferring and _first_level(cell) == 0:
        raise StaticWriteError(messages.INFERRING.format(box=cell.describe(), kind=frame.kind))
    compiled = state.compiled
    if compiled is not None and cell._level < compiled.level:
        _meet(cell, compiled)
    if cell._level < frame.level:
        frame._own(cell)
    frame.written[cell] = None
    _SET_VALUE(cell, value)
    if not is_tracer(value):
        _hand_out(cell, value)


def write_unless_changed(
    cells: Iterable[Cell], values: Iterable[Any], taken: dict[Cell, Any]
) -> None:
    """Write the results of a program that ran without the lock.

    A cell that meanwhile has another value than was taken from it keeps that: the write of another
    thread came last.
    """
    for cell, value in zip(cells, values, strict=True):
        if cell not in taken or cell._value is taken[cell]:
            write(cell, value)


def _first_level(cell: Cell) -> int:
    """Return in which frame a cell was made, wherever it may be bound now; 0 is outside."""
    return next((f.levels[cell] for f in STATE.frames if cell in f.levels), cell._level)


def write_all(cells: Iterable[Cell], values: Iterable[Any]) -> None:
    """Write several values, or, if one of them would be lost, none."""
    pairs = list(zip(cells, values, strict=True))
    if pairs and not STATE.frames and trace_mark() != CLEAN:
        lost = next((cell for cell, value in pairs if is_tracer(value)), None)
        if lost is not None or staging():
            first = pairs[0][0] if lost is None else lost
            raise ForeignTransformError(messages.FOREIGN_WRITE.format(box=first.describe()))
    for cell, value in pairs:
        write(cell, value)


def _hand_out(cell: Cell, value: Any) -> Any:
    if not cell._handed:
        _SET_HANDED(cell, True)
        _Handed.count += 1
    return value


def _meet(cell: Cell, compiled: Frame) -> None:
    """Take in a cell that a compiled function reaches and that was not bound for it.

    During the look these are cells that had no shape yet when it began, and cells that were made
    in it to last. Whether they can be found again is checked when the look is over.
    """
    if not compiled.look:
        raise UnprovenError(messages.UNPROVEN.format(box=cell.describe(), kind=compiled.kind))
    compiled._own(cell)
    compiled.met[cell] = None


def _check_foreign_read(cell: Cell) -> None:
    """Refuse a read that plain JAX would freeze into a program that it may run again."""
    state = STATE
    frames = state.frames
    now = trace_mark()
    if frames:
        if frames[0].foreign and cell._level == 0 and not is_tracer(cell._value):
            raise ForeignTransformError(messages.FOREIGN_READ.format(box=cell.describe()))
        if now == frames[-1].trace:
            return
    elif not state.depth or state.entry != CLEAN:
        if now != CLEAN and not is_tracer(cell._value) and staging():
            raise ForeignTransformError(messages.FOREIGN_READ.format(box=cell.describe()))
        return
    elif now == CLEAN:
        return
    if staging() and kept_by_jax(bool(STATE.frames)):
        raise ForeignTransformError(messages.KEPT_BY_JAX.format(box=cell.describe()))


def fill(cell: Cell) -> Any:
    """Give an empty cell its first value, as if it had always had it."""
    value = cell.first_value()
    if value is not None and cell._value is None:  # it may have come together with others
        settle(cell, value)
    return cell._value


def _stand_in(cell: Cell, frame: Frame) -> Any:
    """Return a tracer of the cell's shape while shapes are inferred: no memory, no arithmetic."""
    spec = cell.stand_in()
    if spec is None:
        return None
    value = jnp.zeros(spec.shape, spec.dtype)
    if trace_mark() == frame.trace:
        frame._own(cell)
        _SET_VALUE(cell, value)
    return value


def settle(cell: Cell, value: Any) -> None:
    """Give a cell a value that outlives the open frames, as if it had always had it."""
    frames = STATE.frames
    with LOCK:
        if frames:
            frames[0].undo.append(lambda: _SET_VALUE(cell, None))
        owners = [frame for frame in frames if cell in frame.values]
        for frame in owners:
            frame.values[cell] = value
        if not owners or cell._value is None:
            _SET_VALUE(cell, value)
        _SET_HANDED(cell, True)
        _Handed.count += 1


def adopt(cell: Cell, value: Any) -> None:
    """Give a cell that was made just now its value; it lives as long as the trace that is open."""
    _SET_VALUE(cell, value)
    _SET_HANDED(cell, True)
    _Handed.count += 1


def belong(cell: Any, born: tuple[int, ...]) -> Any:
    """Let a cell made now be as old as what it belongs to, which :func:`birth` has marked.

    A gradient or a moment that is first needed in a trace lives as long as its parameter.
    """
    frames = STATE.frames
    if frames:
        level = level_of(born)
        _SET_LEVEL(cell, level)
        if level < len(frames):
            del frames[-1].born[cell]
            if level:
                frames[level - 1].born[cell] = None
    return cell


def settled_value(cell: Cell) -> Any:
    """Return what a cell holds outside of all frames."""
    for frame in STATE.frames:
        if cell in frame.values:
            return frame.values[cell]
    return cell._value


def is_at_hand(cell: Cell) -> bool:
    """Tell whether reading a cell is sure to succeed, and makes nothing depend on it anew."""
    compiled = STATE.compiled
    return cell in compiled.values if compiled else not is_tracer(cell._value)


def raw_values(cells: Iterable[Cell]) -> list[Any]:
    """Return what cells hold now, for tracing and for looking at types: not for users."""
    return list(map(_VALUE, cells))


def clear(cells: Iterable[Cell]) -> None:
    """Take the values of cells away, so that they are made again."""
    with LOCK:
        for cell in cells:
            _SET_VALUE(cell, None)


def put_back(cells: Iterable[Cell], values: Iterable[Any]) -> None:
    """Give cells what they held before something failed."""
    with LOCK:
        for cell, value in zip(cells, values, strict=True):
            _SET_VALUE(cell, value)
            _SET_HANDED(cell, True)
        _Handed.count += 1


# When things were made.


def birth() -> tuple[int, ...]:
    """Return what marks an object that is made now as belonging to the open frames."""
    return tuple(frame.serial for frame in STATE.frames)


def level_of(born: tuple[int, ...]) -> int:
    """Return how many of the frames in which an object was made are open still."""
    pairs = zip(STATE.frames, born, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0].serial == pair[1], pairs))


# Running compiled programs.


class Exchange:
    """The cells of one compiled call: which are given up, which are only read, which are written.

    Attributes:
        donated: cells whose arrays the program may reuse for the new values.
        kept: cells that are only read, or whose new value has another shape.
        written: cells that take the program's first results, in order.
    """

    __slots__ = ("donated", "kept", "seen", "written")

    def __init__(self, donated: list[Cell], kept: list[Cell], written: list[Cell]) -> None:
        self.donated, self.kept, self.written = donated, kept, written
        self.seen = -1

    def run(self, program: Callable[..., Any], arrays: list[Any], name: str) -> Any:
        """Call a compiled program; the caller holds the lock."""
        kept = [cell._value for cell in self.kept]
        if not self.written:
            return program([], kept, arrays)[1]
        donated = [cell._value for cell in self.donated]
        count = _Handed.count
        copied = self._protect(donated) if self.seen != count else ()
        results: list[Any] = []
        try:
            # Called through map, so that an interrupt that arrives during the call can't come
            # between the return and the assignment, when the donated values are gone already.
            results.extend(map(program, (donated,), (kept,), (arrays,)))
        except Exception as error:
            if any(hasattr(v, "is_deleted") and v.is_deleted() for v in donated):
                error.add_note(messages.LOST.format(name=name))
            raise
        finally:
            if results:
                _each(_SET_VALUE, self.written, results[0][0])
                _each(_SET_HANDED, copied, itertools.repeat(False))
                self.seen = count
        return results[0][1]

    def _protect(self, donated: list[Any]) -> list[Cell]:
        """Replace arrays that the user holds by copies: donation must not delete those."""
        copied = []
        for index, cell in enumerate(self.donated):
            if cell._handed and donated[index] is not None:
                donated[index] = jnp.copy(donated[index])
                copied.append(cell)
        return copied
