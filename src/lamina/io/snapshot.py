"""A snapshot of a training's state: references to arrays that never change, copies of all else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .._core.errors import TypeMismatchError
from .._core.module import Module
from .._core.state_dict import StateDict
from .arrays import is_array
from .strict_json import parse_json

__all__ = ["frozen", "json_value"]


def frozen(value: Any, where: str) -> Any:
    """Return the same data, safe from later changes: containers and NumPy arrays are copied.

    Args:
        value: arrays, numbers, strings, bytes, ``None``, and lists, tuples and dicts of them.
        where: its dotted path, for messages.

    Raises:
        TypeMismatchError: naming the path of the first thing that is not data.

    Example:
        >>> order = np.arange(3)
        >>> kept = frozen({"order": order}, "data")
        >>> order[0] = 7
        >>> kept["order"]
        array([0, 1, 2])
    """
    if isinstance(value, StateDict):
        for name, part in value.items():
            value[name] = frozen(part, f"{where}.{name}")
        return value
    if isinstance(value, Mapping):
        return {key: frozen(part, f"{where}.{key}") for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(frozen(part, f"{where}.{i}") for i, part in enumerate(value))
    if isinstance(value, jax.Array | np.generic | bool | int | float | complex | str | bytes):
        return value
    if isinstance(value, Module) or hasattr(value, "__lamina_tensors__"):
        return frozen(value.state_dict(), where)
    if value is None:
        return None
    if is_array(value):
        return np.array(value)
    raise TypeMismatchError(
        f"{where}: cannot save an object of type {type(value).__name__}; a checkpoint holds "
        f"arrays, numbers, strings, None, lists, tuples and dicts"
    )


def json_value(metadata: Any) -> Any:
    """Return a copy of a JSON value as it will be read back.

    Raises:
        TypeMismatchError: if it is none, or would come back as something else.
    """
    try:
        text = json.dumps(metadata, allow_nan=False)
        back = parse_json("metadata", text.encode(), "the value", inexact=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeMismatchError(f"metadata is no JSON value: {error}") from None
    if back != metadata:
        raise TypeMismatchError(
            f"metadata would come back as {str(back)[:200]}; use lists and keys of type str, or "
            f"pass it as data="
        )
    return back
