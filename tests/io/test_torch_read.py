"""Files that PyTorch writes, in every manner, read without it: same names, shapes, types, bytes."""

import argparse
import collections
import datetime
import enum
import os
import pathlib
import pickle
import subprocess
import zipfile

import ml_dtypes
import numpy as np
import pytest

import lamina.io
from lamina._core.errors import FileError
from lamina.io.torch_legacy import open_torch_legacy
from lamina.io.torch_zip import open_torch_zip

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

MANNERS = {
    "zip": (open_torch_zip, {}),
    "protocol 3": (open_torch_zip, {"pickle_protocol": 3}),
    "protocol 4": (open_torch_zip, {"pickle_protocol": 4}),
    "protocol 5": (open_torch_zip, {"pickle_protocol": 5}),
    "legacy": (open_torch_legacy, {"_use_new_zipfile_serialization": False}),
    "legacy 4": (
        open_torch_legacy,
        {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
    ),
}
NAMES = [
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
]


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def raw(tensor):
    """The bytes of a tensor in row-major order."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous().clone()
    return bytes(tensor.untyped_storage())[: tensor.numel() * tensor.element_size()]


def flat(value, prefix=""):
    """The tensors of nested dicts, lists and tuples by dotted names."""
    if isinstance(value, torch.Tensor):
        return {prefix[:-1] or "array": value}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {}
    found = {}
    for key, item in items:
        found |= flat(item, f"{prefix}{key}.")
    return found


def check(file, expected):
    assert list(file) == list(expected)
    for name, tensor in expected.items():
        handle = file[name]
        dtype = numpy_dtype(str(tensor.dtype).removeprefix("torch."))
        assert (handle.shape, handle.dtype) == (tuple(tensor.shape), dtype), name
        read = handle.read()
        assert (read.shape, read.dtype) == (handle.shape, dtype), name
        assert read.tobytes() == raw(tensor), name


def objects():
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    tied = torch.randn(3, 4)
    values = torch.randint(0, 256, (16,), dtype=torch.uint8)
    types = {name: values.clone().view(getattr(torch, name)) for name in NAMES if name != "bool"}
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.Adam(net.parameters(), amsgrad=True)
    net(torch.randn(2, 2, 5, 5)).sum().backward()
    optimizer.step()
    yield "types", {**types, "bool": values > 100}
    yield "one tensor", torch.arange(5.0)
    yield "parameter", torch.nn.Parameter(torch.ones(2, 2))
    yield (
        "scalars and empty",
        {
            "scalar": torch.tensor(3.5),
            "one": torch.ones(1, 1, 1),
            "empty": torch.empty(0),
            "empty too": torch.empty(3, 0, 2, dtype=torch.int64),
        },
    )
    yield (
        "views",
        {
            "base": base,
            "rows": base[2:5],
            "columns": base[:, 3],
            "steps": base[::2, 1::3],
            "transposed": base.t(),
            "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
            "expanded": torch.randn(3, 1).expand(3, 5),
            "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "diagonal": base[:, :6].diagonal(),
        },
    )
    complexes = torch.randn(4, dtype=torch.complex64)
    yield (
        "lazy bits",
        {
            "conj": complexes.conj(),
            "negative": complexes.clone().conj().imag,
            "conj of conj": complexes.conj().conj(),
            "wide": torch.randn(2, 2, dtype=torch.complex128).mH,
        },
    )
    yield "ties", {"a": tied, "b": tied, "c": tied[:], "d": tied[1:]}
    yield "state dict", net.state_dict()
    yield "training state", {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "e": 3}
    yield "nested", {"a": [{"b": (torch.ones(2), [torch.zeros(1)])}], 7: {None: torch.ones(1)}}
    yield "many", {f"layers.{i}.weight": torch.full((i % 7,), float(i)) for i in range(400)}


OBJECTS = dict(objects())


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("name", OBJECTS)
def test_same_names_shapes_types_and_bytes(name, manner, tmp_path):
    opener, options = MANNERS[manner]
    path = tmp_path / "x.anything"
    torch.save(OBJECTS[name], path, **options)
    with opener(path) as file:
        check(file, flat(OBJECTS[name]))


def test_parameters_of_a_module_are_their_data(tmp_path):
    path = tmp_path / "x.pt"
    net = torch.nn.Linear(3, 2)
    torch.save(dict(net.named_parameters()), path)
    with open_torch_zip(path) as file:
        check(file, net.state_dict())


@pytest.mark.parametrize("manner", ["zip", "legacy"])
def test_ties_and_slices(manner, tmp_path):
    opener, options = MANNERS[manner]
    torch.save(OBJECTS["ties"], tmp_path / "x.pt", **options)
    with opener(tmp_path / "x.pt") as file:
        assert file.ties == {"b": "a", "c": "a"}
        assert file["b"] is file["a"]
        assert file.nbytes == 3 * 4 * 4 + 2 * 4 * 4


def test_storages_are_mapped_where_they_lie(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(OBJECTS["many"], path)
    with open_torch_zip(path) as file:
        assert all(handle.offset % 64 == 0 and handle.contiguous for handle in file.values())
        array = file["layers.6.weight"].read()
        assert not array.flags.writeable
        assert not array.flags.owndata
    assert array.tolist() == [6.0] * 6


def test_what_lies_beside_the_weights(tmp_path):
    path = tmp_path / "x.pt"

    class Color(enum.Enum):
        RED = 1

    Color.__qualname__ = "Color"
    globals()["Color"] = Color
    saved = {
        "args": argparse.Namespace(lr=0.1, tensor=torch.ones(2)),
        "path": pathlib.PurePosixPath("/etc/passwd"),
        "date": datetime.date(2020, 1, 2),
        "enum": Color.RED,
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "bytes": b"\x00\xff",
        "complex": 2 + 3j,
        "set": {1, 2},
        "frozen": frozenset("a"),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
        "numbers": [1, -1, 2**40, -(2**100), 1.5, float("inf"), None, True],
        "text": "häß",
    }
    torch.save(saved, path)
    with open_torch_zip(path) as file:
        assert list(file) == ["args.tensor"]
        tree = file.tree
    assert repr(tree["args"]) == "<argparse.Namespace>"
    assert tree["args"].attributes()["lr"] == 0.1
    assert repr(tree["path"]) == "<pathlib.PurePosixPath>"
    assert repr(tree["date"]) == "<datetime.date>"
    assert repr(tree["enum"]).endswith("Color>")
    assert repr(tree["device"]) == "<torch.device>"
    assert repr(tree["dtype"]) == "<torch.float16>"
    plain = ["size", "bytes", "complex", "set", "frozen", "numbers", "text"]
    assert [tree[key] for key in plain] == [tuple(saved["size"]), *(saved[k] for k in plain[1:])]
    assert tree["counter"] == {"a": 2, "b": 1}
    assert tree["default"] == {"a": [1]}


def test_state_dict_keeps_its_order_and_versions(tmp_path):
    net = torch.nn.BatchNorm1d(2)
    torch.save({"net": net.state_dict()}, tmp_path / "x.pt")
    with open_torch_zip(tmp_path / "x.pt") as file:
        state = file.tree["net"]
    assert type(state) is collections.OrderedDict
    assert state._metadata == {"": {"version": 2}}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_in_the_pickle(protocol, tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "bf16": np.arange(3).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 2)),
        "scalar array": np.array(2.5),
        "bool": np.array([True, False]),
    }
    arrays["same"] = arrays["a"]
    rest = {"number": np.float32(1.5), "flag": np.bool_(True), "words": np.array(["a"])}
    objects = {"objects": np.array([{}], dtype=object)}
    torch.save({**arrays, **rest, **objects}, tmp_path / "x.pt", pickle_protocol=protocol)
    with open_torch_zip(tmp_path / "x.pt") as file:
        assert list(file) == list(arrays)
        assert file.ties == {"same": "a"}
        for name, array in arrays.items():
            read = file[name].read()
            assert read.dtype == array.dtype.newbyteorder("=")
            assert read.shape == array.shape
            assert read.tobytes() == array.astype(read.dtype).tobytes()
        assert file.tree["number"] == np.float32(1.5)
        assert file.tree["number"].dtype == np.float32
        assert file.tree["flag"].item() is True
        assert repr(file.tree["objects"]) == "<numpy.ndarray>"


def test_types_without_a_numpy_equal_are_listed_and_refused(tmp_path):
    quantised = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)
    channels = torch.quantize_per_channel(
        torch.ones(2, 3), torch.ones(2), torch.zeros(2), 0, torch.quint8
    )
    saved = {
        "fine": torch.ones(2),
        "quantised": quantised,
        "channels": channels,
        "half complex": torch.ones(2, dtype=torch.complex32),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(4).to_sparse_csr(),
        "meta": torch.empty(5, 6, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }
    torch.save(saved, tmp_path / "x.pt")
    with open_torch_zip(tmp_path / "x.pt") as file:
        assert list(file) == list(saved)
        reasons = {
            "quantised": ("qint8", (2, 3), "quantised"),
            "channels": ("quint8", (2, 3), "quantised"),
            "half complex": ("complex32", (2,), "numpy does not have"),
            "sparse": ("float32", (3, 3), "sparse; save tensor.to_dense"),
            "csr": ("float32", (4, 4), "sparse; save tensor.to_dense"),
            "meta": ("float32", (5, 6), "meta device"),
            "nested": ("float32", (), "nested"),
        }
        for name, (kind, shape, reason) in reasons.items():
            assert (file[name].kind, file[name].shape) == (kind, shape)
            with pytest.raises(FileError, match=f"'{name}' .*{reason}"):
                file[name].read()


def test_storage_saved_alone(tmp_path):
    torch.save(torch.arange(4.0).untyped_storage(), tmp_path / "x.pt")
    with open_torch_zip(tmp_path / "x.pt") as file:
        assert file["array"].read().view(np.float32).tolist() == [0, 1, 2, 3]


def test_subclass_of_tensor(tmp_path):
    class Mine(torch.Tensor):
        pass

    Mine.__qualname__ = "Mine"
    globals()["Mine"] = Mine
    value = torch.arange(3.0).as_subclass(Mine)
    value.note = "x"
    torch.save({"w": value}, tmp_path / "x.pt")
    with open_torch_zip(tmp_path / "x.pt") as file:
        assert file["w"].read().tolist() == [0, 1, 2]


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("manner", MANNERS)
def test_payload_does_not_run(manner, tmp_path):
    canary = tmp_path / "canary"
    opener, options = MANNERS[manner]
    saved = {"w": torch.ones(2), "x": Payload(f"touch {canary}")}
    torch.save(saved, tmp_path / "x.pt", **options)
    with opener(tmp_path / "x.pt") as file:
        assert file["w"].read().tolist() == [1, 1]
        assert repr(file.tree["x"]).endswith(".system>")
    assert not canary.exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert canary.exists(), "the payload is real"


def test_old_big_endian_file(tmp_path):
    """As a big-endian machine writes it: every component swapped, and a record that says so."""
    expected = {name: OBJECTS["types"][name] for name in NAMES if name != "bool"}
    torch.save(expected, tmp_path / "x.pt")
    source = zipfile.ZipFile(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("byteorder"):
                content = b"big"
            if "/data/" in name:
                kind = list(expected)[int(name.rpartition("/")[2])]
                content = np.frombuffer(content, swappable(kind)).byteswap().tobytes()
            target.writestr(name, content)
    with open_torch_zip(tmp_path / "big.pt") as file:
        check(file, expected)
    assert list(torch.load(tmp_path / "big.pt")) == list(expected)


def swappable(name):
    """An integer type as wide as a component."""
    size = numpy_dtype(name).itemsize // (2 if name.startswith("complex") else 1)
    return f"u{size}"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_file_packed_again(method, tmp_path):
    torch.save(OBJECTS["views"], tmp_path / "x.pt")
    source = zipfile.ZipFile(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w", method) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with open_torch_zip(tmp_path / "y.pt", verify=True) as file:
        check(file, flat(OBJECTS["views"]))
        assert set(file.ties) == set()


def test_verify_finds_a_flipped_bit(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    with open_torch_zip(path, verify=True) as file:
        offset = file["w"].offset
        assert file.verify() > 1
    content = bytearray(path.read_bytes())
    content[offset + 77] ^= 4
    path.write_bytes(content)
    file = open_torch_zip(path)
    with pytest.raises(FileError, match="data/0' does not match its checksum"):
        file.verify()
    file.close()
    with pytest.raises(FileError, match="checksum"):
        open_torch_zip(path, verify=True)


def test_file_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    with open_torch_zip(tmp_path / "x.pt", verify=True) as file:
        assert file["w"].read().tolist() == [1, 1, 1]


def test_sharded_by_index(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(
        {"b": torch.zeros(3)},
        tmp_path / "pytorch_model-00002-of-00002.bin",
        _use_new_zipfile_serialization=False,
    )
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(
        '{"metadata": {"total_size": 20}, "weight_map": {'
        '"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}'
    )
    for path in (index, tmp_path):
        with lamina.io.open(path) as file:
            assert {name: h.read().tolist() for name, h in file.items()} == {
                "a": [1, 1],
                "b": [0, 0, 0],
            }
    index.write_text('{"weight_map": {"a": "../pytorch_model-00001-of-00002.bin"}}')
    with pytest.raises(FileError, match="not the name of a file beside the index"):
        lamina.io.open(index)


def test_load_as_numpy_and_jax(tmp_path):
    torch.save({"w": torch.ones(2), "n": [torch.tensor(3)], "note": "x"}, tmp_path / "x.pt")
    loaded = lamina.io.load(tmp_path / "x.pt", numpy=True)
    assert loaded["w"].tolist() == [1, 1]
    assert (loaded["n"][0].dtype, loaded["note"]) == (np.int64, "x")


def test_plain_pickle_is_refused_and_said_so(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"w": 1}, 4))
    with pytest.raises(FileError, match="plain pickle"):
        open_torch_legacy(tmp_path / "x.pt")


def test_errors_name_the_tensor(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"model": {"fc.weight": torch.ones(4)}}, path)
    content = path.read_bytes()
    # The size (4,) follows the offset 0 in the pickle.
    at = content.index(b"K\x00K\x04")
    source = zipfile.ZipFile(path)
    assert source.getinfo(f"{path.stem}/data.pkl").header_offset < at
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"K\x00K\x04", b"K\x00K\x09"))
    with pytest.raises(FileError, match=r"y.pt: tensor 'model.fc.weight' needs 36 bytes .* 16"):
        open_torch_zip(tmp_path / "y.pt")


def test_directory_and_missing_file(tmp_path):
    with pytest.raises(FileError, match="directory"):
        open_torch_zip(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_torch_zip(tmp_path / "missing.pt")


def test_files_are_closed(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"PK\3\4 not really")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(FileError, match="directory is missing"):
            open_torch_zip(path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert subprocess.call(["true"]) == 0
