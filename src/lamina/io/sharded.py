"""Checkpoints in several files: an index ``{"weight_map": {name: file}}`` beside its shards.

The layout is that of Hugging Face (``model-00001-of-00003.safetensors`` and
``model.safetensors.index.json``). The index is replaced last, in one rename, and new shards never
overwrite old ones, so whoever opens the checkpoint sees all of the old or all of the new.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from .._core.errors import FileError
from .atomic import replacing, sync_directory, write_at
from .safetensors import write_safetensors
from .strict_json import parse_json
from .tensorfile import FileBytes, TensorFile, TensorHandle
from .tree import DESCRIPTION, restore

__all__ = ["open_directory", "open_index", "parse_size", "remove_index", "write_sharded"]

_MAX_INDEX = 100_000_000
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
# In the order in which a directory is searched.
_PATTERNS = (
    r".*\.safetensors\.index\.json",
    r".*\.safetensors",
    r".*\.bin\.index\.json",
    r".*\.(bin|pt|pth|ckpt|npz|gguf)",
)

Opener = Callable[[str], TensorFile]


def open_index(path: str | os.PathLike[str], open_shard: Opener) -> TensorFile:
    """Open a sharded checkpoint by its index.

    Args:
        path: the ``.index.json`` file.
        open_shard: opens one shard.

    Returns:
        One mapping over all shards.

    Raises:
        FileError: if the index is malformed, names a file outside its directory, or does not agree
            with the shards.
    """
    path = os.fspath(path)
    index = _read_index(path)
    directory = os.path.dirname(path)
    placed: dict[str, str] = index["weight_map"]
    shards: dict[str, TensorFile] = {}
    tensors: dict[str, TensorHandle] = {}
    ties: dict[str, str] = {}
    try:
        for name in dict.fromkeys(placed.values()):
            try:
                shards[name] = open_shard(os.path.join(directory, name))
            except FileNotFoundError:
                raise FileError(f"{path}: the shard {name!r} is missing") from None
        for name, shard in placed.items():
            if name not in shards[shard]:
                raise FileError(f"{path}: tensor {name!r} is not in the shard {shard!r}")
            tensors[name] = shards[shard][name]
        for file in shards.values():
            for name, handle in file.items():
                if tensors.setdefault(name, handle) is not handle and name not in placed:
                    raise FileError(f"{path}: tensor {name!r} is in two shards, not in the index")
            ties.update({alias: kept for alias, kept in file.ties.items()
                         if tensors[alias] is file[alias]})  # fmt: skip
        words = index.get("metadata", {})
        metadata = {k: v for k, v in words.items() if isinstance(v, str)}
        tree, nested = None, False
        if DESCRIPTION in metadata:
            tensors, tree, nested = restore(path, metadata[DESCRIPTION], tensors)
        return _ShardedFile(
            path, "sharded", tensors, metadata=metadata, ties=ties, tree=tree,
            nested=nested, sources=shards.values(),
        )  # fmt: skip
    except BaseException:
        for file in shards.values():
            file.close()
        raise


class _ShardedFile(TensorFile):
    """A checkpoint of several files, each with its own checksums."""

    def verify(self, progress: Callable[[int], Any] | None = None) -> int:
        shards = (shard for shard in self._sources if isinstance(shard, TensorFile))
        return sum(shard.verify(progress) for shard in shards)


def open_directory(path: str | os.PathLike[str], open_shard: Opener) -> TensorFile:
    """Open the one checkpoint in a directory: an index, or a single file of weights.

    Raises:
        FileError: if there is none, or more than one of a kind.
    """
    path = os.fspath(path)
    names = sorted(os.listdir(path))
    for pattern in _PATTERNS:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if len(found) > 1:
            raise FileError(f"{path}: holds several checkpoints ({', '.join(found[:5])}); name one")
        if found:
            whole = os.path.join(path, found[0])
            if found[0].endswith(".index.json"):
                return open_index(whole, open_shard)
            return open_shard(whole)
    raise FileError(f"{path}: is a directory without a checkpoint; it has {names[:10]}")


def parse_size(size: int | str) -> int:
    """Turn ``"5GB"``, ``"500 MiB"`` or a number of bytes into bytes.

    Raises:
        ValueError: if it is no size above zero.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"{size!r} is not a size; write for example '5GB' or '500MiB'")
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ValueError(f"a shard needs at least one byte, got {size}")
    return size


def write_sharded(
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    max_bytes: int,
    *,
    description: str = "",
    metadata: Mapping[str, str] | None = None,
    ties: Mapping[str, str] | None = None,
    checksums: bool = True,
    sync: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write safetensors shards of at most ``max_bytes`` of data (or one tensor) and their index.

    Args:
        tensors: names and arrays.
        path: as of the single file, ``model.safetensors``; the shards are named after it. A single
            file of that name is removed at the end, and other shards named after it: those of the
            old index, and of saves that were killed.
        max_bytes: the limit.
        description: what ``lamina.io.tree`` needs to give nested objects back.
        metadata: text for the index and every shard.
        ties: ``{alias: name}``.
        checksums: record a crc32 for each tensor.
        sync: wait for the disk.
        progress: called with the number of bytes after each piece that is written.

    Raises:
        FileError, OSError: as ``write_safetensors``; the old checkpoint is then as it was.
    """
    path = os.path.realpath(os.fspath(path))
    directory, base = os.path.split(path)
    stem = base.removesuffix(".safetensors")
    index_path = f"{path}.index.json"
    stale = set(_old_shards(index_path))
    groups = _split(tensors, max_bytes)
    names = list(_shard_names(directory, stem, len(groups)))
    written: list[str] = []
    try:
        for name, group in zip(names, groups, strict=True):
            own = {alias: kept for alias, kept in (ties or {}).items() if kept in group}
            written.append(os.path.join(directory, name))
            write_safetensors(
                group, written[-1], metadata=metadata, ties=own, checksums=checksums, sync=sync,
                progress=progress,
            )  # fmt: skip
        words = {**(metadata or {}), "total_size": sum(a.nbytes for a in tensors.values())}
        if description:
            words[DESCRIPTION] = description
        placed = {n: name for name, group in zip(names, groups, strict=True) for n in group}
        text = json.dumps({"metadata": words, "weight_map": placed}, indent=1).encode()
        with replacing(index_path, len(text), sync=sync) as fd:
            write_at(fd, 0, [np.frombuffer(text, np.uint8)])
    except BaseException:
        for shard in written:
            with contextlib.suppress(OSError):
                os.unlink(shard)
        raise
    shard = re.compile(re.escape(stem) + r"(-[0-9a-f]{8})?-\d{5}-of-\d{5}\.safetensors")
    stale.update(name for name in os.listdir(directory) if shard.fullmatch(name))
    for name in {*stale, base} - set(names):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(directory, name))
    if sync:
        sync_directory(directory)


def remove_index(path: str | os.PathLike[str]) -> None:
    """Remove the index and the shards that a single file at ``path`` has just replaced."""
    path = os.path.realpath(os.fspath(path))
    index = f"{path}.index.json"
    stale = _old_shards(index)
    for name in [index, *(os.path.join(os.path.dirname(path), shard) for shard in stale)]:
        if stale and name != path:
            with contextlib.suppress(OSError):
                os.unlink(name)


def _split(tensors: Mapping[str, np.ndarray], max_bytes: int) -> list[dict[str, np.ndarray]]:
    groups: list[dict[str, np.ndarray]] = [{}]
    used = 0
    for name, array in tensors.items():
        if groups[-1] and used + array.nbytes > max_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = array
        used += array.nbytes
    return groups


def _shard_names(directory: str, stem: str, count: int) -> Iterator[str]:
    """Names that no file has yet, so that an older checkpoint stays whole until the end."""
    plain = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if any(os.path.lexists(os.path.join(directory, name)) for name in plain):
        stem = f"{stem}-{secrets.token_hex(4)}"
    for i in range(1, count + 1):
        yield f"{stem}-{i:05d}-of-{count:05d}.safetensors"


def _old_shards(index_path: str) -> list[str]:
    """The shards that an index at this place names; none if there is no valid one."""
    try:
        return list(_read_index(index_path)["weight_map"].values())
    except (OSError, FileError):
        return []


def _read_index(path: str) -> dict[str, Any]:
    source = FileBytes(path)
    try:
        if source.size > _MAX_INDEX:
            raise FileError(f"{path}: the index has {source.size} bytes, at most {_MAX_INDEX}")
        index = parse_json(path, source.pread(source.size, 0), "the index", inexact=True)
    finally:
        source.close()
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not isinstance(index.get("metadata", {}), dict):
        raise FileError(f"{path}: the index has no weight_map of names to files")
    for name, shard in placed.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise FileError(
                f"{path}: tensor {name!r:.200} is said to be in {shard!r:.200}, "
                f"which is not the name of a file beside the index"
            )
    return index


def _is_plain_name(name: str) -> bool:
    return (
        name not in ("", ".", "..") and not any(c in name for c in "/\\\0:") and name.isprintable()
    )
