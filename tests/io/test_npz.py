"""npz and npy: both ways with numpy, and nothing in them is unpickled or inflated without bounds."""

import io
import os
import pickle
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest

import lamina.io
from lamina._core.errors import FileError
from lamina.io.npz import open_npz, write_npz

DTYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
SHAPES = [(), (0,), (3,), (4, 5), (2, 0, 3), (2, 3, 4)]


def everything():
    return {
        f"{dtype}/{i}": (np.arange(np.prod(shape, dtype=int)) % 2).astype(dtype).reshape(shape)
        for dtype in DTYPES
        for i, shape in enumerate(SHAPES)
    }


def same(left, right):
    native = right.dtype.newbyteorder("=") if right.dtype.isbuiltin != 2 else right.dtype
    return left.dtype == native and left.shape == right.shape and (left == right).all()


def test_numpy_reads_our_files(tmp_path):
    tensors = everything()
    tensors["fortran"] = np.arange(12.0).reshape(3, 4).T
    tensors["step"] = np.arange(12.0)[::2]
    lamina.io.save(tensors, tmp_path / "x", format="npz")
    with np.load(tmp_path / "x", allow_pickle=False) as file:
        assert set(file.files) == set(tensors)
        assert all(same(file[name], array) for name, array in tensors.items())
    with zipfile.ZipFile(tmp_path / "x") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_we_read_files_of_numpy(tmp_path, save):
    tensors = everything()
    tensors["fortran"] = np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))
    tensors["big"] = np.arange(6, dtype=">i4").reshape(2, 3)
    with open(tmp_path / "x", "wb") as file:
        save(file, **tensors)
    with lamina.io.open(tmp_path / "x") as file:
        assert file.verify() == len(tensors)
        for name, array in tensors.items():
            assert same(file[name].read(), array.astype(array.dtype.newbyteorder("=")))
        assert same(file["fortran"].read((1, slice(0, 2))), tensors["fortran"][1, :2])
        assert file["big"].dtype.isnative
    loaded = lamina.io.load(tmp_path / "x", numpy=True)
    assert all(same(loaded[name], array) for name, array in tensors.items())


@pytest.mark.parametrize("array", [
    np.arange(6.0).reshape(2, 3), np.float32(3), np.zeros((0, 3)), np.asfortranarray(np.ones((3, 2))),
    np.arange(3, dtype=">f8"),
])  # fmt: skip
def test_npy(tmp_path, array):
    with open(tmp_path / "x", "wb") as file:
        np.save(file, array)
    loaded = lamina.io.load(tmp_path / "x", numpy=True)
    assert same(loaded, np.asarray(array))


def test_versions_of_npy(tmp_path):
    for version in [(1, 0), (2, 0), (3, 0)]:
        with open(tmp_path / "x", "wb") as file:
            np.lib.format.write_array(file, np.arange(4.0), version=version)
        assert lamina.io.load(tmp_path / "x", numpy=True).tolist() == [0, 1, 2, 3]


def test_types_numpy_cannot_name(tmp_path):
    obj = {
        "b": np.arange(3).astype(ml_dtypes.bfloat16),
        "e": np.ones(2, ml_dtypes.float8_e5m2),
        "n": [1],
    }
    lamina.io.save(obj, tmp_path / "x", format="npz")
    loaded = lamina.io.load(tmp_path / "x", numpy=True)
    assert same(loaded["b"], obj["b"]) and same(loaded["e"], obj["e"]) and loaded["n"] == [1]
    with np.load(tmp_path / "x") as file:
        assert same(file["b"].view(ml_dtypes.bfloat16), obj["b"])
    with open(tmp_path / "y", "wb") as file:
        np.savez(file, b=obj["b"], f=np.ones(2))
    with pytest.raises(FileError, match="'b' has the raw type"):
        lamina.io.load(tmp_path / "y")
    assert lamina.io.load(tmp_path / "y", names="f", numpy=True)["f"].tolist() == [1, 1]


def test_our_data_is_aligned(tmp_path):
    tensors = {f"long name {i}" * i: np.ones(5000 + i, "u1") for i in range(1, 9)}
    write_npz(tensors, tmp_path / "x")
    with open_npz(tmp_path / "x") as file:
        assert all(handle.offset % 64 == 0 for handle in file.values())


def test_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    with open(tmp_path / "x", "wb") as file:
        np.savez(
            file, bad=np.array([Bomb()], dtype=object), good=np.ones(2, "f4"), text=np.array(["a"])
        )
    with lamina.io.open(tmp_path / "x") as file:
        assert list(file) == ["bad", "good", "text"]
        with pytest.raises(FileError, match="'bad' holds pickled Python objects"):
            file["bad"].read()
        with pytest.raises(FileError, match="'text' has the type <U1"):
            file["text"].read()
    with pytest.raises(FileError, match="never loaded"):
        lamina.io.load(tmp_path / "x")
    assert not (tmp_path / "exploded").exists()


def npy(header, body=b"", version=1):
    text = header if isinstance(header, bytes) else repr(header).encode()
    width = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(width, "little") + text + body


GOOD = {"descr": "<f4", "fortran_order": False, "shape": (2,)}


@pytest.mark.parametrize(("content", "message"), [
    (npy({**GOOD, "shape": (3,)}, bytes(8)), "needs 12 bytes, but has 8"),
    (npy({**GOOD, "shape": (-2,)}, bytes(8)), "bad shape"),
    (npy({**GOOD, "shape": (True, 2)}, bytes(8)), "bad shape"),
    (npy({**GOOD, "shape": [2]}, bytes(8)), "bad shape"),
    (npy({**GOOD, "shape": (2,) + (1,) * 64}, bytes(8)), "axes"),
    (npy({**GOOD, "shape": (1 << 62, 1 << 62)}, bytes(8)), "needs"),
    (npy({**GOOD, "fortran_order": 1}, bytes(8)), "bad header"),
    (npy({**GOOD, "more": 1}, bytes(8)), "bad header"),
    (npy(b"__import__('os')", bytes(8)), "not a Python literal"),
    (npy(b"(" * 5000, bytes(8)), "not a Python literal|bytes, expected"),
    (npy(b"-" * 4000 + b"1", bytes(8)), "not a Python literal|bad header"),
    (npy(b"9" * 4000, bytes(8)), "bad header|literal"),
    (npy(b" " * 70000, bytes(8), 2), "truncated|said"),
    (npy(b"'" + b"a" * 5000 + b"'", bytes(8)), "expected under 4096"),
    (npy(GOOD, bytes(8), 9), "version 9"),
    (npy(GOOD, bytes(8))[:12], "truncated"),
    (b"\x93NUMPY", "magic|truncated"),
    (npy({**GOOD, "descr": "<f3"}, bytes(8)), "no plain number"),
    (npy({**GOOD, "descr": [("a", "<f4")]}, bytes(8)), "no plain number"),
    (npy({**GOOD, "descr": "|O"}, bytes(8)), "pickled Python objects"),
    (npy({**GOOD, "descr": "<M8[s]"}, bytes(16)), "no plain number"),
])  # fmt: skip
def test_bad_npy(tmp_path, content, message):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        lamina.io.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", content)
    with pytest.raises(FileError, match=message):
        lamina.io.load(path)


def test_zip_bombs(tmp_path):
    zeros = io.BytesIO()
    np.save(zeros, np.zeros(1 << 28, "u1"))
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("bomb.npy", zeros.getvalue())
        archive.writestr("small.npy", npy({**GOOD, "shape": (1 << 60,)}))
    with pytest.raises(FileError, match="'small' .*needs"):
        lamina.io.load(tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "y", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("bomb.npy", zeros.getvalue())
    with lamina.io.open(tmp_path / "y") as file:
        assert file["bomb"].shape == (1 << 28,)
        with pytest.raises(FileError, match="would inflate to"):
            file["bomb"].read()


def test_duplicates_and_strangers(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("a.npy", npy(GOOD, bytes(8)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", npy(GOOD, bytes(8)))
    with pytest.raises(FileError, match="twice"):
        lamina.io.load(tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "y", "w") as archive:
        archive.writestr("../../etc/passwd", b"x")
    with pytest.raises(FileError, match="zip file without tensors"):
        lamina.io.load(tmp_path / "y")
    with pytest.raises(FileError, match="cannot be a name"):
        lamina.io.save({"a\0b": np.ones(1)}, tmp_path / "z", format="npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_truncations_and_flips(tmp_path, compressed):
    tensors = {"a": np.arange(20, dtype="f4"), "b": np.ones((2, 2), "i8")}
    path = tmp_path / "x"
    if compressed:
        with open(path, "wb") as file:
            np.savez_compressed(file, **tensors)
    else:
        lamina.io.save({**tensors, "more": [1, (2,)]}, path, format="npz")
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FileError):
            lamina.io.load(path, numpy=True)
    choice = random.Random(0)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << choice.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = lamina.io.load(path, numpy=True, verify=True)
        except FileError:
            continue
        assert set(loaded) >= set(tensors)
        assert all(same(loaded[name], array) for name, array in tensors.items())


def test_plain_pickle_inside(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("w.npy", pickle.dumps([1]))
    with pytest.raises(FileError, match="magic"):
        lamina.io.load(tmp_path / "x")


def test_empty_archive(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        np.savez(file)
    assert lamina.io.load(tmp_path / "x") == {}
