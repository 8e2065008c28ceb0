"""Gradients: ``value_and_grad``, ``grad`` and, for loops written the PyTorch way, ``backward``."""

from __future__ import annotations

import fnmatch
import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from .._core import bind
from .._core.bind import Frame, Retry
from .._core.errors import RuleError, did_you_mean
from .._core.parameter import Box, Parameter
from .._core.walk import walk
from ._args import Constants, settle, store_all

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
        gradients are a dict ``{name: Array}``, a tied parameter once with its gradients added up.
        What ``fn`` writes into buffers stays written.

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
        out, grads = settle(
            lambda: _once(fn, numbers, wrt, args, kwargs, has_aux), "value_and_grad"
        )
        return out, (grads[0] if isinstance(argnums, int) else tuple(grads))

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
        self.leaves, self.treedef = jax.tree.flatten(tree)
        self.names: dict[int, dict[str, Parameter]] = {}
        self.waiting: list[Box] = []
        self.boxes: list[Parameter] = []
        seen: set[Box] = set()
        for place, leaf in enumerate(self.leaves):
            if hasattr(leaf, "_state_boxes"):
                chosen = select(leaf, wrt)
                self.waiting += [box for box in chosen.values() if box._awaits_shapes]
                self.names[place] = {
                    name: box for name, box in chosen.items() if not box._awaits_shapes
                }
                new = [box for box in self.names[place].values() if box not in seen]
                seen.update(new)
                self.boxes += new

    def values(self) -> tuple[list[Any], list[Any]]:
        arrays = [leaf for i, leaf in enumerate(self.leaves) if i not in self.names]
        return arrays, [box._read() for box in self.boxes]

    def join(self, arrays: Iterable[Any]) -> Any:
        values = iter(arrays)
        return jax.tree.unflatten(
            self.treedef,
            [leaf if i in self.names else next(values) for i, leaf in enumerate(self.leaves)],
        )

    def gradients(self, arrays: Iterable[Any], by_box: dict[Box, Any]) -> Any:
        values = iter(arrays)
        return jax.tree.unflatten(
            self.treedef,
            [
                {name: by_box[box] for name, box in self.names[i].items()}
                if i in self.names
                else next(values)
                for i in range(len(self.leaves))
            ],
        )


def _once(
    fn: Callable[..., Any], numbers: tuple[int, ...], wrt: Select, args: Any, kwargs: Any,
    has_aux: bool,
) -> tuple[Any, list[Any]]:  # fmt: skip
    targets = [_Target(args[number], wrt) for number in numbers]
    values = [target.values() for target in targets]
    aux_constants = Constants()
    written: list[Box] = []

    def pure(values: list[tuple[list[Any], list[Any]]]) -> Any:
        with Frame("lamina.grad") as frame:
            full = list(args)
            for number, target, (arrays, inner) in zip(numbers, targets, values, strict=True):
                frame.bind(target.boxes, inner)
                full[number] = target.join(arrays)
            out = fn(*full, **kwargs)
            loss, aux = out if has_aux else (out, None)
            if frame.stale or any(
                not box._awaits_shapes for target in targets for box in target.waiting
            ):
                raise Retry
            written[:] = frame.written
            return loss, (aux_constants.take(aux), frame.collect())

    (loss, (aux, states)), grads = jax.value_and_grad(pure, has_aux=True)(values)
    store_all(written, states)
    result = [
        target.gradients(arrays, dict(zip(target.boxes, inner, strict=True)))
        for target, (arrays, inner) in zip(targets, grads, strict=True)
    ]
    return ((loss, aux_constants.give(aux)) if has_aux else loss), result


def select(net: Any, wrt: Select = None) -> dict[str, Parameter]:
    """Return the trainable parameters of a module by name, or those that ``wrt`` selects."""
    everything = {
        name: box
        for box, name in walk(net).names.items()
        if isinstance(box, Parameter) and jnp.issubdtype(box.dtype, jnp.inexact)
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
        raise RuleError(f"wrt={wrt!r} selects none of the parameters {list(everything)}.{hint}")
    return chosen


_TOUCHED: dict[Any, list[weakref.ref[Box]]] = {}


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
    boxes: list[Any] = [box for box in guess if _is_trainable(box) and not box._awaits_shapes]

    def attempt() -> tuple[Any, dict[Parameter, None]]:
        aux_constants = Constants()
        written: list[Box] = []
        touched: dict[Any, None] = {}
        read: list[Box] = []

        def pure(values: list[Any]) -> Any:
            with Frame("lamina.backward", captures=True) as frame:
                frame.bind(boxes, values, watch=True)
                out = fn(*args, **kwargs)
                loss, aux = out if has_aux else (out, None)
                known = set(boxes)
                new = [b for b in frame.captured if _is_trainable(b) and b not in known]
                if new or frame.stale:
                    boxes.extend(new)
                    raise Retry
                touched.update((box, None) for box in boxes if box in frame.captured)
                read[:] = [box for box in frame.captured if box not in known]
                written[:] = frame.written
                return loss, (aux_constants.take(aux), frame.collect())

        values = [box._read() for box in boxes]
        (loss, (aux, states)), grads = jax.value_and_grad(pure, has_aux=True)(values)
        for box in read:
            bind.note_read(box)
        store_all(written, states)
        for box, gradient in zip(boxes, grads, strict=True):
            if box in touched:
                before = box.grad
                box.grad = gradient if before is None else before + gradient
        return ((loss, aux_constants.give(aux)) if has_aux else loss), touched

    result, touched = settle(attempt, "backward")
    if code is not None:
        _TOUCHED[code] = [weakref.ref(box) for box in touched]
    return result


def _is_trainable(box: Box) -> bool:
    return (
        isinstance(box, Parameter) and box.requires_grad and jnp.issubdtype(box.dtype, jnp.inexact)
    )
