"""Materialising: giving abstract boxes their values; and inferring the shapes of unshaped ones."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from . import bind
from .bind import STATE, Frame
from .box import Box
from .errors import DeferredError, ForeignTransformError
from .hooks import refuse_kept
from .module import Module
from .shapes import as_sharding, canonical, is_floating
from .walk import walk

__all__ = ["abstractify", "infer", "infer_call", "materialize"]


def infer(net: Module, *specs: Any, **kwargs: Any) -> Module:
    """Find unknown shapes by running ``forward`` abstractly: no arithmetic, no memory.

    Args:
        net: the model.
        *specs: what ``net`` would be called with: arrays or ``jax.ShapeDtypeStruct``.
        **kwargs: keyword arguments of the call, likewise.

    Returns:
        ``net``, with every shape known that ``forward`` reaches.

    Raises:
        Exception: whatever ``forward`` raises; the model is then as it was.

    Example:
        >>> import jax, jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> net = nn.LazyLinear(4)
        >>> _ = lamina.infer(net, jax.ShapeDtypeStruct((8, 3), jnp.float32))
        >>> net.weight.shape, net.weight.is_material
        ((4, 3), False)
    """
    infer_call(net, specs, kwargs)
    return net


def infer_call(fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Call a function abstractly, so that the modules that it calls learn their sizes."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    dynamic = [_is_spec(leaf) for leaf in leaves]
    foreign = bind.under_foreign()

    def forward(values: list[Any]) -> None:
        remaining = iter(values)
        filled = [
            next(remaining) if use else leaf for use, leaf in zip(dynamic, leaves, strict=True)
        ]
        positional, keywords = jax.tree.unflatten(treedef, filled)
        with Frame("infer", abstract=True, foreign=foreign):
            fn(*positional, **keywords)

    jax.eval_shape(forward, [abstractify(x) for x, use in zip(leaves, dynamic, strict=True) if use])
    refuse_kept()


def materialize(
    net: Module,
    *specs: Any,
    key: jax.Array | None = None,
    dtype: Any = None,
    shardings: Any = None,
    overwrite: bool = False,
) -> Module:
    """Give every abstract parameter and buffer its value, straight into its place.

    Args:
        net: the model.
        *specs: inputs (arrays or ``jax.ShapeDtypeStruct``), needed while sizes are unknown.
        key: a PRNG key from which, with the names below ``net``, all values follow. Default: the
            seed under which the model was built.
        dtype: dtype for all floating-point parameters and buffers (default: as declared).
        shardings: where the values go: a sharding or device for all, a dict of name globs to
            shardings, or a function ``(name, box) -> sharding | None``.
        overwrite: also draw anew what has a value already (default False).

    Returns:
        ``net``.

    Raises:
        DeferredError: if shapes are still unknown, or a box has neither value nor recipe. All such
            names are listed.

    Example:
        >>> import jax, lamina
        >>> from lamina import nn
        >>> net = lamina.materialize(nn.Linear(3, 4), key=jax.random.key(0))
        >>> net.weight.is_material
        True
    """
    if specs:
        infer(net, *specs)
    if STATE.frames or bind.under_foreign():
        raise ForeignTransformError(_INSIDE)
    names = walk(net).names
    place = _placer(shardings)
    problems = []
    for box, name in names.items():
        if dtype is not None and is_floating(box.declared_dtype):
            box.cast(dtype)
        sharding = place(name, box)
        if sharding is not None:
            box.sharding = as_sharding(sharding)
        if box.state == "unshaped":
            problems.append(f"  {name}: {box.what_is_missing()}")
        elif box.state == "abstract" and box.init is None:
            problems.append(f"  {name}: has no value and no recipe to make one")
    if problems:
        raise DeferredError(
            "these can't get values:\n"
            + "\n".join(problems)
            + "\n    fix: pass an input, lamina.materialize(net, "
            "jax.ShapeDtypeStruct((batch, features), jnp.float32)), or set p.init"
        )
    named: dict[Any, str] = {}
    """Copies that were made before there were values draw under the name of the first of them."""
    for box, name in names.items():
        again = overwrite and box.init is not None and box.state == "material"
        if box.state == "abstract" or again:
            if key is not None:
                name = named.setdefault(box if box.promised is None else box.promised, name)
            value = box.drawn(box.origin() if key is None else (key, 0, name))
            bind.write(box, value) if again else bind.settle(box, value)
    return net


def _placer(shardings: Any) -> Callable[[str, Box], Any]:
    if shardings is None:
        return lambda name, box: None
    if isinstance(shardings, Mapping):

        def by_glob(name: str, box: Box) -> Any:
            for pattern, sharding in shardings.items():
                if fnmatch.fnmatchcase(name, pattern):
                    return sharding
            return None

        return by_glob
    if callable(shardings) and not isinstance(shardings, jax.sharding.Sharding):
        return shardings
    return lambda name, box: shardings


def abstractify(value: Any) -> Any:
    """Return the shape and dtype of an array as a ``jax.ShapeDtypeStruct``."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return value
    if isinstance(value, (Box, jax.Array)):
        return jax.ShapeDtypeStruct(value.shape, value.dtype)
    value = np.asarray(value)
    return jax.ShapeDtypeStruct(value.shape, canonical(value.dtype))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, (jax.ShapeDtypeStruct, jax.Array, np.ndarray, np.generic))


_INSIDE = """materialize is called inside a transform: it would happen once, while tracing, and \
the values would be frozen into the program.
    fix: call lamina.materialize(net, ...) outside, before the transformed function"""
