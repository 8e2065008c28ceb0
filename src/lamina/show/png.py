"""A PNG file of 8-bit RGB pixels, written with the standard library."""

from __future__ import annotations

import struct
import zlib

import numpy as np

__all__ = ["encode_png"]


def encode_png(pixels: np.ndarray) -> bytes:
    """Return the file for ``pixels``, a uint8 array ``(height, width, 3)``.

    Example:
        >>> import numpy as np
        >>> encode_png(np.zeros((1, 1, 3), np.uint8))[:4]
        b'\\x89PNG'

    Source: the PNG specification, https://www.w3.org/TR/png-3/
    """
    height, width, _ = pixels.shape
    # Every line begins with the number of its filter; 0 is none.
    lines = np.zeros((height, 1 + 3 * width), np.uint8)
    lines[:, 1:] = pixels.reshape(height, 3 * width)
    eight_bits, rgb = 8, 2
    header = struct.pack(">IIBBBBB", width, height, eight_bits, rgb, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
