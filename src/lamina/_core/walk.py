"""The walker: the one place that decides the order, the names and the ties of boxes.

Modules are visited in definition order, parents before children; in each module the parameters
come before the buffers. A box reached by several names is one box: the first name is canonical.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .bind import VERSION
from .errors import LaminaError

if TYPE_CHECKING:
    from .module import Module
    from .parameter import Box

__all__ = ["Tree", "describe", "fingerprint", "identify", "root_of", "walk"]


class Tree:
    """All names below a module.

    Attributes:
        entries: ``(name, box, is_parameter)`` in order, every name of every box.
        names: canonical name of each box, in order.
        aliases: further name -> canonical name, for tied boxes.
        modules: ``(name, module)`` in order, every name of every module.
    """

    __slots__ = ("aliases", "entries", "modules", "names", "version")

    def __init__(self, root: Module) -> None:
        self.version = VERSION.tree
        self.entries: list[tuple[str, Box, bool]] = []
        self.names: dict[Box, str] = {}
        self.aliases: dict[str, str] = {}
        self.modules: list[tuple[str, Module]] = []
        self._visit(root, "", set())

    def _visit(self, module: Module, name: str, above: set[Module]) -> None:
        if module in above:
            raise LaminaError(f"module {name!r} contains itself; a model must be a tree or a DAG")
        above.add(module)
        self.modules.append((name, module))
        prefix = f"{name}." if name else ""
        fields = module.__dict__
        for registry, is_parameter in ((fields["_parameters"], True), (fields["_buffers"], False)):
            for key, box in registry.items():
                if box is None:
                    continue
                path = prefix + key
                self.entries.append((path, box, is_parameter))
                first = self.names.setdefault(box, path)
                if first is not path:
                    self.aliases[path] = first
        for key, child in fields["_modules"].items():
            if child is not None:
                self._visit(child, prefix + key, above)
        above.remove(module)

    @property
    def boxes(self) -> list[Box]:
        """Every box once, in order."""
        return list(self.names)


def walk(root: Any) -> Tree:
    """Return the names below ``root``; cached until a module or a box is added or removed."""
    tree = root.__dict__.get("_tree")
    if tree is None or tree.version != VERSION.tree:
        for _, module in root._walk_modules():
            module._adopt_containers()
        tree = Tree(root)
        root.__dict__["_tree"] = tree
    return tree


def root_of(module: Module) -> Module:
    """Return the topmost module that contains ``module``."""
    seen = {id(module)}
    while True:
        above = holder_of(module.__dict__["_parents"], module, ("_modules",))
        if above is None or id(above) in seen:
            return module
        seen.add(id(above))
        module = above


def holder_of(owners: Any, part: Any, registries: tuple[str, ...]) -> Any:
    """Return the first of some weakly referenced modules that still has ``part``."""
    for reference in owners:
        owner = reference()
        if owner is not None and any(
            other is part for key in registries for other in owner.__dict__[key].values()
        ):
            return owner
    return None


def identify(box: Box) -> tuple[Module | None, str]:
    """Return the topmost module that contains a box, and the box's canonical name there."""
    owner = holder_of(box._owners, box, ("_parameters", "_buffers"))
    if owner is None:
        return None, ""
    root = root_of(owner)
    name = walk(root).names.get(box)
    return (None, "") if name is None else (root, name)


def path_of(module: Module) -> str:
    """Return the dotted path of a module below its topmost module, or its class name."""
    root = root_of(module)
    for name, other in walk(root).modules:
        if other is module and name:
            return name
    return type(module).__name__


def describe(box: Box) -> str:
    """Name a box for a message: ``parameter '0.weight'``."""
    kind = type(box).__name__.lower()
    if box._gradient_of is not None and (parameter := box._gradient_of()) is not None:
        return f"gradient of {describe(parameter)}"
    _, name = identify(box)
    return f"{kind} {name!r}" if name else kind


class _Same:
    """Compares by identity and keeps the object alive, so that its id is not used again."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


_PLAIN = (int, float, str, bytes, bool, complex, type(None), type(Ellipsis), np.dtype, type)


def static_value(value: Any) -> Any:
    """Return a hashable stand-in for a plain attribute: equal when a program may be reused."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if isinstance(value, (list, tuple)):
        return kind, tuple(map(static_value, value))
    if isinstance(value, dict):
        return kind, tuple((static_value(k), static_value(v)) for k, v in value.items())
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(map(static_value, value))
    if isinstance(value, (np.ndarray, jax.Array)):
        return _Same(value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return kind, value


def _can_change(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_can_change, value))
    return isinstance(value, (list, dict, set))


def fingerprint(root: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """Return all that a compiled program may depend on except values, and the mutable attributes.

    The second part lists ``(container, stand-in)`` for plain lists, dicts and sets, whose content
    can change without an assignment and so is compared again at each call.
    """
    cached = root.__dict__.get("_fingerprint")
    if cached is not None and cached[0] == VERSION.static:
        if all(static_value(container) == mark for container, mark in cached[1][1]):
            return cached[1]
    index: dict[Any, int] = {}
    mutable: list[tuple[Any, Any]] = []
    parts: list[Any] = []
    for name, module in walk(root).modules:
        if module in index:
            parts.append((name, index[module]))
            continue
        index[module] = len(index)
        boxes = []
        for key, box in module._own_boxes():
            boxes.append((key, type(box), box._requires_grad, index.setdefault(box, len(index))))
        parts.append((name, type(module), tuple(boxes), tuple(_statics(module, mutable))))
    result = (tuple(parts), mutable)
    root.__dict__["_fingerprint"] = (VERSION.static, result)
    return result


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _statics(module: Module, mutable: list[tuple[Any, Any]]) -> Iterator[Any]:
    for key, value in module.__dict__.items():
        if key in module._INTERNAL:
            continue
        stand_in = static_value(value)
        if _can_change(value):
            mutable.append((value, stand_in))
        yield key, stand_in
    for kind in _HOOKS:
        hooks = getattr(module, kind)
        if hooks:
            yield kind, tuple(_Same(hook) for hook in hooks.values())
