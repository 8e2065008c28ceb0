"""A module as a pure function of its weights, in evaluation mode, with all shapes known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from .._core.errors import DeferredError
from .._core.materialize import abstractify, infer
from .._core.module import Module
from .._core.walk import walk

__all__ = ["mode", "prepare"]


@contextlib.contextmanager
def mode(net: Any, train: bool) -> Iterator[None]:
    """Put ``net`` into evaluation mode inside the block, unless ``train``.

    Raises:
        TypeError: if ``net`` is no module.
    """
    if not isinstance(net, Module):
        raise TypeError(f"export: expected a module, got {type(net).__name__}")
    before = [(module, module.training) for module in net.modules()]
    if not train:
        net.eval()
    try:
        yield
    finally:
        for module, training in before:
            if module.training != training:
                module.training = training


def prepare(net: Module, specs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, jax.Array]]:
    """Find out shapes that are not known yet, and collect all values.

    Args:
        net: the module.
        specs: arrays or ``jax.ShapeDtypeStruct``.

    Returns:
        The specs without values, and ``{canonical name: value}`` of parameters and buffers, also of
        those that are not part of the state dict.

    Raises:
        DeferredError: if ``net`` has sizes that its inputs do not tell.
    """
    shapes = jax.tree.map(abstractify, specs)
    boxes = walk(net).names
    if any(box.state == "unshaped" for box in boxes):
        infer(net, *shapes)
        boxes = walk(net).names
    unknown = [name for box, name in boxes.items() if box.state == "unshaped"]
    if unknown:
        raise DeferredError(
            f"export: forward does not tell the sizes of {', '.join(unknown)}\n"
            f"    fix: give them sizes, or remove what is not used"
        )
    values = {name: box.data for box, name in boxes.items() if box.state != "empty"}
    return shapes, values
