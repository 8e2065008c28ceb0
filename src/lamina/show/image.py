"""``save_image``: a picture of learned filters, or of any matrix."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from .._core.box import Box
from .._core.errors import ShapeError, format_shape

# Of the siblings' this only takes the one way in which a file is replaced in one step.
from ..io.atomic import replacing
from .png import encode_png

__all__ = ["save_image"]

_TARGET = 640
_PAPER = (216, 219, 224)
_NOT_A_NUMBER = (255, 0, 255)

# Colours at equal steps, dark at the ends, so that size is seen without colour as well.
_SIGNED = np.array(
    [
        (10, 36, 84), (28, 84, 156), (72, 140, 200), (150, 196, 228), (216, 232, 242),
        (248, 247, 244),
        (250, 224, 206), (240, 168, 132), (214, 98, 78), (168, 34, 48), (92, 8, 34),
    ],
    float,
)  # fmt: skip
_UNSIGNED = np.array(
    [
        (250, 250, 247), (222, 226, 232), (164, 178, 198),
        (98, 120, 152), (46, 66, 104), (14, 20, 44),
    ],
    float,
)  # fmt: skip


def save_image(
    array: Any,
    path: str | os.PathLike[str],
    *,
    scale: int | None = None,
    columns: int | None = None,
    limit: float | None = None,
) -> tuple[int, int]:
    """Write a PNG picture of a matrix, or of a stack of matrices as a grid of tiles.

    Where values are negative, blue is below zero, red above, white is zero; otherwise white is zero
    and dark is large. NaN is magenta. All tiles share one scale of colours. The file is replaced in
    one step.

    Args:
        array: a parameter or an array: ``(height, width)``; ``(tiles, height, width)``; or
            ``(out, in, height, width)``, the filters of a convolution, one row of tiles per output
            if there are several inputs.
        path: the file to write.
        scale: pixels per element (default: as many as make a picture of about 640 pixels).
        columns: tiles side by side (default: one row of tiles per output, or nearly square).
        limit: the absolute value that gets the darkest colour (default: the largest).

    Returns:
        Width and height in pixels.

    Raises:
        ShapeError: for another number of dimensions, or if there is nothing to draw.
        OSError: if the file can't be written; what was there before is untouched.

    Example:
        >>> import os, tempfile, lamina.show
        >>> from lamina import nn
        >>> path = os.path.join(tempfile.mkdtemp(), "filters.png")
        >>> lamina.show.save_image(nn.Conv2d(1, 6, 5).weight, path, scale=10, columns=3)
        (166, 112)
    """
    values = np.asarray(array.data if isinstance(array, Box) else array)
    if values.ndim not in (2, 3, 4) or not values.size:
        raise ShapeError(
            f"save_image: expected a shape of two to four sizes, (height, width), (tiles, height, "
            f"width) or (out, in, height, width), got {format_shape(values.shape)}; "
            f"fix: value.reshape(tiles, height, width)"
        )
    if np.iscomplexobj(values):
        values = np.abs(values)
    tiles = values.astype(np.float64).reshape(-1, *values.shape[-2:])
    for option, number in (("scale", scale), ("columns", columns)):
        if number is not None and number < 1:
            raise ValueError(f"save_image: expected {option} >= 1, got {number}")
    columns = min(columns or _columns(values.shape), len(tiles))
    if scale is None:
        rows = math.ceil(len(tiles) / columns)
        longest = max(columns * (tiles.shape[2] + 1), rows * (tiles.shape[1] + 1))
        scale = max(1, _TARGET // longest)
    picture = _grid(_colours(tiles, limit), columns, scale)
    content = encode_png(picture)
    with replacing(path) as fd, os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    return picture.shape[1], picture.shape[0]


def _columns(shape: tuple[int, ...]) -> int:
    """Return one column per input of a filter, or so many that the picture is nearly square."""
    if len(shape) == 4 and shape[1] > 1:
        return shape[1]
    height, width = shape[-2:]
    return max(1, math.ceil(math.sqrt(math.prod(shape[:-2]) * height / width)))


def _colours(tiles: np.ndarray, limit: float | None) -> np.ndarray:
    """Return uint8 colours ``(tiles, height, width, 3)``."""
    known = np.isfinite(tiles)
    if limit is None:
        limit = float(np.abs(tiles[known]).max(initial=0.0))
    signed = bool((tiles[known] < 0).any())
    limit = limit or 1.0
    share = np.clip(np.nan_to_num(tiles, nan=0.0, posinf=limit, neginf=-limit) / limit, -1, 1)
    anchors, place = (_SIGNED, (share + 1) / 2) if signed else (_UNSIGNED, share)
    place = place * (len(anchors) - 1)
    steps = np.arange(len(anchors))
    colours = np.stack([np.interp(place, steps, anchors[:, i]) for i in range(3)], axis=-1)
    colours[np.isnan(tiles)] = _NOT_A_NUMBER
    return np.rint(colours).astype(np.uint8)


def _grid(tiles: np.ndarray, columns: int, scale: int) -> np.ndarray:
    """Enlarge the tiles and lay them out with a margin around each."""
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = tiles.shape
    rows = math.ceil(count / columns)
    gap = 0 if count == 1 else max(2, round(scale * 0.4))
    shape = (gap + rows * (height + gap), gap + columns * (width + gap), 3)
    picture = np.full(shape, _PAPER, np.uint8)
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        picture[top : top + height, left : left + width] = tile
    return picture
