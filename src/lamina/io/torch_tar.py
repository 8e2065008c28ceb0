"""Read the tar files of ``torch.save`` before PyTorch 0.1.10.

The members are ``sys_info``, ``storages``, ``tensors`` and ``pickle``; they are looked at where
they lie in the file and never extracted.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from .._core.errors import FileError
from .tensorfile import FileBytes, TensorFile
from .torch_globals import call_global, storage_element
from .torch_pickle import load_pickle
from .torch_tensors import MAX_RANK, Storage, TensorRecord
from .torch_tree import NamedTensors
from .torch_values import Ref, describe, printable

__all__ = ["open_torch_tar"]

_BLOCK = 512
_PARTS = ("storages", "tensors", "pickle")
_REGULAR = (b"0", b"\0")
_EXTENSIONS = (b"x", b"g")
MAX_EXTENSION = 1 << 16


def open_torch_tar(path: str | os.PathLike[str]) -> TensorFile:
    """Open a tar file that PyTorch before 0.1.10 wrote; nothing in it is executed or extracted.

    Args:
        path: the file.

    Returns:
        The tensors by their dotted names, and the nested object as ``tree``.

    Raises:
        FileError: if the file is damaged, hostile, or not of this kind.
        OSError: if it cannot be opened.

    Example:
        >>> with open_torch_tar("model-2016.pth") as file:  # doctest: +SKIP
        ...     print(list(file))
        ['weight', 'bias']
    """
    source = FileBytes(path)
    try:
        return _TarReader(source).open()
    except BaseException:
        source.close()
        raise


class _TarReader:
    def __init__(self, source: FileBytes) -> None:
        self.source = source
        self.where = source.path
        self.data = source.buffer().data
        self.objects: dict[str, Any] = {}

    def open(self) -> TensorFile:
        members = self._members()
        missing = [name for name in _PARTS if name not in members]
        if missing:
            raise FileError(f"{self.where}: this tar file has no {missing[0]}; not from PyTorch")
        try:
            self._read_storages(*members["storages"])
            self._read_tensors(*members["tensors"])
        except (struct.error, ValueError, TypeError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{self.where}: the list of tensors is damaged") from None
        begin, end = members["pickle"]
        value, _ = self._load("pickle", begin, end, self._persistent)
        named = NamedTensors(value, self.source, end - begin)
        return TensorFile(
            self.where,
            "torch-tar",
            named.tensors,
            ties=named.ties,
            tree=named.tree,
            nested=True,
            sources=[self.source],
        )

    def _load(self, what: str, at: int, end: int, persistent: Any = None) -> tuple[Any, int]:
        where = f"{self.where}: {what}"
        return load_pickle(self.data[:end], where, call_global, persistent, at)

    def _members(self) -> dict[str, tuple[int, int]]:
        """Begin and end of every regular member."""
        found: dict[str, tuple[int, int]] = {}
        at = 0
        wide: int | None = None
        while at + _BLOCK <= len(self.data):
            header = bytes(self.data[at : at + _BLOCK])
            if not any(header):
                break
            kind, size = header[156:157], self._size(header)
            begin = at + _BLOCK
            if kind not in _EXTENSIONS and wide is not None:
                size, wide = wide, None
            if begin + size > len(self.data):
                raise FileError(f"{self.where}: the tar file is cut off")
            if kind in _EXTENSIONS:
                wide = self._wide_size(begin, size)
            elif kind in _REGULAR:
                name = header[:100].split(b"\0")[0].decode("utf-8", "backslashreplace")
                if name in found:
                    raise FileError(f"{self.where}: the member {printable(name)!r} is there twice")
                found[name] = (begin, begin + size)
            at = begin + -(-size // _BLOCK) * _BLOCK
        return found

    def _size(self, header: bytes) -> int:
        try:
            recorded = int(header[148:156].strip(b" \0") or b"0", 8)
            digits = header[124:136].strip(b" \0") or b"0"
            size = int(digits, 8) if digits.isdigit() else -1
        except ValueError:
            recorded, size = -1, -1
        total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if header[257:262] != b"ustar" or recorded != total or size < 0:
            raise FileError(f"{self.where}: the tar file is damaged")
        return size

    def _wide_size(self, begin: int, size: int) -> int | None:
        """The size in an extended header, which stands for one that has too many digits."""
        if size > MAX_EXTENSION:
            raise FileError(f"{self.where}: the tar file has an extended header of {size} bytes")
        for line in bytes(self.data[begin : begin + size]).split(b"\n"):
            _, _, field = line.partition(b" ")
            key, _, value = field.partition(b"=")
            if key == b"path":
                raise FileError(f"{self.where}: the tar file renames its members")
            if key == b"size":
                if not value.isdigit() or len(value) > 19:
                    raise FileError(f"{self.where}: the tar file is damaged")
                return int(value)
        return None

    def _read_storages(self, at: int, end: int) -> None:
        count, at = self._load("storages", at, end)
        for _ in range(count):
            (key, _, kind), at = self._load("storages", at, end)
            element = storage_element(kind)
            if element is None:
                raise FileError(f"{self.where}: unknown type of storage {describe(kind)}")
            (numel,) = struct.unpack_from("<q", self.data[:end], at)
            at += 8
            storage = Storage(self._key(key), element, numel * element.dtype.itemsize)
            if numel < 0 or at + storage.nbytes > end:
                raise FileError(f"{self.where}: {storage!r} is longer than the file")
            storage.place(self.source, at)
            self._add(key, storage)
            at += storage.nbytes
        views, at = self._load("storages", at, end)
        if type(views) is not list:
            raise FileError(f"{self.where}: the views of storages are not a list")
        for target, root, offset, numel in views:
            self._add(target, self._view(self._find(root, Storage), target, offset, numel))

    def _view(self, root: Storage, key: Any, offset: Any, numel: Any) -> Storage:
        item = root.element.dtype.itemsize
        if any(type(n) is not int or n < 0 for n in (offset, numel)):
            raise FileError(f"{self.where}: a view of {root!r} has no size")
        if (offset + numel) * item > root.nbytes or root.source is None:
            raise FileError(f"{self.where}: a view lies outside of {root!r}")
        view = Storage(self._key(key), root.element, numel * item)
        view.place(root.source, root.offset + offset * item)
        return view

    def _read_tensors(self, at: int, end: int) -> None:
        count, at = self._load("tensors", at, end)
        part = self.data[:end]
        for _ in range(count):
            (key, storage_key, _), at = self._load("tensors", at, end)
            storage = self._find(storage_key, Storage)
            # The number of axes takes eight bytes, of which the last four mean nothing.
            (rank,) = struct.unpack_from("<i4x", part, at)
            if not 0 <= rank <= MAX_RANK:
                raise FileError(f"{self.where}: a tensor has {rank} axes")
            size = struct.unpack_from(f"<{rank}q", part, at + 8)
            stride = struct.unpack_from(f"<{rank}q", part, at + 8 + 8 * rank)
            (offset,) = struct.unpack_from("<q", part, at + 8 + 16 * rank)
            at += 16 + 16 * rank
            self._add(key, TensorRecord(storage, storage.element, offset, size, stride))

    def _persistent(self, pid: Any) -> Any:
        """A tensor or a storage by its key; of a class with its source, just the class."""
        if type(pid) is tuple and pid and type(pid[0]) is Ref:
            return pid[0]
        return self._find(pid, (Storage, TensorRecord))

    def _key(self, key: Any) -> str:
        if type(key) not in (int, str) or len(str(key)) > 40:
            raise FileError(f"{self.where}: a storage or tensor has no proper key")
        return str(key)

    def _add(self, key: Any, value: Any) -> None:
        key = self._key(key)
        if key in self.objects:
            raise FileError(f"{self.where}: two storages or tensors have the key {printable(key)}")
        self.objects[key] = value

    def _find(self, key: Any, kinds: Any) -> Any:
        value = self.objects.get(self._key(key))
        if not isinstance(value, kinds):
            raise FileError(
                f"{self.where}: {printable(self._key(key))} is used and not in the file"
            )
        return value
