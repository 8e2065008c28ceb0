"""Whether two tensors on disk are close, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .tensorfile import TensorHandle

__all__ = ["within"]

_ROWS = 1 << 20


def within(first: TensorHandle, second: TensorHandle, rtol: float, atol: float) -> bool:
    """Whether ``|a - b| <= atol + rtol * |b|`` for every element; NaN equals NaN.

    Args:
        first: a tensor.
        second: another one of the same shape.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """
    return all(
        np.allclose(_wide(a), _wide(b), rtol, atol, equal_nan=True)
        for a, b in _pairs(first, second)
    )


def _pairs(first: TensorHandle, second: TensorHandle) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if first.splittable and second.splittable:
        count = _ROWS // max(first.dtype.itemsize, second.dtype.itemsize)
        yield from zip(
            first.chunks(count * first.dtype.itemsize),
            second.chunks(count * second.dtype.itemsize),
            strict=True,
        )
    elif not first.shape or not first.nbytes:
        yield first.read(), second.read()
    else:
        rows = max(_ROWS * first.shape[0] // max(first.nbytes, second.nbytes), 1)
        for start in range(0, first.shape[0], rows):
            part = slice(start, start + rows)
            yield first.read(part), second.read(part)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
