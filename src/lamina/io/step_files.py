"""One training checkpoint on disk: a directory ``step_00000100`` that appears in one rename.

A writer fills ``.step_00000100.<token>.tmp``, waits until all of it is on disk, and renames it.
What is to be removed is first renamed to ``.step_00000100.<token>.old``. To save a step again, the
new directory first gets the name ``step_00000100.new``, which readers prefer; so at every instant
there is a whole one. Writers hold a lock of the directory, which the kernel takes away from a
process that dies: whoever has it knows that every such leftover is nobody's.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from .._core.errors import FileError
from .atomic import replacing, sync_directory, write_at
from .native import save
from .safetensors import open_safetensors
from .strict_json import parse_json
from .tensorfile import TensorFile

__all__ = [
    "MODEL",
    "OPTIMIZER",
    "POSITION",
    "Record",
    "clean",
    "find_steps",
    "has_leftovers",
    "locked",
    "open_checked",
    "read_record",
    "remove_step",
    "write_step",
]

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
POSITION = "position.safetensors"
_RECORD = "checkpoint.json"
_LOCK = ".lock"
_VERSION = 1
_STEP = re.compile(r"step_([0-9]{8,20})(\.new)?")
_LEFTOVER = re.compile(r"\.step_[0-9]+\.[0-9a-f]+\.(tmp|old)")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_HELD: dict[str, threading.Lock] = {}


class Record(NamedTuple):
    """What ``checkpoint.json`` says.

    Attributes:
        path: the directory of the step.
        metrics: numbers by name.
        metadata: the user's own JSON value.
        x64: whether JAX's 64-bit mode was on.
        files: for each file its size and the crc32 of its header (which has those of the tensors).
    """

    path: str
    metrics: dict[str, float]
    metadata: Any
    x64: bool
    files: dict[str, dict[str, Any]]


def find_steps(directory: str) -> dict[int, str]:
    """Return ``{step: path}`` of all that is complete, in rising order."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return {}
    found = {}
    for name in sorted(names):  # "step_1.new" comes after "step_1" and takes its place
        match = _STEP.fullmatch(name)
        if match and name.removesuffix(".new") == _step_name(int(match[1])):
            found[int(match[1])] = os.path.join(directory, name)
    return dict(sorted(found.items()))


def _step_name(step: int) -> str:
    return f"step_{step:08d}"


@contextlib.contextmanager
def locked(directory: str, patience: float) -> Iterator[bool]:
    """Hold the writer's lock of a directory.

    Args:
        directory: has to exist.
        patience: seconds to wait for another writer.

    Yields:
        Whether the lock is held; ``False`` where the file system has no locks.

    Raises:
        TimeoutError: if another writer has it for longer.
    """
    # The kernel's lock is between processes (a forked child does not inherit it), ours between
    # threads.
    inner = _HELD.setdefault(os.path.realpath(directory), threading.Lock())
    if not inner.acquire(timeout=patience):
        raise _busy(directory, patience)
    try:
        fd = os.open(os.path.join(directory, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            yield _lock(fd, directory, patience)
        finally:
            os.close(fd)
    finally:
        inner.release()


def _lock(fd: int, directory: str, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() >= deadline:
            raise _busy(directory, patience)
        time.sleep(0.02)


def _busy(directory: str, patience: float) -> TimeoutError:
    return TimeoutError(
        f"{directory}: another writer has been saving here for {patience:g} seconds; "
        f"give every training its own directory"
    )


def has_leftovers(directory: str) -> bool:
    """Whether something lies there that a writer, dead or alive, has not finished."""
    try:
        return any(map(_unfinished, os.listdir(directory)))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _unfinished(name: str) -> bool:
    return bool(_LEFTOVER.fullmatch(name)) or (
        name.endswith(".new") and bool(_STEP.fullmatch(name))
    )


def clean(directory: str) -> None:
    """Remove what killed writers left, and finish replacements; only under the lock."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if _LEFTOVER.fullmatch(name):
            shutil.rmtree(path, ignore_errors=True)
        elif _unfinished(name):
            _finish_replacing(path)


def write_step(
    directory: str,
    step: int,
    files: Mapping[str, Any],
    metrics: Mapping[str, float],
    metadata: Any,
) -> str:
    """Write one step, completely or not at all.

    Args:
        directory: where the steps are; has to exist.
        step: the number; a step that is there already is replaced.
        files: what ``lamina.save`` is to write under each of this module's file names.
        metrics: numbers by name.
        metadata: a JSON value.

    Returns:
        The path of the step.

    Raises:
        OSError: if the disk is full or fails; nothing is left behind.
    """
    final = os.path.join(directory, _step_name(step))
    temporary = _hidden(final, "tmp")
    os.mkdir(temporary)
    try:
        marks = {}
        for name, content in files.items():
            path = os.path.join(temporary, name)
            save(content, path)
            with open_safetensors(path) as file:
                marks[name] = _mark(path, file)
        _write_record(temporary, step, marks, metrics, metadata)
        sync_directory(temporary)
        if os.path.lexists(final):
            os.rename(temporary, f"{final}.new")
            sync_directory(directory)
            _finish_replacing(f"{final}.new")
        else:
            os.rename(temporary, final)
        sync_directory(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def remove_step(path: str) -> None:
    """Remove a step; it disappears as a whole before its files go."""
    hidden = _hidden(path.removesuffix(".new"), "old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _finish_replacing(newer: str) -> None:
    final = newer.removesuffix(".new")
    hidden = _hidden(final, "old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, hidden)
    os.rename(newer, final)
    shutil.rmtree(hidden, ignore_errors=True)


def _hidden(path: str, kind: str) -> str:
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.{secrets.token_hex(6)}.{kind}")


def _mark(path: str, file: TensorFile) -> dict[str, Any]:
    """Return the size and the crc32 of the header, in which the checksums of the data are."""
    with open(path, "rb") as raw:
        start = raw.read(8)
        header = start + raw.read(struct.unpack("<Q", start)[0])
        size = os.fstat(raw.fileno()).st_size
    return {"bytes": size, "tensors": len(file), "crc32": f"{zlib.crc32(header):08x}"}


def _write_record(
    directory: str,
    step: int,
    files: Mapping[str, Any],
    metrics: Mapping[str, float],
    metadata: Any,
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    record: dict[str, Any] = {
        "version": _VERSION,
        "step": step,
        "saved": now.isoformat(timespec="seconds"),
        "x64": bool(jax.dtypes.canonicalize_dtype(np.int64) == np.int64),
        # JSON has no NaN and no infinity.
        "metrics": {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()},
        "metadata": metadata,
        "files": dict(files),
    }
    record["crc32"] = _digest(record)
    text = json.dumps(record, indent=1).encode()
    with replacing(os.path.join(directory, _RECORD), len(text)) as fd:
        write_at(fd, 0, [np.frombuffer(text, np.uint8)])


def _digest(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def read_record(path: str, step: int) -> Record:
    """Read and check the record of a step.

    Raises:
        FileError: if it is missing or anything about it is wrong.
    """
    where = os.path.join(path, _RECORD)
    try:
        with open(where, "rb") as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(f"{where}: is missing") from None
    record = parse_json(where, text, "the record", inexact=True)
    if not isinstance(record, dict) or record.get("crc32") != _digest(record):
        raise FileError(f"{where}: is damaged or was edited (wrong checksum)")
    if record.get("version") != _VERSION:
        raise FileError(
            f"{where}: is of version {record.get('version')!r}, expected {_VERSION}; "
            f"read it with a newer lamina"
        )
    if record.get("step") != step:
        raise FileError(f"{where}: is of step {record.get('step')!r}, expected {step}")
    try:
        metrics = {str(name): float(value) for name, value in record["metrics"].items()}
        files = {str(name): dict(mark) for name, mark in record["files"].items()}
        return Record(path, metrics, record["metadata"], bool(record["x64"]), files)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise FileError(f"{where}: is malformed") from None


def open_checked(record: Record, name: str) -> TensorFile:
    """Open a file of a step after comparing all of its bytes with their checksums.

    Raises:
        FileError: if it is missing or damaged, or is not the file that was saved.
    """
    path = os.path.join(record.path, name)
    try:
        file = open_safetensors(path)
    except FileNotFoundError:
        raise FileError(f"{path}: is missing") from None
    try:
        mark = _mark(path, file)
        if mark != record.files[name]:
            raise FileError(f"{path}: is not the file that was saved (wrong size or checksum)")
        file.verify()
    except BaseException:
        file.close()
        raise
    return file
