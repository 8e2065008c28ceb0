"""``export``: a model as a StableHLO program that runs without the model's Python code.

The file is a safetensors file: the weights under their names, the program that ``jax.export``
serialises as a ``uint8`` tensor, and a line of JSON. Loading it imports and unpickles nothing. But
a program is a program: calling it computes what its author wrote, for as long and in as much memory
as the author liked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from .._core.errors import FileError, LaminaError, TypeMismatchError
from .._core.module import Module
from .._core.state_dict import StateDict
from .._core.walk import walk
from ..func import functional_call
from ..io.arrays import to_jax
from ..io.native import save
from ..io.safetensors import open_safetensors
from ..io.strict_json import parse_json
from ..io.tensorfile import TensorFile
from .pure import mode, prepare

__all__ = ["ExportedModule", "export", "load_exported"]

_PROGRAM = "__program__"
_DESCRIPTION = "exported"
_VERSION = 1

Path = str | os.PathLike[str]


class ExportedModule:
    """A program and its weights; made by :func:`export` and :func:`load_exported`.

    Called like the module it was made from. It can be compiled into larger JAX programs, but not
    differentiated.

    Attributes:
        weights: ``{name: array}``; a new dict with other values of the same shapes can be set.
        ties: ``{further name: name}``.
        in_specs: for each argument its shape and dtype (``jax.ShapeDtypeStruct``).
        out_specs: the same of the output.
        platforms: where it runs: ``("cpu",)``, ``("cuda", "tpu")``.

    Example:
        >>> import jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> program = lamina.export(nn.Linear(3, 2), jnp.ones((4, 3)))
        >>> program.in_specs[0].shape, program.out_specs.shape
        ((4, 3), (4, 2))
    """

    def __init__(
        self,
        exported: jax.export.Exported,
        weights: Mapping[str, jax.Array],
        ties: Mapping[str, str] | None = None,
    ) -> None:
        self._exported = exported
        self._call = jax.jit(exported.call)
        self.weights = dict(weights)
        self.ties = dict(ties or {})
        (args, _) = jax.tree.unflatten(exported.in_tree, list(map(_spec, exported.in_avals)))
        self.in_specs: tuple[Any, ...] = tuple(args[1:])
        self.out_specs: Any = jax.tree.unflatten(
            exported.out_tree, list(map(_spec, exported.out_avals))
        )
        self.platforms: tuple[str, ...] = tuple(exported.platforms)

    def __call__(self, *args: Any) -> Any:
        """Run the program.

        Raises:
            TypeMismatchError: if the arguments are others than ``in_specs``.
        """
        expected, got = jax.tree.structure(self.in_specs), jax.tree.structure(args)
        if expected != got:
            raise TypeMismatchError(
                f"exported module: expected arguments {_show(self.in_specs)}, got {_show(args)}"
            )
        try:
            return self._call(list(self.weights.values()), *args)
        except ValueError as error:
            if "mismatch" not in str(error):
                raise
            raise TypeMismatchError(
                f"exported module: expected arguments {_show(self.in_specs)}, got {_show(args)}"
            ) from error

    def save(self, path: Path) -> None:
        """Write weights and program to one file, completely or not at all.

        Raises:
            TypeMismatchError: if arguments or output are of classes that a file can't name.
            LaminaError: if flatbuffers is not installed, which JAX needs to write programs.
            OSError: if the disk is full or the place is not writable; an old file is untouched.
        """
        try:
            program = self._exported.serialize()
        except ImportError as error:
            raise LaminaError(_NEEDS.format(error=error)) from error
        except ValueError as error:
            raise TypeMismatchError(
                f"{os.fspath(path)}: the program can't be saved: {error}\n"
                f"    fix: let forward take and return arrays in lists, tuples and dicts"
            ) from error
        content = StateDict(self.weights)
        content[_PROGRAM] = np.frombuffer(program, np.uint8)
        content.ties.update(self.ties)
        for alias, name in self.ties.items():
            content[alias] = content[name]
        description = {
            "version": _VERSION,
            "jax": jax.__version__,
            "platforms": self.platforms,
            "inputs": _show(self.in_specs),
            "outputs": _show(self.out_specs),
            "weights": list(self.weights),
        }
        save(content, path, metadata={_DESCRIPTION: json.dumps(description)})

    def __repr__(self) -> str:
        size = sum(value.nbytes for value in self.weights.values())
        return (
            f"ExportedModule({_show(self.in_specs)} -> {_show(self.out_specs)}, "
            f"{len(self.weights)} weights of {size} bytes, for {', '.join(self.platforms)})"
        )


def export(
    net: Module,
    *specs: Any,
    path: Path | None = None,
    platforms: Sequence[str] | None = None,
    train: bool = False,
) -> ExportedModule:
    """Make a StableHLO program of a model, with its weights.

    Args:
        net: the model. Sizes that are not known yet are inferred.
        *specs: what it is to be called with: arrays or ``jax.ShapeDtypeStruct``. Sizes may be
            left open: ``jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 3"), "float32")``.
        path: where to save it (default: nowhere).
        platforms: where it is to run: ``["cpu", "cuda", "rocm", "tpu"]`` (default: where we are).
        train: leave the modules in the mode in which they are. By default all are in evaluation
            mode for the export. Drawing random numbers or writing buffers can't be exported.

    Returns:
        The program, which can be called.

    Raises:
        DeferredError: if ``net`` has sizes that ``specs`` do not tell.
        ForeignTransformError: if ``forward`` writes buffers.

    Example:
        >>> import jax, jax.numpy as jnp, lamina
        >>> from lamina import nn
        >>> net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
        >>> batch = jax.export.symbolic_shape("batch, 3")
        >>> program = lamina.export(net, jax.ShapeDtypeStruct(batch, jnp.float32))
        >>> program(jnp.ones((5, 3))).shape
        (5, 2)

    Source: https://docs.jax.dev/en/latest/export/export.html
    """
    with mode(net, train):
        shapes, values = prepare(net, specs)
        names = list(values)

        def program(weights: list[Any], *args: Any) -> Any:
            return functional_call(net, dict(zip(names, weights, strict=True)), *args)

        weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values.values()]
        exported = jax.export.export(jax.jit(program), platforms=platforms)(weights, *shapes)
    made = ExportedModule(exported, values, walk(net).aliases)
    if path is not None:
        made.save(path)
    return made


def load_exported(path: Path) -> ExportedModule:
    """Load a model that :func:`export` saved; its Python code is not needed.

    Nothing in the file is imported or unpickled, and programs that call back into Python are
    refused. Calling the result runs the program that is in the file, compiled by XLA: load programs
    only from where you would take programs.

    Args:
        path: the file.

    Returns:
        The program with its weights.

    Raises:
        FileNotFoundError: if there is nothing there.
        FileError: if the file is damaged or holds no program.

    Example:
        >>> import jax.numpy as jnp, lamina, os, tempfile
        >>> from lamina import nn
        >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
        >>> _ = lamina.export(nn.Linear(3, 2), jnp.ones((4, 3)), path=path)  # doctest: +SKIP
        >>> lamina.load_exported(path).out_specs.shape  # doctest: +SKIP
        (4, 2)
    """
    with open_safetensors(path) as file:
        if _PROGRAM not in file or _DESCRIPTION not in file.metadata:
            raise FileError(
                f"{file.path}: holds no exported module; read its tensors with lamina.load"
            )
        file.verify()
        names = _weight_names(file)
        exported = _deserialize(file)
        weights = to_jax([file[name] for name in names])
        _check_fit(file.path, exported, names, weights)
        ties = {alias: name for alias, name in file.ties.items() if name in names}
        return ExportedModule(exported, dict(zip(names, weights, strict=True)), ties)


def _weight_names(file: TensorFile) -> list[str]:
    text = file.metadata[_DESCRIPTION]
    description = parse_json(file.path, text.encode(), "the description of the program")
    if not isinstance(description, dict) or description.get("version") != _VERSION:
        raise FileError(
            f"{file.path}: the description of the program is not of version {_VERSION}; "
            f"read it with a newer lamina"
        )
    names = description.get("weights")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileError(f"{file.path}: the description of the program is malformed")
    missing = [name for name in names if name not in file]
    if missing:
        raise FileError(f"{file.path}: the weights {missing[:10]} are missing")
    return names


def _deserialize(file: TensorFile) -> jax.export.Exported:
    data = file[_PROGRAM].read().tobytes()
    try:
        exported = jax.export.deserialize(bytearray(data))
        # Printing the program takes time, and only one with such a word in it can have such a call.
        calls = _PYTHON_CALL.search(exported.mlir_module()) if b"callback" in data else None
    except ImportError as error:
        raise LaminaError(_NEEDS.format(error=error)) from error
    except Exception as error:  # whatever the deserialiser stumbles over
        raise FileError(
            f"{file.path}: its program can't be read by JAX {jax.__version__}: "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error
    if calls is not None:
        raise FileError(f"{file.path}: its program calls back into Python ({calls[1]}); refused")
    return exported


_NEEDS = """JAX needs the package flatbuffers to read and write programs: {error}
    fix: pip install "lamina[export]"
    or:    pip install flatbuffers"""
_PYTHON_CALL = re.compile(r"custom_call[^\n]*?([\w.]*callback[\w.]*)")


def _check_fit(
    path: str, exported: jax.export.Exported, names: list[str], weights: list[jax.Array]
) -> None:
    """Make sure that the program takes these weights as its first argument."""
    problem = "takes no list of weights"
    try:
        args, keywords = jax.tree.unflatten(exported.in_tree, list(exported.in_avals))
        if isinstance(args[0], list) and not keywords and len(args[0]) == len(names):
            wrong = [
                name
                for name, spec, value in zip(names, args[0], weights, strict=True)
                if (spec.shape, spec.dtype) != (value.shape, value.dtype)
            ]
            problem = f"takes other shapes or dtypes of {wrong[:10]}" if wrong else ""
    except (IndexError, TypeError, ValueError, AttributeError):
        pass
    if problem:
        raise FileError(f"{path}: program and weights do not fit: the program {problem}")


def _spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _show(tree: Any) -> str:
    """Write shapes and dtypes: ``(float32[batch,3],)``."""

    def text(leaf: Any) -> Any:
        shape = ",".join(map(str, jnp.shape(leaf)))
        return _Word(f"{getattr(leaf, 'dtype', type(leaf).__name__)}[{shape}]")

    return repr(jax.tree.map(text, tree))


class _Word(str):
    def __repr__(self) -> str:
        return str(self)
