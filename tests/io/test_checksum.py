"""Our CRC-32 is zlib's, whatever the length, and is complete when the work beside it is."""

import threading
import zlib

import numpy as np
import pytest

from lamina.io import checksum
from lamina.io.checksum import crc32, summing

LENGTHS = [
    *(0, 1, 4, 1000),
    *(checksum._WORTH + step for step in (-1, 0, 1, 2, 3, 4, 5, 63)),
    *(checksum._FAR + 5 * checksum._NEAR + step for step in (-1, 0, 1)),
    *(checksum._FAR + checksum._BLOCKS * checksum._NEAR + step for step in (-1, 0, 1)),
    3_000_001,
]


def data(length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("value", [0, 1, 0xDEADBEEF, 0xFFFFFFFF])
def test_is_that_of_zlib(length, value):
    row = data(length)
    assert crc32(row, value) == zlib.crc32(row, value)


@pytest.mark.parametrize("fill", [0, 255])
def test_of_one_value_only(fill):
    row = np.full(1_000_003, fill, np.uint8)
    assert crc32(row) == zlib.crc32(row)


def test_in_pieces():
    row, value = data(2_500_000), 0
    for start in range(0, row.size, 700_001):
        value = crc32(row[start : start + 700_001], value)
    assert value == zlib.crc32(row)


def test_read_only_and_unaligned_rows():
    row = data(1_000_000)[3:]
    row.flags.writeable = False
    before = row.copy()
    assert crc32(row) == zlib.crc32(row)
    assert np.array_equal(row, before)


def test_every_bit_counts():
    row = data(500_000)
    right = crc32(row)
    for position in np.random.default_rng(1).integers(0, row.size, 40):
        row[position] ^= 1
        assert crc32(row) != right
        row[position] ^= 1
    assert crc32(row) == right


@pytest.mark.parametrize("length", [500, 50_000, 1_500_000])
def test_summing_beside_other_work(length):
    views = {i: data(length * (i % 3), i) for i in range(40)}
    sums = {}
    with summing(views, sums):
        pass
    assert sums == {i: zlib.crc32(view) for i, view in views.items()}


def test_an_error_ends_the_summing():
    before = threading.active_count()
    sums = {}
    with (
        pytest.raises(OSError, match="full"),
        summing({i: data(1_000_000) for i in range(60)}, sums),
    ):
        raise OSError("full")
    assert threading.active_count() == before
    assert len(sums) < 60
