"""What every reader returns: a mapping of names to lazy tensors that know where their bytes are.

* ``FileBytes`` (``filebytes.py``) is an open file; ``LazyBytes`` stands in where the bytes are not
  in the file as they are (a deflated record).
* ``TensorHandle`` is one tensor: name, shape, dtype and the place of its bytes; nothing is read
  before ``read()``.
* ``TensorFile`` is the mapping ``{name: TensorHandle}`` of a whole file (or of all its shards).

A format is a function ``open_x(path) -> TensorFile``.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Hashable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np

from .._core.errors import FileError, did_you_mean
from .checksum import crc32, worth_threads
from .filebytes import FileBytes, LazyBytes

__all__ = [
    "THREADS",
    "FileBytes",
    "LazyBytes",
    "TensorFile",
    "TensorHandle",
    "flat_bytes",
    "same_bytes",
]

_CHUNK = 1 << 20
_VERIFY_CHUNK = 4 << 20
THREADS = 2


class TensorHandle:
    """One tensor of a file, not read yet.

    The maker of a handle has checked that the bytes are inside ``source``; the constructor checks
    it again, with unbounded integers.

    Args:
        name: its name in the file.
        shape: its shape.
        dtype: the dtype that ``read`` returns, in the machine's byte order.
        source: where the bytes are.
        offset: byte position of the first element in ``source``.
        strides: strides in bytes, not negative; ``None`` for row-major.
        stored: dtype as it lies in the file where that differs only in byte order.
        finish: elementwise function applied after reading (conjugate, negate, swap bytes).
        kind: the file's own word for the type, for messages (``"BF16"``, ``"Q4_K"``).
        refused: why it cannot be read (a type that numpy has not); listing it still works.
        prng: the implementation's name if it holds the data of a typed JAX random key.
        nbytes: bytes in the file, where shape and dtype do not tell (refused types).

    Attributes:
        file: path of the file that holds it.
        nbytes: bytes of the whole tensor.

    Example:
        >>> import numpy as np, os, tempfile, lamina
        >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
        >>> lamina.save({"w": np.arange(6.0).reshape(2, 3)}, path)
        >>> with lamina.open(path) as file:
        ...     handle = file["w"]
        ...     handle.shape, handle.nbytes, handle.read((1, slice(2)))
        ((2, 3), 48, array([3., 4.]))
    """

    __slots__ = (
        "dtype",
        "file",
        "finish",
        "kind",
        "name",
        "nbytes",
        "offset",
        "prng",
        "refused",
        "shape",
        "source",
        "stored",
        "strides",
    )

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        source: FileBytes | LazyBytes,
        offset: int,
        *,
        strides: tuple[int, ...] | None = None,
        stored: np.dtype | None = None,
        finish: Callable[[np.ndarray], np.ndarray] | None = None,
        kind: str = "",
        refused: str = "",
        prng: str = "",
        nbytes: int | None = None,
    ):
        size = math.prod(shape)
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.source = source
        self.offset = offset
        self.strides = strides
        self.stored = stored
        self.finish = finish
        self.kind = kind or dtype.name
        self.refused = refused
        self.prng = prng
        self.nbytes = size * dtype.itemsize if nbytes is None else nbytes
        self.file = source.path
        if strides is None:
            span = self.nbytes
        elif size == 0:
            span = 0
        else:
            last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            span = last + dtype.itemsize
        if offset < 0 or (shape and min(shape) < 0) or (strides and min(strides) < 0):
            raise FileError(f"{self.file}: tensor {name!r} has a negative size, stride or offset")
        if len(shape) > 64:
            raise FileError(f"{self.file}: tensor {name!r} has {len(shape)} axes, at most 64")
        if offset + span > source.size:
            raise FileError(
                f"{self.file}: tensor {name!r} needs bytes {offset} to {offset + span}, "
                f"but there are only {source.size}"
            )

    @property
    def key(self) -> Hashable:
        """Two handles with equal keys are the same tensor (a tie)."""
        place = (id(self.source), self.offset, self.nbytes)
        return (*place, self.shape, self.strides, self.dtype, self.finish)

    @property
    def contiguous(self) -> bool:
        """Whether the file holds exactly the bytes of the row-major array."""
        if self.finish is not None or self.refused or self.stored not in (None, self.dtype):
            return False
        if self.strides is None or self.nbytes == 0:
            return True
        step = self.dtype.itemsize
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != step:
                return False
            step *= n
        return True

    def read(self, index: Any = ...) -> np.ndarray:
        """Read the tensor, or the part that a numpy ``index`` selects, with the file's dtype.

        Args:
            index: any numpy index; only the memory pages that it needs are read.

        Returns:
            A read-only array without a copy where the bytes allow it.

        Raises:
            FileError: if the file was closed or truncated, or numpy has no such type.
        """
        if self.refused:
            raise FileError(f"{self.file}: tensor {self.name!r} {self.refused}")
        stored = self.stored or self.dtype
        if 0 in self.shape:
            full = np.empty(self.shape, stored)
        else:
            buffer = self.source.buffer()
            full = np.ndarray(self.shape, stored, buffer, self.offset, self.strides)
        if index is ... and self.finish is None and self.stored is None:
            return full
        part = full[index]
        if self.finish is not None:
            part = self.finish(part)
        # A scalar index gives a numpy scalar; asarray makes it an array again.
        return np.asarray(part, dtype=self.dtype)

    @property
    def splittable(self) -> bool:
        """Whether ``chunks`` can begin and end anywhere."""
        plain = self.contiguous or (self.refused and self.strides is None)
        return bool(plain) and isinstance(self.source, FileBytes)

    def chunks(
        self, limit: int = _CHUNK, start: int = 0, stop: int | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the elements as flat arrays of at most ``limit`` bytes, in row-major order.

        The memory of a chunk is used again for the next one. Tensors that do not lie in the file as
        they are go along their first axis, whatever size that gives. Refused types give raw bytes.

        Args:
            limit: bytes of a chunk.
            start: first byte, of a whole element; only for ``splittable`` tensors.
            stop: where to end, in the same way.
        """
        source = self.source
        if not self.splittable or not isinstance(source, FileBytes):
            yield from self._row_chunks(limit)
            return
        step = max(limit // self.dtype.itemsize, 1) * self.dtype.itemsize
        end = self.nbytes if stop is None else stop
        scratch = np.empty(min(step, max(end - start, 0)), np.uint8)
        for position in range(start, end, step):
            piece = scratch[: min(step, end - position)]
            source.read_into(self.offset + position, [piece.data])
            yield piece.view(self.dtype)

    def _row_chunks(self, limit: int) -> Iterator[np.ndarray]:
        if not self.shape or self.nbytes <= limit:
            if self.nbytes or self.refused:
                yield self.read().reshape(-1)
            return
        rows = max(limit // (self.nbytes // self.shape[0]), 1)
        for start in range(0, self.shape[0], rows):
            yield self.read(slice(start, start + rows)).reshape(-1)

    def __repr__(self) -> str:
        return f"<tensor {self.name!r} {self.kind} {self.shape} in {self.file}>"


class TensorFile(Mapping[str, TensorHandle]):
    """An open file of tensors: a mapping of names to handles, in the order of the file.

    Every name is a key, also the aliases in ``ties`` (their handle is that of the canonical name).
    Use it in a ``with`` statement or call ``close``; arrays already read stay valid.

    Args:
        path: the file, or the directory or index of a sharded checkpoint.
        kind: name of the format (``"safetensors"``, ``"torch-zip"``, ``"npz"``, ...).
        tensors: the handles; aliases may be left out.
        metadata: the file's own text metadata.
        ties: ``{alias: canonical name}``, canonical names being keys of ``tensors``.
        tree: nested dicts, lists, tuples and inert values with handles as leaves, for formats that
            store nested objects; ``None`` if the file is a plain ``{name: tensor}``.
        nested: whether ``tree`` is the content, even if it is ``None``.
        sources: what ``close`` closes.
        checksums: ``{name: crc32 of the bytes}`` where the file records them, or what reads them.

    Example:
        >>> import numpy as np, lamina.io, tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "x.safetensors")
        >>> lamina.io.save({"w": np.arange(6.0, dtype="f4").reshape(2, 3)}, path)
        >>> with lamina.io.open(path) as file:
        ...     print(file["w"].shape, file["w"].read(1))
        (2, 3) [3. 4. 5.]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        kind: str,
        tensors: dict[str, TensorHandle],
        *,
        metadata: dict[str, str] | None = None,
        ties: dict[str, str] | None = None,
        tree: Any = None,
        nested: bool = False,
        sources: Iterable[FileBytes | LazyBytes | TensorFile] = (),
        checksums: Mapping[str, int] | Callable[[], Mapping[str, int]] | None = None,
    ):
        self.path = os.fspath(path)
        self.kind = kind
        self.metadata = metadata or {}
        self.ties = ties or {}
        self.tree = tree
        self.nested = nested or tree is not None
        self._checksums = checksums or {}
        self._tensors = dict(tensors)
        for alias, name in self.ties.items():
            self._tensors.setdefault(alias, self._tensors[name])
        self._sources = tuple(sources)

    def __getitem__(self, name: str) -> TensorHandle:
        handle = self._tensors.get(name)
        if handle is None:
            hint = did_you_mean(str(name), self._tensors)
            raise KeyError(f"{self.path}: has no tensor {name!r}.{hint}")
        return handle

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def items(self) -> ItemsView[str, TensorHandle]:
        """Return the names and handles."""
        return self._tensors.items()

    def values(self) -> ValuesView[TensorHandle]:
        """Return the handles."""
        return self._tensors.values()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each tie counted once."""
        return sum(h.nbytes for name, h in self._tensors.items() if name not in self.ties)

    @property
    def checksums(self) -> Mapping[str, int]:
        """The checksums that the file records; read when they are first needed."""
        if callable(self._checksums):
            self._checksums = self._checksums()
        return self._checksums

    def verify(self, progress: Callable[[int], Any] | None = None) -> int:
        """Compare every recorded checksum with the data.

        Args:
            progress: called with a number of bytes after each tensor.

        Returns:
            How many tensors were compared; 0 if the file records no checksums.

        Raises:
            FileError: naming every tensor whose bytes are damaged.
        """
        damaged = []
        checksums = self.checksums

        def found(name: str) -> int:
            value = 0
            for chunk in self[name].chunks(_VERIFY_CHUNK):
                value = crc32(chunk.view(np.uint8), value)
            return value

        sizes = {name: self[name].nbytes for name in checksums}
        threaded = worth_threads(sizes.values())
        with ThreadPoolExecutor(THREADS) if threaded else contextlib.nullcontext() as pool:
            values = pool.map(found, checksums) if pool else map(found, checksums)
            for (name, size), value in zip(sizes.items(), values, strict=True):
                if value != checksums[name]:
                    damaged.append(name)
                if progress is not None:
                    progress(size)
        if damaged:
            shown = ", ".join(repr(name) for name in damaged[:10])
            more = f" and {len(damaged) - 10} more" if len(damaged) > 10 else ""
            raise FileError(f"{self.path}: the data of {shown}{more} is damaged (wrong checksum)")
        return len(checksums)

    def close(self) -> None:
        """Close the file; arrays read from it stay valid."""
        for source in self._sources:
            source.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.kind} file {self.path}: {len(self)} tensors, {self.nbytes} bytes>"


def flat_bytes(array: np.ndarray) -> np.ndarray:
    """Return an array's bytes in row-major order as a row of ``uint8``, a view where possible."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def same_bytes(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays of one size hold the same bytes, in row-major order.

    Many times faster than comparing elements, or than comparing ``memoryview``s.
    """
    a, b = flat_bytes(first), flat_bytes(second)
    whole = min(a.size, b.size) // 8 * 8
    words = np.array_equal(a[:whole].view(np.uint64), b[:whole].view(np.uint64))
    return words and np.array_equal(a[whole:], b[whole:])
