"""The arguments of a compiled call, apart: arrays, and roots (modules, objects, constants)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._core.box import Box
from .._core.errors import StaticWriteError
from .._core.fingerprint import is_plain, value_key
from .._core.module import Module
from .._core.trees import as_array, is_arraylike

__all__ = ["Arguments", "run_swapped"]

NATIVE, HOST, OWNER, ARRAY, ROOT = range(1, 6)
"""Kinds of arguments: JAX's arrays, NumPy's, modules and optimizers, other data, other things."""


KINDS: dict[type, int] = {}


def classify(leaf: Any) -> int:
    """Sort an argument: an array, or a module, an optimizer, an object or a constant."""
    kind = type(leaf)
    found = KINDS.get(kind)
    if found is None:
        if isinstance(leaf, jax.Array):
            found = NATIVE
        elif isinstance(leaf, (np.ndarray, np.generic)):
            found = HOST
        elif is_data(leaf):
            found = ARRAY
        else:
            found = OWNER if isinstance(leaf, Module) or hasattr(kind, "__lamina_reach__") else ROOT
        KINDS[kind] = found
    return found


def is_leaf(value: Any) -> bool:
    return isinstance(value, (Box, Static))


def is_data(leaf: Any) -> bool:
    return is_arraylike(leaf) and not isinstance(leaf, Box)


def leaves_of(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=is_leaf)


class Static:
    """An argument that is a constant of the program, whatever its type."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Arguments:
    """The arguments of one call, apart: arrays, and roots (modules, objects, constants).

    Attributes:
        key: what identifies the call except for the arrays' values.
        shape: the same without identities.
    """

    def __init__(self, args: Any, kwargs: Any, numbers: Any, names: Any) -> None:
        if numbers or names:
            args = tuple(Static(a) if i in numbers else a for i, a in enumerate(args))
            kwargs = {k: Static(v) if k in names else v for k, v in kwargs.items()}
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
        kinds = tuple(map(classify, leaves))
        is_array = [kind in (NATIVE, HOST, ARRAY) for kind in kinds]
        key: list[Any] = []
        shape: list[Any] = [treedef, tuple(is_array)]
        self.arrays: list[Any] = []
        self.roots: list[Any] = []
        for leaf, kind in zip(leaves, kinds, strict=True):
            if kind in (NATIVE, HOST, ARRAY):
                leaf = as_array(leaf) if kind == ARRAY else leaf
                self.arrays.append(leaf)
                form = (leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else (type(leaf), None)
                key.append(leaf.aval if kind == NATIVE else form)
                shape += form
            else:
                leaf = leaf.value if isinstance(leaf, Static) else leaf
                self.roots.append(leaf)
                key.append(value_key(leaf) if is_plain(leaf) else id(leaf))
        plain_call = not kwargs and all(KINDS.get(type(a)) in (NATIVE, HOST, OWNER) for a in args)
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
                after, structure = jax.tree.flatten(given, is_leaf=is_leaf)
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


_ARGUMENT = """a list, dict or field of an argument is changed inside a compiled function, which \
works on a copy of it: the change would be lost.
    fix: return the new list, dict or value"""
