"""``Parameter`` (a trainable value), ``Buffer`` (state), and plain array attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from . import bind
from .bind import Cell
from .box import Box, Recipe, array
from .errors import ShapeError, format_shape
from .hooks import RemovableHandle, add_hook
from .shapes import Shape, is_inexact
from .walk import touch

__all__ = ["ArrayAttribute", "Buffer", "Parameter", "is_trainable"]


class Parameter(Box):
    """A trainable value of a module.

    Args:
        data: the value, anything ``jnp.asarray`` takes. Leave it out to defer the value.
        requires_grad: whether gradients are taken and the optimizer updates it (default True).
        shape: the sizes, ``None`` for each one that is not known yet.
        dtype: default float32, or the dtype of ``data``.
        init: recipe ``(key, shape, dtype) -> Array`` for the deferred value.
        sharding: where the value is to lie (``jax.sharding.Sharding``).

    Raises:
        TypeError: if both ``data`` and ``shape`` are given.

    Example:
        >>> from lamina import nn
        >>> p = nn.Parameter(shape=(2, None), init=nn.init.Zeros())
        >>> p.shape
        (2, None)
        >>> p.shape = (2, 3)
        >>> p[0, 0] = 42.0
        >>> float(p.sum())
        42.0

    Source: the interface of ``torch.nn.Parameter``.
    """

    __slots__ = ("_grad", "_grad_hooks")

    def __init__(
        self,
        data: Any = None,
        requires_grad: bool = True,
        *,
        shape: Shape | None = None,
        dtype: Any = None,
        init: Recipe | None = None,
        sharding: Any = None,
    ) -> None:
        super().__init__(data, shape=shape, dtype=dtype, init=init, sharding=sharding)
        self._requires_grad = requires_grad
        self._grad: _Gradient | None = None
        self._grad_hooks: dict[int, Any] = {}

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set ``requires_grad`` and return the parameter."""
        self.requires_grad = requires_grad
        return self

    @property
    def grad(self) -> jax.Array | None:
        """The gradient accumulated by :func:`lamina.backward`, or ``None``."""
        return None if self._grad is None else bind.read(self._grad)

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is None and self._grad is None:
            return
        if value is not None and tuple(np.shape(value)) != self.shape:
            got = format_shape(np.shape(value))
            raise ShapeError(self._mismatch("gradient shape", format_shape(self.shape), got))
        bind.write(self.grad_cell(), None if value is None else array(value))

    def grad_cell(self) -> Cell:
        """Return the cell that holds the gradient."""
        cell = self._grad
        if cell is None:
            cell = self._grad = bind.belong(_Gradient(self.describe), self._born)
            touch(self.owners)
        return cell

    @property
    def gradients(self) -> list[Cell]:
        """The cell of the gradient, if there is, or was, one."""
        return [] if self._grad is None else [self._grad]

    @property
    def gradient_hooks(self) -> list[Any]:
        """What :meth:`register_hook` was given."""
        return list(self._grad_hooks.values())

    def register_hook(self, hook: Callable[[jax.Array], Any]) -> RemovableHandle:
        """Call ``hook(grad)`` whenever a gradient of this parameter is computed; what it returns,
        if anything, takes the gradient's place.
        """
        if not self.requires_grad:
            raise RuntimeError(
                f"{self.describe()} is frozen, and has no gradient to hook\n"
                f"    fix: p.requires_grad_(True) before p.register_hook(hook)"
            )
        return add_hook(self._grad_hooks, hook, lambda: touch(self.owners))

    def hooked(self, grad: jax.Array) -> jax.Array:
        """Return a gradient as the registered hooks leave it."""
        for hook in self.gradient_hooks:
            changed = hook(grad)
            if changed is not None and np.shape(changed) != grad.shape:
                got = format_shape(np.shape(changed))
                raise ShapeError(self._mismatch("hooked gradient", format_shape(grad.shape), got))
            grad = grad if changed is None else array(changed)
        return grad

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._grad, self._grad_hooks = None, {}
        grad = state.pop("grad", None)
        super().__setstate__(state)
        if grad is not None:
            self.grad = jnp.asarray(grad)

    def __getstate__(self) -> dict[str, Any]:
        grad = self.grad
        return super().__getstate__() | ({} if grad is None else {"grad": np.asarray(grad)})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = super().__deepcopy__(memo)
        twin._grad, twin._grad_hooks = None, {}
        if self.grad is not None:
            bind.adopt(twin.grad_cell(), self.grad)
        return twin

    def __repr__(self) -> str:
        return f"Parameter containing:\n{self._repr_value(f'requires_grad={self.requires_grad}')}"


class _Gradient(Cell):
    """The gradient of a parameter, which may be none."""

    __slots__ = ("name",)

    def __init__(self, name: Callable[[], str]) -> None:
        super().__init__()
        self.name = name

    def describe(self) -> str:
        return f"gradient of {self.name()}"


class Buffer(Box):
    """State of a module that is not trained: running statistics, counters, masks, tables.

    As an attribute of a module it reads as its value, and assigning stores a new one; the box
    itself is ``module.get_buffer(name)``.

    Args:
        data: the value, anything ``jnp.asarray`` takes; leave it out to defer the value.
        persistent: whether the buffer is part of ``state_dict`` (default True).
        shape, dtype, init, sharding: as for :class:`Parameter`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> class Counter(nn.Module):
        ...     def __init__(self):
        ...         self.calls = nn.Buffer(jnp.asarray(0))
        ...     def forward(self, x):
        ...         self.calls += 1
        ...         return x
        >>> net = Counter()
        >>> _ = net(jnp.ones(2)), net(jnp.ones(2))
        >>> net.calls
        Array(2, dtype=int32)

    Source: the interface of ``torch.nn.Buffer``.
    """

    __slots__ = ("persistent",)

    def __init__(
        self,
        data: Any = None,
        persistent: bool = True,
        *,
        shape: Shape | None = None,
        dtype: Any = None,
        init: Recipe | None = None,
        sharding: Any = None,
    ) -> None:
        super().__init__(data, shape=shape, dtype=dtype, init=init, sharding=sharding)
        self.persistent = persistent

    @property
    def is_place(self) -> bool:
        """Whether this is a declared place for an array of any shape, or for none."""
        return self._shape is None and self._recipe is None

    def _copied_fields(self) -> dict[str, Any]:
        return super()._copied_fields() | {"persistent": self.persistent}


class ArrayAttribute(Cell):
    """A plain array among a module's attributes: of any shape, and no part of the state dict.

    NumPy arrays are kept as they are, so that changes in place are seen.
    """

    __slots__ = ("name",)

    def __init__(self, value: Any, name: str) -> None:
        super().__init__(value)
        self.name = name

    def describe(self) -> str:
        return f"array attribute {self.name!r}"


def is_trainable(box: Any) -> bool:
    """Tell whether gradients are taken for a box."""
    return isinstance(box, Parameter) and box.requires_grad and is_inexact(box.dtype)


for _class in (Parameter, Buffer):
    jax.tree_util.register_pytree_node(
        _class,
        lambda box: ((box.data,), None),
        lambda _, parts: parts[0],  # type: ignore[arg-type]
    )
