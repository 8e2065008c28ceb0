"""``lamina.jit``: look, then build; prove, or look again.

look     run the function abstractly, with everything in reach bound: which cells does it read and
         write, and does it change anything else?
build    a program: one ``jax.jit`` of those cells, shared by all whose reach has the same shape
         and which touch the same places
bind     a program, the very cells of one set of arguments, and the proof that they are those
"""

from __future__ import annotations

import functools
import operator
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from .._core import bind
from .._core.bind import CLEAN, LOCK, STATE, Cell, Exchange, Frame, apart, trace_mark
from .._core.box import Box
from .._core.errors import ForeignTransformError, StaticWriteError, UnprovenError
from .._core.fingerprint import is_plain, value_key
from .._core.module import Module
from .._core.random import BIRTHS, DEFAULT
from .._core.trees import as_array, is_arraylike
from .reach import Reach, cell_form

__all__ = ["Jitted", "jit"]

_MOST_BINDINGS = 256


def jit(
    fn: Callable[..., Any] | None = None,
    *,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
) -> Any:
    """Compile a function; what it writes into modules is visible outside, as in PyTorch.

    Modules and optimizers may be arguments (also inside lists, dicts and plain objects) or
    closures. Values that the function writes are donated to the compiled program, so memory is
    reused; arrays that you got from ``p.data`` or ``state_dict()`` stay valid. Another shape,
    structure, flag or plain attribute compiles anew; another instance of the same structure does
    not. All that the function depends on is compared at every call, or refused.

    Args:
        fn: a function or a module. Left out, ``jit`` is a decorator with options.
        static_argnums: positions of arguments that are constants of the program. Strings and other
            arguments that can't be arrays are so by themselves.
        static_argnames: names of such keyword arguments.

    Returns:
        A function of the same signature.

    Raises:
        StaticWriteError: if ``fn`` changes a plain attribute, a list or the structure of a module.
        UnprovenError: if it depends on something that can't be compared at every call.
        DataDependentError: if Python control flow in a module depends on an array's value.

    Example:
        >>> import jax.numpy as jnp, lamina, optax
        >>> from lamina import nn
        >>> net = nn.LazyLinear(1)
        >>> opt = lamina.Optimizer(net, optax.sgd(0.1))
        >>> @lamina.jit
        ... def step(net, opt, x, y):
        ...     loss, grads = lamina.value_and_grad(lambda net: ((net(x) - y) ** 2).mean())(net)
        ...     opt.step(grads)
        ...     return loss
        >>> x, y = jnp.ones((4, 3)), jnp.ones((4, 1))
        >>> first, second = step(net, opt, x, y), step(net, opt, x, y)
        >>> bool(second < first)
        True
    """
    if fn is None:
        return functools.partial(
            jit, static_argnums=static_argnums, static_argnames=static_argnames
        )
    return Jitted(fn, static_argnums, static_argnames)


class Jitted:
    """A compiled function; made by :func:`jit`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        static_argnums: int | Iterable[int] = (),
        static_argnames: str | Iterable[str] = (),
    ) -> None:
        if not callable(fn):
            raise TypeError(f"lamina.jit: expected a function or a module, got {type(fn).__name__}")
        functools.update_wrapper(self, fn, updated=())
        self.fn = _Call(fn) if isinstance(fn, Module) else fn
        self._name = getattr(fn, "__name__", None) or type(fn).__name__
        numbers = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
        self._static_numbers = frozenset(numbers)
        self._static_names = frozenset(
            (static_argnames,) if isinstance(static_argnames, str) else static_argnames
        )
        self._has_static = bool(self._static_numbers or self._static_names)
        self._bindings: dict[Any, _Binding] = {}
        self._programs: dict[Any, list[_Program]] = {}

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key: list[Any] = []
        arrays: list[Any] = []
        roots: list[Any] = []
        if not kwargs and not self._has_static:
            for arg in args:  # most calls: only modules and arrays, no tree to flatten
                kind = _KINDS.get(type(arg))
                if kind == _NATIVE:
                    arrays.append(arg)
                    key += (arg.shape, arg.dtype)
                elif kind == _OWNER:
                    roots.append(arg)
                    key.append(id(arg))
                else:
                    break
            else:
                found = self._bindings.get(tuple(key))
                if found is not None and not STATE.frames and trace_mark() == CLEAN:
                    extra = found.holds(self.fn, roots)
                    if extra is not None:
                        return found.run([*arrays, *extra] if extra else arrays, roots)
        return self._slow(args, kwargs)

    def _slow(self, args: Any, kwargs: Any) -> Any:
        """Find or make the binding for a call that is not just like the last one."""
        if STATE.compiled is not None:
            return self.fn(*args, **kwargs)  # a part of the program that is being traced
        if not STATE.frames and bind.under_foreign():
            raise ForeignTransformError(_FOREIGN.format(name=self._name))
        call = _Arguments(args, kwargs, self._static_numbers, self._static_names)
        inside = bool(STATE.frames) or trace_mark() != CLEAN
        with LOCK:
            found = self._bindings.get(call.key)
            extra = None if found is None else found.holds(self.fn, call.roots)
            if found is None or extra is None:
                found = self._bind(call)
                self._keep(call.key, found)
                extra = found.steps(self.fn, call.roots)
            arrays = [*call.arrays, *map(as_array, extra)]
            if inside:
                return found.run_inside(arrays, call.roots)
        return found.run(arrays, call.roots)

    def _keep(self, key: Any, binding: _Binding) -> None:
        former = self._bindings.get(key)
        for old in [b for b in self._bindings.values() if b.dead or b is former]:
            self._forget(old)
        while len(self._bindings) >= _MOST_BINDINGS:
            self._forget(next(iter(self._bindings.values())))
        while len(self._programs) > _MOST_BINDINGS:
            self._programs.pop(next(iter(self._programs)))
        self._bindings[key] = binding
        binding.key = key

    def _bind(self, call: _Arguments) -> _Binding:
        reach = Reach(self.fn, call.roots, [DEFAULT.stream])
        program = self._known(call, reach)
        if program is None:
            reach, look = self._look(call, reach)
            program = self._program(call, reach, look)
        return _Binding(program, reach, self._forget)

    def _known(self, call: _Arguments, reach: Reach) -> _Program | None:
        """Return the program of a call with these very cells, if there was one."""
        for program in self._programs.get((call.shape, reach.shape), ()):
            if program.has_served(reach.cells):
                return program
        return None

    def _program(self, call: _Arguments, reach: Reach, look: _Look) -> _Program:
        programs = self._programs.setdefault((call.shape, reach.shape), [])
        for program in programs:
            if look.agrees(program):
                return program
        program = _Program(self.fn, self._name, call.make, look)
        programs.append(program)
        return program

    def _look(self, call: _Arguments, reach: Reach) -> tuple[Reach, _Look]:
        """Run the function abstractly; return what it reaches afterwards, and what it touched."""
        births = BIRTHS.mark()
        cells = list(reach.cells)
        frame = Frame(f"lamina.jit of {self._name}", compiled=True, abstract=True, look=True)
        forms: dict[Cell, Any] = {}
        extra = reach.holds(self.fn, call.roots) or []
        inputs, count = [*call.arrays, *map(as_array, extra)], len(extra)

        def look(values: list[Any], arrays: list[Any]) -> Any:
            with frame:
                frame.bind(cells, values)
                result = run_swapped(
                    call.make(self.fn, call.roots), reach.swap, self.fn, call.roots, arrays, count
                )
                pairs = zip(frame.written, frame.collect(), strict=True)
                forms.update((c, None if v is None else (v.shape, v.dtype)) for c, v in pairs)
                return [leaf for leaf in _leaves(result) if _is_data(leaf)]

        try:
            jaxpr = jax.make_jaxpr(look)(bind.raw_values(cells), inputs)
            if reach.holds(self.fn, call.roots) is None:
                raise StaticWriteError(_CHANGED.format(name=self._name))
        except BaseException as error:
            reach.undo()
            if isinstance(error, jax.errors.UnexpectedTracerError):
                raise ForeignTransformError(_KEPT.format(name=self._name)) from error
            raise
        finally:
            BIRTHS.resume(births)
        bind.refuse_kept()
        if frame.met or not reach.is_current():  # shapes were inferred, or state was made
            reach = Reach(self.fn, call.roots, [DEFAULT.stream])
        for cell in frame.met:
            if cell not in reach.cells:
                raise UnprovenError(_NO_PATH.format(box=cell.describe(), name=self._name))
        touched = [c for c in reach.cells if c in frame.read or c in frame.met or c in forms]
        for cell in touched:
            if cell.is_empty:
                bind.fill(cell)
        return reach, _Look(reach, touched, forms, frame, bind.has_callbacks(jaxpr.jaxpr))

    def _forget(self, binding: _Binding) -> None:
        if self._bindings.get(binding.key) is binding:
            del self._bindings[binding.key]

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Return the lowered program for these arguments (``jax.stages.Lowered``)."""
        call = _Arguments(args, kwargs, self._static_numbers, self._static_names)
        with LOCK:
            found = self._bind(call)
            self._keep(call.key, found)
            extra = found.steps(self.fn, call.roots)
            return found.lower([*call.arrays, *map(as_array, extra)], call.roots)

    def __repr__(self) -> str:
        return f"<lamina.jit of {self._name}>"


class _Call:
    """The call of a module, as a function."""

    def __init__(self, module: Module) -> None:
        self.__wrapped__ = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


_NATIVE, _OWNER, _ARRAY, _ROOT = range(1, 5)
_KINDS: dict[type, int] = {}


def _classify(leaf: Any) -> int:
    """Sort an argument: an array, or a module, an optimizer, an object or a constant."""
    kind = type(leaf)
    found = _KINDS.get(kind)
    if found is None:
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            found = _NATIVE
        elif _is_data(leaf):
            found = _ARRAY
        else:
            found = (
                _OWNER if isinstance(leaf, Module) or hasattr(kind, "__lamina_reach__") else _ROOT
            )
        _KINDS[kind] = found
    return found


def _is_leaf(value: Any) -> bool:
    return isinstance(value, (Box, _Static))


def _is_data(leaf: Any) -> bool:
    return is_arraylike(leaf) and not isinstance(leaf, Box)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_leaf)


class _Static:
    """An argument that is a constant of the program, whatever its type."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Arguments:
    """The arguments of one call, apart: arrays, and roots (modules, objects, constants).

    Attributes:
        key: what identifies the call except for the arrays' values.
        shape: the same without identities.
    """

    def __init__(self, args: Any, kwargs: Any, numbers: Any, names: Any) -> None:
        if numbers or names:
            args = tuple(_Static(a) if i in numbers else a for i, a in enumerate(args))
            kwargs = {k: _Static(v) if k in names else v for k, v in kwargs.items()}
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_leaf)
        kinds = tuple(map(_classify, leaves))
        is_array = [kind in (_NATIVE, _ARRAY) for kind in kinds]
        key: list[Any] = []
        shape: list[Any] = [treedef, tuple(is_array)]
        self.arrays: list[Any] = []
        self.roots: list[Any] = []
        for leaf, kind in zip(leaves, kinds, strict=True):
            if kind in (_NATIVE, _ARRAY):
                leaf = leaf if kind == _NATIVE else as_array(leaf)
                self.arrays.append(leaf)
                form = (leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else (type(leaf), None)
                key += form
                shape += form
            else:
                leaf = leaf.value if isinstance(leaf, _Static) else leaf
                self.roots.append(leaf)
                key.append(value_key(leaf) if is_plain(leaf) else id(leaf))
        plain_call = not kwargs and all(_KINDS.get(type(a)) in (_NATIVE, _OWNER) for a in args)
        if not plain_call:  # else the key is the one that Jitted.__call__ makes
            key.insert(0, treedef)
        self.key = tuple(key)
        self.shape = tuple(shape)

        def make(fn: Any, roots: list[Any]) -> Callable[[list[Any]], Any]:
            def run(arrays: list[Any]) -> Any:
                values, others = iter(arrays), iter(roots)
                full = [next(values) if use else next(others) for use in is_array]
                given = jax.tree.unflatten(treedef, full)
                result = fn(*given[0], **given[1])
                after, structure = jax.tree.flatten(given, is_leaf=_is_leaf)
                if structure != treedef or any(map(operator.is_not, after, full)):
                    raise StaticWriteError(_ARGUMENT)
                return result

            return run

        self.make = make


def run_swapped(
    run: Any, swap: Any, fn: Any, roots: list[Any], arrays: list[Any], count: int
) -> Any:
    """Run a function while the last ``count`` arrays lie in fields of its arguments."""
    if not count:
        return run(arrays)
    given = arrays[len(arrays) - count :]
    former = swap(fn, roots, given)
    try:
        result = run(arrays[: len(arrays) - count])
    finally:
        after = swap(fn, roots, former)
    if any(map(operator.is_not, after, given)):
        raise StaticWriteError(_ARGUMENT)
    return result


class _Look:
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

    def agrees(self, program: _Program) -> bool:
        mine, other = self.__dict__, program.look.__dict__
        return mine == other


def _fits(cell: Cell, form: Any) -> bool:
    value = bind.raw_values([cell])[0]
    return isinstance(value, jax.Array) and form is not None and form == (value.shape, value.dtype)


class _Program:
    """One ``jax.jit``. It names no cell: they are given to it with the values, for its traces."""

    def __init__(self, fn: Any, name: str, make: Any, look: _Look) -> None:
        self.name, self.look = name, look
        self.served: list[list[weakref.ref[Cell]]] = []
        """All cells that were in reach in calls of this program: they need no look again."""
        self.current: tuple[_Binding, list[Any]] | None = None
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
                    raise ForeignTransformError(_KEPT.format(name=name)) from error
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

    def _seal(self, result: Any, binding: _Binding) -> list[Any]:
        """Return the arrays of a result; keep how the rest is to be found for any binding."""
        leaves, treedef = jax.tree.flatten(result, is_leaf=_is_leaf)
        marks: list[Any] = []
        for leaf in leaves:
            if _is_data(leaf):
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

    def open(self, result: Any, binding: _Binding) -> Any:
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


class _Binding:
    """A program with the cells of one set of arguments, and the proof that they are still those."""

    def __init__(
        self, program: _Program, reach: Reach, forget: Callable[[_Binding], None]
    ) -> None:
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
                bind.note_draws(dict(self.draws))
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
            bind.write_unless_changed(exchange.written, written, dict(zip(exchange.kept, kept)))
            bind.note_draws(dict(self.draws))
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
        bind.note_draws(dict(self.draws))
        return program.open(result, self)

    def lower(self, arrays: list[Any], roots: list[Any]) -> Any:
        program, exchange = self.program, self.exchange
        program.current = (self, roots)
        try:
            values = bind.raw_values(exchange.donated), bind.raw_values(exchange.kept)
            return program.compiled.lower(*values, arrays)
        finally:
            program.current = None


_FOREIGN = """{name}, a function compiled by lamina.jit, is called under a plain JAX transform \
that records a program: its parameters would be frozen into it, and what it writes would be lost.
    wrong:  jax.jit(step), jax.lax.scan(step, ...), jax.eval_shape(step, ...)
    right:  lamina.scan(step, ...), or call it outside
    fix: use lamina's transform of that name, or lamina.functional_call(net, params, x) in it"""

_CHANGED = """{name} changes a list, a dict, a field or a global that outlives the call: compiled, \
it would happen once, while tracing, with arrays that exist only then. It was put back.
    fix: return the value, keep it in a buffer (self.seen = nn.Buffer(...)), or change it outside"""

_NO_PATH = """{box} is reached by {name} on a way that can't be walked again at every call \
(through an object that is not a module, a plain object, a function, a list or a dict).
    fix: pass it as an argument of the compiled function"""

_VARIES = """{box} is touched by {name} in this trace, and was not in the first: the function does \
not do the same each time.
    fix: pass what it depends on as an argument"""

_ARGUMENT = """a list, dict or field of an argument is changed inside a compiled function, which \
works on a copy of it: the change would be lost.
    fix: return the new list, dict or value"""

_KEPT = """{name} uses an array that was kept from a transform that has ended, and exists only \
there.
    fix: return the array from the transformed function, or keep it in a buffer"""

_RESULT = """{name} returns a {kind}, which is no array and was made inside: it would be the same \
object in every call, with arrays that exist only while tracing.
    fix: return arrays in tuples, lists or dicts; of a module its state_dict()"""
