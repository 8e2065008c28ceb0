"""Exported programs run without the model's code, give the same numbers, and are checked on load."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
import lamina.io
from lamina import demo, nn
from lamina._core.errors import (
    DeferredError,
    FileError,
    ForeignTransformError,
    LaminaError,
    TypeMismatchError,
)
from lamina.interchange import export, export_onnx, load_exported

SOURCE = str(Path(lamina.io.__file__).parents[2])
IMAGES = jax.ShapeDtypeStruct((4, 1, 8, 8), jnp.float32)


def images(count=4):
    return np.random.default_rng(0).random((count, 1, 8, 8), np.float32)


def symbolic(text, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(text), dtype)


def test_without_a_file():
    net = demo.mlp()
    program = export(net, IMAGES)
    np.testing.assert_allclose(program(images()), net.eval()(images()), rtol=1e-6)
    assert program.in_specs == (IMAGES,)
    assert program.out_specs == jax.ShapeDtypeStruct((4, 10), jnp.float32)
    assert program.platforms == ("cpu",)
    assert repr(program) == (
        "ExportedModule((float32[4,1,8,8],) -> float32[4,10], 8 weights of 52520 bytes, for cpu)"
    )


def test_the_weights_are_arguments():
    net = nn.Linear(3, 2)
    program = export(net, jnp.ones((1, 3)))
    program.weights = {name: jnp.zeros_like(w) for name, w in program.weights.items()}
    np.testing.assert_array_equal(program(jnp.ones((1, 3))), np.zeros((1, 2)))
    assert jax.jit(lambda x: program(x) + 1)(jnp.ones((1, 3))).shape == (1, 2)


def test_the_mode_is_put_back():
    net = demo.conv_net()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    export(net, IMAGES)
    assert [module.training for module in net.modules()] == modes


def test_training_mode_cannot_lose_state():
    with pytest.raises(ForeignTransformError, match="random state|running_mean"):
        export(demo.conv_net(), IMAGES, train=True)
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    assert export(net, jnp.ones((1, 3)), train=True)(jnp.ones((1, 3))).shape == (1, 2)


def test_sizes_that_nobody_knows():
    class Unused(nn.Module):
        def __init__(self):
            self.used = nn.LazyLinear(2)
            self.unused = nn.LazyLinear(2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(DeferredError, match=r"unused\.weight"):
        export(Unused(), jnp.ones((1, 3)))
    with pytest.raises(TypeError, match="expected a module, got function"):
        export(lambda x: x, jnp.ones(3))


def test_wrong_arguments():
    program = export(nn.Linear(3, 2), jnp.ones((4, 3)))
    with pytest.raises(TypeMismatchError, match=r"float32\[4,3\].*float32\[5,3\]"):
        program(jnp.ones((5, 3)))
    with pytest.raises(TypeMismatchError, match="expected arguments"):
        program(jnp.ones((4, 3)), 1)


class TestFiles:
    """They need flatbuffers, which JAX serialises programs with."""

    @pytest.fixture(autouse=True)
    def needs(self):
        pytest.importorskip("flatbuffers")

    def test_in_a_process_without_the_model(self, tmp_path):
        net = demo.conv_net()
        path = tmp_path / "net.safetensors"
        export(net, symbolic("batch, 1, 8, 8"), path=path)
        np.save(tmp_path / "in.npy", images(3))
        code = (
            "import sys, numpy as np\n"
            "from lamina.interchange import load_exported\n"
            "program = load_exported(sys.argv[1] + '/net.safetensors')\n"
            "np.save(sys.argv[1] + '/out.npy', program(np.load(sys.argv[1] + '/in.npy')))\n"
            "assert 'lamina.demo' not in sys.modules\n"
            "print(program.in_specs[0].shape, program.out_specs.shape)\n"
        )
        path = os.pathsep.join([SOURCE, os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}
        out = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout == "(batch, 1, 8, 8) (batch, 10)\n"
        np.testing.assert_allclose(
            np.load(tmp_path / "out.npy"), net.eval()(images(3)), rtol=1e-5, atol=1e-6
        )

    def test_the_weights_are_ordinary_tensors(self, tmp_path):
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        net[1].weight = net[0].weight
        path = tmp_path / "net.safetensors"
        export(net, jnp.ones((1, 2)), path=path)
        loaded = lamina.io.load(path)
        assert set(loaded) == {*net.state_dict(), "__program__"}
        fresh = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        fresh.load_state_dict(loaded, strict=False)
        np.testing.assert_array_equal(fresh[1].weight, net[0].weight)
        program = load_exported(path)
        assert list(program.weights) == ["0.weight", "0.bias", "1.bias"]
        assert program.ties == {"1.weight": "0.weight"}
        program.save(tmp_path / "again.safetensors")
        again = load_exported(tmp_path / "again.safetensors")
        np.testing.assert_array_equal(again(jnp.ones((1, 2))), program(jnp.ones((1, 2))))

    def test_dtypes_structures_and_hidden_buffers(self, tmp_path):
        class Odd(nn.Module):
            def __init__(self):
                self.scale = nn.Parameter(jnp.full(3, 2, jnp.bfloat16))
                self.register_buffer("table", jnp.arange(3), persistent=False)

            def forward(self, inputs, both):
                return {"a": inputs["x"] * self.scale.data, "b": [both[0] + self.table]}

        x = {"x": jnp.ones(3, jnp.bfloat16)}
        path = tmp_path / "odd"
        export(Odd(), x, (jnp.arange(3),), path=path)
        program = load_exported(path)
        assert list(program.weights) == ["scale", "table"]
        out = program(x, (jnp.arange(3),))
        assert out["a"].dtype == jnp.bfloat16 and out["b"][0].tolist() == [0, 2, 4]
        assert program.in_specs[0]["x"].dtype == jnp.bfloat16

    def test_other_platforms(self, tmp_path):
        path = tmp_path / "net"
        export(nn.Linear(3, 2), jnp.ones((1, 3)), path=path, platforms=["cpu", "cuda", "tpu"])
        program = load_exported(path)
        assert program.platforms == ("cpu", "cuda", "tpu")
        assert program(jnp.ones((1, 3))).shape == (1, 2)

    def test_classes_that_a_file_cannot_name(self, tmp_path):
        class Own(dict):
            pass

        jax.tree_util.register_pytree_node(
            Own, lambda d: (tuple(d.values()), tuple(d)), lambda k, v: Own(zip(k, v, strict=True))
        )

        class Net(nn.Module):
            def forward(self, x):
                return Own(out=x)

        with pytest.raises(TypeMismatchError, match="lists, tuples and dicts"):
            export(Net(), jnp.ones(2), path=tmp_path / "net")
        assert os.listdir(tmp_path) == []

    def test_not_an_exported_module(self, tmp_path):
        lamina.io.save(nn.Linear(2, 2), tmp_path / "net")
        with pytest.raises(FileError, match="holds no exported module"):
            load_exported(tmp_path / "net")
        with pytest.raises(FileNotFoundError):
            load_exported(tmp_path / "none")

    def test_damaged(self, tmp_path):
        path = tmp_path / "net"
        export(nn.Linear(3, 2), jnp.ones((1, 3)), path=path)
        whole = path.read_bytes()
        rng = np.random.default_rng(0)
        for place in rng.integers(8, len(whole), 60):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with contextlib.suppress(FileError):  # bits of the description may not matter
                load_exported(path)
        for size in rng.integers(0, len(whole), 10):
            path.write_bytes(whole[:size])
            with pytest.raises(FileError, match="net"):
                load_exported(path)

    def resave(self, path, **changes):
        """Write the file again with other parts, and right checksums."""
        with lamina.io.open(path) as file:
            tensors = {name: handle.read() for name, handle in file.items()}
            description = json.loads(file.metadata["exported"])
        for name, value in changes.items():
            if name == "program":
                tensors["__program__"] = value
            else:
                description[name] = value
        lamina.io.save(
            {name: np.array(value) for name, value in tensors.items()},
            path,
            metadata={"exported": json.dumps(description)},
        )

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"version": 2}, "not of version 1"),
            ({"weights": "all"}, "malformed"),
            ({"weights": ["weight", "else"]}, "are missing"),
            ({"weights": ["weight"]}, "do not fit"),
            ({"weights": ["bias", "weight"]}, "other shapes or dtypes"),
            ({"program": np.arange(40, dtype=np.uint8)}, "can't be read by JAX"),
            ({"program": np.zeros(0, np.uint8)}, "can't be read by JAX"),
        ],
    )
    def test_hostile(self, tmp_path, changes, reason):
        path = tmp_path / "net"
        export(nn.Linear(3, 2), jnp.ones((1, 3)), path=path)
        self.resave(path, **changes)
        with pytest.raises(FileError, match=reason):
            load_exported(path)

    def test_programs_that_call_python_are_refused(self, tmp_path):
        path = tmp_path / "net"
        export(nn.Linear(3, 2), jnp.ones((1, 3)), path=path)

        def call_back(weights, x):
            out = jax.ShapeDtypeStruct((1, 2), jnp.float32)
            return jax.ffi.ffi_call("xla_ffi_python_cpu_callback", out)(x, index=np.uint64(1))

        check = jax.export.DisabledSafetyCheck.custom_call("xla_ffi_python_cpu_callback")
        exported = jax.export.export(jax.jit(call_back), disabled_checks=[check])(
            [jnp.ones((2, 3)), jnp.ones(2)], jnp.ones((1, 3))
        )
        self.resave(path, program=np.frombuffer(exported.serialize(), np.uint8))
        with pytest.raises(FileError, match="calls back into Python"):
            load_exported(path)


def test_files_without_flatbuffers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for name in [name for name in sys.modules if name.startswith("jax._src.export.serialization")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(LaminaError, match="pip install flatbuffers"):
        export(nn.Linear(3, 2), jnp.ones((1, 3)), path=tmp_path / "net")


def test_onnx_without_jax2onnx(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(LaminaError, match=r'pip install "lamina\[onnx\]"'):
        export_onnx(nn.Linear(3, 2), jnp.ones((1, 3)))


@pytest.mark.filterwarnings("ignore")
class TestOnnx:
    @pytest.fixture(autouse=True)
    def needs(self):
        pytest.importorskip("jax2onnx")
        pytest.importorskip("onnxruntime")

    @pytest.mark.parametrize("make", [demo.mlp, demo.conv_net])
    @pytest.mark.parametrize("batch", ["4", "batch"])
    def test_same_numbers(self, tmp_path, make, batch):
        import onnxruntime

        net = make()
        path = tmp_path / "net.onnx"
        export_onnx(net, symbolic(f"{batch}, 1, 8, 8"), path=path)
        session = onnxruntime.InferenceSession(path)
        (input,) = session.get_inputs()
        assert input.name == "input" and input.shape == [4 if batch == "4" else "batch", 1, 8, 8]
        (out,) = session.run(None, {"input": images()})
        np.testing.assert_allclose(out, net.eval()(images()), rtol=1e-5, atol=1e-6)

    def test_arguments_are_arrays(self):
        with pytest.raises(TypeMismatchError, match="are arrays"):
            export_onnx(nn.Linear(3, 2), {"x": jnp.ones((1, 3))})
