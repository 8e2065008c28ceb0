"""What differs between two files of tensors, values included, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from .stats import PARALLEL, Scratch, as_float, share
from .tensorfile import THREADS, TensorFile, TensorHandle, same_bytes

__all__ = ["Difference", "FileDiff", "file_diff"]

_CHUNK = 1 << 19


class Difference(NamedTuple):
    """One tensor that is in both files and differs.

    Attributes:
        name: its name.
        shapes, dtypes: in the first and in the second file.
        values: how many elements differ (NaN equals NaN, and 0.0 equals -0.0); 0 if the shapes
            differ, where nothing can be compared.
        max_abs, max_rel: the largest absolute difference, and the largest relative to the larger
            of the two; infinite where only one of them is finite.
        first: index of the first element that differs, or ``None``.

    Example:
        >>> import numpy as np, os, tempfile, lamina
        >>> a, b = (os.path.join(tempfile.mkdtemp(), name) for name in "ab")
        >>> lamina.save({"w": np.zeros(3, "f4")}, a)
        >>> lamina.save({"w": np.array([0, 0, 2], "f4")}, b)
        >>> with lamina.open(a) as first, lamina.open(b) as second:
        ...     diff = lamina.io.file_diff(first, second)
        >>> diff.different[0].values, diff.different[0].max_abs, diff.different[0].first
        (1, 2.0, (2,))
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    values: int
    max_abs: float
    max_rel: float
    first: tuple[int, ...] | None


class FileDiff(NamedTuple):
    """The differences of two files.

    Attributes:
        only_first, only_second: names that the other file has not.
        different: tensors that both have and that differ in shape, dtype or value.
        equal: how many tensors are the same in all three.

    Example:
        >>> import numpy as np, os, tempfile, lamina
        >>> a, b = (os.path.join(tempfile.mkdtemp(), name) for name in "ab")
        >>> lamina.save({"w": np.zeros(3, "f4")}, a)
        >>> lamina.save({"w": np.array([0, 0, 2], "f4")}, b)
        >>> with lamina.open(a) as first, lamina.open(b) as second:
        ...     diff = lamina.io.file_diff(first, second)
        >>> diff.same, [difference.name for difference in diff.different]
        (False, ['w'])
    """

    only_first: list[str]
    only_second: list[str]
    different: list[Difference]
    equal: int

    @property
    def same(self) -> bool:
        """Whether there is no difference at all."""
        return not (self.only_first or self.only_second or self.different)


def file_diff(
    first: TensorFile, second: TensorFile, progress: Callable[[int], Any] | None = None
) -> FileDiff:
    """Compare two open files tensor by tensor, whatever their formats.

    Args:
        first: an open file.
        second: another one.
        progress: called with the number of bytes after each piece.

    Raises:
        FileError: if a tensor cannot be read.

    Example:
        >>> import numpy as np, tempfile, os, lamina.io
        >>> a, b = (os.path.join(tempfile.mkdtemp(), name) for name in "ab")
        >>> lamina.io.save({"w": np.zeros(3, "f4"), "v": np.ones(2)}, a)
        >>> lamina.io.save({"w": np.array([0, 0, 0.5], "f4")}, b, format="npz")
        >>> with lamina.io.open(a) as first, lamina.io.open(b) as second:
        ...     diff = file_diff(first, second)
        >>> diff.only_first, diff.different[0].name, diff.different[0].max_abs
        (['v'], 'w', 0.5)
    """
    different: list[Difference] = []
    common = [name for name in first if name in second]
    for name in common:
        found = _tensor_diff(name, first[name], second[name], progress)
        if found is not None:
            different.append(found)
    return FileDiff(
        [name for name in first if name not in second],
        [name for name in second if name not in first],
        different,
        len(common) - len(different),
    )


def _tensor_diff(
    name: str,
    first: TensorHandle,
    second: TensorHandle,
    progress: Callable[[int], Any] | None,
) -> Difference | None:
    same_type = first.dtype == second.dtype
    if first.refused or second.refused:
        # Without values there is still the question whether the bytes are the same.
        same_type = first.kind == second.kind
        if not same_type:
            return Difference(
                name, (first.shape, second.shape), (first.kind, second.kind), 0, 0.0, 0.0, None
            )
    found = _Found()
    if first.shape == second.shape:
        for part, size in _parts(first, second, same_type):
            found = found.merge(part)
            if progress is not None:
                progress(size)
        if same_type and not found.values:
            return None
    index = None
    if found.values and not first.refused:
        index = tuple(map(int, np.unravel_index(found.place, first.shape)))
    return Difference(
        name,
        (first.shape, second.shape),
        (first.kind, second.kind) if first.refused else (first.dtype.name, second.dtype.name),
        found.values,
        found.max_abs,
        found.max_rel,
        index,
    )


class _Found(NamedTuple):
    """Differences of a part: how many, the largest ones, and where the first is."""

    values: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    place: int = 0

    def merge(self, later: _Found) -> _Found:
        place = self.place if self.values else later.place
        return _Found(
            self.values + later.values,
            max(self.max_abs, later.max_abs),
            max(self.max_rel, later.max_rel),
            place,
        )


def _parts(
    first: TensorHandle, second: TensorHandle, same_type: bool
) -> Iterator[tuple[_Found, int]]:
    """Compare piece by piece; large tensors in two threads, since numpy lets go of the lock."""
    sizes = first.dtype.itemsize, second.dtype.itemsize
    if not (first.splittable and second.splittable):
        position, scratch = 0, Scratch()
        for left, right in _rows(first, second):
            yield _compare(left, right, same_type, position, scratch), left.nbytes
            position += left.size
        return
    count = first.nbytes // sizes[0]
    threads = THREADS if max(first.nbytes, second.nbytes) >= PARALLEL else 1
    size = count if threads == 1 else share(count, max(sizes))

    def run(begin: int) -> tuple[_Found, int]:
        end, step = min(begin + size, count), _CHUNK // max(sizes)
        found, scratch, position = _Found(), Scratch(), begin
        left, right = (
            handle.chunks(step * width, begin * width, end * width)
            for handle, width in zip((first, second), sizes, strict=True)
        )
        for a, b in zip(left, right, strict=True):
            found = found.merge(_compare(a, b, same_type, position, scratch))
            position += a.size
        return found, (end - begin) * sizes[0]

    starts = range(0, count, size) if count else ()
    if threads == 1:
        yield from map(run, starts)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(run, starts)


def _rows(first: TensorHandle, second: TensorHandle) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pieces of both with equally many elements, along the first axis."""
    if not first.shape or not first.nbytes:
        yield first.read().reshape(-1), second.read().reshape(-1)
        return
    widest = max(first.nbytes, second.nbytes)
    rows = max(_CHUNK * first.shape[0] // widest, 1)
    for start in range(0, first.shape[0], rows):
        part = slice(start, start + rows)
        yield first.read(part).reshape(-1), second.read(part).reshape(-1)


def _compare(
    left: np.ndarray, right: np.ndarray, same_type: bool, position: int, scratch: Scratch
) -> _Found:
    """Count elements that differ; largest absolute and relative difference, and where first."""
    if same_type and same_bytes(left, right):
        return _Found()
    a, b = as_float(left, scratch, 0), as_float(right, scratch, 2)
    if a.dtype != b.dtype or a.dtype.kind != "f":
        return _compare_any(left, right, position)
    native = left.dtype.kind in "iu" and right.dtype.kind in "iu"
    with np.errstate(all="ignore"):
        distance = np.subtract(a, b, out=scratch.get(4, a.dtype, a.size))
        np.abs(distance, out=distance)
        at = int(distance.argmax())
        if not np.isfinite(distance[at]):
            return _compare_any(left, right, position)
        unequal = scratch.get(4, np.bool_, a.size)
        np.not_equal(*((left, right) if native else (a, b)), out=unequal)
        values = int(np.count_nonzero(unequal))
        if not values:
            return _Found()
        larger = np.abs(a, out=scratch.get(5, a.dtype, a.size))
        other = np.abs(b, out=scratch.get(6, a.dtype, a.size))
        np.maximum(larger, other, out=larger)
        # Two zeros do not differ; any divisor will do.
        np.maximum(larger, np.finfo(a.dtype).smallest_subnormal, out=larger)
        np.divide(distance, larger, out=distance)
        worst = int(distance.argmax())
    # Found in the precision of the data, told in more.
    places = np.array([at, worst])
    most = _compare_any(left[places], right[places], 0)
    return _Found(values, most.max_abs, most.max_rel, position + int(unequal.argmax()))


def _compare_any(left: np.ndarray, right: np.ndarray, position: int) -> _Found:
    """The same for all types and values, slower."""
    a, b = _exact(left), _exact(right)
    with np.errstate(all="ignore"):
        unequal = (a != b) & ~((a != a) & (b != b))
        places = np.flatnonzero(unequal)
        if not places.size:
            return _Found()
        a, b = _wide(a[places]), _wide(b[places])
        distance = np.abs(a - b)
        distance[~np.isfinite(distance)] = np.inf
        relative = distance / np.maximum(np.abs(a), np.abs(b))
        relative[~np.isfinite(relative)] = np.inf
    return _Found(
        int(places.size), float(distance.max()), float(relative.max()), position + int(places[0])
    )


def _exact(array: np.ndarray) -> np.ndarray:
    """Types that numpy has not, in float32, which holds them exactly."""
    return array if array.dtype.kind in "biufc" else as_float(array, Scratch(), 0)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
