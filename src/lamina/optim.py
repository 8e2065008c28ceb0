"""``Optimizer``: any optax transformation, with its state kept by parameter name."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._core import bind
from ._core.bind import STATE, VERSION
from ._core.errors import DeferredError, LoadError, did_you_mean, format_shape
from ._core.module import Module
from ._core.parameter import Buffer, Parameter, array
from ._core.walk import fingerprint, walk

__all__ = ["Optimizer"]


class _StateBox(Buffer):
    """One array of an optimizer's state; its first value comes from the transformation."""

    __slots__ = ("optimizer",)

    def __init__(self, optimizer: weakref.ref[Optimizer], shape: Any, dtype: Any) -> None:
        super().__init__(shape=shape, dtype=dtype)
        bind.outlive(self)
        self.optimizer = optimizer

    def _make_value(self) -> None:
        optimizer = self.optimizer()
        assert optimizer is not None
        optimizer._fill()

    def _describe(self) -> str:
        return "optimizer state"


class Optimizer:
    """Updates the trainable parameters of a model with an optax transformation.

    May be made before shapes are known. Tied parameters have one state, frozen ones none;
    parameters that are added, frozen or unfrozen later are followed, and the others keep their
    state.

    Args:
        net: the model.
        tx: an optax transformation, such as ``optax.adamw(1e-3)``.

    Example:
        >>> import jax.numpy as jnp, lamina, optax
        >>> from lamina import nn
        >>> net = nn.Linear(3, 1)
        >>> opt = lamina.Optimizer(net, optax.adam(1e-2))
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     loss = lamina.backward(lambda: (net(jnp.ones((2, 3))) ** 2).mean())
        ...     opt.step()
        >>> int(opt.state_dict()["0.count"])
        3

    Source: optax, https://optax.readthedocs.io
    """

    def __init__(self, net: Module, tx: optax.GradientTransformation) -> None:
        if not isinstance(net, Module):
            raise TypeError(
                f"Optimizer: expected a module, got {type(net).__name__}; write "
                f"lamina.Optimizer(net, optax.adam(1e-3)) and freeze what is not to be trained: "
                f"net.encoder.requires_grad_(False)"
            )
        if not hasattr(tx, "update"):
            raise TypeError(
                f"Optimizer: expected an optax transformation, got {type(tx).__name__}; "
                f"for instance optax.adam(1e-3)"
            )
        self.net = net
        self.tx = optax.with_extra_args_support(tx)
        self._reference: Any = weakref.ref(self)
        self._boxes: dict[str, _StateBox] = {}
        self._treedef: Any = None
        self._names: dict[str, Parameter] = {}
        self._version = -1
        self._update = jax.jit(self._pure_update)

    # The parameters and their state.

    def _trainable(self) -> dict[str, Parameter]:
        return {
            name: box
            for box, name in walk(self.net).names.items()
            if isinstance(box, Parameter) and box.requires_grad and _is_float(box)
        }

    def _sync(self) -> dict[str, Parameter]:
        """Follow the model: make state for new parameters, drop that of frozen ones."""
        if self._version == VERSION.static and self._treedef is not None:
            return self._names
        names = self._trainable()
        unknown = [name for name, box in names.items() if box.is_unshaped]
        if unknown:
            raise DeferredError(
                f"the optimizer's state can't be made yet, sizes are unknown: {', '.join(unknown)}"
                f"\n    mend:  pass data through the model once, net(x), or call lamina.infer"
            )
        if self._treedef is None or {n: _spec(b) for n, b in names.items()} != self._specs:
            self._specs = {name: _spec(box) for name, box in names.items()}
            shapes = jax.eval_shape(self.tx.init, self._specs)
            leaves, self._treedef = jax.tree_util.tree_flatten_with_path(shapes)
            old, self._boxes = self._boxes, {}
            for path, leaf in leaves:
                name = _join(path)
                box = old.get(name)
                if box is None or box.shape != leaf.shape:
                    box = _StateBox(self._reference, leaf.shape, leaf.dtype)
                box._cast(leaf.dtype)
                self._boxes[name] = box
            self._owners = [_owner(path, names) for path, _ in leaves]
            VERSION.static += 1
        self._names = names
        self._version = VERSION.static
        return names

    def _fill(self) -> None:
        """Give state that has no value yet its first one."""
        with jax.ensure_compile_time_eval():
            params = {}
            for name, box in self._names.items():
                box._read()
                params[name] = bind.settled_value(box)
            leaves = jax.tree.leaves(self.tx.init(params))
        for box, value in zip(self._boxes.values(), leaves, strict=True):
            if bind.settled_value(box) is None:
                value = jnp.asarray(value, box.dtype)
                bind.settle(box, value)
                box._exposed = value  # some transformations put one array into several places
        VERSION.exposed += 1

    # Stepping.

    def step(self, grads: Mapping[str, Any] | None = None, **extra: Any) -> None:
        """Update the parameters.

        Args:
            grads: ``{name: gradient}`` as :func:`lamina.value_and_grad` returns it. Left out, the
                ``.grad`` of each parameter is used, and parameters without one are skipped.
            **extra: passed on to the transformation (for instance ``value=loss``).

        Raises:
            LoadError: for gradients under unknown or frozen names, or of a wrong shape.
            DeferredError: if there are no gradients at all.
        """
        names = self._sync()
        if grads is None:
            grads = {name: box.grad for name, box in names.items() if box.grad is not None}
            if not grads:
                raise DeferredError(
                    "opt.step(): no parameter has a gradient\n"
                    "    mend:  loss = lamina.backward(lambda: loss_fn(net(x), y)); opt.step()\n"
                    "    or:    loss, grads = lamina.value_and_grad(f)(net); opt.step(grads)"
                )
        self._check(names, grads)
        params = [box._read() for box in names.values()]
        state = [box._read() for box in self._boxes.values()]
        given = [array(grads[name]) if name in grads else None for name in names]
        if STATE.frames:
            new_params, new_state = self._pure_update(params, state, given, extra)
        else:
            new_params, new_state = self._update(params, state, given, extra)
        skipped = {name for name in names if name not in grads}
        for (name, box), value in zip(names.items(), new_params, strict=True):
            if name not in skipped:
                box._write(value)
        for box, owner, value in zip(self._boxes.values(), self._owners, new_state, strict=True):
            if owner not in skipped:
                box._write(value)

    def _pure_update(self, params: Any, state: Any, grads: Any, extra: Any) -> Any:
        names = list(self._names)
        tree = dict(zip(names, params, strict=True))
        given = {
            name: jnp.zeros_like(tree[name]) if grad is None else grad.astype(tree[name].dtype)
            for name, grad in zip(names, grads, strict=True)
        }
        updates, new_state = self.tx.update(
            given, jax.tree.unflatten(self._treedef, state), tree, **extra
        )
        new: Any = optax.apply_updates(tree, updates)
        return [new[name] for name in names], jax.tree.leaves(new_state)

    def _check(self, names: Mapping[str, Parameter], grads: Mapping[str, Any]) -> None:
        problems = []
        frozen = {name for name, box, _ in walk(self.net).entries if name not in names}
        for name, grad in grads.items():
            if name not in names:
                why = "is frozen or tied" if name in frozen else "is no parameter of the model"
                problems.append(f"  {name}: {why}.{did_you_mean(name, names)}")
            elif tuple(np.shape(grad)) != names[name].shape:
                problems.append(
                    f"  {name}: expected shape {format_shape(names[name].shape)}, got "
                    f"{format_shape(np.shape(grad))}"
                )
        if problems:
            raise LoadError("opt.step(grads): these gradients do not fit:\n" + "\n".join(problems))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or set them to zero."""
        self.net.zero_grad(set_to_none)

    # The state as data.

    @property
    def state(self) -> Any:
        """The optax state, a pytree of arrays; can be set to one of the same structure."""
        self._sync()
        return jax.tree.unflatten(self._treedef, [box.data for box in self._boxes.values()])

    @state.setter
    def state(self, state: Any) -> None:
        self._sync()
        leaves, treedef = jax.tree.flatten(state)
        if treedef != self._treedef:
            raise LoadError("opt.state: the new state has another structure than the old one")
        for box, value in zip(self._boxes.values(), leaves, strict=True):
            box._write(value)

    def state_dict(self) -> dict[str, jax.Array]:
        """Return the state as ``{name: array}``, a snapshot ready for :func:`lamina.save`."""
        self._sync()
        return {name: box.data for name, box in self._boxes.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state from a dict that :meth:`state_dict` returned: all of it or nothing.

        Raises:
            LoadError: listing every missing, unexpected and mis-shaped entry.
        """
        self._sync()
        problems = [
            f"  missing: {name}{did_you_mean(name, state_dict)}"
            for name in self._boxes
            if name not in state_dict
        ]
        values = {}
        for name, value in state_dict.items():
            box = self._boxes.get(name)
            if box is None:
                problems.append(f"  unexpected: {name}{did_you_mean(name, self._boxes)}")
                continue
            value = jnp.asarray(value)
            if value.shape != box.shape or value.dtype != box.dtype:
                problems.append(
                    f"  {name}: expected {box.dtype}{list(box.shape)}, got "
                    f"{value.dtype}{list(value.shape)}"
                )
            values[name] = value
        if problems:
            raise LoadError(
                "the optimizer's state does not fit; nothing was loaded:\n" + "\n".join(problems)
            )
        for name, value in values.items():
            box = self._boxes[name]
            box._write(jax.device_put(value, box.sharding) if box.is_material else value)

    def __lamina_tensors__(self) -> Any:
        return self.state_dict(), {}, {}

    # What compiled functions need.

    def _state_boxes(self) -> list[Any]:
        return [*walk(self.net).boxes, *self._boxes.values()]

    def _state_fingerprint(self) -> Any:
        mark, mutable = fingerprint(self.net)
        return (mark, type(self), self.tx, tuple(self._boxes), self._treedef), mutable

    def __repr__(self) -> str:
        return f"Optimizer({type(self.net).__name__}, {len(self._trainable())} parameters)"


def _is_float(box: Parameter) -> bool:
    return jnp.issubdtype(box.dtype, jnp.inexact)


def _spec(box: Parameter) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(box.shape, box.dtype)


def _join(path: Any) -> str:
    """Write a path into an optax state as a name: ``0.mu.layer.weight``."""
    parts = []
    for key in path:
        for field in ("key", "name", "idx"):
            if hasattr(key, field):
                parts.append(str(getattr(key, field)))
                break
    return ".".join(parts)


def _owner(path: Any, names: Mapping[str, Parameter]) -> str | None:
    """Return the parameter that a leaf of the state belongs to, if any."""
    for key in reversed(path):
        if getattr(key, "key", None) in names:
            return key.key
    return None
