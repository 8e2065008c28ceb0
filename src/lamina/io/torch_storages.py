"""The storages that a pickle refers to by persistent ids, one object for each key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._core.errors import FileError
from .torch_globals import storage_element
from .torch_tensors import Element, Storage
from .torch_values import Ref, describe, printable

__all__ = ["StorageTable"]


class StorageTable:
    """Answers persistent ids, and remembers every storage so that shared ones stay shared.

    A storage is ``("storage", type, key, location, numel)``; before PyTorch 1.6 there was one item
    more: ``None``, or ``(key, offset, numel)`` of a view into the storage. Old pickles of whole
    modules also refer to ``("module", class, file, source)``.

    Args:
        where: what errors begin with.
        place: called once for a new storage, to give it its place in the file if that is known.
    """

    def __init__(self, where: str, place: Callable[[Storage], None] | None = None) -> None:
        self.where = where
        self.place = place
        self.storages: dict[str, Storage] = {}
        self.views: dict[str, tuple[Storage, Storage, int]] = {}

    def persistent(self, pid: Any) -> Any:
        """Return the storage that ``pid`` names.

        Raises:
            FileError: if it names nothing that PyTorch would write, or contradicts an earlier id.
        """
        if type(pid) is not tuple or len(pid) < 2:
            raise self._error("refers to something that is no storage")
        word, kind = pid[:2]
        if word == "module" and type(kind) is Ref:
            return kind
        if word != "storage" or len(pid) not in (5, 6):
            raise self._error("refers to something that is no storage")
        element = storage_element(kind)
        if element is None:
            raise self._error(f"has an unknown type of storage {describe(kind)}")
        storage = self._find(element, pid[2], pid[4])
        return storage if len(pid) == 5 or pid[5] is None else self._view(storage, pid[5])

    def place_views(self) -> None:
        """Give the views their places, after the storages have theirs."""
        for view, root, offset in self.views.values():
            if root.source is not None:
                view.place(root.source, root.offset + offset)

    def _error(self, reason: str) -> FileError:
        return FileError(f"{self.where}: the pickle {reason}")

    def _key(self, key: Any) -> str:
        if type(key) is int or (type(key) is str and len(key) <= 1024):
            return str(key)
        raise self._error("has a storage whose key is neither text nor a number")

    def _find(self, element: Element, key: Any, numel: Any) -> Storage:
        key = self._key(key)
        if type(numel) is not int or not 0 <= numel < 1 << 62:
            raise self._error(f"has a storage {printable(key)!r} without a size")
        nbytes = numel * element.dtype.itemsize
        storage = self.storages.get(key)
        if storage is None:
            storage = Storage(key, element, nbytes)
            if self.place is not None:
                self.place(storage)
            self.storages[key] = storage
        elif storage.element is not element or storage.nbytes != nbytes:
            raise self._error(f"gives storage {printable(key)!r} two types or sizes")
        return storage

    def _view(self, root: Storage, view: Any) -> Storage:
        if type(view) is not tuple or len(view) != 3:
            raise self._error("has a view of a storage that is not (key, offset, size)")
        key, offset, numel = self._key(view[0]), *view[1:]
        if any(type(number) is not int or number < 0 for number in (offset, numel)):
            raise self._error("has a view of a storage that is not (key, offset, size)")
        item = root.element.dtype.itemsize
        if (offset + numel) * item > root.nbytes:
            raise self._error(f"has a view {printable(key)!r} that is outside its storage")
        known = self.views.get(key)
        if known is None:
            known = (Storage(key, root.element, numel * item), root, offset * item)
            self.views[key] = known
        elif known[1:] != (root, offset * item) or known[0].nbytes != numel * item:
            raise self._error(f"gives the view {printable(key)!r} two meanings")
        return known[0]
