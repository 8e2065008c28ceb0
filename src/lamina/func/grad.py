"""Gradients: ``value_and_grad``, ``grad`` and, for loops written the PyTorch way, ``backward``."""

from __future__ import annotations

import fnmatch
import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import jax

from .._core import bind
from .._core.box import Box
from .._core.errors import RuleError, did_you_mean
from .._core.materialize import infer_call
from .._core.module import Module
from .._core.parameter import Parameter, is_trainable
from .._core.shapes import is_inexact
from .._core.trees import Carrier, Partition
from .._core.walk import walk
from ._effects import Effects

__all__ = ["backward", "grad", "value_and_grad"]

Select = str | Iterable[Any] | Callable[[str, Parameter], bool] | None


def value_and_grad(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    wrt: Select = None,
) -> Callable[..., Any]:
    """Return a function that computes ``fn`` and its gradients.

    Args:
        fn: returns a scalar loss, or ``(loss, aux)`` with ``has_aux``.
        argnums: which arguments to differentiate: modules, arrays, or lists and dicts of them.
        has_aux: ``fn`` returns further data beside the loss (default False).
        wrt: which parameters of a module: a name glob (``"head.*"``), a list of globs or
            parameters, or a predicate ``(name, parameter) -> bool``. Default: all with
            ``requires_grad``.

    Returns:
        A function returning ``(loss, grads)`` or ``((loss, aux), grads)``. For a module the
        gradients are a dict ``{name: Array}``, a tied parameter once with its gradients added up;
        where two arguments share a parameter each shows the total. What ``fn`` writes into
        buffers stays written.

    Raises:
        RuleError: if ``wrt`` selects no parameter.

    Example:
        >>> import jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> net = nn.Linear(3, 1)
        >>> loss, grads = lamina.value_and_grad(lambda net: net(jnp.ones((2, 3))).sum())(net)
        >>> {name: g.shape for name, g in grads.items()}
        {'weight': (1, 3), 'bias': (1,)}
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(fn, updated=())
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        targets = {number: _Target(args[number], wrt) for number in numbers}
        if any(target.waits for target in targets.values()):
            infer_call(fn, args, kwargs)
            targets = {number: _Target(args[number], wrt) for number in numbers}
        boxes = list(dict.fromkeys(box for target in targets.values() for box in target.boxes))

        def run(arrays: dict[int, Any]) -> Any:
            full = [targets[i].join(arrays[i]) if i in arrays else a for i, a in enumerate(args)]
            return fn(*full, **kwargs)

        arrays = {number: target.arrays for number, target in targets.items()}
        out, grads, others = _differentiate("lamina.grad", run, boxes, arrays, has_aux)
        found = tuple(targets[number].gradients(grads, others[number]) for number in numbers)
        return out, (found[0] if isinstance(argnums, int) else found)

    return differentiated


def grad(
    fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    wrt: Select = None,
) -> Callable[..., Any]:
    """Return a function that computes the gradients of ``fn``; as :func:`value_and_grad`.

    Returns:
        A function returning ``grads``, or ``(grads, aux)`` with ``has_aux``.

    Example:
        >>> import jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> net = nn.Linear(3, 1)
        >>> sorted(lamina.grad(lambda net: net(jnp.ones((2, 3))).sum())(net))
        ['bias', 'weight']
    """
    both = value_and_grad(fn, argnums, has_aux, wrt=wrt)

    @functools.wraps(fn, updated=())
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        out, grads = both(*args, **kwargs)
        return (grads, out[1]) if has_aux else grads

    return differentiated


class _Target:
    """One differentiated argument: its arrays, and the parameters of its modules."""

    def __init__(self, tree: Any, wrt: Select) -> None:
        self.parts = Partition(tree, lambda leaf: not isinstance(leaf, Module))
        self.arrays = self.parts.chosen
        self.join = self.parts.combine
        chosen = [(leaf, select(leaf, wrt)) for leaf in self.parts.rest]
        self.waits = any(b.state == "unshaped" for _, names in chosen for b in names.values())
        self.names = [
            {name: box for name, box in names.items() if box.state != "unshaped"}
            for _, names in chosen
        ]

    @property
    def boxes(self) -> list[Parameter]:
        return [box for names in self.names for box in names.values()]

    def gradients(self, by_box: dict[Any, Any], arrays: list[Any]) -> Any:
        """Return the argument with gradients in the places of its modules and arrays."""
        own = iter(arrays)
        modules = iter(self.names)
        leaves = [
            next(own) if use else {name: by_box[box] for name, box in next(modules).items()}
            for use in self.parts.mask
        ]
        return jax.tree.unflatten(self.parts.treedef, leaves)


def _differentiate(
    kind: str, run: Callable[[Any], Any], boxes: list[Any], arrays: Any, has_aux: bool,
    watch: Any = None,
) -> tuple[Any, dict[Any, Any], Any]:  # fmt: skip
    """Return what ``run(arrays)`` returns, and its gradients for ``boxes`` and ``arrays``.

    ``watch``, if given, is called with the frame before it closes, and may reject the run.
    """
    aux_rest = Carrier()
    effects = Effects(kind, watch=watch is not None)

    def pure(values: list[Any], arrays: Any) -> Any:
        with effects.frame() as frame:
            frame.bind(boxes, values)
            out = run(arrays)
            loss, aux = out if has_aux else (out, None)
            if watch is not None:
                watch(frame)
            return loss, (aux_rest.take(aux), effects.collect(frame, aux_rest))

    values = list(map(bind.read, boxes))
    (loss, (aux, states)), (grads, others) = jax.value_and_grad(pure, (0, 1), has_aux=True)(
        values, arrays
    )
    if watch is not None and watch(None):
        return None, {}, None
    effects.pass_on(states)
    found = {box: box.hooked(grad) for box, grad in zip(boxes, grads, strict=True)}
    return ((loss, aux_rest.give(aux)) if has_aux else loss), found, others


def select(net: Any, wrt: Select = None) -> dict[str, Parameter]:
    """Return the trainable parameters of a module by name, or those that ``wrt`` selects."""
    everything = {
        name: box
        for box, name in walk(net).names.items()
        if isinstance(box, Parameter) and is_inexact(box.dtype)
    }
    if wrt is None:
        return {name: box for name, box in everything.items() if box.requires_grad}
    if callable(wrt):
        chosen = {name: box for name, box in everything.items() if wrt(name, box)}
    else:
        wanted = [wrt] if isinstance(wrt, (str, Box)) else list(wrt)
        chosen = {
            name: box
            for name, box in everything.items()
            if any(fnmatch.fnmatchcase(name, w) if isinstance(w, str) else w is box for w in wanted)
        }
    if not chosen:
        hint = did_you_mean(wrt, everything) if isinstance(wrt, str) else ""
        raise RuleError(
            f"wrt={wrt!r} selects none of the parameters {list(everything)}.{hint}\n"
            f"    fix: a name glob, a list of globs or parameters, or a predicate (name, parameter)"
        )
    return chosen


_TOUCHED: dict[Any, list[weakref.ref[Box]]] = {}
"""Which parameters a function touched last time, by its code: a guess that saves a second run."""


def backward(fn: Callable[..., Any], *args: Any, has_aux: bool = False, **kwargs: Any) -> Any:
    """Compute a loss and add its gradients to ``.grad`` of every trainable parameter it touches.

    Args:
        fn: a function returning a scalar loss, or ``(loss, aux)`` with ``has_aux``. It reaches
            modules through its closure or through ``*args``.
        *args: arguments of ``fn``.
        has_aux: ``fn`` returns further data beside the loss (default False).
        **kwargs: keyword arguments of ``fn``.

    Returns:
        The loss, or ``(loss, aux)``.

    Example:
        >>> import jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> net = nn.Linear(3, 1)
        >>> loss = lamina.backward(lambda: net(jnp.ones((2, 3))).sum())
        >>> net.weight.grad
        Array([[2., 2., 2.]], dtype=float32)

    Source: the interface of ``torch.Tensor.backward``.
    """
    code = getattr(fn, "__code__", None)
    guess = [box for ref in _TOUCHED.get(code, ()) if (box := ref()) is not None]
    boxes: list[Any] = [
        box
        for box in guess
        if is_trainable(box) and box.state != "unshaped" and bind.is_at_hand(box)
    ]
    touched: list[Any] = []
    new: list[Any] = []

    def watch(frame: Any) -> bool:
        if frame is not None:
            touched[:] = [box for box in frame.read if is_trainable(box)]
            new[:] = [box for box in touched if box not in known]
        return bool(new)

    while True:
        known = set(boxes)
        out, grads, _ = _differentiate(
            "lamina.backward", lambda _: fn(*args, **kwargs), boxes, (), has_aux, watch
        )
        if not new:
            break
        boxes += new  # it reached parameters that gradients were not asked for: run it again
    for box in touched:
        before = box.grad
        box.grad = grads[box] if before is None else before + grads[box]
    if code is not None:
        _TOUCHED[code] = [weakref.ref(box) for box in touched]
    return out
