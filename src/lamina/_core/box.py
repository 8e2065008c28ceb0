"""Boxes: what ``Parameter`` and ``Buffer`` share.

A box holds a plain ``jax.Array`` and can be used wherever ``jax.numpy`` takes one. What it holds
goes in and out through the gate in ``bind.py``; here is what is known about the value.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from . import bind, changes
from .bind import STATE, Cell
from .draw import Origin, Recipe, TracedSeed, draw
from .errors import DeferredError, ShapeError, TypeMismatchError, format_shape
from .operators import Operators
from .random import BIRTHS, Generator
from .recipe import are_equal
from .shapes import Shape, Size, as_sharding, canonical, check_shape, fits, weakest
from .walk import changed, describe, identify, origin_of, touch

__all__ = ["Box", "Recipe", "array", "is_array"]


class Box(Cell, Operators):
    """A mutable holder of one array, with its shape, dtype, recipe and sharding.

    Use :class:`Parameter` or :class:`Buffer`.
    """

    __slots__ = (
        "__dict__",
        "_birth",
        "_born",
        "_dtype",
        "_origin",
        "_recipe",
        "_requires_grad",
        "_seed",
        "_shape",
        "_sharding",
        "owners",
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
        self.owners: tuple[Any, ...] = ()
        self._born = bind.birth()
        self._birth: Any = None
        self._origin: Origin | None = None
        self._seed: Any = None
        self._recipe = init
        self._sharding = sharding
        self._requires_grad = False
        if data is None:
            self._shape = None if shape is None else check_shape(shape)
            self._dtype = np.dtype(dtype if dtype is not None else np.float32)
            super().__init__()
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
        super().__init__(value)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):  # a box's own, and no attribute of the user's
            object.__setattr__(self, name, value)
            return
        self._refuse_change(f"attribute {name!r}")  # a user's own, which forward may read
        object.__setattr__(self, name, value)
        touch(self.owners)

    # What is known about the value.

    @property
    def state(self) -> str:
        """``"material"`` (there is a value), ``"abstract"`` (shape and dtype, no memory),
        ``"unshaped"`` (a size is unknown, here or in the recipe), or ``"empty"``: a place for an
        array of any shape, with none in it.
        """
        if not self.is_empty:
            return "material"
        if self.is_place:
            return "empty"
        known = self._shape is not None and None not in self._shape
        return "abstract" if known and getattr(self._recipe, "is_ready", True) else "unshaped"

    @property
    def is_material(self) -> bool:
        """Whether the box holds a value."""
        return not self.is_empty

    @property
    def is_unshaped(self) -> bool:
        """Whether some size is not known yet."""
        return self.is_empty and (self._shape is None or None in self._shape)

    @property
    def is_place(self) -> bool:
        """Whether this is a declared place for an array of any shape, or for none."""
        return False

    @property
    def is_fixed(self) -> bool:
        """Whether shape and dtype never change, and there is always a value once there is one."""
        return not self.is_place

    @property
    def shape(self) -> Shape:
        """The sizes, with ``None`` for a size that is not known yet.

        Setting it fills in unknown sizes: ``p.shape = (256, 784)``. A size that is known already
        must stay as it is.
        """
        known = self.known_shape
        return (None,) if known is None else known

    @shape.setter
    def shape(self, shape: Shape) -> None:
        shape = check_shape(shape)
        old = self.known_shape
        if not fits(old, shape):
            raise ShapeError(
                f"{self.describe()}: its shape is {format_shape(self.shape)} and can't become "
                f"{format_shape(shape)}\n"
                f"    fix: replace it: {self._path()} = nn.{type(self).__name__}(new_value)"
            )
        new = tuple(b if a is None else a for a, b in zip(old or shape, shape, strict=True))
        if new != old:
            self.reform(new, self._dtype)

    @property
    def known_shape(self) -> Shape | None:
        """The sizes that a value must have: ``None`` if any number of axes will do."""
        value = bind.raw_values([self])[0]
        return self._shape if value is None else tuple(value.shape)

    @property
    def declared_dtype(self) -> np.dtype:
        """The dtype as declared; 64-bit types may be held as 32-bit ones."""
        return self._dtype

    def reform(self, shape: Shape | None, dtype: Any) -> None:
        """Set shape and dtype; taken back if the trace that is open fails."""
        former = self._shape, self._dtype
        if STATE.frames:
            changes.on_error(lambda: self.reform(*former))
        self._shape, self._dtype = shape, np.dtype(dtype)
        touch(self.owners)

    @property
    def dtype(self) -> Any:
        """The dtype of the value as JAX holds it (64-bit types follow JAX's x64 setting)."""
        value = bind.raw_values([self])[0]
        return value.dtype if value is not None else canonical(self._dtype)

    @property
    def ndim(self) -> int:
        """The number of dimensions; ``dim()`` is the same."""
        return len(self.shape)

    @property
    def size(self) -> Size:
        """The number of elements. Called, the sizes: ``p.size()``, ``p.size(0)``.

        Raises :class:`DeferredError` while a size is unknown.
        """
        return Size(self._all_sizes())

    def numel(self) -> int:
        """Return the number of elements; raises :class:`DeferredError` while a size is unknown."""
        return math.prod(self._all_sizes())

    def _all_sizes(self) -> tuple[int, ...]:
        shape = self.shape
        if None in shape:
            raise DeferredError(
                _UNSHAPED.format(
                    box=self.describe(),
                    why="shape " + format_shape(self.shape) + " is not known yet",
                )
            )
        return shape  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """The size of the value in bytes."""
        return self.numel() * np.dtype(self.dtype).itemsize

    @property
    def init(self) -> Recipe | None:
        """The recipe ``(key, shape, dtype) -> Array`` from which the value is or was made."""
        return self._recipe

    @init.setter
    def init(self, recipe: Recipe) -> None:
        self.initialize(recipe)

    @property
    def sharding(self) -> Any:
        """Where the value lies, or is to lie; ``None`` means JAX's default device."""
        if not self.is_empty and not STATE.frames:
            return bind.raw_values([self])[0].sharding
        return self._sharding

    @sharding.setter
    def sharding(self, sharding: Any) -> None:
        self._refuse_change("sharding")
        self._sharding = sharding
        touch(self.owners)
        if not self.is_empty and sharding is not None:
            bind.write(self, jax.device_put(self.data, sharding))

    @property
    def declared_sharding(self) -> Any:
        """Where the value is meant to lie; ``None`` if nobody has said so."""
        return self._sharding

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are taken and the optimizer updates this value."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, flag: bool) -> None:
        if self._requires_grad != bool(flag):
            self._refuse_change("requires_grad")
            self._requires_grad = bool(flag)
            touch(self.owners, by=changed(self, "requires_grad", not flag, bool(flag)))

    def _refuse_change(self, what: str) -> None:
        changes.refuse_static_change(self._born, _STATIC, box=self.describe(), what=what)

    # The value.

    @property
    def data(self) -> jax.Array:
        """The value: a ``jax.Array`` that stays valid whatever happens to the box later.

        Reading a box that has a shape but no value yet makes the value from its recipe. Under
        ``lamina.grad`` gradients flow through it; :meth:`detach` stops them.
        """
        return bind.read(self)

    @data.setter
    def data(self, value: Any) -> None:
        bind.write(self, self._checked(value))

    def _checked(self, value: Any) -> Any:
        """Return ``value`` as an array of exactly this box's shape and dtype, or raise."""
        value = array(value) if isinstance(value, Box) else value
        if self.is_place:
            return None if value is None else array(value)
        dtype = np.dtype(self.dtype)
        if isinstance(value, (bool, int, float, complex)) or (
            isinstance(value, (list, tuple)) and not _has_array(value)
        ):
            host = np.asarray(value)
            if not np.can_cast(weakest(host.dtype), dtype, "same_kind"):
                raise TypeMismatchError(self._mismatch("dtype", dtype, host.dtype))
            value = host.astype(dtype)
        result = array(value)
        if not fits(self.known_shape, result.shape):
            raise ShapeError(
                self._mismatch("shape", format_shape(self.shape), format_shape(result.shape))
            )
        if result.dtype != dtype or result.weak_type:
            narrows = not np.can_cast(weakest(result.dtype), dtype, "same_kind")
            if result.dtype != dtype and (not result.weak_type or narrows):
                raise TypeMismatchError(self._mismatch("dtype", dtype, result.dtype))
            result = jax.lax.convert_element_type(result, dtype)
        if self._shape is None or None in self._shape:
            self.reform(tuple(result.shape), self._dtype)
        return self._placed(result)

    def _placed(self, value: Any) -> Any:
        """Put a value where this box's value is declared to lie."""
        sharding = self._sharding
        if sharding is None:
            return self._beside_others(value)
        if not bind.is_tracer(value):
            return value if value.sharding == sharding else jax.device_put(value, sharding)
        if len(sharding.device_set) == 1:
            return value
        return jax.lax.with_sharding_constraint(value, sharding)

    def _beside_others(self, value: Any) -> Any:
        """Spread a value over the devices over which the present one is spread, if it is."""
        held = bind.raw_values([self])[0]
        if held is None or bind.is_tracer(held) or bind.is_tracer(value):
            return value
        spread, here = (len(v.sharding.device_set) > 1 for v in (held, value))
        fits = spread and not here and held.shape == value.shape
        return jax.device_put(value, held.sharding) if fits else value

    def _mismatch(self, what: str, expected: Any, got: Any) -> str:
        fix = (
            f"value.astype({np.dtype(self.dtype).name!r}), or change the model first: net.to(dtype)"
            if what == "dtype"
            else f"reshape the value, or replace the box: {self._path()} = "
            f"nn.{type(self).__name__}(value)"
        )
        return f"{self.describe()}: expected {what} {expected}, got {got}\n    fix: {fix}"

    def _path(self) -> str:
        """Write how a user reaches the box from its model: ``net.hidden.weight``."""
        _, name = identify(self)
        parts = [f".{p}" if p.isidentifier() else f"[{p}]" for p in name.split(".")] if name else []
        return "net" + "".join(parts) if parts else f"my_{type(self).__name__.lower()}"

    def first_value(self) -> Any:
        """Draw the value from the recipe, outside of whatever is being traced."""
        state = self.state
        if state == "empty":
            return None
        if state == "unshaped":
            raise DeferredError(_UNSHAPED.format(box=self.describe(), why=self.what_is_missing()))
        if self._recipe is None:
            raise DeferredError(_NO_RECIPE.format(box=self.describe(), shape=self._shape))
        return self.drawn(self.origin())

    def form(self) -> Any:
        """Return something with the shape and dtype of the value, or ``None``."""
        return None if self.state == "empty" else self

    def stand_in(self) -> jax.ShapeDtypeStruct | None:
        """Return the shape and dtype of the value to come."""
        if self.is_place:
            return None
        if self._shape is None or None in self._shape:
            raise DeferredError(
                _UNSHAPED.format(
                    box=self.describe(),
                    why="shape " + format_shape(self.shape) + " is not known yet",
                )
            )
        return jax.ShapeDtypeStruct(self._shape, self.dtype)  # type: ignore[arg-type]

    def what_is_missing(self) -> str:
        """Say why the value can't be made yet."""
        if self.is_unshaped:
            return f"shape {format_shape(self.shape)} is not known yet"
        return f"its recipe {self._recipe!r} waits for a size that is not known yet"

    def follow(self, old: Box, new: Any) -> None:
        """Have a recipe that takes a size from another box take it from its replacement."""
        if getattr(self._recipe, "of", None) is old and isinstance(new, Box):
            self._recipe = self._recipe.with_weight(new)  # type: ignore[union-attr]

    def drawn(self, origin: Origin) -> jax.Array:
        """Return the value that the recipe gives for an origin."""
        assert self._recipe is not None
        assert self._shape is not None
        sizes = tuple(int(size) for size in self._shape)  # type: ignore[arg-type]
        return draw(
            self._recipe, origin, sizes, np.dtype(canonical(self._dtype)), self._sharding,
            self.describe(),
        )  # fmt: skip

    @property
    def promised(self) -> Origin | None:
        """The origin that was fixed when the box was copied, and that its copies share."""
        return self._origin

    def origin(self) -> Origin:
        """Return from which seed, model number and name the value follows."""
        if self._origin is not None:
            return self._origin
        root, name = identify(self)
        if root is None:
            self._birth = seed, number = self._birth or BIRTHS.take(self._born)
        else:
            seed, number = origin_of(root, BIRTHS.take)
        if self._seed is not None:
            fresh = getattr(seed, "fresh", False)
            seed, number = self._seed, 0 if isinstance(self._seed, jax.Array) else number
            if fresh and isinstance(seed, TracedSeed):
                seed = TracedSeed(seed.words, fresh)
        BIRTHS.use(seed, number)
        return seed, number, name

    def initialize(self, recipe: Recipe | None = None, key: Any = None) -> Self:
        """Record a recipe, and draw the value anew if there is one already.

        Args:
            recipe: ``(key, shape, dtype) -> Array``; any function of this signature will do.
                Left out, the recipe on record.
            key: a JAX PRNG key or a ``lamina.Generator`` to use instead of the seed in force and
                the box's name.

        Returns:
            The box itself.
        """
        recipe = self._recipe if recipe is None else recipe
        key = key.next_key() if isinstance(key, Generator) else key
        if not callable(recipe):
            raise TypeMismatchError(
                f"{self.describe()}: a recipe is a function (key, shape, dtype) -> Array, "
                f"got {type(recipe).__name__}; for fixed values use nn.init.Value(array)\n"
                f"    fix: p.initialize(nn.init.Value(array))"
            )
        seed = key if key is not None else BIRTHS.seed_inside() if STATE.frames else BIRTHS.seed()
        former = self._recipe, self._origin, self._seed
        self._recipe, self._origin, self._seed = recipe, None, seed
        if changes.outlives_compiled(self._born):  # only the value is new in each call
            if not are_equal(recipe, former[0]):
                self._recipe, self._origin, self._seed = former
                self._refuse_change("recipe")
            try:
                bind.write(self, self._checked(self.drawn(self.origin())))
            finally:
                self._recipe, self._origin, self._seed = former
        elif not self.is_empty:
            bind.write(self, self._checked(self.drawn(self.origin())))
        return self

    def materialize(
        self, shape: Shape | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        """Fill in the unknown sizes (PyTorch's name for it on uninitialised parameters)."""
        if shape is not None:
            self.shape = shape
        if dtype is not None and self.is_empty:
            self.reform(self._shape, dtype)
        if device is not None:
            self.sharding = as_sharding(device)

    def cast(self, dtype: Any) -> None:
        """Change the dtype, of the value or of the value to come."""
        dtype = np.dtype(dtype)
        if dtype == self._dtype:
            return
        self._refuse_change("dtype")
        value = None if self.is_empty else self.data.astype(canonical(dtype))
        self.reform(self._shape, dtype)
        if value is not None:
            bind.write(self, value)

    def replace(self, value: jax.Array) -> None:
        """Store a value of any shape and dtype, which become the box's own."""
        self._refuse_change("shape")
        self.reform(tuple(value.shape), value.dtype)
        bind.write(self, self._placed(value))

    def describe(self) -> str:
        """Name the box for a message: ``parameter '0.weight'``."""
        return describe(self)

    # PyTorch's methods; more are in ``operators.py``.

    def _updated(self, value: Any) -> Self:
        value = jnp.asarray(value)
        if not np.can_cast(weakest(value.dtype), np.dtype(self.dtype), "same_kind"):
            raise TypeMismatchError(self._mismatch("dtype", self.dtype, value.dtype))
        bind.write(self, self._checked(value.astype(self.dtype)))
        return self

    def __getattr__(self, name: str) -> Any:
        if name in _REPLACED:
            raise AttributeError(
                f"a {type(self).__name__} has no {name}\n    fix: {_REPLACED[name]}"
            )
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.data, name)

    def __format__(self, spec: str) -> str:
        return format(self.data, spec) if spec else str(self)

    def __hash__(self) -> int:
        return id(self)

    # Copying keeps the value, the recipe and the flags; the copy belongs to nobody yet.

    def _copied_fields(self) -> dict[str, Any]:
        """Return what a copy keeps. A value that is still to come will be the same in both."""
        if self.is_empty and self._recipe is not None and self._origin is None:
            self._origin = self.origin()
        return {
            "_shape": self._shape,
            "_dtype": self._dtype,
            "_requires_grad": self._requires_grad,
            "_seed": self._seed,
            "_origin": self._origin,
        }

    def __getstate__(self) -> dict[str, Any]:
        state = self._copied_fields() | {"_recipe": self._recipe, "extra": self._extra()}
        if not self.is_empty:
            state["value"] = np.asarray(self.data)
        return state

    def _extra(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        Box.__init__(self)
        self.__dict__.update(state.pop("extra"))
        value = state.pop("value", None)
        for field, content in state.items():
            object.__setattr__(self, field, content)
        if value is not None:
            bind.settle(self, jnp.asarray(value))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        Box.__init__(twin, init=copy.deepcopy(self._recipe, memo), sharding=self._sharding)
        for field, content in self._copied_fields().items():
            object.__setattr__(twin, field, content)
        twin.__dict__.update(copy.deepcopy(self._extra(), memo))
        if not self.is_empty:
            bind.adopt(twin, self.data)
        return twin

    def __copy__(self) -> Self:
        return self.__deepcopy__({})

    def forget(self) -> None:
        """Become abstract again, to be drawn from the recipe under the present name."""
        if self._recipe is not None and self._shape is not None:
            bind.clear([self])
        self._seed = self._origin = None

    def __repr__(self) -> str:
        return f"{type(self).__name__} containing:\n{self._repr_value()}"

    def _repr_value(self, *extra: str) -> str:
        if self.is_empty:
            shape = "(?)" if self._shape is None else format_shape(self._shape)
            known = "unshaped" if self.is_unshaped else "abstract"
            parts = [f"{known} {shape}", np.dtype(self.dtype).name]
            if self._recipe is not None:
                parts.append(f"init={self._recipe!r}")
            return ", ".join([*parts, *extra])
        text = repr(self.data)
        return (
            text[:-1] + "".join(f", {part}" for part in extra) + ")" if text.endswith(")") else text
        )


def array(value: Any) -> jax.Array:
    """Return a box, NumPy array, list or scalar as a ``jax.Array`` (or tracer)."""
    if isinstance(value, Box):
        return value.data
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def is_array(value: Any) -> bool:
    """Tell whether a value is a JAX or NumPy array, or one of another library."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "OSUMm"  # text, dates and objects are plain attributes
    return isinstance(value, jax.Array) or (
        hasattr(type(value), "__dlpack__") and not isinstance(value, (Box, np.generic))
    )


def _has_array(value: Any) -> bool:
    return any(isinstance(leaf, (Box, jax.Array, np.ndarray)) for leaf in jax.tree.leaves(value))


_REPLACED = {
    "backward": "loss = lamina.backward(lambda: loss_fn(net(x), y)), which fills p.grad",
    "cuda": "p.to('gpu'), or net.to('gpu') for the whole model",
    "is_cuda": "p.sharding tells where the value lies",
    "grad_fn": "gradients come from lamina.grad, value_and_grad or backward",
}

_UNSHAPED = """{box} has no value yet, and some of its sizes are unknown: {why}.
    fix: pass data through the model once, net(x), or lamina.infer(net, \
jax.ShapeDtypeStruct((batch, features), jnp.float32)), or state the sizes when building the layer"""

_NO_RECIPE = """{box} has no value and no recipe to make one.
    fix: nn.Parameter(shape={shape}, init=nn.init.Normal(std=0.02))"""

_STATIC = """{what} of {box} is changed inside a compiled function: the change would happen once, \
while tracing, and then be lost.
    fix: change it outside of the compiled function (a value may change inside: p.data = ...)"""
