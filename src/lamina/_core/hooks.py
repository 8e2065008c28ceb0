"""Hooks: functions of the user's that run around ``forward`` and around its gradient."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp

from .bind import VERSION

__all__ = ["RemovableHandle", "add_hook", "run_backward_hooks"]

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

    def __init__(self, hooks: dict[int, Any]) -> None:
        self.id = next(_IDS)
        self._hooks = hooks

    def remove(self) -> None:
        """Remove the hook; a second call does nothing."""
        self._hooks.pop(self.id, None)
        VERSION.static += 1

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def add_hook(module: Any, registry: str, hook: Any, prepend: bool = False) -> RemovableHandle:
    """Add ``hook`` to one of a module's hook registries and return its handle."""
    hooks = module.__dict__.get(registry)
    if hooks is None:
        hooks = module.__dict__[registry] = OrderedDict()
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    if prepend:
        hooks.move_to_end(handle.id, last=False)
    VERSION.static += 1
    return handle


def run_backward_hooks(module: Any, args: tuple[Any, ...], forward: Any) -> Any:
    """Call ``forward(*args)`` so that the module's backward hooks see its gradients.

    The gradient with respect to the outputs reaches the pre-hooks and then, together with the
    gradient with respect to the inputs, the hooks. Either may return a replacement.
    """
    before = list(module._backward_pre_hooks.values())
    after = list(module._backward_hooks.values())
    seen: dict[str, Any] = {}

    @jax.custom_vjp
    def tap_inputs(values: Any) -> Any:
        return values

    def inputs_backward(_: None, grads: Any) -> Any:
        result = grads
        for hook in after:
            changed = hook(module, tuple(result), seen.get("outputs"))
            if changed is not None:
                result = [jnp.asarray(c) for c in _as_tuple(changed)]
        return (list(result),)

    tap_inputs.defvjp(lambda values: (values, None), inputs_backward)

    @jax.custom_vjp
    def tap_outputs(values: Any) -> Any:
        return values

    def outputs_backward(_: None, grads: Any) -> Any:
        result = tuple(grads)
        for hook in before:
            changed = hook(module, result)
            if changed is not None:
                result = _as_tuple(changed)
        seen["outputs"] = result
        return (list(result),)

    tap_outputs.defvjp(lambda values: (values, None), outputs_backward)

    where = [i for i, arg in enumerate(args) if _is_float(arg)]
    tapped = tap_inputs([args[i] for i in where])
    full = list(args)
    for i, value in zip(where, tapped, strict=True):
        full[i] = value
    leaves, treedef = jax.tree.flatten(forward(*full))
    outputs = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
    for i, value in zip(outputs, tap_outputs([leaves[i] for i in outputs]), strict=True):
        leaves[i] = value
    return jax.tree.unflatten(treedef, leaves)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _is_float(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact)
