"""``Checkpoints``: everything a training needs to go on, saved in steps and restored as a whole."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import threading
import traceback
import warnings
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from .._core import bind
from .._core.errors import FileError, ForeignTransformError, did_you_mean
from .._core.module import Module
from .._core.random import DEFAULT
from .restore_step import HasState, Restored, restore_step
from .snapshot import frozen, json_value
from .step_files import (
    MODEL,
    OPTIMIZER,
    POSITION,
    clean,
    find_steps,
    has_leftovers,
    locked,
    read_record,
    remove_step,
    write_step,
)

__all__ = ["Checkpoints", "Restored"]

_PATIENCE = 600.0
_LOWER = ("loss", "error", "perplexity", "mse", "mae", "rmse", "nll")
_HIGHER = ("accuracy", "acc", "auc", "f1", "precision", "recall", "score", "bleu")


class Checkpoints:
    """The checkpoints of one training, in one directory.

    A step is a directory of safetensors files and one JSON, which any safetensors reader and
    :func:`lamina.load` read. It appears as a whole or not at all, whenever the process is killed;
    what killed writers leave is cleaned up by the next one.

    Args:
        directory: where the steps are; made with the first of them.
        keep: how many of the newest steps to keep (default 3), ``None`` for all.
        every: save only steps that are multiples of this (default 1).
        best: a metric, as ``"min:loss"`` or ``"max:accuracy"``, whose best step is kept as well.
            Where the direction is clear from the name (``"val_loss"``), the name suffices.
        background: write in a thread (default True): ``save`` then takes a snapshot, which copies
            nothing, and returns. The first update after it copies the state once, because the
            arrays of the snapshot stay valid. The process ends only when all is written.

    Example:
        >>> import lamina, tempfile
        >>> from lamina import nn
        >>> directory = tempfile.mkdtemp()
        >>> net = nn.Linear(2, 1)
        >>> with lamina.Checkpoints(directory, keep=2) as checkpoints:
        ...     for step in range(5):
        ...         net.weight = [[float(step)] * 2]
        ...         saved = checkpoints.save(step, net)
        >>> checkpoints.steps()
        [3, 4]
        >>> fresh = nn.Linear(2, 1)
        >>> checkpoints.restore(fresh).step, fresh.weight.data
        (4, Array([[4., 4.]], dtype=float32))
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int | None = 3,
        every: int = 1,
        best: str | None = None,
        background: bool = True,
    ) -> None:
        for name, value in (("keep", keep), ("every", every)):
            if value is not None and value < 1:
                raise ValueError(f"Checkpoints: {name} has to be 1 or more, got {value}")
        self.directory = os.path.abspath(os.fspath(directory))
        self.keep = keep
        self.every = every
        self.background = background
        self._best = None if best is None else _direction(best)
        self._thread: threading.Thread | None = None
        self._errors: list[BaseException] = []
        # At the end of the process too: an error that nobody was told of is shown.
        weakref.finalize(self, _complain, self._errors)
        if has_leftovers(self.directory):
            with contextlib.suppress(OSError), locked(self.directory, patience=0) as held:
                if held:
                    clean(self.directory)

    # Saving.

    def save(
        self,
        step: int,
        net: Module | None = None,
        opt: HasState | None = None,
        rng: bool = True,
        data: Any = None,
        metrics: Mapping[str, Any] | None = None,
        metadata: Any = None,
        force: bool = False,
    ) -> bool:
        """Save a step, if it is one that is to be saved.

        Waits for the step before it, if that is still being written.

        Args:
            step: number of the step; a step that is there already is replaced.
            net: the model.
            opt: its optimizer.
            rng: whether to save the state of the default generator (default True).
            data: position in the data: arrays, numbers, strings, ``None``, and lists, tuples and
                dicts of them. NumPy arrays are copied at once.
            metrics: numbers by name.
            metadata: a JSON value, to be read by humans.
            force: save also if ``step`` is no multiple of ``every``.

        Returns:
            Whether the step is saved.

        Raises:
            OSError: if the disk is full or fails, also if that happened to an earlier step in the
                background. Nothing is left behind, and the steps before are untouched.
            TypeMismatchError: if ``data`` or ``metadata`` is no data.
            ForeignTransformError: inside a transform, where there are no values to save.
        """
        self._raise()
        step = _step_number(step)
        _check_net(net)
        if not force and step % self.every:
            return False
        if bind.STATE.frames or bind.under_foreign():
            raise ForeignTransformError(
                "checkpoints.save was called inside a transform, where there are no values yet\n"
                "    fix: call it after the compiled step has returned"
            )
        self.wait()
        os.makedirs(self.directory, exist_ok=True)
        files: dict[str, Any] = {}
        if net is not None:
            files[MODEL] = frozen(net.state_dict(), "net")
        if opt is not None:
            files[OPTIMIZER] = frozen(opt.state_dict(), "opt")
        position: dict[str, Any] = {"data": frozen(data, "data")}
        if rng:
            position["rng"] = DEFAULT.get_state()
        files[POSITION] = position
        numbers = dict(metrics or {})
        if self._best is not None and numbers and self._best[1] not in numbers:
            raise ValueError(
                f"checkpoints.save: the metric {self._best[1]!r} that decides which step is best "
                f"is missing, got {list(numbers)}.{did_you_mean(self._best[1], numbers)}"
            )
        arguments = (step, files, numbers, json_value(metadata))
        if not self.background:
            self._write(*arguments)
            return True
        # Not a daemon: the interpreter waits for it.
        self._thread = threading.Thread(
            target=self._write_and_note, args=arguments, name="lamina-checkpoint", daemon=False
        )
        self._thread.start()
        return True

    def _write_and_note(self, step: int, *arguments: Any) -> None:
        try:
            self._write(step, *arguments)
        except BaseException as error:
            error.add_note(f"while step {step} was saved to {self.directory}")
            self._errors.append(error)

    def _write(
        self, step: int, files: Mapping[str, Any], metrics: Mapping[str, Any], metadata: Any
    ) -> None:
        # Only here: a metric may be an array that is still being computed.
        numbers = {name: float(value) for name, value in metrics.items()}
        with locked(self.directory, _PATIENCE) as held:
            if held:
                clean(self.directory)
            write_step(self.directory, step, files, numbers, metadata)
            self._prune(step)

    def _prune(self, written: int) -> None:
        steps = find_steps(self.directory)
        if self.keep is None or len(steps) <= self.keep:
            return
        kept = {written, *list(steps)[-self.keep :]}
        if self._best is not None:
            best = _best_of(steps, *self._best)
            kept |= set() if best is None else {best}
        for step, path in steps.items():
            if step not in kept:
                remove_step(path)

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            OSError: or whatever went wrong in the background.
        """
        self._join()
        self._raise()

    close = wait

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise(self) -> None:
        if self._errors:
            raise self._errors.pop(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._join()
        if error is None:
            self._raise()

    # Looking.

    def steps(self) -> list[int]:
        """Return the numbers of all steps that are there, rising; waits for the last one."""
        self._join()
        return list(find_steps(self.directory))

    def latest(self) -> int | None:
        """Return the newest step, or ``None`` if there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Return the step with the best metric, or ``None`` if no step has it.

        Raises:
            ValueError: if no metric was named when the object was made.
        """
        if self._best is None:
            raise ValueError(
                "checkpoints.best: which metric?\n"
                '    fix: lamina.Checkpoints(directory, best="min:loss")'
            )
        self._join()
        return _best_of(find_steps(self.directory), *self._best)

    # Restoring.

    def restore(
        self,
        net: Module | None = None,
        opt: HasState | None = None,
        step: int | str | None = None,
        rng: bool = True,
        fallback: bool = False,
    ) -> Restored:
        """Put back what was saved: all of it, or, if anything is wrong, nothing.

        A model without values gets those of the file and makes no random ones first.

        Args:
            net: the model to fill.
            opt: its optimizer.
            step: a number, ``"latest"`` (default) or ``"best"``.
            rng: whether to put back the state of the default generator, if it was saved
                (default True).
            fallback: if the step is damaged, warn and take the newest older one that is not.

        Returns:
            The step, and what was saved with it.

        Raises:
            FileNotFoundError: if there is no such step.
            FileError: if it is damaged, naming file and reason.
            LoadError: if it does not fit the model or the optimizer.
        """
        self._join()
        _check_net(net)
        wanted = self._find(step)
        for _ in range(3):
            try:
                return self._restore(wanted, net, opt, rng, fallback)
            except _Gone:
                # Another process removed it as old while it was being read.
                wanted = self._find(step)
        raise FileNotFoundError(f"{self.directory}: step {wanted} is being removed")

    def _find(self, step: int | str | None) -> int:
        there = self.steps()
        if step == "best":
            found = self.best()
            what = "no step with the metric that decides which is best"
        elif step is None or step == "latest":
            found, what = max(there, default=None), "no checkpoint"
        else:
            number = _step_number(step)
            found, what = (number if number in there else None), f"no step {number}"
        if found is None:
            has = f"there are {there}" if there else "there are none at all"
            raise FileNotFoundError(
                f"{self.directory}: {what}, {has}\n"
                f"    fix: if checkpoints.latest() is not None: checkpoints.restore(net, opt)"
            )
        return found

    def _restore(
        self, step: int, net: Module | None, opt: HasState | None, rng: bool, fallback: bool
    ) -> Restored:
        steps = find_steps(self.directory)
        for candidate in sorted((s for s in steps if s <= step), reverse=True):
            try:
                return restore_step(candidate, steps[candidate], net, opt, rng)
            except FileError as error:
                if candidate not in find_steps(self.directory):
                    raise _Gone from error
                older = max((s for s in steps if s < candidate), default=None)
                message = f"step {candidate} can't be restored: {error}"
                if not fallback or older is None:
                    raise FileError(message + _mend(older)) from error
                warnings.warn(f"{message}; trying step {older}", stacklevel=4)
        raise _Gone

    def __repr__(self) -> str:
        return f"Checkpoints({self.directory!r}, keep={self.keep}, every={self.every})"


class _Gone(Exception):
    """A step vanished while it was read."""


def _mend(older: int | None) -> str:
    if older is None:
        return "\n    there is no older step"
    return (
        f"\n    fix: checkpoints.restore(net, opt, step={older})"
        f"\n    or:    checkpoints.restore(net, opt, fallback=True)"
    )


def _best_of(steps: Mapping[int, str], sign: int, metric: str) -> int | None:
    """Return the step with the best finite metric, the later one of equals."""
    found: list[tuple[float, int]] = []
    for step, path in steps.items():
        # A damaged step is never the best; restore says what is wrong with it.
        with contextlib.suppress(FileError):
            value = read_record(path, step).metrics.get(metric, math.nan)
            if math.isfinite(value):
                found.append((sign * value, step))
    return max(found)[1] if found else None


def _direction(best: str) -> tuple[int, str]:
    way, colon, metric = best.partition(":")
    if colon and way in ("min", "max") and metric:
        return (-1 if way == "min" else 1), metric
    words = best.lower().replace("-", "_").replace("/", "_").split("_")
    for sign, known in ((-1, _LOWER), (1, _HIGHER)):
        if not colon and words[-1] in known:
            return sign, best
    raise ValueError(
        f'Checkpoints: best={best!r}: is lower or higher better? Write "min:{metric or best}" or '
        f'"max:{metric or best}"'
    )


def _check_net(net: Any) -> None:
    if net is not None and not isinstance(net, Module):
        raise TypeError(f"Checkpoints: expected a module for net, got {type(net).__name__}")


def _step_number(step: Any) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0 or isinstance(step, bool):
        raise ValueError(f"a step is a whole number from 0 on, got {step!r}")
    return number


def _complain(errors: list[BaseException]) -> None:
    for error in errors:
        traceback.print_exception(error)
