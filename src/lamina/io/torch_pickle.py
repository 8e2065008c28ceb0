"""A pickle machine that executes nothing.

It runs the opcodes that PyTorch writes (protocols 2 to 5) over inert values: a global is a
:class:`Ref`, which is two strings and is never imported, and calling one asks a function of
lamina's own; when that has no answer the result is an :class:`Opaque` record of the call. Time and
memory are bounded by the size of the data: every length is checked before it is used, opcodes and
copies are counted, and only plain small values may become keys.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from .._core.errors import FileError
from .torch_values import Opaque, Ref, StateDict

__all__ = ["Machine", "load_pickle"]

MAX_PICKLE_BYTES = 64 << 20
MAX_OPCODES = 6_000_000
MAX_INT_BYTES = 1024
MAX_GLOBAL_CHARS = 1024
MAX_MARKS = 10_000
# Hashes of integers and of tuples of them are not randomised, so whoever writes a file can make
# them collide; the number of keys that can be chosen so is kept small.
MAX_FORGEABLE_KEYS = 8_000
FORGEABLE_INT = (1 << 61) - 1
MAX_KEY_TUPLE = 16
COST_OF_CALL = 8
COST_OF_SET = 16

_ATOMS = (str, int, float, bool, bytes, type(None))


Call = Callable[["Machine", Ref, tuple[Any, ...]], Any]
Persistent = Callable[[Any], Any]


def load_pickle(
    data: Any, where: str, call: Call, persistent: Persistent | None = None, start: int = 0
) -> tuple[Any, int]:
    """Run one pickle and return its value and the offset just behind it.

    Args:
        data: the bytes (any buffer); reading begins at ``start``.
        where: what to call the pickle in errors: file name and record.
        call: answers a call of a global with a value, or with ``NotImplemented`` to get an
            :class:`Opaque`.
        persistent: turns a persistent id into a value; without it such ids are refused.
        start: offset of the first opcode.

    Raises:
        FileError: if the pickle is damaged, too large, or uses what PyTorch never writes.

    Example:
        >>> import pickle
        >>> value, _ = load_pickle(pickle.dumps({"lr": 0.1}, 2), "x", lambda *_: NotImplemented)
        >>> value
        {'lr': 0.1}
    """
    machine = Machine(data, where, call, persistent, start)
    return machine.run(), machine.at


class Machine:
    """The state of one run: stack, marks, memo, position and what is left of the budget."""

    def __init__(
        self, data: Any, where: str, call: Call, persistent: Persistent | None, start: int = 0
    ) -> None:
        self.data = memoryview(data).cast("B")
        self.end = min(len(self.data), start + MAX_PICKLE_BYTES)
        self.at = start
        self.where = where
        self.call = call
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.refs: dict[tuple[str, str], Ref] = {}
        self.budget = MAX_OPCODES
        self.forgeable_keys = MAX_FORGEABLE_KEYS

    def run(self) -> Any:
        handlers = _HANDLERS
        data = self.data
        try:
            while True:
                code = data[self.at]
                self.at += 1
                self.budget -= 1
                if code == _STOP:
                    break
                handlers[code](self)
                if self.budget < 0:
                    raise self.error("has more operations than any real checkpoint")
            if self.marks or len(self.stack) != 1:
                raise self.error("does not end with exactly one value")
            return self.stack[0]
        except IndexError:
            if self.at >= self.end:
                raise self.error("is cut off or too large") from None
            raise self.error("takes a value that is not there") from None
        except KeyError:
            raise self.error("uses an operation or a memo entry that is not there") from None
        except struct.error:
            raise self.error("is cut off or too large") from None
        except UnicodeDecodeError:
            raise self.error("has text that is not UTF-8") from None
        except (TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
            if isinstance(error, FileError):
                raise
            raise self.error(f"combines values that do not fit ({type(error).__name__})") from None

    def error(self, reason: str) -> FileError:
        return FileError(f"{self.where}: the pickle {reason} (near byte {self.at})")

    def charge(self, cost: int) -> None:
        """Take ``cost`` operations from the budget, before work of that size is done."""
        self.budget -= cost
        if self.budget < 0:
            raise self.error("asks for more work than any real checkpoint")

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes, which are checked to be there."""
        start = self.at
        if count > self.end - start:
            raise self.error(f"is cut off or too large: {count} more bytes are announced")
        self.at = start + count
        return self.data[start : self.at]

    def text(self, count: int) -> str:
        return str(self.take(count), "utf-8")

    def old_text(self, count: int) -> str:
        """Text of Python 2, which had no encoding."""
        raw = bytes(self.take(count))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.decode("latin-1")

    def byte(self) -> int:
        value = self.data[self.at]
        self.at += 1
        return value

    def unpack(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def line(self) -> str:
        limit = min(self.end, self.at + MAX_GLOBAL_CHARS)
        raw = bytes(self.data[self.at : limit])
        length = raw.find(b"\n")
        if length < 0:
            raise self.error("has a global whose name does not end")
        self.at += length + 1
        return raw[:length].decode("utf-8")

    def ref(self, module: Any, name: Any) -> Ref:
        if type(module) is not str or type(name) is not str:
            raise self.error("names a global by something that is not text")
        if len(module) + len(name) > MAX_GLOBAL_CHARS:
            raise self.error("names a global with too long a name")
        ref = self.refs.get((module, name))
        if ref is None:
            ref = self.refs[module, name] = Ref(module, name)
        return ref

    def key(self, key: Any) -> Any:
        """Check that hashing ``key`` is cheap and safe, and return it."""
        kind = type(key)
        if kind is str or kind is Ref:
            return key
        if kind is int:
            if not -FORGEABLE_INT < key < FORGEABLE_INT:
                self._forgeable()
        elif kind is tuple:
            if len(key) > MAX_KEY_TUPLE or any(type(item) not in _ATOMS for item in key):
                raise self.error("has a key that is a large or nested tuple")
            if not all(type(item) in (str, bytes) for item in key):
                self._forgeable()
        elif kind not in _ATOMS and kind.__hash__ is not object.__hash__:
            raise self.error(f"has a key of type {kind.__name__}")
        return key

    def _forgeable(self) -> None:
        self.forgeable_keys -= 1
        if self.forgeable_keys < 0:
            raise self.error("has too many keys that are tuples or very large integers")

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.error("closes a group that was not opened")
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def apply(self, ref: Any, args: Any) -> Any:
        """Call a global: lamina's own function for it, or an inert record."""
        if type(args) is not tuple:
            raise self.error("calls with arguments that are not a tuple")
        if type(ref) is Opaque:
            self.charge(COST_OF_CALL)
            return Opaque(ref.ref, args)
        if type(ref) is not Ref:
            raise self.error("calls something that is not a global")
        cost = COST_OF_CALL
        for arg in args:
            kind = type(arg)
            if kind in (list, dict, tuple, set, frozenset, StateDict):
                cost += len(arg)
            elif kind is str or kind is bytes:
                cost += len(arg) >> 4
        self.charge(cost)
        result = self.call(self, ref, args)
        return Opaque(ref, args) if result is NotImplemented else result

    def extend(self, target: Any, values: list[Any]) -> None:
        kind = type(target)
        if kind is list:
            target.extend(values)
        elif kind is set:
            target.update(map(self.key, values))
        elif kind is Opaque:
            target.items.extend(values)
        else:
            raise self.error(f"adds items to a {kind.__name__}")

    def insert(self, target: Any, values: list[Any]) -> None:
        """Set the items of a dict from a flat list of keys and values."""
        kind = type(target)
        if len(values) % 2:
            raise self.error("has a key without a value")
        if kind is Opaque:
            target = target.mapping
        elif kind is not dict and kind is not StateDict:
            raise self.error(f"sets items of a {kind.__name__}")
        key = self.key
        for i in range(0, len(values), 2):
            target[key(values[i])] = values[i + 1]

    def build(self, target: Any, state: Any) -> None:
        """Give an object the state its ``__setstate__`` would have been given."""
        if type(target) is Ref:
            raise self.error("sets the state of a class")
        set_state = getattr(target, "set_state", None)
        if set_state is not None:
            set_state(state)


_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")


def _proto(m: Machine) -> None:
    version = m.byte()
    if not 2 <= version <= 5:
        raise m.error(f"has protocol {version}; PyTorch writes 2 to 5")


def _frame(m: Machine) -> None:
    size = m.unpack(_U64)
    if size > m.end - m.at:
        raise m.error("is cut off or too large")


def _mark(m: Machine) -> None:
    if len(m.marks) >= MAX_MARKS:
        raise m.error("opens too many groups at once")
    m.marks.append(m.stack)
    m.stack = []


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


def _pop_mark(m: Machine) -> None:
    m.pop_mark()


def _global(m: Machine) -> None:
    m.stack.append(m.ref(m.line(), m.line()))


def _stack_global(m: Machine) -> None:
    name = m.stack.pop()
    m.stack.append(m.ref(m.stack.pop(), name))


def _persistent(m: Machine) -> None:
    if m.persistent is None:
        raise m.error("refers to a tensor where none can be")
    m.charge(COST_OF_CALL)
    m.stack.append(m.persistent(m.stack.pop()))


def _reduce(m: Machine) -> None:
    args = m.stack.pop()
    m.stack[-1] = m.apply(m.stack[-1], args)


def _new_object_with_keywords(m: Machine) -> None:
    keywords = m.stack.pop()
    args = m.stack.pop()
    if type(keywords) is not dict or type(args) is not tuple:
        raise m.error("calls with arguments that are not a tuple and a dict")
    m.stack[-1] = m.apply(m.stack[-1], (*args, keywords) if keywords else args)


def _build(m: Machine) -> None:
    state = m.stack.pop()
    m.build(m.stack[-1], state)


def _put(m: Machine) -> None:
    m.memo[m.byte()] = m.stack[-1]


def _long_put(m: Machine) -> None:
    m.memo[m.unpack(_U32)] = m.stack[-1]


def _memoize(m: Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _get(m: Machine) -> None:
    m.stack.append(m.memo[m.byte()])


def _long_get(m: Machine) -> None:
    m.stack.append(m.memo[m.unpack(_U32)])


def _long(m: Machine, size: int) -> None:
    if size > MAX_INT_BYTES:
        raise m.error(f"has an integer of {size} bytes")
    m.stack.append(int.from_bytes(m.take(size), "little", signed=True))


def _tuple(count: int) -> Callable[[Machine], None]:
    def make(m: Machine) -> None:
        if len(m.stack) < count:
            raise m.error("takes a value that is not there")
        items = tuple(m.stack[-count:])
        del m.stack[-count:]
        m.stack.append(items)

    return make


def _mark_tuple(m: Machine) -> None:
    items = tuple(m.pop_mark())
    m.stack.append(items)


def _append(m: Machine) -> None:
    value = m.stack.pop()
    m.extend(m.stack[-1], [value])


def _appends(m: Machine) -> None:
    values = m.pop_mark()
    m.extend(m.stack[-1], values)


def _add_items(m: Machine) -> None:
    values = m.pop_mark()
    if type(m.stack[-1]) not in (set, Opaque):
        raise m.error("adds set items to something else")
    m.extend(m.stack[-1], values)


def _set_item(m: Machine) -> None:
    value = m.stack.pop()
    key = m.stack.pop()
    m.insert(m.stack[-1], [key, value])


def _set_items(m: Machine) -> None:
    values = m.pop_mark()
    m.insert(m.stack[-1], values)


def _empty_set(m: Machine) -> None:
    m.charge(COST_OF_SET)
    m.stack.append(set())


def _frozenset(m: Machine) -> None:
    m.charge(COST_OF_SET)
    values = m.pop_mark()
    m.stack.append(frozenset(map(m.key, values)))


_STOP = ord(".")

_HANDLERS: dict[int, Callable[[Machine], None]] = {
    0x80: _proto,
    0x95: _frame,
    ord("("): _mark,
    ord("0"): _pop,
    ord("1"): _pop_mark,
    ord("c"): _global,
    0x93: _stack_global,
    ord("Q"): _persistent,
    ord("R"): _reduce,
    0x81: _reduce,
    0x92: _new_object_with_keywords,
    ord("b"): _build,
    ord("q"): _put,
    ord("r"): _long_put,
    0x94: _memoize,
    ord("h"): _get,
    ord("j"): _long_get,
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("J"): lambda m: m.stack.append(m.unpack(_I32)),
    ord("K"): lambda m: m.stack.append(m.byte()),
    ord("M"): lambda m: m.stack.append(m.unpack(_U16)),
    0x8A: lambda m: _long(m, m.byte()),
    0x8B: lambda m: _long(m, m.unpack(_U32)),
    ord("G"): lambda m: m.stack.append(m.unpack(_F64)),
    0x8C: lambda m: m.stack.append(m.text(m.byte())),
    ord("X"): lambda m: m.stack.append(m.text(m.unpack(_U32))),
    0x8D: lambda m: m.stack.append(m.text(m.unpack(_U64))),
    ord("U"): lambda m: m.stack.append(m.old_text(m.byte())),
    ord("T"): lambda m: m.stack.append(m.old_text(m.unpack(_U32))),
    ord("C"): lambda m: m.stack.append(bytes(m.take(m.byte()))),
    ord("B"): lambda m: m.stack.append(bytes(m.take(m.unpack(_U32)))),
    0x8E: lambda m: m.stack.append(bytes(m.take(m.unpack(_U64)))),
    0x96: lambda m: m.stack.append(bytes(m.take(m.unpack(_U64)))),
    ord(")"): lambda m: m.stack.append(()),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("t"): _mark_tuple,
    ord("]"): lambda m: m.stack.append([]),
    ord("a"): _append,
    ord("e"): _appends,
    ord("}"): lambda m: m.stack.append({}),
    ord("s"): _set_item,
    ord("u"): _set_items,
    0x8F: _empty_set,
    0x90: _add_items,
    0x91: _frozenset,
}
