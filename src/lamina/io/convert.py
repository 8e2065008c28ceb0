"""One file into another: format, dtype, names and shards, in bounded memory.

Tensors that lie in the file as they will be written are written from the mapped file. Those that
have to be cast, inflated or rearranged go through a nameless scratch file beside the target, a
piece at a time.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._core.errors import FileError
from .arrays import to_jax
from .native import save, select
from .rename import Renaming
from .render import objects_beside
from .tensorfile import FileBytes, TensorFile, TensorHandle, flat_bytes
from .torch_values import printable

__all__ = ["Conversion", "Count", "convert", "format_of"]

_ALIGN = 64
_ENDINGS = {"npz": "npz", "pt": "torch", "pth": "torch", "bin": "torch", "ckpt": "torch"}
_OWN_WORDS = {"format", "total_size", "lamina", "lamina.crc32"}


class Conversion(NamedTuple):
    """What was written: how many tensors and bytes (ties once), and remarks for the user."""

    tensors: int
    nbytes: int
    remarks: list[str]


def format_of(path: str | os.PathLike[str]) -> str:
    """Return the format that the ending of a path asks for.

    >>> format_of("model.npz"), format_of("model.pt"), format_of("model")
    ('npz', 'torch', 'safetensors')
    """
    ending = os.fspath(path).rpartition(".")[2].lower()
    return _ENDINGS.get(ending, "safetensors")


def convert(
    file: TensorFile,
    target: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    dtype: Any = None,
    rename: Renaming | None = None,
    only: Sequence[str] | None = None,
    max_shard_size: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Conversion:
    """Write the tensors of an open file into another one, atomically.

    Args:
        file: what to convert.
        target: the new file; it may be the old one.
        format: as for ``lamina.save``.
        dtype: cast floating-point tensors to this one.
        rename: rules for the names.
        only: names or globs of the tensors to take, by their old names.
        max_shard_size: bytes of a shard.
        progress: called after each piece that is cast, rearranged or written, with the number of
            bytes so far and of all.

    Returns:
        What was written. Ties stay ties. The structure around the tensors is kept if it is plain
        data and neither ``rename`` nor ``only`` is given.

    Raises:
        FileError: if a tensor cannot be read or ``only`` matches nothing.
        RuleError: if a rename rule has no effect, or two names become one.
        OSError: if the target cannot be written; it is then as it was.
    """
    chosen = dict(file) if only is None else select(file, list(only))
    names = {name: name for name in chosen} if rename is None else rename.apply(chosen)
    chosen = {name: chosen[name] for name in names}
    for name, handle in chosen.items():
        if handle.refused:
            raise FileError(
                f"{file.path}: tensor {name!r} {handle.refused}; leave it out with only"
            )
    remarks: list[str] = []
    whole = file.nested and rename is None and only is None
    whole = whole and _is_data(file.tree)
    beside = [] if whole else [printable(name, 40) for name in objects_beside(file)]
    if beside:
        more = f" and {len(beside) - 5} more" if len(beside) > 5 else ""
        remarks.append(f"left out, being no tensors: {', '.join(beside[:5])}{more}")
    target_dtype = None if dtype is None else np.dtype(dtype)
    directory = os.path.dirname(os.path.realpath(os.fspath(target)))
    with tempfile.TemporaryFile(dir=directory) as scratch:
        count = Count(progress)
        spool = _Spool(scratch.fileno(), target_dtype, count)
        arrays = spool.arrays(chosen)
        obj: Any = {new: arrays[chosen[old].key] for old, new in names.items()}
        if whole:
            obj = _fill(file.tree, arrays)
        save(
            obj, target, format=format, max_shard_size=max_shard_size,
            metadata=_metadata(file, obj) if format == "safetensors" else None, progress=count,
        )  # fmt: skip
    if spool.overflows:
        remarks.append(f"{spool.overflows} values are too large for {dtype} and are not finite now")
    size = sum(array.nbytes for array in arrays.values())
    return Conversion(len(chosen), size, remarks)


class Count:
    """Adds up bytes, and tells how many of all are done."""

    def __init__(self, tell: Callable[[int, int], Any] | None, total: int = 0) -> None:
        self.tell = tell
        self.total = total
        self.done = 0

    def __call__(self, size: int) -> None:
        self.done += size
        if self.tell is not None:
            self.tell(self.done, self.total)


class _Spool:
    """Casts and rearranges tensors into a scratch file."""

    def __init__(self, fd: int, dtype: np.dtype | None, progress: Count) -> None:
        self.fd = fd
        self.dtype = dtype
        self.progress = progress
        self.overflows = 0
        self._end = 0

    def arrays(self, handles: Mapping[str, TensorHandle]) -> dict[Hashable, Any]:
        """Return an array for each distinct tensor, mapped from its file or from the scratch."""
        made: dict[Hashable, Any] = {}
        waiting: list[tuple[TensorHandle, np.dtype, int]] = []
        for handle in handles.values():
            if handle.key in made:
                continue
            wanted = self._wanted(handle)
            size = handle.nbytes // handle.dtype.itemsize * wanted.itemsize
            self.progress.total += size  # to be written in the end
            if handle.prng:
                made[handle.key] = to_jax([handle])[0]
            elif wanted == handle.dtype and handle.contiguous and _mapped(handle):
                made[handle.key] = handle.read()
            else:
                made[handle.key] = np.empty(handle.shape, wanted) if size == 0 else None
                self.progress.total += handle.nbytes  # to be cast before
                waiting.append((handle, wanted, size))
        starts = [self._write(handle, wanted) for handle, wanted, _ in waiting]
        if self._end:
            memory = np.frombuffer(mmap.mmap(self.fd, self._end, access=mmap.ACCESS_READ), np.uint8)
            for (handle, wanted, size), start in zip(waiting, starts, strict=True):
                if size:
                    part = memory[start : start + size].view(wanted)
                    made[handle.key] = part.reshape(handle.shape)
        return made

    def _wanted(self, handle: TensorHandle) -> np.dtype:
        floating = jnp.issubdtype(handle.dtype, jnp.floating)
        return self.dtype if self.dtype is not None and floating else handle.dtype

    def _write(self, handle: TensorHandle, wanted: np.dtype) -> int:
        start = self._end = -(-self._end // _ALIGN) * _ALIGN
        for chunk in handle.chunks():
            piece = self._cast(chunk, wanted)
            view = flat_bytes(piece).data
            while view:
                done = os.pwrite(self.fd, view, self._end)
                self._end += done
                view = view[done:]
            self.progress(chunk.nbytes)
        if not isinstance(handle.source, FileBytes):
            handle.source.close()  # what was inflated is in the scratch file now
        return start

    def _cast(self, chunk: np.ndarray, wanted: np.dtype) -> np.ndarray:
        if chunk.dtype == wanted:
            return chunk
        with np.errstate(over="ignore", invalid="ignore"):
            piece = chunk.astype(wanted)
        if wanted.itemsize <= chunk.dtype.itemsize:
            lost = np.count_nonzero(np.isfinite(chunk)) - np.count_nonzero(np.isfinite(piece))
            self.overflows += int(lost)
        return piece


def _mapped(handle: TensorHandle) -> bool:
    return isinstance(handle.source, FileBytes)


def _metadata(file: TensorFile, obj: Any) -> dict[str, str]:
    """The file's own words, without those that are lamina's, ties, or would be read as ties."""
    names = set(obj) if isinstance(obj, dict) else set()
    taken = {*_OWN_WORDS, *file, *names}
    return {
        key: value
        for key, value in file.metadata.items()
        if key not in taken and value not in taken and not key.startswith("lamina")
    }


def _is_data(tree: Any, depth: int = 0) -> bool:
    """Whether a structure holds nothing but tensors and plain values, as ``save`` takes them."""
    if isinstance(tree, TensorHandle | np.generic) or tree is None:
        return True
    if depth > 90:
        return False
    if isinstance(tree, dict):
        plain = all(key is None or type(key) in (str, int, float, bool) for key in tree)
        return plain and all(_is_data(child, depth + 1) for child in tree.values())
    if type(tree) in (list, tuple):
        return all(_is_data(child, depth + 1) for child in tree)
    return type(tree) in (bool, int, float, complex, str, bytes)


def _fill(tree: Any, arrays: dict[Hashable, Any]) -> Any:
    if isinstance(tree, TensorHandle):
        return arrays[tree.key]
    if isinstance(tree, dict):
        return {key: _fill(child, arrays) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_fill(child, arrays) for child in tree])
    return tree
