"""Hooks: functions of the user's that run around ``forward`` and around its gradient."""

from __future__ import annotations

import collections
import gc
import itertools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from .bind import CLEAN, STATE, Cell, is_tracer, trace_mark
from .errors import ForeignTransformError
from .shapes import is_inexact
from .walk import path_of, touch

__all__ = ["Hooked", "RemovableHandle", "add_hook", "run_backward_hooks"]

_IDS = itertools.count()


class RemovableHandle:
    """Returned by every ``register_*_hook``; ``remove()`` takes the hook away again.

    Also a context manager that removes the hook at the end of the block.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> net = nn.ReLU()
        >>> seen = []
        >>> with net.register_forward_hook(lambda module, args, out: seen.append(out.shape)):
        ...     _ = net(jnp.ones((2, 3)))
        >>> _ = net(jnp.ones((2, 3)))
        >>> seen
        [(2, 3)]
    """

    def __init__(self, hooks: dict[int, Any], changed: Callable[[], None]) -> None:
        self.id = next(_IDS)
        self._hooks = hooks
        self._changed = changed

    def remove(self) -> None:
        """Remove the hook; a second call does nothing."""
        self._hooks.pop(self.id, None)
        self._changed()

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def add_hook(
    hooks: dict[int, Any], hook: Any, changed: Callable[[], None], prepend: bool = False
) -> RemovableHandle:
    """Add ``hook`` to a registry and return its handle; ``changed`` is told of it both times."""
    handle = RemovableHandle(hooks, changed)
    hooks[handle.id] = hook
    if prepend and isinstance(hooks, OrderedDict):
        hooks.move_to_end(handle.id, last=False)
    changed()
    return handle


_NO_HOOKS: Any = MappingProxyType({})


class Hooked:
    """What can have hooks: the registries of a module, and how they are filled."""

    _links: Any
    _forward_hooks: dict[int, Any] = _NO_HOOKS
    _forward_pre_hooks: dict[int, Any] = _NO_HOOKS
    _backward_hooks: dict[int, Any] = _NO_HOOKS
    _backward_pre_hooks: dict[int, Any] = _NO_HOOKS
    _state_dict_hooks: dict[int, Any] = _NO_HOOKS
    _state_dict_pre_hooks: dict[int, Any] = _NO_HOOKS
    _load_hooks: dict[int, Any] = _NO_HOOKS
    _load_pre_hooks: dict[int, Any] = _NO_HOOKS

    def _add_hook(self, registry: str, hook: Any, prepend: bool = False) -> RemovableHandle:
        hooks = self.__dict__.setdefault(registry, OrderedDict())
        me = self._links.me
        return add_hook(hooks, hook, lambda: touch((me,)), prepend)

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Call ``hook(module, args)`` before ``forward``; it may return other arguments."""
        return self._add_hook("_forward_pre_hooks", (hook, with_kwargs), prepend)

    def register_forward_hook(
        self,
        hook: Callable[..., Any],
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> RemovableHandle:
        """Call ``hook(module, args, output)`` after ``forward``; it may return another output."""
        return self._add_hook("_forward_hooks", (hook, with_kwargs, always_call), prepend)

    def register_full_backward_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(module, grad_input, grad_output)`` when gradients pass through the module.

        Both are tuples of arrays, ``None`` for inputs that no gradient is asked for; the hook may
        return a replacement for ``grad_input``. It runs under ``lamina.grad``, ``value_and_grad``
        and ``backward``; inside a compiled function it sees tracers, while tracing.
        """
        return self._add_hook("_backward_hooks", hook, prepend)

    def register_full_backward_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(module, grad_output)`` before gradients enter the module."""
        return self._add_hook("_backward_pre_hooks", hook, prepend)

    def register_state_dict_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(module, prefix, keep_vars)`` before ``state_dict`` collects."""
        return self._add_hook("_state_dict_pre_hooks", hook)

    def register_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(module, state_dict, prefix, local_metadata)`` on the collected dict."""
        return self._add_hook("_state_dict_hooks", hook)

    _register_state_dict_hook = register_state_dict_post_hook

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(module, state_dict, prefix, local_metadata, strict, missing_keys,
        unexpected_keys, error_msgs)`` before the module takes its values; it may edit the dict.
        """
        return self._add_hook("_load_pre_hooks", hook)

    def _register_load_state_dict_pre_hook(
        self, hook: Callable[..., Any], with_module: bool = False
    ) -> RemovableHandle:
        call = hook if with_module else (lambda module, *args: hook(*args))
        return self._add_hook("_load_pre_hooks", call)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(module, incompatible_keys)`` after all values are taken; it may edit the
        two lists.
        """
        return self._add_hook("_load_hooks", hook)


def run_forward_hooks(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    for hook, with_kwargs, _ in list(module._forward_hooks.values()):
        runs(hook)
        result = hook(module, args, kwargs, output) if with_kwargs else hook(module, args, output)
        output = output if result is None else result
    return output


def run_pre_hook(module: Any, hook: Any, with_kwargs: bool, args: Any, kwargs: Any) -> Any:
    runs(hook)
    result = hook(module, args, kwargs) if with_kwargs else hook(module, args)
    if result is None:
        return args, kwargs
    if with_kwargs:
        return result
    return (result if isinstance(result, tuple) else (result,)), kwargs


def run_backward_hooks(
    module: Any, before: list[Any], after: list[Any], args: tuple[Any, ...], forward: Any
) -> Any:
    """Call ``forward(*args)`` so that a module's backward hooks see its gradients.

    The gradient with respect to the outputs reaches the hooks ``before`` and then, together with
    the gradient with respect to the inputs, the hooks ``after``. Either may return a replacement.
    Where no gradient is asked for an input, as in a first layer, the hooks see ``None`` for it.
    """
    # JAX keeps the functions below for a while, which must keep no array.
    seen: dict[str, Any] = {"inputs": False}
    count = len(args)

    @jax.custom_vjp
    def tap_inputs(values: Any) -> Any:
        return values

    def inputs_forward(values: Any) -> Any:
        seen["inputs"] = any(value.perturbed for value in values)
        return [value.value for value in values], [value.perturbed for value in values]

    def inputs_backward(wanted: Any, grads: Any) -> Any:
        shown = [g if want else None for g, want in zip(grads, wanted, strict=True)]
        result = run_after(list(map(_dense, shown)))
        return ([_dense(g) if r is None else r for g, r in zip(grads, result, strict=True)],)

    def run_after(grads: list[Any]) -> list[Any]:
        """Show the hooks one gradient for each argument; return those of the arrays among them."""
        every: list[Any] = [None] * count
        for i, grad in zip(where, grads, strict=True):
            every[i] = grad
        outputs = seen.pop("outputs", None)
        for hook in after:
            changed = runs(hook)(module, tuple(every), outputs)
            if changed is not None:
                every = _replaced(module, every, _as_tuple(changed))
        return [every[i] for i in where]

    tap_inputs.defvjp(inputs_forward, inputs_backward, symbolic_zeros=True)

    @jax.custom_vjp
    def tap_outputs(values: Any) -> Any:
        return values

    def outputs_backward(_: None, grads: Any) -> Any:
        result = tuple(grads)
        for hook in before:
            changed = runs(hook)(module, result)
            if changed is not None:
                result = _as_tuple(changed)
        seen["outputs"] = result
        if not seen["inputs"]:
            run_after([None] * len(where))
        return (list(result),)

    tap_outputs.defvjp(lambda values: (values, None), outputs_backward)

    where = [i for i, arg in enumerate(args) if _is_inexact(arg)]
    full = list(args)
    for i, value in zip(where, tap_inputs([args[i] for i in where]), strict=True):
        full[i] = value
    leaves, treedef = jax.tree.flatten(forward(*full))
    outputs = [i for i, leaf in enumerate(leaves) if _is_inexact(leaf)]
    for i, value in zip(outputs, tap_outputs([leaves[i] for i in outputs]), strict=True):
        leaves[i] = value
    return jax.tree.unflatten(treedef, leaves)


def _replaced(module: Any, grads: list[Any], by: tuple[Any, ...]) -> list[Any]:
    """Return the gradients that a hook has put in place of others."""
    fits = len(by) == len(grads)
    if not fits or any(g is None and n is not None for g, n in zip(grads, by, strict=True)):
        shown = ", ".join("None" if g is None else "an array" for g in grads)
        raise ValueError(
            f"a backward hook of {path_of(module)} returned {len(by)} gradients, which do not fit "
            f"the {len(grads)} that it was given: ({shown})\n"
            f"    fix: return None, or a tuple with None where there is no gradient"
        )
    return [g if n is None else jnp.asarray(n) for g, n in zip(grads, by, strict=True)]


def _dense(grad: Any) -> Any:
    if isinstance(grad, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(grad.shape, grad.dtype)  # type: ignore[arg-type]
    return grad


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _is_inexact(value: Any) -> bool:
    return hasattr(value, "dtype") and is_inexact(value.dtype)


def runs(hook: Any) -> Any:
    """Note that a hook runs, which must keep nothing that it sees in an open transform."""
    if STATE.frames:
        STATE.hooks[id(hook)] = hook
    return hook


def refuse_kept() -> None:
    """When the outermost transform has returned, refuse that a hook has kept what it saw in it."""
    if STATE.frames or not STATE.hooks or trace_mark() != CLEAN:
        return
    hooks, STATE.hooks = STATE.hooks, {}
    if any(map(is_tracer, _reachable(list(hooks.values())))):
        raise ForeignTransformError(_KEPT_BY_HOOK)


def _reachable(things: list[Any]) -> Iterator[Any]:
    """Yield what functions can reach in closures, globals, plain objects, lists and dicts."""
    seen: set[int] = set()
    while things and len(seen) < 10_000:
        thing = things.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, types.FunctionType):
            names = thing.__code__.co_names
            things += [thing.__globals__[name] for name in names if name in thing.__globals__]
            things += [*(thing.__closure__ or ()), thing.__defaults__]
        elif isinstance(thing, types.CellType):
            things += gc.get_referents(thing)
        elif isinstance(thing, types.MethodType):
            things += [thing.__func__, thing.__self__]
        elif isinstance(thing, (list, tuple, set, collections.deque)):
            things += thing
        elif isinstance(thing, dict):
            things += thing.values()
        elif hasattr(thing, "__dict__") and not isinstance(
            thing, (type, types.ModuleType, Cell, jax.Array)
        ):
            if not type(thing).__module__.startswith("lamina."):
                things += vars(thing).values()


_KEPT_BY_HOOK = """a hook has kept an array that it saw inside a transform, and that exists only \
there: it could not be used afterwards.
    wrong:  hook = lambda module, args, output: kept.append(output)
    right:  ... kept.append(output.shape), or in forward: self.last = output, with \
self.register_buffer("last", None, persistent=False)
    fix: return the array from the transformed function (has_aux=True), keep it in a buffer, or \
remove the hook before"""
