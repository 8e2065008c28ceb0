"""``lamina.jit``: compile a function that reads and writes modules in place."""

from __future__ import annotations

import functools
import operator
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core import bind
from .._core.bind import LOCK, STATE, VERSION, Frame, Retry
from .._core.errors import ForeignTransformError, LaminaError
from .._core.module import Module
from .._core.parameter import Box, Parameter
from .._core.walk import describe, identify, root_of, static_value

__all__ = ["Jitted", "jit"]

_MOST_TRACES = 20
_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def jit(
    fn: Callable[..., Any] | None = None,
    *,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
) -> Any:
    """Compile a function; what it writes into modules is visible outside, as in PyTorch.

    Modules and optimizers may be arguments (also inside lists and dicts) or closures. Values that
    the function writes are donated to the compiled program, so memory is reused; arrays that you
    got from ``p.data`` or ``state_dict()`` stay valid. Another shape, structure, flag or plain
    attribute compiles anew; another instance of the same structure does not.

    Args:
        fn: a function or a module. Left out, ``jit`` is a decorator with options.
        static_argnums: positions of arguments that are constants of the program. Strings and other
            arguments that can't be arrays are so by themselves.
        static_argnames: names of such keyword arguments.

    Returns:
        A function of the same signature.

    Raises:
        StaticWriteError: if ``fn`` changes a plain attribute or the structure of a module.
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
        self._module = fn if hasattr(fn, "_state_boxes") else None
        self._fn = _call_module if self._module is not None else fn
        shift = 0 if self._module is None else 1
        numbers = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
        self._static_numbers = frozenset(number + shift for number in numbers)
        self._static_names = frozenset(
            (static_argnames,) if isinstance(static_argnames, str) else static_argnames
        )
        self._has_static = bool(self._static_numbers or self._static_names)
        self._bindings: dict[Any, _Binding] = {}
        self._programs: dict[Any, list[_Program]] = {}

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._module is not None:
            args = (self._module, *args)
        if self._has_static:
            args, kwargs = self._mark_static(args, kwargs)
        place, arrays = self._place(args, kwargs)
        binding = self._bindings.get(place)
        learnt = None
        if (
            binding is not None
            and binding.version == VERSION.static
            and not STATE.frames
            and binding.is_unchanged()
        ):
            try:
                return binding.run(arrays)
            except Retry:
                learnt = binding.learnt
        leaves, treedef = jax.tree.flatten((args, kwargs))
        return self._call(place, leaves, treedef, _caller(arrays), learnt or _Learnt())

    def _place(self, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """Return what identifies a call except for its arrays, and the arrays."""
        arrays: list[Any] = []
        key: list[Any] = []
        if not kwargs:
            for arg in args:  # most calls: only modules and arrays, no tree to flatten
                kind = _KINDS.get(type(arg))
                if kind == _ARRAY:
                    arrays.append(arg)
                    key.append(None)
                elif kind == _OWNER:
                    key.append(id(arg))
                else:
                    break
            else:
                return tuple(key), arrays
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays, key = [], [treedef]
        for leaf in leaves:
            kind = _classify(leaf)
            if kind == _ARRAY:
                arrays.append(leaf)
                key.append(None)
            else:
                key.append(id(leaf) if kind == _OWNER else static_value(leaf))
        return tuple(key), arrays

    def _call(
        self,
        place: Any,
        leaves: list[Any],
        treedef: Any,
        use: Callable[[_Binding], Any],
        learnt: _Learnt,
    ) -> Any:
        """Run ``use`` on a binding, tracing again while the trace knows too little."""
        for _ in range(_MOST_TRACES):
            binding = self._bind(place, leaves, treedef, learnt)
            try:
                result = use(binding)
            except Retry:
                learnt = binding.learnt
                continue
            if not STATE.frames:
                self._keep(place, binding)
            return result
        raise LaminaError(
            f"{self._name()}: the function touches other parameters each time it is traced "
            f"({_MOST_TRACES} times); build its modules outside of it"
        )

    def _mark_static(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return (
            tuple(_Static(a) if i in self._static_numbers else a for i, a in enumerate(args)),
            {k: _Static(v) if k in self._static_names else v for k, v in kwargs.items()},
        )

    def _keep(self, place: Any, binding: _Binding) -> None:
        self._bindings[place] = binding
        for module in binding.program.closures:
            binding.mutable += module._state_fingerprint()[1]
        for owner in binding.owners:
            binding.watch.append(weakref.ref(owner, lambda _: self._bindings.pop(place, None)))
        binding.owners = []

    def _bind(self, place: Any, leaves: list[Any], treedef: Any, learnt: _Learnt) -> _Binding:
        owners, statics = [], []
        for leaf in leaves:
            kind = _classify(leaf)
            if kind == _OWNER:
                owners.append(leaf)
            elif kind == _STATIC:
                statics.append(static_value(leaf))
        shape = tuple(map(_classify, leaves))
        binding = _Binding(leaves, treedef, shape, owners)
        key = (treedef, shape, tuple(statics), binding.fingerprint)
        programs = self._programs.setdefault(key, [])
        program = next((p for p in programs if p.is_current() and p.fits(binding)), None)
        if program is None:
            program = _Program(self._fn, self._name())
            program.kept = [ref for ref in binding.refs.values() if not ref[2]]
            programs.append(program)
        program.learn(binding, learnt)
        binding.use(program)
        return binding

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Return the lowered program for these arguments (``jax.stages.Lowered``)."""
        if self._module is not None:
            args = (self._module, *args)
        args, kwargs = self._mark_static(args, kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if _classify(leaf) == _ARRAY]
        return self._call(None, leaves, treedef, lambda found: found.lower(arrays), _Learnt())

    def _name(self) -> str:
        return getattr(self, "__name__", None) or type(self._module or self._fn).__name__

    def __repr__(self) -> str:
        return f"<lamina.jit of {self._name()}>"


Module._compiler = staticmethod(jit)


class _Learnt:
    """What a trace found out: boxes it wrote, boxes it read that were not bound, and which of
    these it read inside a JAX transform nested in it.
    """

    def __init__(
        self, written: Iterable[Box] = (), read: Iterable[Box] = (), foreign: Iterable[Box] = ()
    ) -> None:
        self.written = list(written)
        self.read = list(read)
        self.foreign = list(foreign)


class _Program:
    """One compiled program: which boxes go in, which of them come out, by reference.

    A reference is ``(owner index, box index, is gradient)`` for what arguments own, so that the
    program serves every instance of their structure, and the box itself for closures.
    """

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        self.fn = fn
        self.name = name
        self.donated: list[Any] = []
        self.kept: list[Any] = []
        self.closures: dict[Any, Any] = {}
        self.guards: list[tuple[Any, Any]] = []
        self.overlaps: list[tuple[Any, Any]] = []
        self.is_traced = False
        self.unsure: list[Box] = []
        """Boxes read inside a nested JAX transform, which must be read there again when bound."""
        self.has_static = False
        self.current: _Binding | None = None
        traced = functools.partial(self._trace)
        functools.update_wrapper(traced, self._trace)
        traced.__name__ = traced.__qualname__ = name  # type: ignore[attr-defined]
        self.compiled = jax.jit(traced, donate_argnums=0)
        self.nested = jax.jit(traced)

    def is_current(self) -> bool:
        """Whether the closures are as they were when the program was traced."""
        return self.names_stand() and all(
            _state_of(module) == before for module, before in self.closures.items()
        )

    def names_stand(self) -> bool:
        """Whether the outer names that meant modules mean the same ones still."""
        return all(_owners_in(look_up()) == before for look_up, before in self.guards)

    def fits(self, binding: _Binding) -> bool:
        """Whether what the outer names mean is found among the arguments at the same places."""
        return all(binding.places(before) == where for (_, before), where in self.overlaps)

    def learn(self, binding: _Binding, learnt: _Learnt) -> None:
        self.unsure += [box for box in learnt.foreign if box not in set(self.unsure)]
        known = {_ref_key(ref) for ref in self.donated}
        for box in learnt.written:
            ref = binding.refs.get(box, box)
            if _ref_key(ref) not in known:
                known.add(_ref_key(ref))
                self.donated.append(ref)
        self.kept = [ref for ref in self.kept if _ref_key(ref) not in known]
        known.update(_ref_key(ref) for ref in self.kept)
        for box in learnt.read:
            ref = binding.refs.get(box, box)
            if _ref_key(ref) not in known:
                known.add(_ref_key(ref))
                self.kept.append(ref)

    def _trace(self, donated: list[Any], kept: list[Any], arrays: list[Any]) -> Any:
        binding = self.current
        assert binding is not None
        with Frame(f"lamina.jit of {self.name}", captures=True, compiled=True) as frame:
            frame.bind(binding.donated, donated)
            frame.bind(binding.kept, kept)
            for box in self.unsure:
                frame.bind([box], [box._value], watch=True)
            args, kwargs = binding.arguments(arrays)
            result = self.fn(*args, **kwargs)
            known = set(binding.donated)
            written = [box for box in frame.written if box not in known]
            known.update(binding.kept)
            read = [box for box in frame.captured if box not in known]
            if written or read or frame.stale:
                binding.learnt = _Learnt(written, read, frame.foreign)
                raise Retry
            for box in self.unsure:
                if box not in frame.captured:
                    raise ForeignTransformError(_KEPT_BY_JAX.format(box=describe(box)))
            self.unsure = []
            self.is_traced = True
            self._note_closures(binding, frame)
            result = jax.tree.map(functools.partial(self._seal, binding), result)
            return [box._value for box in binding.donated], result

    def _note_closures(self, binding: _Binding, frame: Frame) -> None:
        self.guards = [
            (look_up, owners)
            for look_up in _outer_names(self.fn)
            if (owners := _owners_in(look_up()))
        ]
        self.overlaps = [(guard, binding.places(guard[1])) for guard in self.guards]
        inside = {part for owner in binding.live() for part in _parts(owner)}
        roots = {root_of(module): None for module in frame.modules if module not in inside}
        for box in (*binding.donated, *binding.kept):
            if box not in binding.refs and (root := identify(box)[0]) is not None:
                roots[root] = None
        for root in roots:
            if root.__dict__["_born"] != frame.serial:
                self.closures[root] = _state_of(root)

    def _seal(self, binding: _Binding, leaf: Any) -> Any:
        if _classify(leaf) == _ARRAY:
            return leaf
        self.has_static = True
        for place, owner in enumerate(binding.live()):
            if leaf is owner:
                return _Static(_Argument(place, ""))
            for name, module in owner.named_modules() if isinstance(owner, Module) else ():
                if leaf is module:
                    return _Static(_Argument(place, name))
        return _Static(leaf)


class _Binding:
    """A program together with the very boxes of one set of arguments."""

    def __init__(
        self, leaves: list[Any], treedef: Any, shape: tuple[int, ...], owners: list[Any]
    ) -> None:
        self.template = [
            None if k == _ARRAY else leaf for k, leaf in zip(shape, leaves, strict=True)
        ]
        self.treedef = treedef
        self.shape = shape
        self.owners = owners
        self.watch: list[Any] = []
        self.learnt = _Learnt()
        self.version = VERSION.static
        self.seen_exposed = -1
        self.refs: dict[Box, Any] = {}
        prints, shared = [], []
        self.mutable: list[tuple[Any, Any]] = []
        for place, owner in enumerate(owners):
            mark, mutable = owner._state_fingerprint()
            prints.append(mark)
            self.mutable += mutable
            for index, box in enumerate(owner._state_boxes()):
                first = self.refs.setdefault(box, (place, index, False))
                if first[0] != place:
                    shared.append((place, index, first))
                if isinstance(box, Parameter) and box._grad is not None:
                    self.refs.setdefault(box._grad, (place, index, True))
        self.fingerprint = (tuple(prints), tuple(shared))
        # The template must not keep the owners alive once the binding is cached.
        self.owner_refs = [weakref.ref(owner) for owner in owners]
        self.template = [
            None if k == _OWNER else leaf for k, leaf in zip(shape, self.template, strict=True)
        ]

    def use(self, program: _Program) -> None:
        self.program = program
        boxes = [owner._state_boxes() for owner in self.owners]

        def resolve(ref: Any) -> Box:
            if isinstance(ref, Box):
                return ref
            box = boxes[ref[0]][ref[1]]
            return box._grad_box() if ref[2] else box

        self.donated = [resolve(ref) for ref in program.donated]
        self.kept = [resolve(ref) for ref in program.kept]

    def places(self, owners: list[Any]) -> list[Any]:
        """Return where the boxes of some modules are found among the arguments."""
        return [self.refs.get(box) for owner in owners for box in owner._state_boxes()]

    def open(self, result: Any) -> Any:
        """Put back what is no array into a result, as it is for these arguments."""
        if not self.program.has_static:
            return result

        def open_leaf(leaf: Any) -> Any:
            if type(leaf) is not _Static:
                return leaf
            if isinstance(leaf.value, _Argument):
                owner: Any = self.owner_refs[leaf.value.place]()
                return owner.get_submodule(leaf.value.name) if leaf.value.name else owner
            return leaf.value

        return jax.tree.map(open_leaf, result, is_leaf=lambda leaf: type(leaf) is _Static)

    def live(self) -> list[Any]:
        return [owner for ref in self.owner_refs if (owner := ref()) is not None]

    def is_unchanged(self) -> bool:
        if not self.mutable and not self.program.guards:
            return True
        return self.program.names_stand() and all(
            static_value(container) == mark for container, mark in self.mutable
        )

    def arguments(self, arrays: list[Any]) -> tuple[Any, Any]:
        values, owners = iter(arrays), iter(self.owner_refs)
        leaves = [
            next(values) if kind == _ARRAY else next(owners)() if kind == _OWNER else leaf
            for kind, leaf in zip(self.shape, self.template, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(self.treedef, leaves)
        return (
            tuple(a.value if type(a) is _Static else a for a in args),
            {k: v.value if type(v) is _Static else v for k, v in kwargs.items()},
        )

    def run(self, arrays: list[Any]) -> Any:
        """Call the compiled program: values out of the boxes, new values back into them."""
        program = self.program
        with LOCK:
            program.current = self
            kept = list(map(_VALUE, self.kept))
            if not self.donated:
                try:
                    return self.open(program.compiled([], kept, arrays)[1])
                finally:
                    program.current = None
            donated = list(map(_VALUE, self.donated))
            copied = self._protect(donated) if self.seen_exposed != VERSION.exposed else ()
            results: list[Any] = []
            try:
                # Called through map, so that an interrupt that arrives during the call can't come
                # between the return and the assignment, when the donated values are gone already.
                results.extend(map(program.compiled, (donated,), (kept,), (arrays,)))
            except Exception as error:
                if any(v is not None and v.is_deleted() for v in donated):
                    error.add_note(_LOST.format(name=program.name))
                raise
            finally:
                program.current = None
                if results:
                    for box, value in zip(self.donated, results[0][0], strict=True):
                        box._value = value
                    for box in copied:
                        box._exposed = None  # not to keep the user's array alive
        return self.open(results[0][1])

    def _protect(self, donated: list[Any]) -> list[Box]:
        """Replace values that the user holds by copies: donation must not delete those."""
        copied = []
        for index, box in enumerate(self.donated):
            value = donated[index]
            if value is not None and box._exposed is value:
                donated[index] = jnp.copy(value)
                copied.append(box)
        self.seen_exposed = VERSION.exposed
        return copied

    def call(self, arrays: list[Any]) -> Any:
        """Call with all checks: the first time, or inside another transform."""
        program = self.program
        if not STATE.frames:
            for box in (*self.donated, *self.kept) if program.is_traced else ():
                if box._value is None and not box._is_free and not box._awaits_shapes:
                    box._fill()
            return self.run(arrays)
        for module in program.closures:
            bind.note_module(module)
        donated = [_inner_value(box) for box in self.donated]
        kept = [_inner_value(box) for box in self.kept]
        with LOCK:
            program.current = self
            try:
                written, result = program.nested(donated, kept, arrays)
            finally:
                program.current = None
        for module in program.closures:
            bind.note_module(module)
        for box, value in zip(self.donated, written, strict=True):
            bind.store(box, value)
        return self.open(result)

    def lower(self, arrays: list[Any]) -> Any:
        donated = [box._value for box in self.donated]
        kept = [box._value for box in self.kept]
        with LOCK:
            self.program.current = self
            return self.program.compiled.lower(donated, kept, arrays)


def _inner_value(box: Box) -> Any:
    """Read a box that may still be without a value through the enclosing frames."""
    if box._value is None and (box._awaits_shapes or box._is_free):
        bind.note_read(box)
        return None
    return box._read()


def _owners_in(value: Any, depth: int = 2) -> list[Any]:
    """Return the modules and optimizers that a value is, or holds in lists, tuples and dicts."""
    if hasattr(value, "_state_boxes"):
        return [value]
    if depth and isinstance(value, (list, tuple)):
        return [owner for item in value for owner in _owners_in(item, depth - 1)]
    if depth and isinstance(value, dict) and len(value) < 1000:
        return [owner for item in value.values() for owner in _owners_in(item, depth - 1)]
    return []


def _state_of(module: Module) -> tuple[Any, list[int]]:
    return module._state_fingerprint()[0], [id(box) for box in module._state_boxes()]


def _parts(owner: Any) -> list[Any]:
    net = getattr(owner, "net", owner)
    return [module for _, module in net._walk_modules()]


def _outer_names(fn: Any) -> Iterator[Callable[[], Any]]:
    """Yield a look-up for each closure cell and each global name that a function may use."""
    code, names = getattr(fn, "__code__", None), getattr(fn, "__globals__", {})
    if code is None:
        return
    for cell in fn.__closure__ or ():
        yield functools.partial(_cell_contents, cell)
    seen, codes = set(), [code]
    while codes:
        code = codes.pop()
        seen.update(code.co_names)
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    for name in seen & names.keys():
        yield functools.partial(names.get, name)


def _cell_contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # deleted in the meantime
        return None


def _call_module(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


class _Static:
    """A value that is part of the program, not of its data."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and static_value(self.value) == static_value(other.value)

    def __hash__(self) -> int:
        return hash(static_value(self.value))


jax.tree_util.register_pytree_node(_Static, lambda box: ((), box), lambda box, _: box)


def _caller(arrays: list[Any]) -> Callable[[_Binding], Any]:
    return lambda binding: binding.call(arrays)


class _Argument:
    """Stands in a result for a module that came in as, or within, an argument."""

    def __init__(self, place: int, name: str) -> None:
        self.place, self.name = place, name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Argument) and (self.place, self.name) == (other.place, other.name)

    def __hash__(self) -> int:
        return hash((self.place, self.name))


_VALUE = operator.attrgetter("_value")
_ARRAY, _OWNER, _STATIC = 1, 2, 3
_KINDS: dict[type, int] = {}


def _classify(leaf: Any) -> int:
    kind = _KINDS.get(type(leaf))
    if kind is None:
        if isinstance(leaf, _ARRAYS) or hasattr(leaf, "__jax_array__"):
            kind = _ARRAY
        else:
            kind = _OWNER if hasattr(leaf, "_state_boxes") else _STATIC
        _KINDS[type(leaf)] = kind
    return kind


def _ref_key(ref: Any) -> Any:
    return id(ref) if isinstance(ref, Box) else ref


_KEPT_BY_JAX = """{box} is read by a function that JAX has kept from an earlier trace (a jax.jit, \
jax.checkpoint or jax.lax loop over a function that lives on), with an old value in it.
    wrong:  inner = jax.jit(lambda x: net(x))           called inside lamina.jit
    right:  inner = lamina.jit(lambda x: net(x))
    or:     make the function where it is used:  jax.lax.scan(lambda h, x: net(h), ...)"""

_LOST = """{name} failed while it was running, after its inputs were given up to it: the \
parameters it was to update are lost. Load them again, for instance from the last checkpoint."""
