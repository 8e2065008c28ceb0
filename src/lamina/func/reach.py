"""What a function can reach, on paths that can be walked again at every call.

From the function and the objects among its arguments ``Reach`` follows closures, globals, defaults,
partials, methods, fields, items, and the Python functions and classes found there. Where a function
mentions no name, its fields are not looked at: a counter beside the model changes nothing. The
result serves four purposes:

proof    ``holds``: each path still leads to what it led to, so the program is still the one
inputs   what ``holds`` returns: arrays in fields and items of arguments, which vary freely
writes   it holds before a trace, but not after it: the function changed a list, a dict or a field
sharing  ``shape``: the same without identities, so that another instance may use the program
"""

from __future__ import annotations

import argparse
import collections
import contextvars
import functools
import gc
import queue
import random
import sys
import threading
import types
import weakref
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from .._core.bind import Cell
from .._core.box import Box, is_array
from .._core.errors import UnprovenError
from .._core.fingerprint import Same, is_plain, plain_attributes, value_key
from .._core.module import Module
from .._core.parameter import Parameter
from .._core.walk import own_boxes, revision_of, walk
from .code import (
    BUILTINS,
    LIBRARY,
    READS_ALL,
    READS_NAMES,
    globals_in,
    imports_in,
    is_library,
    is_library_thing,
    names_in,
    slots_of,
    unwrapped,
)
from .proof import EMPTY, Proof, any_array_key, array_form, cell_form, contents

__all__ = ["Reach"]


_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_RANDOM = (np.random.Generator, np.random.RandomState, random.Random)
_MAPPINGS = (dict, types.MappingProxyType)
_CONTAINERS = (*_MAPPINGS, list, tuple, set, frozenset, bytearray, collections.deque)
_MOST_BYTES = 4096


class Reach:
    """Everything that ``fn``, called with ``roots`` among its arguments, may depend on.

    Attributes:
        cells: every cell in reach, numbered in the order of discovery.
        objects: modules, boxes and objects in reach by ``id``, for results that name them.
        shape: what the function depends on besides arrays and identities; hashable.
        holds: ``(fn, roots)`` to the arrays found on the way, ``None`` if the proof fails.
        swap: ``(fn, roots, arrays)`` puts other arrays in their places, and returns them.
        watched: objects whose end makes the proof void.
    """

    def __init__(self, fn: Any, roots: list[Any], always: Iterable[Cell] = ()) -> None:
        self._always = list(always)
        self._names: frozenset[str] = frozenset()
        mentioned: set[str] = set()
        while True:
            self._begin()
            self._mentioned = mentioned
            for at, value in enumerate([fn, *roots]):
                self._visit(value, at)
            if mentioned <= self._names:
                break
            self._names = frozenset(mentioned)  # code found late may mention fields seen early
        self.holds, self.swap = self.proof.compile(len(roots))
        self.shape = tuple(self._shape)

    @property
    def inputs(self) -> int:
        """How many arrays ``holds`` returns."""
        return len(self.proof.inputs)

    def _begin(self) -> None:
        self.cells: dict[Cell, int] = {c: i for i, c in enumerate(self._always)}
        self.objects: dict[int, Any] = {}
        self.watched: list[Any] = []
        self.versions: list[tuple[Any, int]] = []
        self._shape: list[Any] = []
        self.proof = Proof()
        self._seen: dict[int, int] = {}
        self._classes: set[Any] = set()
        self._owners = 0
        self._alive: list[Any] = []
        self._undo: list[tuple[Any, Any, Any]] = []
        self._of_argument = False

    def is_current(self) -> bool:
        """Tell whether all modules are as they were when they were looked at."""
        return all(revision_of(ref()) == revision for ref, revision in self.versions)

    def forget(self) -> None:
        """Keep what proves, drop what keeps alive."""
        self._alive, self._undo = [], []
        self.objects, self.watched, self._seen = {}, [], {}

    def undo(self) -> None:
        """Put back what a trace changed in lists, dicts, fields, globals and closures."""
        for container, kind, content in self._undo:
            if kind == "items":
                container.clear()
                (container.update if isinstance(container, (dict, set)) else container.extend)(
                    content
                )
            elif kind == "cell":
                container.cell_contents = content
            elif kind == "array":
                container[...] = content
            elif kind == "class":
                for name in self._names & (vars(container).keys() | content.keys()):
                    if name not in content:
                        delattr(container, name)
                    elif vars(container).get(name, self) is not content[name]:
                        setattr(container, name, content[name])
            else:
                for name, value in content.items():
                    if container.get(name, self) is not value:
                        container[name] = value
                for name in kind:  # mentioned, and not there before
                    container.pop(name, None)

    # Finding.

    def _step(self, text: str, value: Any) -> str:
        """Add a step to the proof that leads to ``value``, which lives at least as long."""
        self._alive.append(value)
        return self.proof.step(text)

    def _child(
        self, parent: str | None, text: str, value: Any, label: Any, place: str = ""
    ) -> None:
        """Look at a child that is found by ``text``, in which ``{}`` stands for the parent.

        ``place``: how another value is put there, if it can be: an array is then an input.
        """
        self._shape.append(label)
        if place and parent is not None and self._of_argument and is_array(value):
            form = array_form(value)
            self._shape.append(form)
            name = self._step(text.format(parent), value)
            self.proof.refute(f"form({name}) != {self.proof.constant(form)}")
            self.proof.inputs.append((name, place.format(parent)))
            return
        if is_plain(value):
            self._shape.append(value_key(value))
            if parent is not None:
                name = self._step(text.format(parent), value)
                known = self.proof.constant(value)
                self.proof.refute(f"{name} is not {known} and differs({name}, {known})")
            return
        name = None
        if parent is not None:
            name = self._step(text.format(parent), value)
            self._expect_identity(name, value)
        self._visit_value(value, name)

    def _expect_identity(self, name: str, value: Any) -> None:
        if isinstance(value, _CONTAINERS):
            self.proof.refute(f"type({name}) is not {self.proof.constant(type(value))}")
        elif isinstance(value, types.MethodType):  # made anew at each look-up
            self.proof.refute(f"type({name}) is not {self.proof.constant(types.MethodType)}")
        elif self._watch(value):
            self.proof.refute(f"id({name}) != {id(value)}")
        else:
            self.proof.refute(f"{name} is not {self.proof.constant(value)}")

    def _watch(self, value: Any) -> bool:
        try:
            weakref.ref(value)
        except TypeError:
            return False
        self.watched.append(value)
        return True

    def _address(self, value: Any, name: str | None) -> str | None:
        """Return the variable of a value, which if need be is found by a weak reference."""
        if name is not None or not self._watch(value):
            return name
        name = self._step(f"{self.proof.constant(weakref.ref(value))}()", value)
        self.proof.refute(f"{name} is None")
        return name

    def _visit(self, value: Any, at: int) -> None:
        name = f"r{at}"
        self._of_argument = at > 0
        self._shape.append(("root", at))
        if is_plain(value):
            self._shape.append(value_key(value))
            known = self.proof.constant(value)
            self.proof.refute(f"{name} is not {known} and differs({name}, {known})")
            return
        self._visit_value(value, name)
        if isinstance(value, Module) or hasattr(type(value), "__lamina_reach__"):
            self._expect_identity(name, value)

    def _visit_value(self, value: Any, name: str | None) -> None:
        kind = type(value)
        if is_library_thing(value):
            self._shape.append(Same(value))
            if name is None:
                self._watch(value)
            return
        self._owners += isinstance(value, (Module, Cell)) or hasattr(kind, "__lamina_reach__")
        if id(value) in self._seen:
            self._shape.append(("again", self._seen[id(value)]))
            return
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, Module):
            self._module(value)
        elif isinstance(value, Cell):
            self._box(value, name)
        elif hasattr(kind, "__lamina_reach__"):
            self._owner(value)
        elif isinstance(value, types.FunctionType):
            self._function(value, name)
        elif isinstance(value, types.MethodType):
            for part in ("__func__", "__self__"):
                self._child(name, "{}." + part, getattr(value, part), part)
        elif isinstance(value, types.BuiltinFunctionType):
            self._child(name, "{}.__self__", value.__self__, value.__name__)
        elif isinstance(value, functools.partial):
            for part in ("func", "args", "keywords"):
                self._child(name, "{}." + part, getattr(value, part), part)
        elif isinstance(value, _CONTAINERS):
            self._container(value, name)
        elif isinstance(value, jax.Array):
            self._shape.append(Same(value))  # never changes: a constant of the program
            if name is None:
                self._watch(value)
        elif isinstance(value, np.ndarray) or hasattr(kind, "__dlpack__"):
            self._array(value, name)
        elif isinstance(value, type):
            self._class(value, name, construct=True)
        elif isinstance(value, types.ModuleType):
            self._namespace(value, name)
        elif getattr(value, "__wrapped__", None) is not None:  # jax.jit, lru_cache, lamina.jit
            self._shape.append(kind)
            before = self._owners
            self._child(name, "{}.__wrapped__", value.__wrapped__, "wrapped")
            if isinstance(value, _LRU_CACHE) and self._owners != before:
                raise UnprovenError(_HIDDEN.format(kind="functools.lru_cache"))
        elif isinstance(value, _RANDOM) or hasattr(kind, "__next__"):
            raise UnprovenError(_STATEFUL.format(kind=kind.__name__))
        elif isinstance(value, _HIDING):
            raise UnprovenError(_HIDDEN.format(kind=kind.__name__))
        else:
            self._object(value, name)

    def _function(self, function: types.FunctionType, name: str | None) -> None:
        code = function.__code__
        self._shape.append(code)
        library = is_library(function.__globals__.get("__name__"))
        if not library:
            self._mentioned |= names_in(code)
        for index, free in enumerate(code.co_freevars):
            if free == "__class__":  # of super(): it can't be rebound
                continue
            content = contents(function.__closure__[index])  # type: ignore[index]
            if library and is_plain(content):
                self._shape.append(value_key(content))
            elif library:
                self._child(None, "", content, index)
            elif content is EMPTY:
                name = self._address(function, name)
                self._shape.append(EMPTY)
                self.proof.refute(f"contents({name}.__closure__[{index}]) is not empty")
            else:
                name = self._address(function, name)
                cells: Any = function.__closure__
                self._undo.append((cells[index], "cell", content))
                self._child(name, f"{{}}.__closure__[{index}].cell_contents", content, index)
        for part in ("__defaults__", "__kwdefaults__"):
            content = getattr(function, part)
            if content:
                self._child(
                    None if library else self._address(function, name), "{}." + part, content, part
                )
        if library:
            return
        scope = function.__globals__
        used = sorted(globals_in(code) & scope.keys())
        found = {key: scope[key] for key in used}
        if {"sys", "modules"} <= names_in(code) or not READS_NAMES.isdisjoint(globals_in(code)):
            raise UnprovenError(_BY_NAME.format(name=function.__qualname__))
        if found:
            name = self._address(function, name)
            self._undo.append((scope, (), found))
        for key, value in found.items():
            self._child(name, f"{{}}.__globals__[{key!r}]", value, key)
        for module in sorted(imports_in(code)):
            if module in sys.modules and not is_library(module):
                text = f"{self.proof.constant(sys.modules)}[{module!r}]"
                self._child("", text, sys.modules[module], module)
        own = {k: v for k, v in function.__dict__.items() if k in self._names}
        if own:
            self._fields(function, function.__dict__, name)
        for key in sorted(globals_in(code) - scope.keys() - BUILTINS):
            name = self._address(function, name)  # a global that is not there yet
            self.proof.refute(f"{key!r} in {name}.__globals__")

    def _container(self, value: Any, name: str | None) -> None:
        kind = type(value)
        self._shape.append((kind, len(value)))
        if not isinstance(value, (tuple, frozenset, types.MappingProxyType)):
            self._undo.append((value, "items", value.copy()))
        items = list(value.values()) if isinstance(value, _MAPPINGS) else list(value)
        if isinstance(value, (set, frozenset)):
            self._shape.append(frozenset(map(value_key, value)))
            if name is not None:
                self.proof.refute(f"{name} != {self.proof.constant(frozenset(value))}")
            for item in items:
                if not is_plain(item):
                    self._child(None, "", item, "member")
            return
        if isinstance(value, _MAPPINGS):
            keys = list(value)
            self._shape.append(tuple(map(value_key, keys)))
            if name is not None:
                self.proof.refute(f"not same_items({name}.keys(), {self.proof.constant(keys)})")
        if all(map(is_plain, items)):
            self._shape.append(tuple(map(value_key, items)))
            if name is not None:
                where = f"{name}.values()" if isinstance(value, _MAPPINGS) else name
                self.proof.refute(f"not same_items({where}, {self.proof.constant(items)})")
            return
        if name is not None and not isinstance(value, _MAPPINGS):
            self.proof.refute(f"len({name}) != {len(items)}")
        into = isinstance(value, (list, dict))
        for key, item in value.items() if isinstance(value, _MAPPINGS) else enumerate(value):
            if name is None:
                self._child(None, "", item, "item")
            else:
                text = repr(key) if isinstance(key, (int, str)) else self.proof.constant(key)
                path = f"{{}}[{text}]"
                self._child(name, path, item, "item", place=f"{path} = " if into else "")

    def _array(self, value: Any, name: str | None) -> None:
        size = getattr(value, "nbytes", _MOST_BYTES + 1)
        frozen = isinstance(value, np.ndarray) and not value.flags.writeable and value.base is None
        if frozen:
            self._shape.append(Same(value))
            return
        if size > _MOST_BYTES:
            raise UnprovenError(
                f"an array of type {type(value).__module__}.{type(value).__name__} and shape "
                f"{tuple(value.shape)} is in reach of a compiled function, which can't see whether "
                f"it changes\n"
                f"    fix: pass it as an argument, or make it a jax.Array with jnp.asarray"
            )
        if isinstance(value, np.ndarray) and value.flags.writeable:
            self._undo.append((value, "array", value.copy()))
        key = any_array_key(value)
        self._shape.append(key)
        if name is not None:
            self.proof.refute(f"array_key({name}) != {self.proof.constant(key)}")

    def _namespace(self, module: types.ModuleType, name: str | None) -> None:
        self._shape.append(module.__name__)
        if not is_library(module.__name__):
            self._fields(module, vars(module), name)

    def _object(self, value: Any, name: str | None) -> None:
        """Look at a plain object: its fields as far as they are mentioned, and its class."""
        kind = type(value)
        self._shape.append(kind)
        if self._watch(value):
            self.objects[id(value)] = value
        if getattr(kind, "__hash__", None) is None and not hasattr(value, "__dict__"):
            raise UnprovenError(_OPAQUE.format(kind=kind.__name__))
        home = kind.__module__.partition(".")[0]
        if home in _BY_IDENTITY:
            self._shape.append(Same(value))
        if home == _HOME:  # our own: what records, counts or saves changes no result
            return
        if hasattr(value, "__dict__"):
            self._fields(value, vars(value), name)
        for slot in slots_of(kind):
            if (slot in self._names or self._reads_all()) and hasattr(value, slot):
                name = self._address(value, name)
                put = f"put({{}}, {slot!r}, "
                self._child(name, f"{{}}.{slot}", getattr(value, slot), slot, place=put)
        if not hasattr(value, "__dict__") and not slots_of(kind):
            self._shape.append(Same(value))
            before = self._owners
            for part in gc.get_referents(value):
                if part is not kind:
                    self._child(None, "", part, "part")
            if self._owners != before:
                raise UnprovenError(_HIDDEN.format(kind=kind.__name__))
        if not is_library(kind.__module__):
            name = self._address(value, name)
            if name is not None:
                self.proof.refute(f"type({name}) is not {self.proof.constant(kind)}")
            self._class(kind, None, construct=False)

    def _reads_all(self) -> bool:
        return not self._names.isdisjoint(READS_ALL)

    def _fields(self, holder: Any, fields: Any, name: str | None) -> None:
        # Code of a library's class, which is not looked at, may read any field of its instances;
        # the standard library's (loggers, locks, mocks) are taken to work the same whatever.
        home = type(holder).__module__.partition(".")[0]
        own = not is_library(home) or isinstance(holder, _NAMESPACES)
        everything = (
            (self._reads_all() and own)
            or home == "collections"
            or (
                home in LIBRARY and home not in sys.stdlib_module_names and home not in _BY_IDENTITY
            )
        )
        chosen = [k for k in fields if everything or k in self._names]
        name = self._address(holder, name)
        # A mentioned field that is not there yet may come.
        known = self.proof.constant(self._names)
        if not isinstance(holder, types.ModuleType):
            wanted = [k for k in fields if k in self._names]
            self.proof.refute(f"len({known}.intersection({name}.__dict__)) != {len(wanted)}")
            if everything:
                self.proof.refute(f"len({name}.__dict__) != {len(fields)}")
        kept = {k: fields[k] for k in chosen}
        there = {k: fields[k] for k in fields if k in self._names}
        self._undo.append((fields, self._names - there.keys(), there))
        for key, value in kept.items():
            path = f"{{}}.__dict__[{key!r}]"
            self._child(name, path, value, key, place=f"{path} = ")

    def _class(self, cls: type, name: str | None, construct: bool) -> None:
        """Look at the methods and class attributes that are mentioned, or that Python calls."""
        if (cls, construct) in self._classes:
            return
        self._classes.add((cls, construct))
        self._shape.append(cls)
        for base in cls.__mro__:
            if is_library(base.__module__):
                continue
            for key, part in list(vars(base).items()):
                mentioned = key in self._names or key == "forward"
                special = key.startswith("__") and key.endswith("__") and callable(part)
                if not mentioned and (not special or key in _NOT_CALLED):
                    continue
                if not mentioned and key in _MAKERS and not construct:
                    continue
                inner = unwrapped(part)
                if key in ("__dict__", "__weakref__"):
                    continue
                if inner is part:
                    where = self._address(base, name if base is cls else None)
                    self._child(where, f"{{}}.__dict__[{key!r}]", part, key)
                else:
                    self._child(None, "", inner, key)
            there = {k: v for k, v in vars(base).items() if k in self._names}
            self._undo.append((base, "class", there))
            known = self.proof.constant(self._names)
            count = len(there)
            where = self._address(base, name if base is cls else None)
            self.proof.refute(f"len({known}.intersection({where}.__dict__)) != {count}")
        if type(cls) is not type:
            self._class(type(cls), None, construct=False)

    def _box(self, box: Any, name: str | None) -> None:
        self._cell(box, type(box))
        self.objects[id(box)] = box
        if isinstance(box, Box):
            name = self._address(box, name)
            self._child(name, "{}.requires_grad", box.requires_grad, "requires_grad")
            self._box_facts(box)

    def _box_facts(self, box: Any) -> None:
        if box.__dict__:
            name = self._address(box, None)
            for key, value in box.__dict__.items():
                self._child(name, f"{{}}.__dict__[{key!r}]", value, key)
        if isinstance(box, Parameter):
            for cell in box.gradients:
                self._cell(cell, "grad")
            for hook in box.gradient_hooks:
                self._child(None, "", hook, "hook")

    def _cell(self, cell: Cell, label: Any) -> None:
        number = self.cells.setdefault(cell, len(self.cells))
        self._shape.append((label, number, cell_form(cell)))

    def _owner(self, owner: Any) -> None:
        """Look at an optimizer or a generator, which say themselves what they touch."""
        facts, cells, parts = owner.__lamina_reach__()
        self._shape.append((type(owner), facts))
        self.objects[id(owner)] = owner
        for cell in cells:
            self._cell(cell, "state")
        for part in parts:
            self._child(None, "", part, "part")

    def _module(self, root: Module) -> None:
        """Versions speak for all that is assigned; steps only for what changes in place."""
        self.versions.append((weakref.ref(root), revision_of(root)))
        self.watched.append(root)
        for name, module in walk(root).modules:
            self._shape.append((name, type(module)))
            if id(module) in self.objects:
                self._shape.append(list(self.objects).index(id(module)))
                continue
            self.objects[id(module)] = module
            self._seen.setdefault(id(module), len(self._seen))
            self._alive.append(module)
            for key, box in own_boxes(module):
                self._shape.append((key, box.requires_grad))
                self._cell(box, type(box))
                self.objects[id(box)] = box
                self._box_facts(box)
            for key, cell in module._array_attributes.items():
                self._cell(cell, key)
            users = not is_library(type(module).__module__)
            # Inherited code of a library's layer, which is not looked at, may read any attribute.
            inherits = any(
                is_library(b.__module__) for b in type(module).__mro__[:-1] if not _is_base(b)
            )
            everything = inherits or self._reads_all()
            variable = None
            for key, value in plain_attributes(module).items():
                if key != "training" and not everything and key not in self._names:
                    continue
                if is_plain(value):
                    self._shape.append((key, value_key(value)))
                else:
                    variable = self._address(module, variable)
                    self._child(variable, f"{{}}.__dict__[{key!r}]", value, key)
            for kind in _HOOKS:
                for hook in getattr(module, kind).values():
                    self._child(None, "", hook, kind)
            if users:
                self._class(type(module), None, construct=False)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_base(cls: type) -> bool:
    """Tell whether a class is ``nn.Module`` itself or what it is made from."""
    return issubclass(Module, cls) or (cls.__name__ == "Module" and cls.__base__ is Module)


_MAKERS = frozenset({"__init__", "__new__", "__post_init__"})
_NOT_CALLED = frozenset(
    {"__repr__", "__str__", "__del__", "__init_subclass__", "__getstate__", "__setstate__"}
    | {"__reduce__", "__class_getitem__", "__annotate__", "__format__", "__dir__"}
)


_LRU_CACHE = type(functools.lru_cache(lambda: None))
_HIDING = (
    weakref.ref, weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet,
    weakref.ProxyType, contextvars.ContextVar, threading.local, queue.Queue, queue.SimpleQueue,
)  # fmt: skip
"""What holds things on ways that can't be walked again."""
_HOME = __name__.partition(".")[0]
_BY_IDENTITY = frozenset({"jax", "jaxlib", "numpy", "ml_dtypes", _HOME})
"""Packages whose objects never change, or say so."""


_HIDDEN = """a {kind} is in reach of a compiled function, which can't see what it leads to.
    fix: pass what it leads to as an argument"""

_BY_NAME = """{name} looks names up at run time (globals(), eval, sys.modules), which a compiled \
function can't follow.
    fix: name the object directly, or pass it as an argument"""

_STATEFUL = """a {kind} is in reach of a compiled function: what it gives would be asked for once, \
while tracing, and be the same in every call.
    fix: pass its items as arguments; for random numbers use lamina.next_key()"""

_OPAQUE = """a {kind} is in reach of a compiled function, which can't see whether it changes.
    fix: pass what is needed of it as arguments"""
