"""The walker: the one place that decides the order, the names and the ties of boxes.

Modules are visited in definition order, parents before children; in each module the parameters
come before the buffers. A box reached by several names is one box: the first name is canonical.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from . import bind
from .bind import Cell
from .errors import LaminaError

__all__ = [
    "Links",
    "Tree",
    "cells_of",
    "describe",
    "identify",
    "join",
    "own_boxes",
    "path_of",
    "revision_of",
    "root_of",
    "touch",
    "walk",
]


class Links:
    """What the walker keeps of a module.

    Attributes:
        me: a weak reference to the module.
        parents: weak references to the modules that have, or had, it as a child.
        revision: stands for all here and below that a program may depend on: a sum of random
            numbers, so that a flag that is set and set back leads back to the same revision.
        structure: changes whenever a part is added, replaced or removed here or below.
        tree: the names below, as far as they are known.
        born: which open trace the module was made in, if any.
        origin: the seed and number from which values below are drawn.
        pending: whether sizes of the module's own boxes are to be inferred.
        compiled: what calls of the module go through, if it was told to compile.
    """

    __slots__ = (
        "born", "compiled", "me", "origin", "parents", "pending", "revision", "structure", "tree",
    )  # fmt: skip

    def __init__(self, module: Any) -> None:
        self.me: Any = weakref.ref(module)
        self.parents: tuple[Any, ...] = ()
        self.revision = 0
        self.structure = 0
        self.tree: Tree | None = None
        self.born = bind.birth()
        self.origin: Any = None
        self.pending = False
        self.compiled: Any = None


class Node(Protocol):
    """What the walker needs of a module: its parts by kind."""

    _links: Links
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]
    _array_attributes: dict[str, Cell]
    _modules: dict[str, Any]

    def _check_attributes(self) -> None: ...


class Tree:
    """All names below a module.

    Attributes:
        entries: ``(name, box)`` in order, every name of every box.
        names: canonical name of each box, in order.
        aliases: further name -> canonical name, for tied boxes.
        modules: ``(name, module)`` in order, every name of every module.
        paths: canonical name of each module, in order.
    """

    __slots__ = ("aliases", "entries", "modules", "names", "paths", "structure")

    def __init__(self, root: Node) -> None:
        self.structure = root._links.structure
        self.entries: list[tuple[str, Any]] = []
        self.names: dict[Any, str] = {}
        self.aliases: dict[str, str] = {}
        self.modules: list[tuple[str, Any]] = []
        self.paths: dict[Any, str] = {}
        stack: list[tuple[str, Any]] = [("", root)]
        above: dict[Any, None] = {}
        while stack:
            name, module = stack.pop()
            if name is _LEAVE:
                del above[module]
                continue
            if module in above:
                raise LaminaError(
                    f"module {name!r} contains itself\n"
                    f"    fix: a model is a tree, or shares parts; keep a link upwards in a "
                    f"weakref.ref"
                )
            above[module] = None
            self._enter(name, module)
            prefix = f"{name}." if name else ""
            stack.append((_LEAVE, module))
            stack += [
                (prefix + k, c) for k, c in reversed(module._modules.items()) if c is not None
            ]

    @property
    def boxes(self) -> list[Any]:
        """Every box once, in order."""
        return list(self.names)

    def _enter(self, name: str, module: Node) -> None:
        module._check_attributes()
        self.modules.append((name, module))
        self.paths.setdefault(module, name)
        prefix = f"{name}." if name else ""
        for key, box in own_boxes(module):
            path = prefix + key
            self.entries.append((path, box))
            first = self.names.setdefault(box, path)
            if first is not path:
                self.aliases[path] = first


_LEAVE: Any = object()


def join(prefix: str, name: str) -> str:
    """Return a dotted path; either part may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def own_boxes(module: Node) -> Iterator[tuple[str, Any]]:
    """Yield a module's own parameters, then its own buffers, by local name."""
    for registry in (module._parameters, module._buffers):
        for name, box in registry.items():
            if box is not None:
                yield name, box


def cells_of(root: Node) -> list[Cell]:
    """Return every box and array attribute below ``root``, once."""
    cells: dict[Cell, None] = dict.fromkeys(walk(root).names)
    for module in walk(root).paths:
        cells.update(dict.fromkeys(module._array_attributes.values()))
    return list(cells)


def walk(root: Node) -> Tree:
    """Return the names below ``root``; cached until a part is added or removed below it."""
    links = root._links
    if links.tree is None or links.tree.structure != links.structure:
        links.tree = Tree(root)
    return links.tree


def origin_of(module: Node, take: Callable[[Any], Any]) -> Any:
    """Return the seed and number of a model, which gets one if it has none yet."""
    links = module._links
    links.origin = links.origin or take(links.born)
    return links.origin


def revision_of(module: Node) -> int:
    """Return what changes whenever a program may depend on something new in a module."""
    return module._links.revision


def touch(owners: Iterable[Any], structure: bool = False, by: int | None = None) -> None:
    """Give a new revision to modules, by weak references, and to all that contain them.

    ``by``: what is added to the revisions, from :func:`changed`; left out, a fresh number.
    """
    by = _FRESH.getrandbits(64) if by is None else by
    stack = list(owners)
    seen = set()
    while stack:
        module = stack.pop()()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        links = module._links
        links.revision += by
        links.structure += structure
        stack += links.parents


_FRESH = random.Random()


def changed(holder: Any, name: str, old: Any, new: Any) -> int:
    """Return what a change of a plain value adds to revisions; changed back, it is taken away."""
    # Of strings: the hashes of tuples that differ in one number differ in much the same way.
    what = f"{id(holder)} {name}"
    return hash(f"{what} {type(new)} {new!r}") - hash(f"{what} {type(old)} {old!r}")


def root_of(module: Node) -> Any:
    """Return the topmost module that contains ``module``."""
    seen = {id(module)}
    while True:
        above = next(_holders(module._links.parents, module), None)
        if above is None or id(above) in seen:
            return module
        seen.add(id(above))
        module = above


def _holders(references: Any, part: Any) -> Iterator[Any]:
    """Yield those of some weakly referenced modules that still have ``part``."""
    for reference in references:
        owner = reference()
        if owner is None:
            continue
        parts: Iterable[Any] = owner._modules.values()
        if isinstance(part, Cell):
            parts = (box for _, box in own_boxes(owner))
        if any(other is part for other in parts):
            yield owner


def identify(box: Any) -> tuple[Any, str]:
    """Return the topmost module that contains a box, and the box's canonical name there."""
    owner = next(_holders(box.owners, box), None)
    if owner is None:
        return None, ""
    root = root_of(owner)
    name = walk(root).names.get(box)
    return (None, "") if name is None else (root, name)


def path_of(module: Node) -> str:
    """Return the dotted path of a module below its topmost module, or its class name."""
    return walk(root_of(module)).paths.get(module) or type(module).__name__


def describe(box: Any) -> str:
    """Name a box for a message: ``parameter '0.weight'``."""
    kind = type(box).__name__.lower()
    _, name = identify(box)
    return f"{kind} {name!r}" if name else kind
