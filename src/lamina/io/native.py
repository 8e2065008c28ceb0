"""``save``, ``load`` and ``open``: objects to files and back."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .._core.errors import FileError, did_you_mean
from .arrays import to_jax, to_numpy
from .npz import numpy_names, write_npz
from .safetensors import storable, write_safetensors
from .sharded import parse_size, remove_index, write_sharded
from .sniff import open_any
from .tensorfile import TensorFile, TensorHandle
from .torch_write import save_torch
from .tree import DESCRIPTION, flatten

__all__ = ["load", "open", "save"]

Path = str | os.PathLike[str]


def save(
    obj: Any,
    path: Path,
    *,
    format: str = "safetensors",
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    checksums: bool = True,
    sync: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Save a module, a state dict or any nested structure of arrays, completely or not at all.

    Args:
        obj: a module, an array, or lists, tuples and dicts of them with Python scalars, strings,
            bytes and ``None``. An array that occurs several times is stored once.
        path: the target, whatever its extension. It may be the file that ``obj`` was loaded from.
        format: ``"safetensors"``, ``"npz"`` or ``"torch"`` (which ``torch.load`` reads).
        max_shard_size: split a safetensors file into shards of at most so many bytes, or ``"5GB"``,
            with an index as Hugging Face has it.
        metadata: text to store beside the tensors (safetensors only).
        checksums: record a crc32 for each tensor (npz and torch files always have them).
        sync: wait until everything is on disk. Without it the file is still replaced in one step,
            but a power failure may lose it.
        progress: called with the number of bytes after each piece that is written.

    Raises:
        TypeMismatchError: naming the path of the first thing in ``obj`` that is not data.
        FileError: if the format cannot hold it.
        OSError: if the disk is full or the place is not writable; the old file is untouched.

    Example:
        >>> import jax.numpy as jnp, tempfile, os, lamina.io
        >>> path = os.path.join(tempfile.mkdtemp(), "state.safetensors")
        >>> lamina.io.save({"w": jnp.ones((2, 2)), "history": [0.5, 0.25], "step": 7}, path)
        >>> lamina.io.load(path)["history"]
        [0.5, 0.25]
    """
    if format == "safetensors":
        flat = flatten(obj, storable)
        words = _user_metadata(path, metadata, flat.tensors)
        if max_shard_size is not None:
            limit = parse_size(max_shard_size)
            if sum(array.nbytes for array in flat.tensors.values()) > limit:
                write_sharded(
                    flat.tensors, path, limit, description=flat.description, metadata=words,
                    ties=flat.ties, checksums=checksums, sync=sync, progress=progress,
                )  # fmt: skip
                return
        if flat.description:
            words[DESCRIPTION] = flat.description
        write_safetensors(
            flat.tensors, path, metadata=words, ties=flat.ties, checksums=checksums, sync=sync,
            progress=progress,
        )  # fmt: skip
        remove_index(path)
        return
    if metadata or max_shard_size is not None:
        raise ValueError(f"metadata and max_shard_size need format='safetensors', got {format!r}")
    if format == "npz":
        flat = flatten(obj, numpy_names)
        write_npz(
            flat.tensors, path, description=flat.description, ties=flat.ties, sync=sync,
            progress=progress,
        )  # fmt: skip
    elif format == "torch":
        save_torch(obj, path, sync=sync, progress=progress)
    else:
        formats = ["safetensors", "npz", "torch"]
        raise ValueError(
            f"unknown format {format!r}, expected one of {formats}.{did_you_mean(format, formats)}"
        )


def load(
    path: Path,
    *,
    names: str | Sequence[str] | None = None,
    dtype: Any = None,
    numpy: bool = False,
    copy: bool | None = None,
    verify: bool = False,
) -> Any:
    """Load what is in a file: the object that was saved, or ``{name: array}``.

    The kind of the file is found by its content: safetensors (also sharded: give the index or the
    directory), PyTorch's formats, npz, npy, GGUF. Nothing in a file is executed.

    Args:
        path: the file or directory.
        names: load only tensors of these names or globs (``"encoder.*"``), as a flat dict.
        dtype: cast floating-point tensors to this dtype.
        numpy: give numpy arrays with the file's exact dtypes instead of ``jax.Array``.
        copy: ``False`` or ``None``: an array is the mapped file itself wherever that is possible
            (``None``: not on network file systems); the file may be replaced, but must not be
            overwritten in place. ``True``: read everything into memory of our own; numpy arrays
            are then writable.
        verify: compare the checksums that the file records first.

    Returns:
        The same structure and types that were saved. As JAX arrays, 64-bit types become 32-bit
        unless x64 is on, with one warning that names the tensors (none for single integers).

    Raises:
        FileNotFoundError: if there is nothing there.
        FileError: if the file is damaged or of no kind that we read, or ``names`` matches nothing.

    Example:
        >>> import numpy as np, tempfile, os, lamina.io
        >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
        >>> lamina.io.save({"a.weight": np.ones(3, "f4"), "b.weight": np.zeros(2, "f4")}, path)
        >>> lamina.io.load(path, names="a.*")
        {'a.weight': Array([1., 1., 1.], dtype=float32)}
    """
    with open_any(path) as file:
        if verify:
            file.verify()
        if names is not None:
            tree: Any = select(file, names)
        else:
            tree = file.tree if file.nested else dict(file.items())
        leaves: dict[int, TensorHandle] = {}
        _collect(tree, leaves, set())
        handles = list(leaves.values())
        _check_readable(file, handles)
        try:
            read = to_numpy if numpy else to_jax
            arrays = read(handles, dtype=dtype, copy=copy)
        except MemoryError:
            needed = sum(handle.nbytes for handle in handles)
            raise FileError(
                f"{file.path}: its tensors need {needed} bytes, more memory than there is; load a "
                f"part with names=..., or read lazily with lamina.open"
            ) from None
        made = dict(zip(leaves, arrays, strict=True))
        return _replace(tree, made, {})


def open(path: Path) -> TensorFile:
    """Open a file without reading its tensors: a mapping of names to lazy handles.

    Args:
        path: the file or directory, of any kind that ``load`` reads.

    Returns:
        A ``TensorFile``, to be used in a ``with`` statement.

    Raises:
        FileNotFoundError: if there is nothing there.
        FileError: if the file is damaged or of no kind that we read.

    Example:
        >>> import numpy as np, tempfile, os, lamina.io
        >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
        >>> lamina.io.save({"w": np.arange(12.0).reshape(3, 4)}, path)
        >>> with lamina.io.open(path) as file:
        ...     file["w"].shape, file["w"].dtype, file["w"].read((0, slice(1, 3)))
        ((3, 4), dtype('float64'), array([1., 2.]))
    """
    return open_any(path)


def select(file: TensorFile, names: str | Sequence[str]) -> dict[str, TensorHandle]:
    """Return the tensors whose names are in ``names`` or match one of its globs.

    Raises:
        FileError: if one of them matches nothing.
    """
    chosen: dict[str, TensorHandle] = {}
    for pattern in [names] if isinstance(names, str) else names:
        found = [pattern] if pattern in file else fnmatch.filter(file, pattern)
        if not found:
            hint = did_you_mean(pattern, file)
            raise FileError(f"{file.path}: no tensor matches {pattern!r}.{hint}")
        chosen.update((name, file[name]) for name in found)
    return {name: chosen[name] for name in file if name in chosen}


def _user_metadata(
    path: Path, metadata: Mapping[str, str] | None, tensors: Mapping[str, np.ndarray]
) -> dict[str, str]:
    words = dict(metadata or {})
    for key, value in words.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise FileError(f"{os.fspath(path)}: metadata maps strings to strings, got {key!r}")
        if key.split(".")[0] == DESCRIPTION or value in tensors:
            raise FileError(
                f"{os.fspath(path)}: the metadata {key!r}: {value!r:.80} would be read as lamina's "
                f"own, or as a tie to the tensor of that name"
            )
    return words


def _collect(tree: Any, leaves: dict[int, TensorHandle], seen: set[int]) -> None:
    """Find the handles of a nested structure; parts that occur twice are visited once."""
    if isinstance(tree, TensorHandle):
        leaves[id(tree)] = tree
    elif isinstance(tree, dict | list | tuple):
        if id(tree) in seen:
            return
        seen.add(id(tree))
        for child in tree.values() if isinstance(tree, dict) else tree:
            _collect(child, leaves, seen)


def _replace(tree: Any, arrays: dict[int, Any], made: dict[int, Any]) -> Any:
    """Make the structure again with arrays in place of handles."""
    if isinstance(tree, TensorHandle):
        return arrays[id(tree)]
    if not isinstance(tree, dict | list | tuple):
        return tree
    if id(tree) not in made:
        if isinstance(tree, dict):
            made[id(tree)] = {key: _replace(child, arrays, made) for key, child in tree.items()}
        else:
            made[id(tree)] = type(tree)([_replace(child, arrays, made) for child in tree])
    return made[id(tree)]


def _check_readable(file: TensorFile, handles: list[TensorHandle]) -> None:
    refused = [handle for handle in handles if handle.refused]
    if refused:
        reasons = "; ".join(f"tensor {h.name!r} {h.refused}" for h in refused[:5])
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise FileError(
            f"{file.path}: {reasons}{more}. Load the others with names=..., "
            f"or look at all of them with lamina.open"
        )
