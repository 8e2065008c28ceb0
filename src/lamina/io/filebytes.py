"""An open file as bytes: mapped read-only, and readable in vectors."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable

import numpy as np

from .._core.errors import FileError

__all__ = ["FileBytes", "LazyBytes"]

_MOST_BUFFERS = 512


class FileBytes:
    """The bytes of a regular file, read-only. ``close`` leaves arrays that were handed out valid.

    Raises:
        FileError: if the path is not a regular file.
        OSError: if it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.fd = -1
        self.path = os.fspath(path)
        mode = os.stat(self.path).st_mode
        if stat.S_ISDIR(mode):
            raise FileError(f"{self.path}: is a directory, expected a file")
        if not stat.S_ISREG(mode):
            raise FileError(f"{self.path}: is not a regular file")
        self.fd = os.open(self.path, os.O_RDONLY)
        self.size = os.fstat(self.fd).st_size
        self._buffer: np.ndarray | None = None

    def buffer(self) -> np.ndarray:
        """Return the whole file as a read-only ``uint8`` array on a shared mapping.

        Raises:
            FileError: if the file was closed, or shrank since it was opened (touching the lost
                pages of the mapping would kill the process).
        """
        self.check()
        if self._buffer is None:
            if self.size == 0:
                self._buffer = np.frombuffer(b"", np.uint8)
            else:
                mapping = mmap.mmap(self.fd, self.size, access=mmap.ACCESS_READ)
                self._buffer = np.frombuffer(mapping, np.uint8)
        return self._buffer

    def check(self) -> None:
        """Raise ``FileError`` if the file is closed or has become shorter."""
        if self.fd < 0:
            raise FileError(f"{self.path}: the file was closed; open it again to read from it")
        now = os.fstat(self.fd).st_size
        if now < self.size:
            raise FileError(
                f"{self.path}: the file was truncated while it was open "
                f"(it had {self.size} bytes, now {now})"
            )

    def read_into(self, offset: int, pieces: list[memoryview]) -> None:
        """Fill consecutive buffers of bytes with the bytes from ``offset`` on, in few system calls.

        Raises:
            FileError: if the file ends before the pieces are full.
        """
        self.check()
        start = 0
        while start < len(pieces):
            batch = pieces[start : start + _MOST_BUFFERS]
            wanted = sum(piece.nbytes for piece in batch)
            got = os.preadv(self.fd, batch, offset) if wanted else 0
            offset += got
            if got == wanted:
                start += len(batch)
                continue
            if got == 0:
                raise FileError(f"{self.path}: the file ends at byte {offset}, expected more data")
            while start < len(pieces) and got >= pieces[start].nbytes:
                got -= pieces[start].nbytes
                start += 1
            pieces = [pieces[start][got:], *pieces[start + 1 :]]
            start = 0

    def pread(self, size: int, offset: int) -> bytes:
        """Return up to ``size`` bytes from ``offset`` on; fewer at the end of the file."""
        self.check()
        parts: list[bytes] = []
        while size > 0:
            part = os.pread(self.fd, min(size, 1 << 30), offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the file. Arrays read before keep the mapping alive as long as they need it."""
        fd, self.fd = self.fd, -1
        self._buffer = None
        if fd >= 0:
            os.close(fd)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:
            close(self.fd)


class LazyBytes:
    """Bytes that have to be made first, for instance inflated; made once, on first use."""

    def __init__(self, path: str, size: int, produce: Callable[[], bytes | memoryview]):
        self.path = path
        self.size = size
        self._produce = produce
        self._buffer: np.ndarray | None = None

    def buffer(self) -> np.ndarray:
        """Return the bytes as a read-only ``uint8`` array."""
        if self._buffer is None:
            made = np.frombuffer(memoryview(self._produce()).toreadonly(), np.uint8)
            if made.nbytes != self.size:
                raise FileError(
                    f"{self.path}: a record holds {made.nbytes} bytes, expected {self.size}"
                )
            self._buffer = made
        return self._buffer

    def check(self) -> None:
        """Nothing can change under bytes held in memory."""

    def close(self) -> None:
        """Let go of the bytes."""
        self._buffer = None
