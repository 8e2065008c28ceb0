"""Boxes: ``Parameter`` (a trainable value) and ``Buffer`` (state).

A box is unshaped (some sizes unknown), abstract (shape and dtype, no memory) or material (a value).
It holds a plain ``jax.Array`` and can be used wherever ``jax.numpy`` takes one.
"""

from __future__ import annotations

import copy
import math
import operator
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from . import bind
from .bind import LOCK, STATE, VERSION
from .errors import (
    DeferredError,
    ForeignTransformError,
    ShapeError,
    TypeMismatchError,
    format_shape,
)
from .operators import Operators
from .shapes import Shape, as_sharding, canonical, check_shape, weakest
from .walk import describe

__all__ = ["Box", "Buffer", "Parameter", "Recipe", "array", "as_sharding", "canonical"]

Recipe = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


class _Maker(Protocol):
    """What a box needs from above: names and seeds. ``materialize.py`` supplies it."""

    def draw(self, box: Box) -> jax.Array: ...
    def seed(self) -> Any: ...


class Box(Operators):
    """A mutable holder of one array, with its shape, dtype, recipe and sharding.

    Use :class:`Parameter` or :class:`Buffer`.
    """

    _maker: ClassVar[_Maker]
    """Supplied by ``materialize.py``, which stands above the boxes."""

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_dtype",
        "_exposed",
        "_gradient_of",
        "_init",
        "_init_is_default",
        "_level",
        "_owners",
        "_requires_grad",
        "_seed",
        "_shape",
        "_sharding",
        "_value",
    )

    def __init__(
        self,
        data: Any = None,
        *,
        shape: Shape | None = None,
        dtype: Any = None,
        init: Recipe | None = None,
        sharding: Any = None,
    ) -> None:
        self._value = None
        self._exposed = None
        self._level = 0
        if STATE.frames:
            bind.note_birth(self)
        self._owners: tuple[weakref.ref, ...] = ()
        self._gradient_of: weakref.ref | None = None
        self._seed: Any = None
        self._init = init
        self._init_is_default = init is not None
        self._sharding = sharding
        self._requires_grad = False
        if data is None:
            self._shape = None if shape is None else check_shape(shape)
            self._dtype = np.dtype(dtype if dtype is not None else np.float32)
            return
        if shape is not None:
            raise TypeError(f"{type(self).__name__}: give either data or shape, not both")
        if isinstance(data, Box):
            data = data.data
        wide = np.dtype(dtype) if dtype is not None else getattr(data, "dtype", None)
        value = jnp.asarray(data, None if dtype is None else canonical(dtype))
        if getattr(value, "weak_type", False):
            value = jax.lax.convert_element_type(value, value.dtype)
        if sharding is not None:
            value = jax.device_put(value, sharding)
        self._shape = tuple(value.shape)
        self._dtype = np.dtype(wide) if isinstance(wide, np.dtype) else np.dtype(value.dtype)
        self._value = value
        self._exposed = value
        VERSION.exposed += 1

    # What is known about the value.

    @property
    def shape(self) -> Shape:
        """The sizes, with ``None`` for a size that is not known yet.

        Setting it fills in unknown sizes: ``p.shape = (256, 784)``. A size that is known already
        must stay as it is.
        """
        value = self._value
        if value is not None:
            return tuple(value.shape)
        return self._shape if self._shape is not None else (None,)

    @shape.setter
    def shape(self, shape: Shape) -> None:
        shape = check_shape(shape)
        old = self._value.shape if self._value is not None else self._shape
        if old is not None and (
            len(old) != len(shape)
            or any(None not in pair and pair[0] != pair[1] for pair in zip(old, shape, strict=True))
        ):
            raise ShapeError(
                f"{self._describe()}: its shape is {format_shape(old)} and can't become "
                f"{format_shape(shape)}; replace the parameter instead: "
                f"module.weight = nn.Parameter(new_value)"
            )
        if self._value is None:
            bind.note_shape(self)
            self._shape = tuple(
                b if a is None else a for a, b in zip(old or shape, shape, strict=True)
            )

    @property
    def dtype(self) -> Any:
        """The dtype of the value as JAX holds it (64-bit types follow JAX's x64 setting)."""
        value = self._value
        return value.dtype if value is not None else canonical(self._dtype)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements; raises :class:`DeferredError` while a size is unknown."""
        return self.numel()

    def numel(self) -> int:
        """Return the number of elements; raises :class:`DeferredError` while a size is unknown."""
        shape = self.shape
        if None in shape:
            raise DeferredError(_UNSHAPED.format(box=self._describe()))
        return math.prod(shape)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """The size of the value in bytes."""
        return self.numel() * np.dtype(self.dtype).itemsize

    @property
    def is_unshaped(self) -> bool:
        """Whether some size is not known yet."""
        return self._value is None and (self._shape is None or None in self._shape)

    @property
    def _awaits_shapes(self) -> bool:
        """Whether the value can't be made yet, for want of a size here or in the recipe."""
        return self._value is None and (
            self._shape is None or None in self._shape or not getattr(self._init, "is_ready", True)
        )

    @property
    def is_material(self) -> bool:
        """Whether the box holds a value."""
        return self._value is not None

    @property
    def init(self) -> Recipe | None:
        """The recipe ``(key, shape, dtype) -> Array`` from which the value is or was made."""
        return self._init

    @init.setter
    def init(self, recipe: Recipe) -> None:
        self.initialize(recipe)

    @property
    def sharding(self) -> Any:
        """Where the value lies, or is to lie; ``None`` means JAX's default device."""
        if self._value is not None and not STATE.frames:
            return self._value.sharding
        return self._sharding

    @sharding.setter
    def sharding(self, sharding: Any) -> None:
        self._sharding = sharding
        if self._value is not None and sharding is not None:
            bind.store(self, jax.device_put(self._read(), sharding))

    # The value.

    @property
    def data(self) -> jax.Array:
        """The value: a ``jax.Array`` that stays valid whatever happens to the box later.

        Reading a box that has a shape but no value yet makes the value from its recipe.
        """
        return self._read()

    @data.setter
    def data(self, value: Any) -> None:
        self._write(value)

    def _read(self) -> jax.Array:
        if STATE.frames:
            value = self._value
            if value is None:
                value = self._fill()
            bind.note_read(self)
            return value
        if STATE.depth == 0 and bind.under_foreign_trace():
            raise ForeignTransformError(_FOREIGN_READ.format(box=self._describe()))
        with LOCK:  # another thread may be tracing, or about to give the value away
            value = self._value
            if value is None:
                value = self._fill()
            if self._exposed is not value:
                self._exposed = value
                VERSION.exposed += 1
        return value

    def _write(self, value: Any) -> None:
        bind.store(self, self._checked(value))

    def _checked(self, value: Any) -> Any:
        """Return ``value`` as an array of exactly this box's shape and dtype, or raise."""
        if isinstance(value, Box):
            value = value._read()
        if self._is_free:
            return None if value is None else array(value)
        dtype = np.dtype(self.dtype)
        if isinstance(value, (bool, int, float, complex)) or (
            isinstance(value, (list, tuple)) and not _has_array(value)
        ):
            host = np.asarray(value)
            if not np.can_cast(weakest(host.dtype), dtype, "same_kind"):
                raise TypeMismatchError(self._mismatch("dtype", dtype, host.dtype))
            value = host.astype(dtype)
        result = value if isinstance(value, jax.Array) else jnp.asarray(value)
        shape = self._value.shape if self._value is not None else self._shape
        if shape is not None and (
            len(shape) != result.ndim
            or any(a is not None and a != b for a, b in zip(shape, result.shape, strict=True))
        ):
            raise ShapeError(
                self._mismatch("shape", format_shape(shape), format_shape(result.shape))
            )
        if result.dtype != dtype or result.weak_type:
            if result.dtype != dtype and not result.weak_type:
                raise TypeMismatchError(self._mismatch("dtype", dtype, result.dtype))
            result = jax.lax.convert_element_type(result, dtype)
        return result

    @property
    def _is_free(self) -> bool:
        """Whether this is a declared place for an array of any shape, or for none."""
        return False

    @property
    def _is_empty(self) -> bool:
        """Whether this is such a place, with no array in it."""
        return self._value is None and self._is_free

    def _mismatch(self, what: str, expected: Any, got: Any) -> str:
        mend = (
            f"mend: value.astype({np.dtype(self.dtype).name!r}), or change the model first: "
            f"net.to(dtype)"
            if what == "dtype"
            else "mend: reshape the value, or replace the parameter: net.name = nn.Parameter(value)"
        )
        return f"{self._describe()}: expected {what} {expected}, got {got}; {mend}"

    def _fill(self) -> jax.Array:
        """Give the box a value from its recipe, or a stand-in while shapes are inferred."""
        if self.is_unshaped:
            raise DeferredError(_UNSHAPED.format(box=self._describe()))
        stand_in = bind.placeholder(self)
        if stand_in is not None:
            return stand_in
        self._make_value()
        return self._value  # type: ignore[return-value]

    def _make_value(self) -> None:
        """Draw the value from the recipe, outside of whatever is being traced."""
        bind.settle(self, self._maker.draw(self))

    def initialize(self, recipe: Recipe, key: Any = None) -> Self:
        """Record a recipe, and draw the value anew if there is one already.

        Args:
            recipe: ``(key, shape, dtype) -> Array``; any function of this signature will do.
            key: a JAX PRNG key to use instead of the seed and the parameter's name.

        Returns:
            The box itself.
        """
        if not callable(recipe):
            raise TypeMismatchError(
                f"{self._describe()}: a recipe is a function (key, shape, dtype) -> Array, "
                f"got {type(recipe).__name__}; for fixed values use nn.init.Value(array)"
            )
        self._init = recipe
        self._init_is_default = False
        self._seed = key if key is not None else self._maker.seed()
        if self._value is not None:
            bind.store(self, self._checked(self._maker.draw(self)))
        return self

    def _default_init(self, recipe: Recipe) -> None:
        """Record a layer's own recipe, unless the user has chosen one."""
        if self._init_is_default or self._init is None:
            bind.note_shape(self)
            self._init = recipe
            self._init_is_default = True

    def materialize(
        self, shape: Shape | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        """Fill in the unknown sizes (PyTorch's name for it on uninitialised parameters)."""
        if shape is not None:
            self.shape = shape
        if dtype is not None and self._value is None:
            self._dtype = np.dtype(dtype)
        if device is not None:
            self.sharding = as_sharding(device)

    def _cast(self, dtype: Any) -> None:
        """Change the dtype, of the value or of the value to come."""
        dtype = np.dtype(dtype)
        if dtype == self._dtype:
            return
        VERSION.static += 1
        if self._value is not None:
            value = self._read().astype(canonical(dtype))
            self._dtype = dtype
            bind.store(self, value)
        self._dtype = dtype

    def _describe(self) -> str:
        return describe(self)

    # PyTorch's in-place and reading methods.

    def copy_(self, value: Any) -> Self:
        """Write ``value``, broadcast to the box's shape and cast to its dtype."""
        source = array(value)
        self._write(jnp.broadcast_to(source.astype(self.dtype), self._known_shape()))
        return self

    def fill_(self, value: Any) -> Self:
        """Set every element to ``value``."""
        self._write(jnp.full(self._known_shape(), value, self.dtype))
        return self

    def zero_(self) -> Self:
        """Set every element to zero."""
        return self.fill_(0)

    def _known_shape(self) -> tuple[int, ...]:
        self.numel()
        return self.shape  # type: ignore[return-value]

    def numpy(self) -> np.ndarray:
        """Return the value as a NumPy array."""
        return np.asarray(self._read())

    def detach(self) -> jax.Array:
        """Return the value without gradient."""
        return jax.lax.stop_gradient(self._read())

    def item(self) -> Any:
        """Return the only element as a Python number."""
        return self._read().item()

    def __getitem__(self, index: Any) -> jax.Array:
        return self._read()[_plain(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        value = array(value)
        if not np.can_cast(weakest(value.dtype), np.dtype(self.dtype), "same_kind"):
            raise TypeMismatchError(self._mismatch("dtype", self.dtype, value.dtype))
        self._write(self._read().at[_plain(index)].set(value.astype(self.dtype)))

    def __len__(self) -> int:
        return len(self._read())

    def __iter__(self) -> Any:
        return iter(self._read())

    def __bool__(self) -> bool:
        return bool(self._read())

    def __float__(self) -> float:
        return float(self._read())

    def __int__(self) -> int:
        return int(self._read())

    def __index__(self) -> int:
        return operator.index(self._read())

    __array_priority__ = 1000  # a NumPy array on the left leaves the operation to the box

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._read(), dtype=dtype)

    def __jax_array__(self) -> jax.Array:
        return self._read()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._read(), name)

    def __format__(self, spec: str) -> str:
        return format(self._read(), spec) if spec else str(self)

    def __hash__(self) -> int:
        return id(self)

    # Copying keeps the value, the recipe and the flags; the copy belongs to nobody yet.

    def __getstate__(self) -> dict[str, Any]:
        state = {
            "shape": self._shape,
            "dtype": self._dtype,
            "init": self._init,
            "init_is_default": self._init_is_default,
            "requires_grad": self._requires_grad,
            "seed": self._seed,
            "extra": dict(self.__dict__),
        }
        if self._value is not None:
            state["value"] = np.asarray(self._read())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        Box.__init__(self)
        self._shape, self._dtype = state["shape"], state["dtype"]
        self._init, self._init_is_default = state["init"], state["init_is_default"]
        self._requires_grad, self._seed = state["requires_grad"], state["seed"]
        self.__dict__.update(state["extra"])
        if "value" in state:
            self._value = self._exposed = jnp.asarray(state["value"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        Box.__init__(twin, init=copy.deepcopy(self._init, memo), sharding=self._sharding)
        twin._shape, twin._dtype = self._shape, self._dtype
        twin._init_is_default, twin._seed = self._init_is_default, self._seed
        twin._requires_grad = self._requires_grad
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if self._value is not None:
            twin._value = twin._exposed = self._read()
        return twin

    def __copy__(self) -> Self:
        return self.__deepcopy__({})

    def __repr__(self) -> str:
        return f"{type(self).__name__} containing:\n{self._repr_value()}"

    def _repr_value(self, *extra: str) -> str:
        if self._value is None:
            shape = "(?)" if self._shape is None else format_shape(self._shape)
            state = "unshaped" if self.is_unshaped else "abstract"
            parts = [f"{state} {shape}", np.dtype(self.dtype).name]
            if self._init is not None:
                parts.append(f"init={self._init!r}")
            return ", ".join([*parts, *extra])
        text = repr(self._read())
        return (
            text[:-1] + "".join(f", {part}" for part in extra) + ")" if text.endswith(")") else text
        )


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

    __slots__ = ("_grad",)

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
        self._grad: Buffer | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are taken and the optimizer updates this parameter."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, flag: bool) -> None:
        if self._requires_grad != bool(flag):
            VERSION.static += 1
            self._requires_grad = bool(flag)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set ``requires_grad`` and return the parameter."""
        self.requires_grad = requires_grad
        return self

    @property
    def grad(self) -> jax.Array | None:
        """The gradient accumulated by :func:`lamina.backward`, or ``None``."""
        box = self._grad
        return None if box is None else box._read_optional()

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is None and self._grad is None:
            return
        if value is not None and tuple(np.shape(value)) != self.shape:
            raise ShapeError(
                self._mismatch(
                    "gradient shape", format_shape(self.shape), format_shape(np.shape(value))
                )
            )
        bind.store(self._grad_box(), None if value is None else array(value))

    def _grad_box(self) -> Buffer:
        box: Any = self._grad
        if box is None:
            box = self._grad = bind.outlive(Buffer())
            box._gradient_of = weakref.ref(self)
        return box

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self.grad is not None:
            state["grad"] = np.asarray(self.grad)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._grad = None
        if "grad" in state:
            self.grad = jnp.asarray(state["grad"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = super().__deepcopy__(memo)
        twin._grad = None
        if self._grad is not None and self._grad._value is not None:
            twin.grad = self.grad
        return twin

    def __repr__(self) -> str:
        return f"Parameter containing:\n{self._repr_value(f'requires_grad={self.requires_grad}')}"


class Buffer(Box):
    """State of a module that is not trained: running statistics, counters, masks, tables.

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
        >>> int(net.calls)
        2

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
    def _is_free(self) -> bool:
        return self._shape is None and self._init is None

    def _read_optional(self) -> jax.Array | None:
        if self._value is None and self._is_free:
            if STATE.frames:
                bind.note_read(self)
            return None
        return self._read()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"persistent": self.persistent}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.persistent = state["persistent"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = super().__deepcopy__(memo)
        twin.persistent = self.persistent
        return twin


def array(value: Any) -> jax.Array:
    """Return a box, NumPy array, list or scalar as a ``jax.Array`` (or tracer).

    Example:
        >>> from lamina._core.parameter import array
        >>> array([1.0, 2.0]).shape
        (2,)
    """
    if isinstance(value, Box):
        return value._read()
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def _has_array(value: Any) -> bool:
    return any(isinstance(leaf, (Box, jax.Array, np.ndarray)) for leaf in jax.tree.leaves(value))


def _plain(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_plain(part) for part in index)
    return index._read() if isinstance(index, Box) else index


for _class in (Parameter, Buffer):
    jax.tree_util.register_pytree_node(
        _class,
        lambda box: ((box._read(),), None),
        lambda _, parts: parts[0],  # type: ignore[arg-type]
    )

_UNSHAPED = """{box} has no value yet, and some of its sizes are unknown.
    mend:  pass data through the model once:  net(x)
    or:    lamina.infer(net, jax.ShapeDtypeStruct((batch, features), jnp.float32))
    or:    state the sizes when building the layer"""

_FOREIGN_READ = """{box} was read under a plain JAX transform that records a program (jax.jit, \
jax.lax.scan, jax.checkpoint ...): its present value would be frozen into it as a constant.
    wrong:  jax.jit(lambda x: x @ net.weight)(x)
    right:  lamina.jit(lambda x: x @ net.weight)(x)
    or:     weight = net.weight.data   outside, and pass it as an argument"""
