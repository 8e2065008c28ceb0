"""Programs: what a look found out, one ``jax.jit`` for it, and its bindings to cells."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from .._core import bind
from .._core.bind import LOCK, STATE, Cell, Exchange, Frame, is_tracer
from .._core.errors import ForeignTransformError, StaticWriteError, UnprovenError
from .._core.fingerprint import is_plain
from .._core.random import note_draws
from .arguments import is_data, is_leaf, run_swapped
from .proof import cell_form
from .reach import Reach

__all__ = ["KEPT", "Binding", "Look", "Program", "has_callbacks"]


class Look:
    """What a look found out, by the numbers of cells and not by the cells themselves."""

    def __init__(
        self,
        reach: Reach,
        touched: list[Cell],
        forms: dict[Cell, Any],
        frame: Frame,
        callbacks: bool,
    ) -> None:
        number = reach.cells
        self.callbacks = callbacks
        # A cell's array can be given up to the program if the new one has the same form.
        donated = [] if callbacks else [c for c in touched if c in forms and _fits(c, forms[c])]
        self.donated = tuple(number[c] for c in donated)
        self.kept = tuple(number[c] for c in touched if c not in set(donated))
        others = [c for c in touched if c in forms and c not in set(donated)]
        self.written = (*self.donated, *(number[c] for c in others))
        self.draws = tuple((number[c], n) for c, n in frame.draws.items() if c in number)
        self.loose = tuple(number[c] for c in touched if not c.is_fixed)

    def agrees(self, program: Program) -> bool:
        mine, other = self.__dict__, program.look.__dict__
        return mine == other


def _fits(cell: Cell, form: Any) -> bool:
    value = bind.raw_values([cell])[0]
    return isinstance(value, jax.Array) and form is not None and form == (value.shape, value.dtype)


class Program:
    """One ``jax.jit``. It names no cell: they are given to it with the values, for its traces."""

    def __init__(self, fn: Any, name: str, make: Any, look: Look) -> None:
        self.name, self.look = name, look
        self.served: list[list[weakref.ref[Cell]]] = []
        """All cells that were in reach in calls of this program: they need no look again."""
        self.current: tuple[Binding, list[Any]] | None = None
        self.template: Any = None
        """How results are put together that are not just arrays."""

        def traced(donated: list[Any], kept: list[Any], arrays: list[Any], lanes: Any = ()) -> Any:
            assert self.current is not None
            binding, roots = self.current
            kind = f"lamina.jit of {name}"
            with Frame(kind, compiled=True, lanes=tuple(lanes), foreign=False) as frame:
                frame.bind(binding.exchange.donated, donated)
                frame.bind(binding.exchange.kept, kept)
                try:
                    result = run_swapped(
                        make(fn, roots), binding.swap, fn, roots, arrays, binding.inputs
                    )
                except jax.errors.UnexpectedTracerError as error:
                    raise ForeignTransformError(KEPT.format(name=name)) from error
                if missed := [c for c in frame.written if c in binding.place and
                              binding.place[c] not in look.written]:  # fmt: skip
                    raise UnprovenError(_VARIES.format(box=missed[0].describe(), name=name))
                written = frame.collect(binding.exchange.written)
                given = [*donated, *kept, *jax.tree.leaves(arrays)]
                return apart(written, self._seal(result, binding), given)

        traced.__name__ = traced.__qualname__ = name
        self.compiled = jax.jit(traced, donate_argnums=0)
        self.inside = jax.jit(traced)

    def has_served(self, cells: Iterable[Cell]) -> bool:
        """Tell whether the program was called with these very cells."""
        self.served = [c for c in self.served if all(ref() is not None for ref in c)]
        mine = list(map(weakref.ref, cells))
        return any(len(c) == len(mine) and all(map(operator.is_, c, mine)) for c in self.served)

    def _seal(self, result: Any, binding: Binding) -> list[Any]:
        """Return the arrays of a result; keep how the rest is to be found for any binding."""
        leaves, treedef = jax.tree.flatten(result, is_leaf=is_leaf)
        marks: list[Any] = []
        for leaf in leaves:
            if is_data(leaf):
                marks.append(None)
            elif is_plain(leaf):
                marks.append(("plain", leaf))
            elif (place := binding.object_place(leaf)) is not None:
                marks.append(("object", place))
            else:
                raise StaticWriteError(_RESULT.format(name=self.name, kind=type(leaf).__name__))
        self.template = None if all(m is None for m in marks) else (treedef, marks)
        arrays = [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark is None]
        return result if self.template is None else arrays

    def open(self, result: Any, binding: Binding) -> Any:
        """Put a result together as it is for one binding."""
        if self.template is None:
            return result
        treedef, marks = self.template
        arrays = iter(result)
        leaves = [
            next(arrays)
            if mark is None
            else mark[1]
            if mark[0] == "plain"
            else binding.object_at(mark[1])
            for mark in marks
        ]
        return jax.tree.unflatten(treedef, leaves)


class Binding:
    """A program with the cells of one set of arguments, and the proof that they are still those."""

    def __init__(self, program: Program, reach: Reach, forget: Callable[[Binding], None]) -> None:
        look, cells = program.look, list(reach.cells)
        self.program = program
        self.key: Any = None
        self.place = {cell: number for number, cell in enumerate(cells)}
        self.exchange = Exchange(
            [cells[i] for i in look.donated],
            [cells[i] for i in look.kept],
            [cells[i] for i in look.written],
        )
        self.draws: list[tuple[Any, int]] = [(cells[i], n) for i, n in look.draws]
        self.loose = [cells[i] for i in look.loose]
        self._prove(reach, forget)
        self.cells = set(map(id, cells))
        if not program.has_served(cells):
            program.served.append(list(map(weakref.ref, cells)))

    def _prove(self, reach: Reach, forget: Callable[[Any], None]) -> None:
        """Take over the proof: the paths, the versions of modules, the forms of loose cells."""
        self.steps, self.swap, self.versions = reach.holds, reach.swap, reach.versions
        self.inputs = reach.inputs
        self.objects = [weakref.ref(thing) for thing in reach.objects.values()]
        self.numbers = {number: place for place, number in enumerate(reach.objects)}
        self.forms = list(map(cell_form, self.loose))
        self.dead: list[Any] = []
        me = weakref.ref(self)

        def release(_: Any) -> None:
            if (binding := me()) is not None:
                forget(binding)

        # Two references each: the first, which runs in C, makes the proof void whatever happens;
        # the second gives the cells free.
        self.references = [
            weakref.ref(thing, action)
            for thing in {id(t): t for t in reach.watched}.values()
            for action in (self.dead.append, release)
        ]
        reach.forget()

    def holds(self, fn: Any, roots: list[Any]) -> list[Any] | None:
        """Return the arrays in arguments' fields if all that the program depends on is as it was,
        else ``None``.
        """
        if self.dead:
            return None
        for reference, revision in self.versions:
            module = reference()
            if module is None or module._links.revision != revision:
                return None
        if self.loose and list(map(cell_form, self.loose)) != self.forms:
            return None
        return self.steps(fn, roots)

    def is_of(self, other: Binding) -> bool:
        """Tell whether it binds the same cells as another."""
        return self.cells == other.cells

    def object_place(self, leaf: Any) -> int | None:
        return self.numbers.get(id(leaf))

    def object_at(self, number: int) -> Any:
        return self.objects[number]()

    def run(self, arrays: list[Any], roots: list[Any]) -> Any:
        """Call the compiled program: values out of the cells, new values back into them."""
        program = self.program
        if program.look.callbacks:
            return self._run_with_callbacks(arrays, roots)
        with LOCK:
            program.current = (self, roots)
            try:
                result = self.exchange.run(program.compiled, arrays, program.name)
            finally:
                program.current = None
            if self.draws:
                note_draws(dict(self.draws))
        return result if program.template is None else program.open(result, self)

    def _run_with_callbacks(self, arrays: list[Any], roots: list[Any]) -> Any:
        """Run without the lock, and giving nothing up: callbacks may read any box meanwhile."""
        program, exchange = self.program, self.exchange
        with LOCK:
            program.current = (self, roots)
            kept = bind.raw_values(exchange.kept)
            try:
                program.compiled.lower([], kept, arrays).compile()
            finally:
                program.current = None
        written, result = program.compiled([], kept, arrays)
        jax.block_until_ready(written)
        with LOCK:
            taken = dict(zip(exchange.kept, kept, strict=True))
            bind.write_unless_changed(exchange.written, written, taken)
            note_draws(dict(self.draws))
        return program.open(result, self)

    def run_inside(self, arrays: list[Any], roots: list[Any]) -> Any:
        """Under grad, vmap and the like: values pass the gate, nothing is given up."""
        program, exchange = self.program, self.exchange
        donated = list(map(bind.read, exchange.donated))
        kept = list(map(bind.read, exchange.kept))
        lanes = [lane for frame in reversed(STATE.frames) for lane in frame.lanes]
        with LOCK:
            program.current = (self, roots)
            try:
                written, result = program.inside(donated, kept, arrays, lanes)
            finally:
                program.current = None
        bind.write_all(exchange.written, written)
        note_draws(dict(self.draws))
        return program.open(result, self)

    def lower(self, arrays: list[Any], roots: list[Any]) -> Any:
        program, exchange = self.program, self.exchange
        program.current = (self, roots)
        try:
            values = bind.raw_values(exchange.donated), bind.raw_values(exchange.kept)
            return program.compiled.lower(*values, arrays)
        finally:
            program.current = None


def apart(written: list[Any], result: Any, given: Iterable[Any]) -> tuple[list[Any], Any]:
    """Return a program's results with copies where an array would come out as it went in, or
    twice: what a cell takes is given away later, and must be nobody else's.
    """
    taken = {id(value) for value in given if value is not None}

    def own(value: Any) -> Any:
        if value is None:
            return None
        if id(value) in taken or not is_tracer(value):
            return jnp.copy(value)
        taken.add(id(value))
        return value

    return [own(value) for value in written], jax.tree.map(
        lambda leaf: jnp.copy(leaf) if id(leaf) in taken else leaf, result
    )


def has_callbacks(jaxpr: Any) -> bool:
    """Tell whether a program calls back into Python while it runs."""
    return any("callback" in name for name in _primitive_names(jaxpr))


def _primitive_names(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _primitive_names(inner)


_VARIES = """{box} is touched by {name} in this trace, and was not in the first: the function does \
not do the same each time.
    fix: pass what it depends on as an argument"""


KEPT = """{name} uses an array that was kept from a transform that has ended, and exists only \
there.
    fix: return the array from the transformed function, or keep it in a buffer"""


_RESULT = """{name} returns a {kind}, which is no array and was made inside: it would be the same \
object in every call, with arrays that exist only while tracing.
    fix: return arrays in tuples, lists or dicts; of a module its state_dict()"""
