"""Read the files of ``torch.save`` before PyTorch 1.6 (and of its old format today).

Five pickles in a row (a magic number, a version, facts about the machine, the object, the keys of
the storages), then for each key the number of elements and the raw bytes, always little-endian. The
data lies at any offset.
"""

from __future__ import annotations

import os
from typing import Any

from .._core.errors import FileError
from .tensorfile import FileBytes, TensorFile
from .torch_globals import call_global
from .torch_pickle import load_pickle
from .torch_storages import StorageTable
from .torch_tree import NamedTensors
from .torch_values import describe, printable

__all__ = ["open_torch_legacy"]

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
_COUNT_BYTES = 8


def open_torch_legacy(path: str | os.PathLike[str]) -> TensorFile:
    """Open a file that PyTorch before 1.6 wrote; nothing in it is executed or imported.

    Args:
        path: the file.

    Returns:
        The tensors by their dotted names, and the nested object as ``tree``.

    Raises:
        FileError: if the file is damaged, hostile, or not of this kind.
        OSError: if it cannot be opened.

    Example:
        >>> with open_torch_legacy("resnet18.pth") as file:  # doctest: +SKIP
        ...     print(file["fc.weight"].shape)
        (1000, 512)
    """
    source = FileBytes(path)
    try:
        return _read(source)
    except BaseException:
        source.close()
        raise


def _read(source: FileBytes) -> TensorFile:
    where = source.path
    data = source.buffer().data
    table = StorageTable(where)

    def load(what: str, start: int, persistent: Any = None) -> tuple[Any, int]:
        return load_pickle(data, f"{where}: {what}", call_global, persistent, start)

    magic, at = load("the magic number", 0)
    if type(magic) is not int or magic != MAGIC:
        raise FileError(f"{where}: this is a plain pickle, not a file of torch.save")
    protocol, at = load("the version", at)
    if type(protocol) is not int or protocol != PROTOCOL:
        raise FileError(f"{where}: the version of this torch.save file is {describe(protocol)}")
    _, at = load("the facts about the machine", at)
    begin = at
    value, at = load("the object", at, table.persistent)
    pickle_bytes = at - begin
    keys, at = load("the list of storages", at)
    _place_storages(source, data, table, keys, at)
    named = NamedTensors(value, source, pickle_bytes)
    return TensorFile(
        where,
        "torch-legacy",
        named.tensors,
        ties=named.ties,
        tree=named.tree,
        nested=True,
        sources=[source],
    )


def _place_storages(
    source: FileBytes, data: memoryview, table: StorageTable, keys: Any, at: int
) -> None:
    """Find every storage behind the pickles, and check that none is missing."""
    where = source.path
    if type(keys) is not list:
        raise FileError(f"{where}: the list of storages is not a list")
    for key in keys:
        storage = table.storages.get(str(key)) if type(key) in (str, int) else None
        if storage is None:
            raise FileError(f"{where}: a storage is listed that no tensor uses")
        if storage.source is not None:
            raise FileError(f"{where}: storage {printable(storage.key)!r} is listed twice")
        if at + _COUNT_BYTES > len(data):
            raise FileError(f"{where}: the file is cut off before {storage!r}")
        count = int.from_bytes(data[at : at + _COUNT_BYTES], "little", signed=True)
        at += _COUNT_BYTES
        if count * storage.element.dtype.itemsize != storage.nbytes:
            raise FileError(f"{where}: {storage!r} is announced with {count} elements")
        if at + storage.nbytes > len(data):
            raise FileError(f"{where}: the file is cut off in {storage!r}")
        storage.place(source, at)
        at += storage.nbytes
    missing = [storage for storage in table.storages.values() if storage.source is None]
    if missing:
        raise FileError(f"{where}: {missing[0]!r} is used by a tensor and not in the file")
    table.place_views()
