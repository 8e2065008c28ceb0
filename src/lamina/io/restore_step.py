"""Putting a step of a training back: all of it is read and checked before anything is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from .._core.errors import FileError, LoadError
from .._core.module import Module
from .._core.random import DEFAULT
from .._core.state_dict import all_or_nothing
from .._core.walk import walk
from .arrays import to_jax
from .native import load
from .step_files import MODEL, OPTIMIZER, POSITION, Record, open_checked, read_record
from .tensorfile import TensorFile

__all__ = ["HasState", "Restored", "restore_step"]


class HasState(Protocol):
    """What an optimizer has to offer to be saved and restored."""

    def state_dict(self) -> Any:
        """Return the state as arrays by name."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take all of such a state, or raise and change nothing."""
        ...


class Restored(NamedTuple):
    """What :meth:`Checkpoints.restore` found besides the state it put back.

    Attributes:
        step: the step that was restored.
        data: the data position that was saved; arrays in it come as writable NumPy arrays.
        metrics: numbers by name.
        metadata: the JSON value that was saved.
        path: the directory of the step.

    Example:
        >>> import lamina, tempfile
        >>> with lamina.Checkpoints(tempfile.mkdtemp()) as checkpoints:
        ...     _ = checkpoints.save(7, data={"epoch": 1}, metrics={"loss": 0.5})
        ...     found = checkpoints.restore()
        >>> found.step, found.data, found.metrics
        (7, {'epoch': 1}, {'loss': 0.5})
    """

    step: int
    data: Any
    metrics: dict[str, float]
    metadata: Any
    path: str


def restore_step(
    step: int, path: str, net: Module | None, opt: HasState | None, rng: bool
) -> Restored:
    """Restore the step in the directory ``path``; see :meth:`Checkpoints.restore`.

    Raises:
        FileError: if a file is missing or damaged.
        LoadError: if it does not fit.
    """
    record = read_record(path, step)
    if record.x64 and jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
        raise LoadError(
            f"{path}: was saved with 64-bit types on, which are off now\n"
            f'    fix: jax.config.update("jax_enable_x64", True)'
        )
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(open_checked(record, name)) for name in sorted(record.files)
        }
        state: dict[str, Any] = {}
        if net is not None:
            state = _model_state(_file(record, files, MODEL, "model"))
        opt_state: Any = None
        if opt is not None:
            opt_state = load(_file(record, files, OPTIMIZER, "optimizer").path)
        position = load(_file(record, files, POSITION, "position").path, numpy=True, copy=True)
        if not isinstance(position, dict) or "data" not in position:
            raise FileError(f"{files[POSITION].path}: holds no position")
    with _all_or_nothing(net):
        if net is not None:
            net.load_state_dict(state)
        if opt is not None:
            opt.load_state_dict(opt_state)
        if rng and "rng" in position:
            DEFAULT.set_state(position["rng"])
    return Restored(step, position["data"], record.metrics, record.metadata, path)


def _file(record: Record, files: Mapping[str, TensorFile], name: str, what: str) -> TensorFile:
    if name not in files:
        raise LoadError(f"{record.path}: was saved without {what}, there is no {name}")
    return files[name]


def _model_state(file: TensorFile) -> dict[str, Any]:
    """Read a model; 64-bit values stay NumPy arrays, and the model takes them as it holds them."""
    handles = [file[name] for name in file]
    narrow = [h for h in handles if h.dtype != jax.dtypes.canonicalize_dtype(h.dtype)]
    others = [h for h in handles if h.dtype == jax.dtypes.canonicalize_dtype(h.dtype)]
    values: dict[int, Any] = {id(h): h.read() for h in narrow}
    values.update((id(h), array) for h, array in zip(others, to_jax(others), strict=True))
    return {name: values[id(file[name])] for name in file}


@contextlib.contextmanager
def _all_or_nothing(net: Module | None) -> Iterator[None]:
    """Give boxes and generator back what they held if the block fails."""
    boxes = [] if net is None else list(walk(net).names)
    with all_or_nothing([*boxes, DEFAULT.stream]):
        yield
