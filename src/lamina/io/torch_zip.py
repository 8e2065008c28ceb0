"""Read the zip files of ``torch.save`` (PyTorch 1.6 and later) and of ``torch.jit.save``.

All records lie under one directory: ``data.pkl`` is the object, ``data/<key>`` one storage each, as
raw bytes that PyTorch aligns to 64, so that they are mapped and never copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .._core.errors import FileError
from .tensorfile import FileBytes, LazyBytes, TensorFile
from .torch_globals import call_global
from .torch_pickle import MAX_PICKLE_BYTES, load_pickle
from .torch_storages import StorageTable
from .torch_tensors import Storage
from .torch_tree import NamedTensors
from .torch_values import printable
from .zip_records import DEFLATED, Record, check_crc, check_records, read_directory, record_bytes

__all__ = ["open_torch_zip"]

_PICKLE = "/data.pkl"


def open_torch_zip(path: str | os.PathLike[str], *, verify: bool = False) -> TensorFile:
    """Open a zip file that PyTorch wrote; only its directory and its pickle are read.

    Nothing in the file is executed or imported. Pickled modules and TorchScript archives are read
    as their state dicts.

    Args:
        path: the file.
        verify: compare every record with its checksum, where one was recorded. The pickle always
            is.

    Returns:
        The tensors by their dotted names, and the nested object as ``tree``.

    Raises:
        FileError: if the file is damaged, hostile, or not written by PyTorch.
        OSError: if it cannot be opened.

    Example:
        >>> import numpy as np, os, tempfile
        >>> from lamina.io.torch_write import save_torch
        >>> path = os.path.join(tempfile.mkdtemp(), "model.pt")
        >>> save_torch({"model": {"0.weight": np.ones((2, 3), np.float32)}, "epoch": 3}, path)
        >>> with open_torch_zip(path) as file:
        ...     print(list(file), file.tree["epoch"])
        ['model.0.weight'] 3
    """
    source = FileBytes(path)
    try:
        file = _ZipReader(source).open()
        if verify:
            file.verify()
        return file
    except BaseException:
        source.close()
        raise


class _ZipFile(TensorFile):
    """A file of PyTorch, whose checksums are those of the zip records."""

    records: dict[str, Record]
    bytes: FileBytes

    def verify(self, progress: Callable[[int], Any] | None = None) -> int:
        data = self.bytes.buffer().data
        return check_records(data, self.records.values(), self.path, progress)


class _ZipReader:
    def __init__(self, source: FileBytes) -> None:
        self.source = source
        self.where = source.path
        self.data = source.buffer().data
        self.records = read_directory(self.data, self.where)
        self.table = StorageTable(self.where, self._place)

    def open(self) -> _ZipFile:
        self.root = self._root()
        self.big_endian = self._big_endian()
        record = self.records[self.root + _PICKLE]
        if record.size > MAX_PICKLE_BYTES:
            raise FileError(f"{self.where}: data.pkl has {record.size} bytes, far too many")
        check_crc(self.data, record, self.where)
        content = record_bytes(self.data, record, self.where)
        what = f"{self.where}: data.pkl"
        value, end = load_pickle(content, what, call_global, self.table.persistent)
        if end != record.size:
            raise FileError(f"{what}: more data follows the pickle")
        named = NamedTensors(value, self.source, record.size)
        sources = [self.source, *(s.source for s in self.table.storages.values())]
        file = _ZipFile(
            self.where,
            "torch-zip",
            named.tensors,
            ties=named.ties,
            tree=named.tree,
            nested=True,
            sources=[s for s in dict.fromkeys(sources) if s is not None],
        )
        file.records, file.bytes = self.records, self.source
        return file

    def _root(self) -> str:
        """The one directory that holds a pickle."""
        found = [name for name in self.records if name.endswith(_PICKLE) and name.count("/") == 1]
        if not found:
            if any(
                "archive_format" in name or name.endswith("model.json") for name in self.records
            ):
                raise FileError(
                    f"{self.where}: this is a program saved by torch.export or by PyTorch 1.0, "
                    f"which is not read; save its state_dict() with torch.save"
                )
            raise FileError(
                f"{self.where}: this zip file has no data.pkl; PyTorch did not write it"
            )
        if len(found) > 1:
            raise FileError(f"{self.where}: two records claim to be the object: {found[:2]}")
        return found[0][: -len(_PICKLE)]

    def _big_endian(self) -> bool:
        record = self.records.get(f"{self.root}/byteorder")
        if record is None:
            return False
        order = bytes(record_bytes(self.data, record, self.where)) if record.size < 16 else b""
        if order not in (b"little", b"big"):
            raise FileError(f"{self.where}: the byte order is recorded as {order!r}")
        return order == b"big"

    def _place(self, storage: Storage) -> None:
        key = storage.key
        storage.big_endian = self.big_endian
        record = self.records.get(f"{self.root}/data/{key}")
        if record is None:
            raise FileError(
                f"{self.where}: the record data/{printable(key)} of a storage is missing"
            )
        if record.size != storage.nbytes:
            raise FileError(
                f"{self.where}: the record {printable(record.name)!r} has {record.size} bytes, "
                f"its storage should have {storage.nbytes}"
            )
        if record.method == DEFLATED:
            storage.place(LazyBytes(self.where, record.size, lambda: self._inflate(record)), 0)
        else:
            storage.place(self.source, record.offset)

    def _inflate(self, record: Record) -> memoryview:
        return record_bytes(self.source.buffer().data, record, self.where).data
