"""Safetensors: byte-equal with the reference implementation, and strict with everything else."""

import json
import random
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lamina.io
from lamina._core.errors import FileError
from lamina.io.safetensors import open_safetensors, write_safetensors

safetensors_numpy = pytest.importorskip("safetensors.numpy")

DTYPES = [
    np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64,
    np.float16, np.float32, np.float64, np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz,
]  # fmt: skip
SHAPES = [(), (0,), (1,), (3, 0, 2), (5, 7), (16, 16), (2, 3, 4, 5)]


def sample(dtype, shape, seed=0):
    raw = np.random.default_rng(seed).integers(0, 100, shape)
    return raw.astype(dtype)


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()


def assert_same(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert bits(left) == bits(right)


def everything():
    tensors = {}
    for dtype in DTYPES:
        for i, shape in enumerate(SHAPES):
            tensors[f"{np.dtype(dtype).name}.{i}"] = sample(dtype, shape, i)
    return tensors


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors_reads_our_files(tmp_path, torch):
    tensors = everything()
    path = tmp_path / "x.safetensors"
    write_safetensors(tensors, path)
    from safetensors.torch import load_file

    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, array in tensors.items():
        view = loaded[name].contiguous().reshape(-1).view(torch.uint8)
        assert tuple(loaded[name].shape) == array.shape
        assert view.numpy().tobytes() == bits(array), name


def test_we_read_files_of_safetensors(tmp_path):
    tensors = {n: a for n, a in everything().items() if not n.startswith("float8")}
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file(tensors, path, metadata={"who": "me"})
    with open_safetensors(path) as file:
        assert file.metadata["who"] == "me"
        assert file.keys() == tensors.keys()
        for name, array in tensors.items():
            assert_same(file[name].read(), array)


def test_types_that_the_oracle_has_not(tmp_path):
    tensors = {"scale": sample(ml_dtypes.float8_e8m0fnu, (4, 2))}
    write_safetensors(tensors, tmp_path / "x")
    assert_same(open_safetensors(tmp_path / "x")["scale"].read(), tensors["scale"])


def test_data_is_aligned_and_aliased(tmp_path):
    tensors = {
        "odd": sample("f4", (1001,)),
        "even": sample("f4", (256, 64)),
        "e2": sample("u1", (1 << 16,)),
    }
    path = tmp_path / "x"
    write_safetensors(tensors, path)
    with open_safetensors(path) as file:
        assert list(file) == ["odd", "even", "e2"]
        assert file["even"].offset % 64 == file["e2"].offset % 64 == 0
        assert file["odd"].offset % 4 == 0
    loaded = lamina.io.load(path)
    assert _mapped(path, loaded["even"]) and _mapped(path, loaded["e2"])
    assert not _mapped(path, loaded["odd"])
    assert not _mapped(path, lamina.io.load(path, copy=True)["even"])


def _mapped(path, array):
    address = array.unsafe_buffer_pointer()
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            if low <= address < high:
                return str(path) in line
    return False


def test_strided_and_foreign_order(tmp_path):
    base = sample("f4", (6, 8))
    tensors = {"t": base.T, "step": base[::2, ::-1], "wide": np.broadcast_to(base[0], (3, 8))}
    write_safetensors(tensors, tmp_path / "x")
    for name, array in lamina.io.load(tmp_path / "x", numpy=True).items():
        assert_same(array, np.ascontiguousarray(tensors[name]))
    lamina.io.save({"big": base.astype(">f4")}, tmp_path / "y")
    assert_same(lamina.io.load(tmp_path / "y", numpy=True)["big"], base)


def test_names(tmp_path):
    tensors = {
        n: np.ones(2, "f4")
        for n in ("", "a.b", "weiß 漢字 🦙", 'quote"\\', "\n\0", "format", "lamina")
    }
    write_safetensors(tensors, tmp_path / "x")
    assert safetensors_numpy.load_file(tmp_path / "x").keys() == tensors.keys()
    assert list(open_safetensors(tmp_path / "x")) == list(tensors)
    with pytest.raises(FileError, match="__metadata__"):
        write_safetensors({"__metadata__": np.ones(1)}, tmp_path / "y")
    with pytest.raises(FileError, match="complex128"):
        write_safetensors({"z": np.ones(1, "c16")}, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_ties_both_ways(tmp_path, torch):
    from safetensors.torch import load_model, save_model

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(5, 4)
            self.head = torch.nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    theirs = Tied()
    save_model(theirs, tmp_path / "theirs")
    loaded = lamina.io.load(tmp_path / "theirs")
    assert loaded["embed.weight"] is loaded["head.weight"]
    with lamina.io.open(tmp_path / "theirs") as file:
        assert set(file) == {"embed.weight", "head.weight"} and len(file.ties) == 1
    lamina.io.save(
        {"embed.weight": loaded["embed.weight"] + 1, "x": loaded["embed.weight"]}, tmp_path / "z"
    )
    value = loaded["embed.weight"] + 1
    lamina.io.save({"embed.weight": value, "head.weight": value}, tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_size < 600
    assert load_model(theirs, tmp_path / "ours") == (set(), [])
    np.testing.assert_array_equal(theirs.head.weight.detach().numpy(), value)


def test_slices(tmp_path):
    array = sample("i4", (9, 5, 4))
    write_safetensors({"w": array}, tmp_path / "x")
    with open_safetensors(tmp_path / "x") as file:
        for index in [..., 3, slice(2, 7, 2), (slice(None), 1), (0, 0, 0), [1, 2], (..., None)]:
            np.testing.assert_array_equal(file["w"].read(index), array[index])
        assert b"".join(bits(c) for c in file["w"].chunks(100)) == bits(array)
        kept = file["w"].read()
    np.testing.assert_array_equal(kept, array)
    with pytest.raises(FileError, match="closed"):
        file["w"].read()


def test_checksums(tmp_path):
    tensors = {"a": sample("f4", (32,)), "t": sample("f4", (4, 6)).T, "none": sample("f4", (0,))}
    path = tmp_path / "x"
    write_safetensors(tensors, path)
    with open_safetensors(path) as file:
        assert file.verify() == 3
        offset = file["t"].offset
    data = bytearray(path.read_bytes())
    data[offset + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileError, match=r"x: the data of 't' is damaged"):
        lamina.io.load(path, verify=True)
    write_safetensors(tensors, path, checksums=False)
    with open_safetensors(path) as file:
        assert file.verify() == 0 and "lamina.crc32" not in file.metadata


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "shape is no list": ({"w": {**ENTRY, "shape": 2}}, "bad shape"),
    "negative size": ({"w": {**ENTRY, "shape": [-2]}}, "bad shape"),
    "boolean size": ({"w": {**ENTRY, "shape": [True, 2]}}, "bad shape"),
    "too many axes": ({"w": {**ENTRY, "shape": [1] * 65 + [2]}}, "bad shape"),
    "float offset": (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8.0]}}', "not an integer"),
    "nan": (b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "NaN"),
    "infinity": (b'{"w":{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,8]}}', "Infinity"),
    "huge integer": (b'{"w":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 99999), "digits"),
    "overflowing product": ({"w": {**ENTRY, "shape": [1 << 62, 4]}}, "needs"),
    "wrapping product": ({"w": {**ENTRY, "shape": [1 << 62, 1 << 62, 0, 1 << 62]}}, "needs"),
    "three offsets": ({"w": {**ENTRY, "data_offsets": [0, 8, 8]}}, "bad offsets"),
    "negative offset": ({"w": {**ENTRY, "data_offsets": [-8, 0]}}, "bad offsets"),
    "backward offsets": ({"w": {**ENTRY, "data_offsets": [8, 0]}}, "is said to lie"),
    "offset past the end": ({"w": {**ENTRY, "shape": [3], "data_offsets": [0, 12]}}, "is said to lie"),
    "wrong size": ({"w": {**ENTRY, "shape": [1]}}, "needs 4 bytes, but has 8"),
    "wrong dtype": ({"w": {**ENTRY, "dtype": "F64"}}, "needs 16 bytes"),
    "unknown dtype": ({"w": {**ENTRY, "dtype": "F33"}}, "unknown dtype 'F33'"),
    "dtype is no text": ({"w": {**ENTRY, "dtype": ["F32"]}}, "unknown dtype"),
    "missing field": ({"w": {"dtype": "F32", "shape": [2]}}, "exactly"),
    "one field more": ({"w": {**ENTRY, "extra": 1}}, "exactly"),
    "entry is no object": ({"w": [1]}, "exactly"),
    "tensor twice": (b'{"w":%s,"w":%s}' % ((json.dumps(ENTRY).encode(),) * 2), "'w' occurs twice"),
    "field twice": (b'{"w":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', "twice"),
    "metadata is no object": ({"__metadata__": [], "w": ENTRY}, "__metadata__"),
    "metadata is no text": ({"__metadata__": {"a": 1}, "w": ENTRY}, "__metadata__"),
    "overlap": ({"v": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}, "w": ENTRY}, "overlaps"),
    "gap": ({"w": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}}, "leaves a gap"),
    "data left over": ({"w": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}}, "end at byte 4 of 8"),
    "not JSON": (b"{'w': 1}", "not valid JSON"),
    "trailing text": (b"{} x", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "half a character": (b'{"\\ud800": %s}' % json.dumps(ENTRY).encode(), "not valid JSON"),
    "list": (b"[]" + b" " * 20, "no kind|does not start"),
    "deep list": (b'{"w":' + b"[" * 500_000, "nested too deeply|not valid JSON"),
    "deep object": (b'{"a":' * 200_000, "nested too deeply|not valid JSON"),
    "bad checksums": ({"__metadata__": {"lamina.crc32": '{"w": 1}'}, "w": ENTRY}, "checksums"),
    "bad description": ({"__metadata__": {"lamina": "[]"}, "w": ENTRY}, "description"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_bad_headers(tmp_path, what):
    header, message = BAD_HEADERS[what]
    path = raw_file(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(FileError, match=message) as caught:
        open_safetensors(path).verify()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x08\0\0", "no kind"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", 1 << 63) + b"{}", "no kind"),
        (struct.pack("<Q", 100_000_001) + b"{}" + bytes(50), "at most 100000000"),
        (struct.pack("<Q", 0) + b"{}", "header"),
    ],
)
def test_bad_lengths(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FileError, match=message):
        lamina.io.open(tmp_path / "x")


def test_no_limit_on_digits_is_no_bomb(tmp_path, monkeypatch):
    import sys

    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        path = raw_file(tmp_path / "x", b'{"w":{"shape":[' + b"9" * 5_000_000 + b"]}}")
        with pytest.raises(FileError, match="5000000 digits"):
            open_safetensors(path)
    finally:
        sys.set_int_max_str_digits(before)


def test_sub_byte_types_are_listed_and_refused(tmp_path):
    header = {
        "q": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]},
        "w": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
    }
    path = raw_file(tmp_path / "x", header, b"\1\2\3\4")
    with lamina.io.open(path) as file:
        assert file["q"].shape == (4,) and file["q"].kind == "F4" and file["q"].nbytes == 2
        with pytest.raises(FileError, match="'q' has the sub-byte type F4"):
            file["q"].read()
    with pytest.raises(FileError, match="'q'.*names="):
        lamina.io.load(path)
    assert lamina.io.load(path, names="w")["w"].tolist() == [3, 4]


def small_file(path):
    lamina.io.save(
        {"a": np.arange(6, dtype="f4"), "b": {"c": np.ones((2, 2), "i1"), "d": [1, 2.5, (None,)]}},
        path,
    )
    return path.read_bytes()


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "x"
    data = small_file(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FileError):
            lamina.io.load(path, numpy=True)


def test_every_bit_flip_is_refused_or_harmless(tmp_path):
    """A flip gives a FileError or data; never another error, and never unseen with verify."""
    path = tmp_path / "x"
    data = small_file(path)
    choice = random.Random(0)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << choice.randrange(8)
        path.write_bytes(flipped)
        try:
            lamina.io.load(path, numpy=True, verify=True)
        except FileError:
            continue
        assert position < start


def test_random_bytes_are_refused(tmp_path):
    choice = random.Random(1)
    for _ in range(200):
        (tmp_path / "x").write_bytes(choice.randbytes(choice.randrange(64)))
        with pytest.raises(FileError):
            lamina.io.load(tmp_path / "x")


def test_jax_arrays_of_every_dtype(tmp_path):
    names = ["bool", "int8", "uint32", "float16", "bfloat16", "float8_e4m3fn", "complex64", "float32",
             "float8_e5m2", "float8_e3m4", "float8_e8m0fnu", "int4", "uint4", "float4_e2m1fn"]  # fmt: skip
    tensors = {name: jnp.arange(6).reshape(2, 3).astype(name) for name in names}
    lamina.io.save(tensors, tmp_path / "x")
    loaded = lamina.io.load(tmp_path / "x")
    for name, array in tensors.items():
        assert isinstance(loaded[name], jax.Array) and not loaded[name].committed
        assert_same(np.asarray(loaded[name]), np.asarray(array))
