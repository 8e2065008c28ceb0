"""``export_onnx``: a model for ONNX runtimes, by way of the optional package jax2onnx."""

from __future__ import annotations

import inspect
import os
from typing import Any

import jax
import numpy as np

from .._core.errors import FileError, LaminaError, TypeMismatchError
from .._core.module import Module
from ..func import functional_call
from ..io.atomic import replacing, write_at
from .pure import mode, prepare

__all__ = ["export_onnx"]


def export_onnx(
    net: Module,
    *specs: Any,
    path: str | os.PathLike[str] | None = None,
    opset: int | None = None,
) -> Any:
    """Write a model as ONNX, with its weights, for runtimes without JAX or Python.

    The modules are in evaluation mode for it. Needs jax2onnx: ``pip install "lamina[onnx]"``.

    Args:
        net: the model. Its arguments have to be arrays. Sizes that are not known yet are inferred.
        *specs: what it is to be called with: arrays or ``jax.ShapeDtypeStruct``. Sizes may be
            left open: ``jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 3"), "float32")``.
        path: where to save it (default: nowhere).
        opset: version of ONNX's operators (default: jax2onnx's own).

    Returns:
        The model as ``onnx.ModelProto``. Inputs have the names of ``forward``'s arguments.

    Raises:
        LaminaError: if jax2onnx is not installed.
        TypeMismatchError: if an argument is not an array.
        FileError: if the model has more than the 2 GiB that one ONNX file can hold.

    Example:
        >>> import jax.numpy as jnp, lamina, os, tempfile
        >>> from lamina import nn
        >>> path = os.path.join(tempfile.mkdtemp(), "net.onnx")
        >>> net = nn.Linear(3, 2)
        >>> model = lamina.export_onnx(net, jnp.ones((4, 3)), path=path)  # doctest: +SKIP

    Source: https://github.com/enpasos/jax2onnx
    """
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LaminaError(
            f"export_onnx needs jax2onnx, which can't be imported: {error}\n"
            f'    fix: pip install "lamina[onnx]"\n'
            f"    or:    pip install jax2onnx onnxruntime"
        ) from error
    if any(not hasattr(spec, "shape") for spec in specs):
        raise TypeMismatchError(
            f"export_onnx: the inputs of an ONNX model are arrays, got "
            f"{[type(spec).__name__ for spec in specs]}"
        )
    options = {} if opset is None else {"opset": opset}
    with mode(net, train=False):
        shapes, values = prepare(net, specs)

        def program(*args: Any) -> Any:
            return functional_call(net, values, *args)

        model = jax2onnx.to_onnx(
            program,
            list(shapes),
            model_name=type(net).__name__,
            enable_double_precision=_has_doubles((values, shapes)),
            input_names=_input_names(net, len(shapes)),
            **options,
        )
    if path is not None:
        _write(model, os.fspath(path))
    return model


def _has_doubles(tree: Any) -> bool:
    return any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(tree))


def _input_names(net: Module, count: int) -> list[str]:
    """Return the names of the first arguments of ``forward``, or numbered ones."""
    names = [
        name
        for name, parameter in inspect.signature(net.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return names[:count] if len(names) >= count else [f"input_{i}" for i in range(count)]


def _write(model: Any, path: str) -> None:
    try:
        data = model.SerializeToString()
    except ValueError as error:
        raise FileError(f"{path}: the model is too large for one ONNX file: {error}") from error
    with replacing(path, len(data)) as fd:
        write_at(fd, 0, [np.frombuffer(data, np.uint8)])
