"""Statistics and value differences, against numpy on the whole arrays."""

import math

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

import lamina.io
import lamina.io.diff
import lamina.io.stats
from lamina.io.diff import file_diff
from lamina.io.stats import tensor_stats

RANDOM = np.random.default_rng(0)


def stats_of(tmp_path, array, **options):
    lamina.io.save({"w": array}, tmp_path / "x", **options)
    with lamina.io.open(tmp_path / "x") as file:
        return tensor_stats(file["w"])


def check(stats, array):
    wide = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    wide = np.abs(wide) if wide.dtype.kind == "c" else wide
    finite = wide[np.isfinite(wide)]
    assert stats.count == array.size
    assert stats.nan == np.isnan(wide).sum() and stats.inf == np.isinf(wide).sum()
    assert stats.zeros == (wide == 0).sum()
    if not finite.size:
        assert math.isnan(stats.mean) and math.isnan(stats.min) and stats.norm == 0
        return
    spread = max(np.abs(finite).max(), 1e-300)
    assert stats.min == pytest.approx(finite.min()) and stats.max == pytest.approx(finite.max())
    assert stats.mean == pytest.approx(finite.mean(), rel=1e-5, abs=1e-6 * spread)
    assert stats.std == pytest.approx(finite.std(), rel=1e-4, abs=1e-6 * spread)
    assert stats.norm == pytest.approx(np.linalg.norm(finite), rel=1e-5)


@pytest.mark.parametrize("dtype", [
    "f2", "f4", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "?", "c8", "c16",
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu,
])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (3, 5), (70, 1000)])
def test_stats_of_every_dtype(tmp_path, dtype, shape):
    values = np.asarray(abs(RANDOM.standard_normal(shape) * 20)).astype(dtype)
    check(stats_of(tmp_path, values), values)


def test_stats_of_special_values(tmp_path):
    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.5, -2.0, 65504, 6e-8])
    for dtype in ("f2", "f4", "f8", ml_dtypes.bfloat16, ml_dtypes.float8_e5m2):
        check(stats_of(tmp_path, special.astype(dtype)), special.astype(dtype))
    for values in ([np.nan, np.inf], [1e38, -3e38], [1e-40, 2e-40], [0.0]):
        check(stats_of(tmp_path, np.array(values, "f4")), np.array(values, "f4"))
    big = stats_of(tmp_path, np.array([1e300, -1e300]))
    assert (
        big.max == 1e300 and big.mean == 0 and big.std == pytest.approx(1e300)
    ) or big.std == math.inf
    assert stats_of(tmp_path, np.array([1e-200] * 3)).mean == pytest.approx(1e-200)
    empty = stats_of(tmp_path, np.zeros((0, 3), "f4"))
    assert empty.count == empty.zeros == 0 and math.isnan(empty.mean)


def test_offset_does_not_drown_the_deviation(tmp_path):
    values = (1 + RANDOM.standard_normal(300_000) * 1e-4).astype("f4")
    assert stats_of(tmp_path, values).std == pytest.approx(values.astype("f8").std(), rel=1e-3)


@pytest.mark.parametrize("share", [1 << 20, 64 << 20])
def test_large_tensors_in_threads(tmp_path, monkeypatch, share):
    monkeypatch.setattr("lamina.io.stats._SHARE", share)
    values = RANDOM.standard_normal(3_000_001, dtype="f4")
    seen = []
    lamina.io.save(
        {"w": values, "t": values[:3_000_000].reshape(3, -1).T}, tmp_path / "x", format="npz"
    )
    with lamina.io.open(tmp_path / "x") as file:
        check(tensor_stats(file["w"], seen.append), values)
        assert sum(seen) == values.nbytes and len(seen) == max(2, -(-values.nbytes // share))
        check(tensor_stats(file["t"]), values[:3_000_000])
        other = values.copy()
        other[[2_500_000, 7]] += 1
        seen.clear()
        lamina.io.save({"w": other}, tmp_path / "y")
        with lamina.io.open(tmp_path / "y") as second:
            (found,) = file_diff(file, second, seen.append).different
        assert (found.values, found.first) == (2, (7,)) and sum(seen) == values.nbytes


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_any_floats(tmp_path_factory, values):
    array = np.array(values, "f4")
    stats = stats_of(tmp_path_factory.getbasetemp(), array, sync=False)
    finite = array[np.isfinite(array)]
    assert stats.nan + stats.inf + finite.size == stats.count
    if finite.size:
        assert (stats.min, stats.max) == (finite.min(), finite.max())
        assert stats.std >= 0


def diff_of(tmp_path, first, second, formats=("safetensors", "safetensors")):
    lamina.io.save(first, tmp_path / "a", format=formats[0])
    lamina.io.save(second, tmp_path / "b", format=formats[1])
    with lamina.io.open(tmp_path / "a") as a, lamina.io.open(tmp_path / "b") as b:
        return file_diff(a, b)


def test_diff(tmp_path):
    base = {"same": np.ones((3, 4), "f4"), "gone": np.ones(1), "shape": np.ones((2, 3), "f4")}
    first = {**base, "value": np.arange(12.0).reshape(3, 4), "type": np.arange(3, dtype="f4")}
    second = {**first, "new": np.ones(2), "shape": np.ones((3, 2), "f4"), "type": np.arange(3.0)}
    del second["gone"]
    second["value"] = first["value"].copy()
    second["value"][1, 2] += 0.5
    second["value"][2, 0] = np.nan
    diff = diff_of(tmp_path, first, second)
    assert diff.only_first == ["gone"] and diff.only_second == ["new"] and diff.equal == 1
    found = {d.name: d for d in diff.different}
    assert set(found) == {"shape", "value", "type"} and not diff.same
    assert found["shape"].shapes == ((2, 3), (3, 2))
    assert found["type"].dtypes == ("float32", "float64") and found["type"].values == 0
    assert found["value"].values == 2 and found["value"].first == (1, 2)
    assert found["value"].max_abs == math.inf


def test_equal_across_formats_and_layouts(tmp_path):
    array = RANDOM.standard_normal((300, 500))
    tensors = {
        "t": array.T,
        "n": np.array([np.nan, 0.0]),
        "z": np.zeros((0, 2)),
        "s": np.array(1.5),
    }
    again = {**tensors, "n": np.array([np.nan, -0.0])}
    diff = diff_of(tmp_path, tensors, again, ("npz", "safetensors"))
    assert diff.equal == 4 and diff.same


@pytest.mark.parametrize(
    "dtype", ["f4", "f2", ml_dtypes.bfloat16, "i8", "?", "c8", ml_dtypes.float8_e5m2]
)
def test_one_element_is_found(tmp_path, dtype):
    array = np.zeros((1200, 1000), dtype)
    other = array.copy()
    other[1100, 7] = 1
    (found,) = diff_of(tmp_path, {"w": array}, {"w": other}).different
    assert (found.values, found.max_abs, found.max_rel, found.first) == (1, 1.0, 1.0, (1100, 7))


EDGES = {
    "f4": [0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1e-30, 7.0],
    "f2": [0.0, -0.0, 6e-8, 65504, -65504, 1.0, 0.1, 7.0],
    "f8": [0.0, -0.0, 5e-324, 1.7e308, 1e-30, -1e200, 1.0, 7.0],
    "i8": [0, -1, 2**53, 2**53 + 1, -(2**63), 2**63 - 1, 7, 8],
    "u1": [0, 255, 1, 254, 128, 127, 7, 8],
    "i1": [0, -128, 127, 1, -1, 64, 7, 8],
    "u8": [0, 2**64 - 1, 2**53, 2**53 + 1, 1, 2, 7, 8],
}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        *((k, k) for k in EDGES),
        ("f2", "f4"),
        ("f4", "f8"),
        ("u1", "i1"),
        ("i1", "f4"),
        ("i8", "u8"),
    ],
)
def test_many_differences(tmp_path, first, second, special):
    """Against plain arithmetic in float64, with enough elements for two threads."""
    size = 3_000_001 if first == second == "f4" else 200_003
    a = np.random.default_rng(1).choice(np.array(EDGES[first], first), size)
    b = np.random.default_rng(2).choice(np.array(EDGES[second], second), size)
    if special and first[0] == second[0] == "f":
        a[size // 2 :: 1000], b[size // 2 :: 1500], b[5] = np.nan, np.nan, np.inf
    (found,) = diff_of(tmp_path, {"w": a}, {"w": b}).different
    with np.errstate(all="ignore"):
        unequal = (a != b) & ~((a != a) & (b != b))
        x, y = a[unequal].astype("f8"), b[unequal].astype("f8")
        distance = np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf)
        relative = distance / np.maximum(np.abs(x), np.abs(y))
    relative[~np.isfinite(relative)] = np.inf
    assert found.values == unequal.sum() and found.first == (int(unequal.argmax()),)
    assert found.max_abs == distance.max()
    assert found.max_rel == pytest.approx(relative.max(), rel=1e-6)


def test_memory_is_bounded(tmp_path):
    import tracemalloc

    lamina.io.save({"w": np.zeros(12_000_000, "f4")}, tmp_path / "a", sync=False)
    lamina.io.save({"w": np.ones(12_000_000, "f4")}, tmp_path / "b", sync=False)
    with lamina.io.open(tmp_path / "a") as a, lamina.io.open(tmp_path / "b") as b:
        tracemalloc.start()
        tensor_stats(a["w"])
        file_diff(a, b)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 24_000_000


def test_refused_types_are_compared_byte_by_byte(tmp_path):
    import json
    import struct

    from lamina._core.errors import FileError

    def write(name, kind, data):
        size = {"F4": 8, "U8": 4}[kind]
        entry = {"dtype": kind, "shape": [size], "data_offsets": [0, 4]}
        text = json.dumps({"q": entry}).encode()
        (tmp_path / name).write_bytes(struct.pack("<Q", len(text)) + text + data)
        return lamina.io.open(tmp_path / name)

    with (
        write("a", "F4", b"1234") as a,
        write("b", "F4", b"1234") as b,
        write("c", "U8", b"1234") as c,
    ):
        assert file_diff(a, b).same
        assert file_diff(a, c).different[0].dtypes == ("F4", "U8")
        with pytest.raises(FileError, match="sub-byte type F4"):
            tensor_stats(a["q"])
        with write("d", "F4", b"1233") as d:
            assert file_diff(a, d).different[0].values == 1
