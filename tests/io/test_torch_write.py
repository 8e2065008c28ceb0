"""What ``save_torch`` writes, ``torch.load(weights_only=True)`` reads, and so do we."""

import collections
import json
import struct
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lamina.io
from lamina import nn
from lamina._core.errors import TypeMismatchError
from lamina.io import zip_write
from lamina.io.torch_write import save_torch
from lamina.io.torch_zip import open_torch_zip
from lamina.io.zip_records import read_directory

NAMES = [
    *("float64", "float32", "float16", "complex64", "complex128", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
]
SMALL = [
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    "float8_e8m0fnu",
]
DTYPES = [np.dtype(name) for name in NAMES] + [np.dtype(getattr(ml_dtypes, n)) for n in SMALL]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def raw(tensor):
    tensor = tensor.contiguous().clone()
    return bytes(tensor.untyped_storage())[: tensor.numel() * tensor.element_size()]


@pytest.mark.parity
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_every_dtype_and_shape(shape, mmap, path, torch):
    rng = np.random.default_rng(0)
    count = int(np.prod(shape))
    arrays = {}
    for dtype in DTYPES:
        content = rng.integers(0, 120, count * dtype.itemsize, dtype=np.uint8)
        if dtype.kind == "b":
            content %= 2
        arrays[dtype.name] = content.view(dtype).reshape(shape)
    save_torch(arrays, path)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert str(loaded[name].dtype) == f"torch.{name}"
        assert tuple(loaded[name].shape) == shape
        assert raw(loaded[name]) == array.tobytes()
    with open_torch_zip(path, verify=True) as file:
        for name, array in arrays.items():
            assert file[name].read().dtype == array.dtype
            assert file[name].read().tobytes() == array.tobytes()
            assert file[name].offset % 64 == 0


NESTED = {
    "numbers": [0, 255, 256, -1, 2**31 - 1, -(2**31), 2**31, 2**63, -(2**200), 0.1, -0.0],
    "special": [float("inf"), None, True, False],
    "text": ["", "häß", "x" * 1000, "\n'\\"],
    "bytes": [b"", bytes(range(256))],
    "tuple": (1, (2, [3, ()])),
    "set": {1, 2},
    "complex": 2 - 3j,
    "keys": {1: "a", None: "b", 2.5: "c", False: "d"},
    "ordered": collections.OrderedDict(z=1, a=2),
    "empty": [{}, [], (), collections.OrderedDict()],
}


@pytest.mark.parity
def test_nested_objects(path, torch):
    save_torch(NESTED, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded == NESTED
    assert type(loaded["ordered"]) is collections.OrderedDict
    with open_torch_zip(path) as file:
        assert file.tree == NESTED


@pytest.mark.parity
def test_numpy_numbers_become_plain_ones(path, torch):
    save_torch([np.float32(1.5), np.int8(3), np.bool_(True), ml_dtypes.bfloat16(2)], path)
    assert torch.load(path, weights_only=True) == [1.5, 3, True, 2.0]


@pytest.mark.parity
def test_jax_arrays_and_layouts(path, torch):
    base = np.arange(24.0).reshape(4, 6)
    arrays = {
        "jax": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "transposed": base.T,
        "steps": base[::2, 1::3],
        "swapped": base.astype(">f8"),
        "expanded": np.broadcast_to(np.float32(1), (3, 4)),
    }
    save_torch(arrays, path)
    loaded = torch.load(path, weights_only=True)
    assert type(loaded) is collections.OrderedDict
    for name, array in arrays.items():
        assert loaded[name].double().numpy().tolist() == np.asarray(array).astype(float).tolist()


@pytest.mark.parity
def test_shared_arrays_share_a_storage(path, torch):
    shared = np.ones((100, 100), np.float32)
    device = jnp.ones((50, 50))
    save_torch({"a": shared, "b": [shared, shared[:]], "c": device, "d": device}, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["a"].data_ptr() == loaded["b"][0].data_ptr() == loaded["b"][1].data_ptr()
    assert loaded["c"].data_ptr() == loaded["d"].data_ptr()
    assert path.stat().st_size < 60_000
    with open_torch_zip(path) as file:
        assert file.ties == {"b.0": "a", "b.1": "a", "d": "c"}


@pytest.mark.parity
def test_ties_by_name(path, torch):
    embed, head = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    state = {"embed.weight": embed, "head.weight": head}
    ties = {"head.weight": "embed.weight", "more.weight": "embed.weight"}
    save_torch({"model": state}, path, ties={f"model.{a}": f"model.{b}" for a, b in ties.items()})
    loaded = torch.load(path, weights_only=True)["model"]
    assert list(loaded) == ["embed.weight", "head.weight", "more.weight"]
    assert len({tensor.data_ptr() for tensor in loaded.values()}) == 1
    assert loaded["head.weight"].sum() == 6
    save_torch(state, path, ties=ties)
    assert list(torch.load(path)) == ["embed.weight", "head.weight", "more.weight"]


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ({"x": "nothing"}, "'nothing', the name of 'x', is no array"),
        ({"other.x": "model.w"}, "'other.x' is not in the object"),
        ({"model.v": "model.w"}, r"'model.v' has shape \(3,\), but 'model.w' has \(2,\)"),
    ],
)
def test_ties_that_cannot_be(ties, message, path):
    with pytest.raises(TypeMismatchError, match=message):
        save_torch({"model": {"w": np.ones(2), "v": np.ones(3)}}, path, ties=ties)


@pytest.mark.parity
def test_module_loads_into_torch(path, torch):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    save_torch({"model": net, "epoch": 1}, path)
    loaded = torch.load(path, weights_only=True)
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    theirs.load_state_dict(loaded["model"])
    x = np.ones((1, 3), np.float32)
    np.testing.assert_allclose(
        theirs(torch.from_numpy(x)).detach().numpy(), np.asarray(net(x)), rtol=1e-5
    )


class Anything:
    pass


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ({"a": [Anything()]}, r"a\.0: cannot save an object of type .*Anything"),
        ({"a": {(1, 2): 3}}, "a: cannot save a dict key of type tuple"),
        ({"w": np.array(["x"])}, "w: cannot save an array of dtype"),
        ({"w": np.ones(2, ml_dtypes.float8_e3m4)}, "w: PyTorch has no dtype float8_e3m4"),
        ({"k": jax.random.key(0)}, "k: PyTorch has no random keys"),
        ({"n": 1 << 3000}, "integer of 376 bytes"),
        ({"f": len}, "f: cannot save an object of type"),
    ],
)
def test_what_torch_has_no_type_for(obj, message, path):
    path.write_bytes(b"before")
    with pytest.raises(TypeMismatchError, match=message):
        save_torch(obj, path)
    assert path.read_bytes() == b"before"
    assert len(list(path.parent.iterdir())) == 1


def test_object_that_contains_itself(path):
    loop = []
    loop.append(loop)
    with pytest.raises(TypeMismatchError, match="contains itself"):
        save_torch(loop, path)


def test_zip_tools_read_it_and_equal_objects_give_equal_files(path):
    obj = {"w": np.arange(1000.0), "t": np.arange(6.0).reshape(2, 3).T, "n": 1}
    save_torch(obj, path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
    first = path.read_bytes()
    save_torch(obj, path)
    assert path.read_bytes() == first


def test_over_the_file_it_was_read_from(path):
    save_torch({"w": np.arange(5.0)}, path)
    loaded = lamina.io.load(path, numpy=True)
    save_torch(loaded, path)
    assert lamina.io.load(path, numpy=True)["w"].tolist() == [0, 1, 2, 3, 4]


def test_more_than_4_gib(tmp_path):
    """Beyond 32 bits in size, offset and place of the directory, in a sparse file."""
    path = tmp_path / "big.zip"
    size = 1 << 32
    places = [
        zip_write._Place(b"a", 0, 64, size),
        zip_write._Place(b"b", 64 + size, 192 + size, 3),
    ]
    end = 195 + size
    with open(path, "wb") as file:
        for place in places:
            file.seek(place.header)
            file.write(zip_write._local(place, 0))
        file.seek(places[1].data)
        file.write(b"xyz" + zip_write._directory(places, [0, 0], end))
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("a").file_size == size
        assert archive.getinfo("b").header_offset == 64 + size
    source = np.memmap(path, np.uint8, "r")
    records = read_directory(memoryview(source), str(path))
    assert (records["a"].size, records["a"].offset) == (size, 64)
    assert bytes(source[records["b"].offset :][:3]) == b"xyz"


def test_more_records_than_16_bits_count(tmp_path):
    path = tmp_path / "many.zip"
    empty = np.zeros(0, np.uint8)
    zip_write.write_zip([(str(i), empty) for i in range(66_000)], path, sync=False)
    data = path.read_bytes()
    assert len(read_directory(memoryview(data), "many")) == 66_000
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 66_000
    count = struct.unpack_from("<H", data, len(data) - 12)
    assert count == (0xFFFF,)


def test_round_trip_is_data_only(path):
    save_torch({"a": [1, {"b": np.ones(2, np.float32)}]}, path)
    with open_torch_zip(path) as file:
        tree = file.tree
        assert json.dumps(tree["a"][0]) == "1"
        assert tree["a"][1]["b"] is file["a.1.b"]
