"""``lamina.jit``: look, then build; prove, or look again.

look     run the function abstractly, with everything in reach bound: which cells does it read and
         write, and does it change anything else?
build    a program: one ``jax.jit`` of those cells, shared by all whose reach has the same shape
         and which touch the same places
bind     a program, the very cells of one set of arguments, and the proof that they are those
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax

from .._core import bind
from .._core.bind import CLEAN, LOCK, STATE, Cell, Frame, trace_mark
from .._core.errors import ForeignTransformError, StaticWriteError, UnprovenError
from .._core.hooks import refuse_kept
from .._core.module import Module
from .._core.random import BIRTHS, DEFAULT
from .._core.trees import as_array
from .arguments import HOST, KINDS, NATIVE, OWNER, Arguments, is_data, leaves_of, run_swapped
from .program import KEPT, Binding, Look, Program, has_callbacks
from .reach import Reach

__all__ = ["Jitted", "jit"]

_MOST_BINDINGS, _MOST_STATES = 256, 4
"""How many sets of arguments, and how many states of the same objects, are kept ready."""


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
        self._bindings: dict[Any, tuple[Binding, ...]] = {}
        self._programs: dict[Any, list[Program]] = {}

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key: list[Any] = []
        arrays: list[Any] = []
        roots: list[Any] = []
        if not kwargs and not self._has_static:
            for arg in args:  # most calls: only modules and arrays, no tree to flatten
                kind = KINDS.get(type(arg))
                if kind == NATIVE:
                    arrays.append(arg)
                    key.append(arg.aval)  # the same object for all arrays of a form
                elif kind == OWNER:
                    roots.append(arg)
                    key.append(id(arg))
                elif kind == HOST:
                    arrays.append(arg)
                    key.append((arg.shape, arg.dtype))
                else:
                    break
            else:
                if not STATE.frames and trace_mark() == CLEAN:
                    for found in self._bindings.get(tuple(key), ()):
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
        call = Arguments(args, kwargs, self._static_numbers, self._static_names)
        inside = bool(STATE.frames) or trace_mark() != CLEAN
        with LOCK:
            for found in self._bindings.get(call.key, ()):
                extra = found.holds(self.fn, call.roots)
                if extra is not None:
                    break
            else:
                found = self._bind(call)
                self._keep(call.key, found)
                extra = found.steps(self.fn, call.roots)
            arrays = [*call.arrays, *map(as_array, extra)]
            if inside:
                return found.run_inside(arrays, call.roots)
        return found.run(arrays, call.roots)

    def _keep(self, key: Any, binding: Binding) -> None:
        for old in [b for found in self._bindings.values() for b in found if b.dead]:
            self._forget(old)
        while len(self._bindings) >= _MOST_BINDINGS:
            self._bindings.pop(next(iter(self._bindings)))
        while len(self._programs) > _MOST_BINDINGS:
            self._programs.pop(next(iter(self._programs)))
        others = self._bindings.get(key, ())
        # The newest first. Those that bind other cells, as after a load or a new layer, are gone.
        same = [old for old in others if old.is_of(binding)]
        self._bindings[key] = (binding, *same[: _MOST_STATES - 1])
        binding.key = key

    def _bind(self, call: Arguments) -> Binding:
        reach = Reach(self.fn, call.roots, [DEFAULT.stream])
        program = self._known(call, reach)
        if program is None:
            reach, look = self._look(call, reach)
            program = self._program(call, reach, look)
        return Binding(program, reach, self._forget)

    def _known(self, call: Arguments, reach: Reach) -> Program | None:
        """Return the program of a call with these very cells, if there was one."""
        for program in self._programs.get((call.shape, reach.shape), ()):
            if program.has_served(reach.cells):
                return program
        return None

    def _program(self, call: Arguments, reach: Reach, look: Look) -> Program:
        programs = self._programs.setdefault((call.shape, reach.shape), [])
        for program in programs:
            if look.agrees(program):
                return program
        program = Program(self.fn, self._name, call.make, look)
        programs.append(program)
        return program

    def _look(self, call: Arguments, reach: Reach) -> tuple[Reach, Look]:
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
                return [leaf for leaf in leaves_of(result) if is_data(leaf)]

        try:
            jaxpr = jax.make_jaxpr(look)(bind.raw_values(cells), inputs)
            if reach.holds(self.fn, call.roots) is None:
                raise StaticWriteError(_CHANGED.format(name=self._name))
        except BaseException as error:
            reach.undo()
            if isinstance(error, jax.errors.UnexpectedTracerError):
                raise ForeignTransformError(KEPT.format(name=self._name)) from error
            raise
        finally:
            BIRTHS.resume(births)
        refuse_kept()
        if frame.met or not reach.is_current():  # shapes were inferred, or state was made
            reach = Reach(self.fn, call.roots, [DEFAULT.stream])
        for cell in frame.met:
            if cell not in reach.cells:
                raise UnprovenError(_NO_PATH.format(box=cell.describe(), name=self._name))
        touched = [c for c in reach.cells if c in frame.read or c in frame.met or c in forms]
        for cell in touched:
            if cell.is_empty:
                bind.fill(cell)
        return reach, Look(reach, touched, forms, frame, has_callbacks(jaxpr.jaxpr))

    def _forget(self, binding: Binding) -> None:
        others = [b for b in self._bindings.get(binding.key, ()) if b is not binding]
        if others:
            self._bindings[binding.key] = tuple(others)
        else:
            self._bindings.pop(binding.key, None)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Return the lowered program for these arguments (``jax.stages.Lowered``)."""
        call = Arguments(args, kwargs, self._static_numbers, self._static_names)
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
