"""Write a file completely or not at all.

The bytes go to a nameless file in the same directory (``O_TMPFILE``), or to a temporary one where
the file system has no such thing. It replaces the target in one rename, after it is safe on disk.
Whoever reads or maps the old file keeps the old bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .._core.errors import FileError

__all__ = ["replacing", "sync_directory", "write_at"]

_MOST_BUFFERS = 512
_MOST_BYTES = 256 << 20
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
_NO_ALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], size: int = 0, *, sync: bool = True) -> Iterator[int]:
    """Open a file descriptor whose contents become ``path`` when the block ends without error.

    Args:
        path: the target; a symbolic link is followed. An existing file keeps its mode and, where
            allowed, its owner; a new one gets ``0666 & ~umask``.
        size: bytes to reserve at once, so that a full disk is found before anything is written.
        sync: wait until the bytes and the name are on disk.

    Yields:
        The descriptor, open for reading and writing, positioned at 0.

    Raises:
        FileError: if the target is a directory or a device.
        OSError: if the disk is full, or the directory or the target is not writable. The target is
            as it was, and nothing is left beside it.

    Example:
        >>> import os, pathlib, tempfile
        >>> target = pathlib.Path(tempfile.mkdtemp(), "x.txt")
        >>> with replacing(target) as fd:
        ...     _ = os.write(fd, b"all of it")
        >>> target.read_text()
        'all of it'
    """
    target = os.path.realpath(os.fspath(path))
    directory, name = os.path.split(target)
    before = _target_status(target)
    fd, temporary = _open_temporary(directory, name)
    try:
        if before is not None:
            with contextlib.suppress(PermissionError):
                os.fchown(fd, before.st_uid, before.st_gid)
            os.fchmod(fd, stat.S_IMODE(before.st_mode))
        if size:
            _reserve(fd, size)
        yield fd
        if sync:
            os.fsync(fd)
        if not temporary:
            temporary = _temporary_name(directory, name)
            # Python follows the link to the nameless file only where a directory is given.
            os.link(f"/proc/self/fd/{fd}", temporary, src_dir_fd=fd, follow_symlinks=True)
        os.replace(temporary, target)
        temporary = ""
        if sync:
            sync_directory(directory)
    finally:
        os.close(fd)
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_at(
    fd: int,
    offset: int,
    buffers: Sequence[np.ndarray],
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write consecutive ``uint8`` arrays from ``offset`` on, in few system calls.

    Args:
        fd: a file, open for writing.
        offset: where the first byte goes.
        buffers: what to write.
        progress: called with the number of bytes after each system call.

    Raises:
        OSError: if the disk is full or fails.
    """
    queue = [buffer for buffer in buffers if buffer.nbytes]
    queue.reverse()
    while queue:
        batch: list[Any] = []
        total = 0
        while queue and len(batch) < _MOST_BUFFERS and total < _MOST_BYTES:
            buffer = queue.pop()
            if total + buffer.nbytes > _MOST_BYTES:
                room = _MOST_BYTES - total
                queue.append(buffer[room:])
                buffer = buffer[:room]
            batch.append(buffer)
            total += buffer.nbytes
        written = os.pwritev(fd, batch, offset)
        offset += written
        if progress is not None:
            progress(written)
        if not written and total:
            raise OSError(errno.EIO, "the file system accepts no more data")
        for buffer in reversed(batch):
            # Put back what was not written, last buffer first.
            total -= buffer.nbytes
            if written >= total + buffer.nbytes:
                break
            queue.append(buffer[max(written - total, 0) :])


def sync_directory(directory: str) -> None:
    """Make sure that renames in ``directory`` survive a power failure."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems refuse to sync a directory.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(fd)


def _target_status(target: str) -> os.stat_result | None:
    try:
        status = os.stat(target)
    except FileNotFoundError:
        parent = os.path.dirname(target)
        if not os.path.isdir(parent):
            raise FileNotFoundError(
                errno.ENOENT, "cannot save: the directory does not exist", parent
            ) from None
        return None
    if stat.S_ISDIR(status.st_mode):
        raise FileError(f"{target}: cannot save over a directory")
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{target}: cannot save over something that is not a regular file")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "cannot save: the file is read-only", target)
    return status


def _open_temporary(directory: str, name: str) -> tuple[int, str]:
    """Return a descriptor and the file's name, which is empty for a nameless file."""
    nameless = getattr(os, "O_TMPFILE", 0)
    if nameless and os.path.isdir("/proc/self/fd"):
        try:
            return os.open(directory, nameless | os.O_RDWR | os.O_CLOEXEC, 0o666), ""
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
    temporary = _temporary_name(directory, name)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(temporary, flags, 0o666), temporary


def _temporary_name(directory: str, name: str) -> str:
    # File names are limited to 255 bytes.
    stem = os.fsdecode(os.fsencode(name)[:200])
    return os.path.join(directory, f".{stem}.{secrets.token_hex(6)}.tmp")


def _reserve(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except AttributeError:
        return
    except OSError as error:
        if error.errno not in _NO_ALLOCATE:
            raise
