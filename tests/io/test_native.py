"""``save``, ``load`` and ``open`` on nested objects, selections, dtypes and wrong files."""

import gc
import math
import os
import pickle
import warnings

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lamina.io
from lamina._core.errors import FileError, TypeMismatchError
from lamina.io.convert import convert
from lamina.io.tree import flatten


def same(left, right):
    """Equal with exact types, NaN equal to NaN."""
    if isinstance(left, np.ndarray | jax.Array):
        a, b = np.asarray(left), np.asarray(right)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            same(a, b) and same(v, w)
            for (a, v), (b, w) in zip(left.items(), right.items(), strict=True)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float | complex | np.generic):
        return repr(left) == repr(right)
    return left == right


@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_nested(tmp_path, format):
    x = jnp.arange(6.0).reshape(2, 3)
    obj = {
        "model": {"0.weight": x, "0.bias": jnp.zeros(3, jnp.bfloat16)},
        "history": [0.5, math.inf, -math.inf, math.nan, -0.0],
        "deep": ({"a": [x + 1, (x + 2,)]}, None, True, 7, 2**80, -(2**70), "text", b"\0\xff", 1 - 2j),
        "scalars": [np.float32(1.5), np.int64(2**40), ml_dtypes.bfloat16(2), np.bool_(True)],
        3: {"int key": 1, None: 2, 2.5: 3, False: 4},
        "empty": [{}, [], (), "", jnp.zeros((0, 2))],
        "odd": "\ud800 and \0",
    }  # fmt: skip
    lamina.io.save(obj, tmp_path / "x", format=format)
    assert same(lamina.io.load(tmp_path / "x"), obj)
    as_numpy = lamina.io.load(tmp_path / "x", numpy=True)
    assert type(as_numpy["model"]["0.bias"]) is np.ndarray
    assert as_numpy["model"]["0.bias"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("obj", [
    None, 3, "text", [], {}, (), np.ones(2, "f4"), [np.ones(1, "f4")], {"a": None}, {1: np.ones(1, "f4")},
    {"__metadata__": np.ones(1, "f4")}, {"a.b": np.ones(1, "f4"), "a": {"b": np.zeros(1, "f4")}},
    {"\ud800": np.ones(2, "f4")}, {0: np.ones(1, "f4"), "0": np.zeros(1, "f4")}, {"array": 1},
    np.array(2.5, "f4"), {"c": np.ones(2, "c16")}, {"": np.ones(1, "f4")},
    {"a": {"": {"": np.ones(1, "f4")}}, "a.": np.ones(2, "f4")},
])  # fmt: skip
@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_odd_roots_and_keys(tmp_path, obj, format):
    lamina.io.save(obj, tmp_path / "x", format=format)
    assert same(lamina.io.load(tmp_path / "x", numpy=True), obj)


def test_state_dict_is_a_plain_file(tmp_path):
    loader = pytest.importorskip("safetensors.numpy")
    tensors = {"0.weight": jnp.ones((2, 3)), "0.bias": jnp.zeros(3, jnp.int32)}
    lamina.io.save(tensors, tmp_path / "x")
    with lamina.io.open(tmp_path / "x") as file:
        assert set(file.metadata) == {"format", "lamina.crc32"} and file.tree is None
    theirs = loader.load_file(tmp_path / "x")
    assert all(same(theirs[name], array) for name, array in tensors.items())


def test_same_array_is_stored_once(tmp_path):
    x = jnp.arange(100.0)
    n = np.arange(100, dtype="f4")
    obj = {"a": x, "b": {"c": x, "d": (x, x + 0)}, "n": n, "m": n[:], "part": n[1:]}
    lamina.io.save(obj, tmp_path / "x")
    loaded = lamina.io.load(tmp_path / "x")
    assert loaded["a"] is loaded["b"]["c"] is loaded["b"]["d"][0]
    assert loaded["a"] is not loaded["b"]["d"][1]
    assert loaded["n"] is loaded["m"]
    assert same(loaded["part"], n[1:])
    with lamina.io.open(tmp_path / "x") as file:
        assert file.ties == {"b.c": "a", "b.d.0": "a", "m": "n"}
        assert file.nbytes == 3 * 400 + 396


class Module:
    """Something that names its tensors."""

    def __init__(self):
        self.weight = jnp.ones((3, 2))

    def __lamina_tensors__(self):
        tensors = {"0.weight": self.weight, "1.steps": jnp.asarray(5), "2.weight": self.weight}
        return tensors, {"2.weight": "0.weight"}, {"1.steps": np.dtype(np.int64)}


def test_modules_name_their_tensors(tmp_path):
    lamina.io.save(Module(), tmp_path / "x")
    with lamina.io.open(tmp_path / "x") as file:
        assert list(file) == ["0.weight", "1.steps", "2.weight"]
        assert file["1.steps"].dtype == np.int64 and file.ties == {"2.weight": "0.weight"}
        assert file.tree is None
    lamina.io.save({"net": Module(), "step": 3}, tmp_path / "y")
    loaded = lamina.io.load(tmp_path / "y", numpy=True)
    assert loaded["step"] == 3
    assert list(loaded["net"]) == ["0.weight", "1.steps", "2.weight"]
    with lamina.io.open(tmp_path / "y") as file:
        assert "net.2.weight" in file


def test_random_keys(tmp_path):
    obj = {"one": jax.random.key(3), "many": jax.random.split(jax.random.key(0, impl="rbg"), 4)}
    lamina.io.save(obj, tmp_path / "x")
    loaded = lamina.io.load(tmp_path / "x")
    assert loaded["many"].dtype == obj["many"].dtype and loaded["many"].shape == (4,)
    assert jax.random.bits(loaded["one"]) == jax.random.bits(obj["one"])
    assert lamina.io.load(tmp_path / "x", numpy=True)["one"].dtype == np.uint32


def test_64_bits(tmp_path):
    obj = {"w": np.ones(2), "n": np.array([3]), "f": np.ones(2, "f4"), "count": np.array(3)}
    lamina.io.save(obj, tmp_path / "x")
    with pytest.warns(UserWarning, match=r"'w' \(float64 -> float32\), 'n' \(int64") as caught:
        loaded = lamina.io.load(tmp_path / "x")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "count" not in str(caught[0].message)  # a single integer keeps its value
    assert loaded["w"].dtype == np.float32 and loaded["n"].dtype == np.int32
    assert loaded["count"].dtype == np.int32
    assert lamina.io.load(tmp_path / "x", numpy=True)["w"].dtype == np.float64
    assert lamina.io.load(tmp_path / "x", names="f")["f"].dtype == np.float32
    with jax.enable_x64(True):
        assert lamina.io.load(tmp_path / "x")["w"].dtype == np.float64
    lamina.io.save({"ids": np.array([2**40])}, tmp_path / "y")
    with pytest.raises(FileError, match=r"'ids' has int64 values.*do not fit int32"):
        lamina.io.load(tmp_path / "y")


def test_dtype_casts_floats_only(tmp_path):
    obj = {
        "w": np.linspace(-3, 3, 50),
        "i": np.arange(3, dtype="i4"),
        "h": np.ones(2, "f2"),
        "s": 1.5,
    }
    lamina.io.save(obj, tmp_path / "x")
    loaded = lamina.io.load(tmp_path / "x", dtype=jnp.bfloat16)
    assert loaded["w"].dtype == loaded["h"].dtype == jnp.bfloat16
    assert loaded["i"].dtype == np.int32 and loaded["s"] == 1.5
    np.testing.assert_array_equal(np.asarray(loaded["w"]), obj["w"].astype(ml_dtypes.bfloat16))
    assert lamina.io.load(tmp_path / "x", dtype="float64", numpy=True)["h"].dtype == np.float64


def test_names(tmp_path):
    lamina.io.save(
        {f"layer{i}.{n}": np.full(2, i, "f4") for i in range(3) for n in "wb"}, tmp_path / "x"
    )
    load = lambda names: list(lamina.io.load(tmp_path / "x", names=names))  # noqa: E731
    assert load("layer1.*") == ["layer1.w", "layer1.b"]
    assert load(["*.b", "layer0.w"]) == ["layer0.w", "layer0.b", "layer1.b", "layer2.b"]
    with pytest.raises(FileError, match=r"no tensor matches 'layer1.bb'\. Did you mean 'layer1.b'"):
        load("layer1.bb")
    lamina.io.save({"model": {"w": np.ones(1, "f4")}, "step": 3}, tmp_path / "y")
    assert list(lamina.io.load(tmp_path / "y", names="model.*")) == ["model.w"]
    with lamina.io.open(tmp_path / "y") as file, pytest.raises(KeyError, match="Did you mean"):
        file["model.v"]


def test_numpy_arrays_are_views_or_writable_copies(tmp_path):
    lamina.io.save({"w": np.ones(50000, "f4")}, tmp_path / "x")
    view = lamina.io.load(tmp_path / "x", numpy=True)["w"]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 2
    copied = lamina.io.load(tmp_path / "x", numpy=True, copy=True)["w"]
    copied[0] = 2
    assert view[0] == 1


def test_donation_never_writes_to_the_file(tmp_path):
    path = tmp_path / "x"
    lamina.io.save({"w": jnp.ones((256, 64))}, path)
    before = path.read_bytes()
    loaded = lamina.io.load(path)
    step = jax.jit(lambda w: w * 2 + 1, donate_argnums=0)
    w = loaded["w"]
    for _ in range(3):
        w = step(w)
    assert float(w[0, 0]) == 15 and path.read_bytes() == before


def test_saving_over_the_file_a_model_is_mapped_from(tmp_path):
    path = tmp_path / "x"
    lamina.io.save({"w": jnp.arange(50000.0)}, path)
    for turn in range(3):
        loaded = lamina.io.load(path)
        lamina.io.save({"w": loaded["w"] + 1, "old": loaded["w"]}, path)
        assert float(loaded["w"][1]) == turn + 1
    assert float(lamina.io.load(path)["w"][0]) == 3


def test_no_descriptors_or_mappings_are_left(tmp_path):
    path = tmp_path / "x"
    lamina.io.save({"w": jnp.arange(50000.0), "v": jnp.ones(3)}, path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        lamina.io.load(path)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()


WRONG_FILES = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
    "html": (b"\n <!DOCTYPE html><html>404</html>", "web page"),
    "upper html": (b"<HTML><body>", "web page"),
    "json error": (b'{"error": "Repository not found"}', "error message of a server"),
    "other json": (b'{"hidden_size": 3}', "JSON file"),
    "empty": (b"", "is empty"),
    "zeros": (bytes(4096), "nothing but zeros"),
    "pickle": (pickle.dumps({"a": 1}), "plain pickle"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(20), "gzip"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "h5py"),
    "text": (b"hello there, this is text", "no kind"),
    "cut zip": (b"PK\x03\x04" + bytes(100), "cut off"),
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_wrong_files(tmp_path, what):
    content, message = WRONG_FILES[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        lamina.io.load(path)
    assert str(path) in str(caught.value)


def test_wrong_places(tmp_path):
    with pytest.raises(FileNotFoundError):
        lamina.io.load(tmp_path / "none")
    with pytest.raises(FileError, match="directory without a checkpoint"):
        lamina.io.load(tmp_path)
    with pytest.raises(FileError, match="not a regular file"):
        lamina.io.load("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="not a regular file"):
        lamina.io.load(tmp_path / "pipe")


def test_extension_does_not_matter(tmp_path):
    for name, format in [("x.pt", "safetensors"), ("x.npz", "safetensors"), ("x.bin", "npz")]:
        lamina.io.save({"w": np.ones(2, "f4")}, tmp_path / name, format=format)
        with lamina.io.open(tmp_path / name) as file:
            assert file.kind == format
    with pytest.raises(ValueError, match="unknown format 'safetensor'"):
        lamina.io.save({}, tmp_path / "y", format="safetensor")


def test_things_that_are_no_data(tmp_path):
    import collections

    point = collections.namedtuple("point", "x y")
    loop = []
    loop.append(loop)
    deleted = jnp.ones(3)
    deleted.delete()
    for obj, message in [
        ({"a": [object()]}, r"a\.0: cannot save an object of type builtins\.object"),
        ({"opt": {"s": point(1, 2)}}, r"opt\.s: .*_asdict"),
        ({"a": loop}, "contains itself"),
        ({"a": {1}}, "builtins.set"),
        ({(1, 2): 3}, "dict key of type tuple"),
        ({"a": np.array(["x"])}, "a: .*dtype"),
        ({"a": np.array([object()])}, "a: .*dtype object"),
        ({"a": np.zeros(2, np.longdouble)}, "a: .*longdouble|float128"),
        ({"a": np.zeros(2, "i4,f4")}, "a: "),
        ({"a": deleted}, "a: the array was deleted"),
        ({"a": print}, "builtin"),
        ({"a": np.float32}, "type"),
    ]:
        with pytest.raises(TypeMismatchError, match=message):
            lamina.io.save(obj, tmp_path / "x")
    with pytest.raises(TypeMismatchError, match="w: cannot save a traced value"):
        jax.jit(lambda x: lamina.io.save({"w": x}, tmp_path / "x"))(jnp.ones(2))
    assert not list(tmp_path.iterdir())


def test_metadata(tmp_path):
    lamina.io.save({"w": np.ones(1, "f4")}, tmp_path / "x", metadata={"author": "me"})
    with lamina.io.open(tmp_path / "x") as file:
        assert file.metadata["author"] == "me" and file.metadata["format"] == "pt"
    for bad in ({"author": "w"}, {"lamina": "x"}, {"n": 3}):
        with pytest.raises(FileError, match="metadata"):
            lamina.io.save({"w": np.ones(1, "f4")}, tmp_path / "y", metadata=bad)


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.binary(max_size=5) | st.complex_numbers()
)  # fmt: skip
dtypes = st.sampled_from(
    ["f2", "f4", "f8", "c8", "c16", "i1", "i8", "u2", "u8", "?"]
) | st.sampled_from(
    [ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e3m4, ml_dtypes.int4]
)


@st.composite
def arrays(draw):
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    raw = np.frombuffer(draw(st.binary(min_size=64, max_size=64)), np.uint8)
    values = np.resize(raw % 8, shape)
    array = values.astype(np.dtype(draw(dtypes)))
    return array.T if draw(st.booleans()) else array


objects = st.recursive(
    scalars | arrays(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(-9, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(objects, st.sampled_from(["safetensors", "npz"]))
def test_round_trip(tmp_path_factory, obj, format):
    path = tmp_path_factory.getbasetemp() / "round-trip"
    lamina.io.save(obj, path, format=format, sync=False)
    assert same(lamina.io.load(path, numpy=True), obj)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lamina.io.load(path)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["array", "dict", "pairs", "tuple", "int", "float", "complex", "bytes",
                         "scalar", "tree", "version", "dtypes", "prng", "w"]), inner, max_size=2),
    max_leaves=10,
))  # fmt: skip
def test_hostile_descriptions(tmp_path_factory, tree):
    import json

    from lamina.io.safetensors import write_safetensors

    path = tmp_path_factory.getbasetemp() / "hostile"
    for text in (
        tree,
        {"version": 1, "tree": tree},
        {"version": 1, "dtypes": tree},
        {"version": 1, "prng": tree},
    ):
        write_safetensors(
            {"w": np.ones(2, "f4")}, path, metadata={"lamina": json.dumps(text)}, sync=False
        )
        try:
            lamina.io.load(path)
        except FileError as error:
            assert len(str(error)) < 2000  # noqa: PT017


def test_deep_description(tmp_path):
    from lamina.io.safetensors import write_safetensors

    for text in ('{"version":1,"tree":' + "[" * 150 + "]" * 150 + "}", '{"tuple":' * 100_000):
        write_safetensors({}, tmp_path / "x", metadata={"lamina": text})
        with pytest.raises(FileError, match="nested|damaged|JSON"):
            lamina.io.load(tmp_path / "x")


def test_deep_object(tmp_path):
    obj = np.ones(1, "f4")
    for _ in range(90):
        obj = {"a": (obj,)} if _ % 3 == 0 else [obj]
    obj_small = obj
    lamina.io.save([[[[np.ones(1, "f4")]]]], tmp_path / "x")
    with pytest.raises(TypeMismatchError, match="nested more than 100 deep"):
        lamina.io.save(obj_small, tmp_path / "x")


def test_flatten_describes_only_what_is_needed():
    keep = lambda dtype: True  # noqa: E731
    assert flatten({"a": np.ones(1), "b.c": np.ones(1)}, keep).description == ""
    assert flatten({}, keep).description == ""
    assert flatten([np.ones(1)], keep).description != ""


@pytest.mark.parametrize(
    "how", [{}, {"max_shard_size": 300_000}, {"format": "npz"}, {"format": "torch"}]
)
def test_progress_of_a_save_and_a_check(tmp_path, how):
    tensors = {"a": np.ones(100_000, "f4"), "b": np.ones((500, 300)).T, "c": np.ones(3, "f4")}
    size = sum(array.nbytes for array in tensors.values())
    told = []
    lamina.io.save(tensors, tmp_path / "x", progress=told.append, **how)
    assert len(told) > 1 and size <= sum(told) < size + 5000  # a zip file's own words count as well
    told.clear()
    with lamina.io.open(tmp_path / ("x.index.json" if "max_shard_size" in how else "x")) as file:
        count = file.verify(told.append)
    assert count >= 3 and size <= sum(told) < size + 5000


def test_progress_of_a_conversion(tmp_path):
    tensors = {"a": np.ones(100_000, "f4"), "b": np.ones((500, 300)).T, "n": np.arange(9)}
    lamina.io.save(tensors, tmp_path / "x")
    told = []
    with lamina.io.open(tmp_path / "x") as file:
        convert(file, tmp_path / "y", dtype="bfloat16", progress=lambda *pair: told.append(pair))
    done, totals = zip(*told, strict=True)
    cast = 400_000 + 1_200_000
    assert set(totals) == {cast + 200_000 + 300_000 + 72}  # read and cast, then written
    assert list(done) == sorted(done) and done[-1] == totals[-1]
