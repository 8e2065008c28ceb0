"""What differs between two files of tensors, values included, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .tensorfile import TensorFile, TensorHandle

__all__ = ["Difference", "FileDiff", "file_diff"]

_CHUNK = 1 << 20


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
    values, max_abs, max_rel, place = 0, 0.0, 0.0, None
    if first.shape == second.shape:
        position = 0
        for left, right in _pairs(first, second):
            if not (same_type and _same_bytes(left, right)):
                count, most, relative, at = _compare(left, right)
                if count and place is None:
                    place = position + at
                values += count
                max_abs, max_rel = max(max_abs, most), max(max_rel, relative)
            position += left.size
            if progress is not None:
                progress(left.nbytes)
        if same_type and not values:
            return None
    index = None
    if place is not None and not first.refused:
        index = tuple(map(int, np.unravel_index(place, first.shape)))
    return Difference(
        name,
        (first.shape, second.shape),
        (first.kind, second.kind) if first.refused else (first.dtype.name, second.dtype.name),
        values,
        max_abs,
        max_rel,
        index,
    )


def _pairs(first: TensorHandle, second: TensorHandle) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pieces of both with equally many elements."""
    if first.splittable and second.splittable:
        count = _CHUNK // max(first.dtype.itemsize, second.dtype.itemsize)
        left = first.chunks(count * first.dtype.itemsize)
        right = second.chunks(count * second.dtype.itemsize)
        yield from zip(left, right, strict=True)
        return
    if not first.shape or not first.nbytes:
        yield first.read().reshape(-1), second.read().reshape(-1)
        return
    widest = max(first.nbytes, second.nbytes)
    rows = max(_CHUNK * first.shape[0] // widest, 1)
    for start in range(0, first.shape[0], rows):
        part = slice(start, start + rows)
        yield first.read(part).reshape(-1), second.read(part).reshape(-1)


def _same_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    # memcmp: many times faster than comparing elements.
    return _bytes(left).data == _bytes(right).data


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def _compare(left: np.ndarray, right: np.ndarray) -> tuple[int, float, float, int]:
    """Count elements that differ; largest absolute and relative difference, and where first."""
    a, b = _exact(left), _exact(right)
    with np.errstate(all="ignore"):
        unequal = (a != b) & ~((a != a) & (b != b))
        places = np.flatnonzero(unequal)
        if not places.size:
            return 0, 0.0, 0.0, 0
        a, b = _wide(a[places]), _wide(b[places])
        distance = np.abs(a - b)
        distance[~np.isfinite(distance)] = np.inf
        relative = distance / np.maximum(np.abs(a), np.abs(b))
        relative[~np.isfinite(relative)] = np.inf
    return int(places.size), float(distance.max()), float(relative.max()), int(places[0])


def _exact(array: np.ndarray) -> np.ndarray:
    """Types of fewer than 16 bits in float32, which holds them exactly."""
    if array.dtype.kind in "biufc":
        return array
    if array.dtype == ml_dtypes.bfloat16:
        return np.left_shift(array.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    return array.astype(np.float32)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
