"""Statistics of a tensor on disk, in one pass and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .tensorfile import THREADS, TensorHandle

__all__ = ["PARALLEL", "Scratch", "Stats", "as_float", "share", "tensor_stats"]

# Elements at a time: small enough to stay in a cache, and large enough that the threads seldom hand
# the interpreter to each other.
_CHUNK = 1 << 18
PARALLEL = 8 << 20
_SHARE = 64 << 20


class Stats(NamedTuple):
    """Statistics of the finite elements of a tensor, and counts of all.

    For complex tensors they are those of the absolute values.

    Attributes:
        count: number of elements.
        min, max: of the finite elements; NaN if there are none.
        mean, std: of the finite elements; the deviation is that of the population.
        norm: square root of the sum of the squares of the finite elements.
        zeros, nan, inf: how many elements are zero, NaN, infinite.

    Example:
        >>> import numpy as np, os, tempfile, lamina
        >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
        >>> lamina.save({"w": np.array([0, 3, 4, np.nan], "f4")}, path)
        >>> with lamina.open(path) as file:
        ...     stats = lamina.io.tensor_stats(file["w"])
        >>> stats.max, round(stats.norm, 3), stats.zeros, stats.nan
        (4.0, 5.0, 1, 1)
    """

    count: int
    min: float
    max: float
    mean: float
    std: float
    norm: float
    zeros: int
    nan: int
    inf: int


class _Sums(NamedTuple):
    """What one chunk gives; two of them add up."""

    count: int = 0
    finite: int = 0
    low: float = math.inf
    high: float = -math.inf
    mean: float = 0.0
    spread: float = 0.0
    zeros: int = 0
    nan: int = 0

    def merge(self, other: _Sums) -> _Sums:
        """Add up (Chan, Golub and LeVeque's formula for the sum of squared deviations)."""
        finite = self.finite + other.finite
        mean, spread = self.mean, self.spread
        if other.finite:
            delta = other.mean - mean
            weight = other.finite / finite
            mean += delta * weight
            spread += other.spread + delta * delta * self.finite * weight
        return _Sums(
            self.count + other.count,
            finite,
            min(self.low, other.low),
            max(self.high, other.high),
            mean,
            spread,
            self.zeros + other.zeros,
            self.nan + other.nan,
        )


def tensor_stats(handle: TensorHandle, progress: Callable[[int], Any] | None = None) -> Stats:
    """Read a tensor once, piece by piece, and return its statistics.

    Args:
        handle: a tensor of any number type.
        progress: called with the number of bytes after each piece.

    Raises:
        FileError: if the tensor cannot be read.

    Example:
        >>> import numpy as np, tempfile, os, lamina.io
        >>> path = os.path.join(tempfile.mkdtemp(), "x")
        >>> lamina.io.save({"w": np.array([3.0, 0.0, -4.0, np.nan])}, path)
        >>> with lamina.io.open(path) as file:
        ...     stats = tensor_stats(file["w"])
        >>> stats.min, stats.max, stats.norm, stats.zeros, stats.nan
        (-4.0, 3.0, 5.0, 1, 1)
    """
    if handle.refused:
        handle.read()
    total = _Sums()
    for sums, size in _all_sums(handle):
        total = total.merge(sums)
        if progress is not None:
            progress(size)
    n = total.finite
    return Stats(
        count=total.count,
        min=total.low if n else math.nan,
        max=total.high if n else math.nan,
        mean=total.mean if n else math.nan,
        std=math.sqrt(total.spread / n) if n else math.nan,
        norm=math.sqrt(total.spread + n * total.mean * total.mean),
        zeros=total.zeros,
        nan=total.nan,
        inf=total.count - n - total.nan,
    )


def _all_sums(handle: TensorHandle) -> Iterator[tuple[_Sums, int]]:
    """Go through the tensor; large ones in two threads, since numpy lets go of the lock."""
    limit = _CHUNK * handle.dtype.itemsize
    if handle.nbytes < PARALLEL or not handle.splittable:
        scratch = Scratch()
        for chunk in _flat_pieces(handle, limit):
            yield _sums(chunk, scratch), chunk.nbytes
        return
    part = share(handle.nbytes // handle.dtype.itemsize, handle.dtype.itemsize)
    part *= handle.dtype.itemsize
    spans = [(at, min(at + part, handle.nbytes)) for at in range(0, handle.nbytes, part)]

    def run(span: tuple[int, int]) -> tuple[_Sums, int]:
        sums, scratch = _Sums(), Scratch()
        for chunk in handle.chunks(limit, *span):
            sums = sums.merge(_sums(chunk, scratch))
        return sums, span[1] - span[0]

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(run, spans)


def share(count: int, itemsize: int) -> int:
    """How many of ``count`` elements to give to a thread at a time; it then reports progress."""
    return min(-(-count // THREADS), _SHARE // itemsize)


def _flat_pieces(handle: TensorHandle, limit: int) -> Iterator[np.ndarray]:
    for chunk in handle.chunks(limit):
        for start in range(0, chunk.size, _CHUNK):
            yield chunk[start : start + _CHUNK]


class Scratch:
    """Memory for one thread's chunks: what is allocated anew costs more than the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, Any], np.ndarray] = {}

    def get(self, place: int, dtype: Any, size: int) -> np.ndarray:
        """Return uninitialised memory; another ``place`` or dtype is other memory."""
        held = self._held.get((place, dtype))
        if held is None or held.size < size:
            held = self._held[place, dtype] = np.empty(size, dtype)
        return held[:size]


def _sums(chunk: np.ndarray, scratch: Scratch) -> _Sums:
    if chunk.dtype.kind == "b":
        return _count_true(chunk)
    size, nan = chunk.size, 0
    values = as_float(chunk, scratch, 0)
    # Integers are compared as they are, being shorter. Comparing floats and counting what is true
    # is many times faster than counting the floats.
    plain = chunk if chunk.dtype.kind in "iu" else values
    zeros = int(np.count_nonzero(np.equal(plain, 0, out=scratch.get(0, np.bool_, size))))
    low, high = float(plain.min()), float(plain.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        nan = int(np.count_nonzero(np.isnan(values)))
        values = values[np.isfinite(values)]
        if not values.size:
            return _Sums(size, zeros=zeros, nan=nan)
        low, high = float(values.min()), float(values.max())
    largest, scale = max(abs(low), abs(high)), 1.0
    if values.dtype == np.float32 and not 1e-12 < largest < 1e12:
        # Squares need room above, and below they must not vanish.
        values = values.astype(np.float64)
    if largest > 1e120 or 0 < largest < 1e-120:
        scale = largest
        values = values / scale
    # numpy's pairwise sums: as exact as needed, and BLAS would start threads of its own.
    n = values.size
    mean = values.dtype.type(np.add.reduce(values) / n)
    centred = np.subtract(values, mean, out=scratch.get(2, values.dtype, n))
    np.multiply(centred, centred, out=centred)
    spread = float(np.add.reduce(centred))
    return _Sums(size, n, low, high, float(mean) * scale, spread * scale * scale, zeros, nan)


def _count_true(chunk: np.ndarray) -> _Sums:
    n, true = chunk.size, int(np.count_nonzero(chunk))
    mean = true / n
    return _Sums(n, n, float(true == n), float(true > 0), mean, true * (1 - mean), zeros=n - true)


def as_float(chunk: np.ndarray, scratch: Scratch, place: int) -> np.ndarray:
    """Convert to float32 where that is exact, else to float64; uses ``place`` and the next."""
    dtype, size = chunk.dtype, chunk.size
    if dtype == np.float32 or dtype == np.float64:
        return chunk
    if dtype == ml_dtypes.bfloat16:
        # The upper half of a float32; a shift is many times faster than the conversion.
        wide = scratch.get(place, np.uint32, size)
        return np.left_shift(chunk.view(np.uint16), 16, out=wide, dtype=np.uint32).view(np.float32)
    if dtype == np.float16:
        return _half_as_float(chunk, scratch, place)
    if dtype.kind == "c":
        return np.abs(chunk.astype(np.complex128))
    if dtype.kind in "iu":
        exact = np.float32 if dtype.itemsize <= 2 else np.float64
        values = scratch.get(place, exact, size)
        np.copyto(values, chunk, casting="same_kind")
        return values
    if dtype.itemsize == 1:
        table = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
        return table.take(
            chunk.view(np.uint8), out=scratch.get(place, np.float32, size), mode="clip"
        )
    return chunk.astype(np.float64)


def _half_as_float(chunk: np.ndarray, scratch: Scratch, place: int) -> np.ndarray:
    """Move the bits of float16 to their places in float32; several times faster than astype."""
    bits = scratch.get(place, np.uint32, chunk.size)
    sign = scratch.get(place + 1, np.uint32, chunk.size)
    np.copyto(bits, chunk.view(np.uint16))
    np.bitwise_and(bits, 0x8000, out=sign)
    np.bitwise_xor(bits, sign, out=bits)
    np.left_shift(bits, 13, out=bits)
    values = bits.view(np.float32)
    with np.errstate(all="ignore"):
        np.multiply(values, np.float32(2.0**112), out=values)
    if values.max() >= 65536:
        return chunk.astype(np.float32)
    np.left_shift(sign, 16, out=sign)
    np.bitwise_or(bits, sign, out=bits)
    return values
