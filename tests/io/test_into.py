"""Files into models: everything checked first, all or nothing, straight into place."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
import lamina.io
from lamina import nn
from lamina._core.errors import FileError, LoadError, RuleError
from lamina.io.into import load_into

RANDOM = np.random.default_rng(0)


def normal(*shape, dtype="f4"):
    return RANDOM.standard_normal(shape).astype(dtype)


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def mlp_state(dtype="f4"):
    return {
        "0.weight": normal(4, 3, dtype=dtype), "0.bias": normal(4, dtype=dtype),
        "2.weight": normal(2, 4, dtype=dtype), "2.bias": normal(2, dtype=dtype),
    }  # fmt: skip


class Tied(nn.Module):
    def __init__(self):
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def values(net):
    return {name: np.asarray(value) for name, value in net.state_dict().items()}


def same(net, state):
    found = values(net)
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], np.asarray(value))


@pytest.mark.parametrize("format", ["safetensors", "npz", "torch"])
def test_every_format(tmp_path, format):
    state = mlp_state()
    lamina.io.save(state, tmp_path / "x", format=format)
    net = mlp()
    report = load_into(net, tmp_path / "x")
    same(net, state)
    assert report.loaded == list(state) and not (report.missing or report.unexpected)
    assert report.source == str(tmp_path / "x") and "loaded 4 tensors into Sequential" in str(
        report
    )
    with lamina.io.open(tmp_path / "x") as file:
        same_net = mlp()
        load_into(same_net, file)
    same(same_net, state)
    mapped = mlp()
    load_into(mapped, state)
    same(mapped, state)


def test_sharded_file(tmp_path):
    state = mlp_state()
    lamina.io.save(state, tmp_path / "m.safetensors", max_shard_size=50)
    net = mlp()
    load_into(net, tmp_path)
    same(net, state)


@pytest.mark.parity
def test_files_of_torch(tmp_path, torch):
    def build(nn):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))

    theirs = build(torch.nn).eval()
    theirs[1].running_mean.uniform_()
    x = torch.randn(2, 3, 4, 4)
    expected = theirs(x).detach().numpy()
    safetensors = pytest.importorskip("safetensors.torch")
    torch.save(theirs.state_dict(), tmp_path / "state.pt")
    torch.save(theirs.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(theirs, tmp_path / "whole.pt")
    safetensors.save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    for path in ("state.pt", "old.pt", "whole.pt", "x.safetensors", None):
        ours = build(nn).eval()
        report = load_into(ours, theirs.state_dict() if path is None else tmp_path / path)
        assert len(report.loaded) == 9 and not report.cast
        np.testing.assert_allclose(ours(jnp.asarray(x.numpy())), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parity
def test_lightning_like_file(tmp_path, torch):
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(theirs.parameters())
    theirs(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "epoch": 3,
            "state_dict": {f"model.{k}": v for k, v in theirs.state_dict().items()},
            "optimizer_states": [optimizer.state_dict()],
        },
        tmp_path / "x.ckpt",
    )
    with pytest.raises(LoadError, match=r"4 names fit without .*prefix='state_dict.model.'"):
        load_into(mlp(), tmp_path / "x.ckpt")
    net = mlp()
    report = load_into(net, tmp_path / "x.ckpt", prefix="state_dict.model")
    assert report.prefix == "state_dict.model." and report.beside == 12
    same(net, {k: v.numpy() for k, v in theirs.state_dict().items()})


def test_nothing_random_is_made(tmp_path):
    def never(key, shape, dtype):
        raise AssertionError("a random value was made")

    net = mlp()
    nn.init.rules(net, {"*": never})
    load_into(net, mlp_state())
    assert net[0].weight.is_material


def test_unknown_sizes_come_from_the_file():
    net = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    state = mlp_state()
    load_into(net, state)
    assert net[0].weight.shape == (4, 3) and net(jnp.ones((5, 3))).shape == (5, 2)
    with pytest.raises(LoadError, match=r"0.weight: expected shape \(4, \?\), got \(5, 3\)"):
        load_into(nn.Sequential(nn.LazyLinear(4)), {"0.weight": normal(5, 3), "0.bias": normal(4)})


def test_buffers_that_are_not_saved_come_from_their_recipes():
    class Rotary(nn.Module):
        def __init__(self):
            self.weight = nn.Parameter(shape=(2,))
            self.table = nn.Buffer(
                shape=(3,), persistent=False, init=lambda key, shape, dtype: jnp.arange(3.0)
            )

    net = Rotary()
    load_into(net, {"weight": normal(2)})
    assert list(net.table) == [0, 1, 2]
    with pytest.raises(LoadError, match=r"unexpected: table \(a buffer that is not saved"):
        load_into(Rotary(), {"weight": normal(2), "table": normal(3)})


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Conv2d(2, 5, 3))
    before = {name: normal(*box.shape) for name, box in net.named_parameters()}
    net.load_state_dict(before)
    state = {
        "0.wieght": normal(4, 3), "0.bias": normal(4, dtype=jnp.bfloat16),
        "1.weight": normal(4, 2), "1.bias": normal(3),
        "2.weight": normal(3, 3, 2, 5), "2.bias": normal(5),
    }  # fmt: skip
    lamina.io.save(state, tmp_path / "x")
    with pytest.raises(LoadError) as caught:
        load_into(net, tmp_path / "x")
    message = str(caught.value)
    for text in (
        "x does not fit Sequential; nothing was loaded",
        "missing: 0.weight Did you mean '0.wieght'?",
        "unexpected: 0.wieght Did you mean '0.weight'?",
        "0.bias: expected dtype float32, got bfloat16; pass dtype='model'",
        "1.weight: expected shape (2, 4), got (4, 2); it fits transposed: value.T",
        "1.bias: expected shape (2,), got (3,)",
        "2.weight: expected shape (5, 2, 3, 3), got (3, 3, 2, 5); it fits transposed: "
        "value.transpose(3, 2, 0, 1)",
        "strict=False",
    ):
        assert text in message
    same(net, before)


def test_error_in_the_middle_leaves_the_model(tmp_path, monkeypatch):
    state = mlp_state()
    state["0.bias"] = state["0.bias"].astype("f8")  # is read piece by piece
    lamina.io.save(state, tmp_path / "x")
    net = mlp()
    before = mlp_state()
    net.load_state_dict(before)
    with lamina.io.open(tmp_path / "x") as file:
        with open(tmp_path / "x", "r+b") as raw:
            raw.truncate(raw.seek(0, 2) - 8)
        with pytest.raises(FileError, match="truncated"):
            load_into(net, file)
    same(net, before)
    with pytest.raises(FileError):
        load_into(net, tmp_path / "x")


def test_not_strict():
    net = mlp()
    report = load_into(net, {"0.weight": normal(4, 3), "extra": normal(1)}, strict=False)
    assert report.loaded == ["0.weight"] and report.unexpected == ["extra"]
    assert report.missing == ["0.bias", "2.weight", "2.bias"]
    assert "missing (3): 0.bias" in str(report)
    with pytest.raises(LoadError, match="1.weight|expected shape"):
        load_into(net, {"0.weight": normal(4, 4)}, strict=False)
    with pytest.raises(LoadError, match="none of the 1 names belongs"):
        load_into(net, {"0.wait": normal(4, 4)}, strict=False)
    with pytest.raises(LoadError, match="none of the 0 names"):
        load_into(net, {}, strict=False)


def test_dtypes(tmp_path):
    state = mlp_state(jnp.bfloat16)
    lamina.io.save(state, tmp_path / "x")
    with pytest.raises(LoadError, match="expected dtype float32, got bfloat16"):
        load_into(mlp(), tmp_path / "x")
    net = mlp()
    report = load_into(net, tmp_path / "x", dtype="model")
    assert net[0].weight.dtype == jnp.float32 and report.cast["0.bias"] == ("bfloat16", "float32")
    for net in (mlp(), lamina.materialize(mlp())):
        load_into(net, tmp_path / "x", dtype="file")
        assert net[2].bias.dtype == jnp.bfloat16
        same(net, state)
        load_into(net, tmp_path / "x", dtype="float16")
        assert net[2].bias.dtype == jnp.float16
    with pytest.raises(ValueError, match="'model', 'file' or a floating"):
        load_into(mlp(), state, dtype="flaot16")
    with pytest.raises(ValueError, match="'model', 'file' or a floating"):
        load_into(mlp(), state, dtype="int8")


def test_counters_keep_64_bits_in_name(tmp_path):
    net = nn.BatchNorm1d(2)
    state = {"weight": normal(2), "bias": normal(2), "running_mean": normal(2),
             "running_var": normal(2), "num_batches_tracked": np.int64(7)}  # fmt: skip
    lamina.io.save({k: np.asarray(v) for k, v in state.items()}, tmp_path / "x")
    for dtype in (None, "model", "file", "bfloat16"):
        net = nn.BatchNorm1d(2)
        load_into(net, tmp_path / "x", dtype=dtype)
        assert int(net.num_batches_tracked) == 7
        lamina.io.save(net, tmp_path / "y")
        with lamina.io.open(tmp_path / "y") as file:
            assert file["num_batches_tracked"].dtype == np.int64
            assert file["weight"].dtype == ("bfloat16" if dtype == "bfloat16" else "f4")
    state["num_batches_tracked"] = np.asarray(2**40)
    with pytest.raises(LoadError, match="do not fit int32"):
        load_into(nn.BatchNorm1d(2), state)


def test_casts_that_lose_meaning():
    class Counter(nn.Module):
        def __init__(self):
            self.count = nn.Buffer(jnp.asarray(0, "int32"))

    with pytest.raises(LoadError, match="a float32 does not become a int32"):
        load_into(Counter(), {"count": np.float32(1.5)}, dtype="model")
    net = Counter()
    load_into(net, {"count": np.asarray(3, "u1")}, dtype="model")
    assert int(net.count) == 3 and net.count.dtype == jnp.int32


def test_old_batch_norm_without_counter():
    net = nn.Sequential(nn.BatchNorm1d(2))
    state = {f"0.{k}": normal(2) for k in ("weight", "bias", "running_mean", "running_var")}
    for _ in range(2):
        report = load_into(net, state)
        assert not report.missing and int(net[0].num_batches_tracked) == 0
    assert net(jnp.ones((3, 2))).shape == (3, 2)


def test_modules_that_translate_older_names():
    class Renamed(nn.Module):
        def __init__(self):
            self.new = nn.Parameter(shape=(2,))

        def _load_from_state_dict(self, state_dict, prefix, *args):
            if prefix + "old" in state_dict:
                state_dict[prefix + "new"] = state_dict.pop(prefix + "old")
            super()._load_from_state_dict(state_dict, prefix, *args)

    net = nn.Sequential(Renamed(), nn.Linear(2, 2))
    other = {"1.weight": normal(2, 2), "1.bias": normal(2)}
    for _ in range(2):
        report = load_into(net, {"0.old": np.ones(2, "f4"), **other})
        assert list(net[0].new) == [1, 1] and not report.missing and not report.unexpected
    with pytest.raises(LoadError, match=r"missing: 0.new(?s:.)*unexpected: 0.older"):
        load_into(net, {"0.older": np.ones(2, "f4"), **other})
    with pytest.raises(LoadError, match="expected shape"):
        load_into(net, {"0.old": np.ones(3, "f4"), **other})
    assert list(net[0].new) == [1, 1]


def test_extra_state(tmp_path):
    class Extra(nn.Module):
        def __init__(self):
            self.weight = nn.Parameter(shape=(2,))
            self.seen = 0

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    net = nn.Sequential(Extra())
    net[0].seen = 5
    load_into(net, {"0.weight": normal(2), "0._extra_state": {"seen": 9}})
    assert net[0].seen == 9
    with pytest.raises(LoadError, match="missing: 0._extra_state"):
        load_into(net, {"0.weight": normal(2)})


@pytest.mark.parametrize(
    "names", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]]
)
def test_ties_under_any_name(tmp_path, names):
    value = normal(5, 3)
    lamina.io.save(dict.fromkeys(names, value), tmp_path / "x")
    net = Tied()
    report = load_into(net, tmp_path / "x")
    assert report.loaded == ["embed.weight"] and report.ties == {"head.weight": "embed.weight"}
    assert net.head.weight is net.embed.weight
    np.testing.assert_array_equal(net.head.weight.data, value)


def test_ties_with_two_values():
    value = normal(5, 3)
    load_into(Tied(), {"embed.weight": value, "head.weight": value.copy()})
    with pytest.raises(LoadError, match="embed.weight: tied to head.weight, but .* two different"):
        load_into(Tied(), {"embed.weight": value, "head.weight": value + 1})
    with pytest.raises(LoadError, match="two different"):
        load_into(Tied(), {"embed.weight": value, "head.weight": value.astype("f8")})


def test_one_tensor_into_two_parameters(tmp_path):
    value = normal(2, 2)
    lamina.io.save({"0.weight": value, "1.weight": value}, tmp_path / "x")
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    load_into(net, tmp_path / "x")

    @lamina.jit
    def step(net):
        net[0].weight += 1.0

    step(net)
    np.testing.assert_array_equal(net[1].weight.data, value)


@pytest.mark.parametrize(
    ("before", "wrappers"),
    [
        ("module.{}", ("module.",)),
        ("_orig_mod.{}", ("_orig_mod.",)),
        ("module._orig_mod.{}", ("module.", "_orig_mod.")),
        ("_fsdp_wrapped_module.{}", ("_fsdp_wrapped_module.",)),
    ],
)
def test_wrappers(before, wrappers):
    state = mlp_state()
    net = mlp()
    report = load_into(net, {before.format(name): value for name, value in state.items()})
    same(net, state)
    assert report.wrappers == wrappers and not report.renamed


def test_wrapper_in_the_middle_and_a_module_of_that_name():
    state = mlp_state()
    net = mlp()
    load_into(net, {k.replace("2.", "2._orig_mod."): v for k, v in state.items()})
    same(net, state)
    named = nn.Sequential(collections.OrderedDict(module=nn.Linear(2, 2, bias=False)))
    assert load_into(named, {"module.weight": normal(2, 2)}).wrappers == ()
    with pytest.raises(LoadError, match="both '0.bias' and 'module.0.bias' would go here"):
        load_into(mlp(), {**state, "module.0.bias": normal(4)})


def test_prefix_only_if_asked():
    state = {f"model.{k}": v for k, v in mlp_state().items()}
    with pytest.raises(LoadError, match=r"4 names fit without 'model.': pass prefix='model.'"):
        load_into(mlp(), state)
    for prefix in ("model", "model."):
        assert load_into(mlp(), {**state, "head": normal(1)}, prefix=prefix).beside == 1
    with pytest.raises(LoadError, match=r"starts with the prefix 'mdel'.*Did you mean 'model'"):
        load_into(mlp(), state, prefix="mdel")
    state = {k.removeprefix("model.0."): v for k, v in state.items() if ".0." in k}
    with pytest.raises(LoadError, match=r"its part '0': load into net.get_submodule\('0'\)"):
        load_into(mlp(), state)


def test_nested_files(tmp_path):
    state = mlp_state()
    moments = {k: v * 0 for k, v in state.items()}
    lamina.io.save(
        {"step": 3, "optimizer": {"mu": moments, "nu": moments}, "model": state}, tmp_path / "x"
    )
    net = mlp()
    report = load_into(net, tmp_path / "x")
    assert report.prefix == "model." and report.beside == 8
    same(net, state)
    load_into(net, {"model": state, "epoch": 3})
    twice = {"model": state, "ema": moments}
    with pytest.raises(LoadError, match=r"several parts .*'ema.'(?s:.)*prefix='"):
        load_into(net, twice)
    load_into(net, twice, prefix="ema")
    same(net, moments)


def test_spellings_of_weight_norm_and_layer_norm():
    class Normed(nn.Module):
        def __init__(self, old):
            names = ("weight_g", "weight_v") if old else ("original0", "original1")
            holder = self
            if not old:
                self.parametrizations = nn.ModuleDict({"weight": nn.Module()})
                holder = self.parametrizations["weight"]
            setattr(holder, names[0], nn.Parameter(shape=(2, 1)))
            setattr(holder, names[1], nn.Parameter(shape=(2, 3)))

    old = {"0.weight_g": normal(2, 1), "0.weight_v": normal(2, 3)}
    new = dict(
        zip(("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
            old.values(), strict=True)
    )  # fmt: skip
    for state in (old, new):
        for is_old in (True, False):
            net = nn.Sequential(Normed(is_old))
            load_into(net, state)
            same(net, old if is_old else new)
    norm = nn.LayerNorm(2)
    report = load_into(norm, {"gamma": normal(2), "beta": normal(2)})
    assert report.renamed == {"gamma": "weight", "beta": "bias"}


def test_rename():
    state = mlp_state()
    theirs = {k.replace("0.", "enc.fc.").replace("2.", "dec."): v for k, v in state.items()}
    rules = {"enc.fc.*": "0.{0}", "dec.*": "2.{0}"}
    net = mlp()
    report = load_into(net, theirs, rename=rules)
    same(net, state)
    assert report.renamed["enc.fc.bias"] == "0.bias"
    load_into(net, {f"module.{k}": v for k, v in theirs.items()}, rename=rules)
    load_into(net, theirs, rename=lambda k: k.replace("enc.fc.", "0.").replace("dec.", "2."))
    load_into(net, {"x": {"weights": theirs}, "y": 1}, rename=rules)
    load_into(net, {**theirs, "old": normal(1)}, rename={**rules, "old": None})
    with pytest.raises(RuleError, match=r"'end.*matches nothing"):
        load_into(net, theirs, rename={**rules, "end.*": "1.{0}"})


def test_only():
    net = mlp()
    before = mlp_state()
    net.load_state_dict(before)
    state = mlp_state()
    report = load_into(net, {**state, "other": normal(1)}, only="0.*")
    same(net, {**before, "0.weight": state["0.weight"], "0.bias": state["0.bias"]})
    assert report.loaded == ["0.weight", "0.bias"] and report.beside == 3 and not report.missing
    with pytest.raises(LoadError, match="missing: 0.bias"):
        load_into(net, {"0.weight": state["0.weight"]}, only=["0.*"])
    with pytest.raises(LoadError, match="only='1.*' matches no name"):
        load_into(net, state, only="1.*")


@pytest.mark.parametrize("dtype", ["f4", jnp.bfloat16])
def test_straight_into_the_shards(tmp_path, monkeypatch, dtype):
    state = {"weight": normal(16, 64, dtype=dtype), "bias": normal(16, dtype=dtype)}
    lamina.io.save(state, tmp_path / "x")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(4, 2), ("a", "b"))
    spec = jax.sharding.PartitionSpec
    net = nn.Linear(64, 16)
    net.weight.sharding = jax.sharding.NamedSharding(mesh, spec("a", "b"))
    net.bias.sharding = jax.sharding.NamedSharding(mesh, spec())
    read = []
    handle = lamina.io.TensorHandle
    original = handle.read
    monkeypatch.setattr(
        handle,
        "read",
        lambda self, index=...: read.append((self.name, index)) or original(self, index),
    )
    load_into(net, tmp_path / "x", dtype="model")
    parts = [index for name, index in read if name == "weight"]
    assert len(parts) == 8 and all(
        original(file_handle(tmp_path), i).shape == (4, 32) for i in parts
    )
    np.testing.assert_array_equal(net.weight.data, state["weight"].astype("f4"))
    np.testing.assert_array_equal(net.bias.data, state["bias"].astype("f4"))
    assert net.weight.data.sharding == net.weight.sharding
    # A model that has values keeps its places.
    spread = nn.Linear(64, 16)
    spread.weight.data = jax.device_put(
        jnp.zeros((16, 64)), jax.sharding.NamedSharding(mesh, spec("b"))
    )
    load_into(spread, tmp_path / "x", dtype="model")
    assert spread.weight.data.sharding.spec == spec("b")


def file_handle(tmp_path):
    return lamina.io.open(tmp_path / "x")["weight"]


def test_the_file_may_be_overwritten_after_a_copy(tmp_path):
    state = {"weight": normal(64, 64), "bias": normal(64)}
    lamina.io.save(state, tmp_path / "x")
    net = nn.Linear(64, 64)
    load_into(net, tmp_path / "x", copy=True)
    with open(tmp_path / "x", "r+b") as raw:
        raw.seek(512)
        raw.write(b"\xff" * 8000)
    same(net, state)


def test_a_mapping_is_copied():
    value = normal(64, 64)
    kept = value.copy()
    net = nn.Linear(64, 64, bias=False)
    load_into(net, {"weight": value})
    value[:] = 0
    np.testing.assert_array_equal(net.weight.data, kept)


def test_sources_of_other_kinds(tmp_path):
    with pytest.raises(TypeError, match="expected a path"):
        load_into(mlp(), 3)
    with pytest.raises(FileNotFoundError):
        load_into(mlp(), tmp_path / "nothing")
    with pytest.raises(LoadError, match="w: expected an array, got object"):
        load_into(mlp(), {"w": object()})


@pytest.mark.parity
def test_torch_tensors_of_every_dtype(torch):
    net = nn.Linear(2, 2, bias=False, dtype=jnp.bfloat16)
    theirs = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    load_into(net, theirs.state_dict())
    load_into(net, dict(theirs.named_parameters()))
    np.testing.assert_array_equal(
        np.asarray(net.weight.data, "f4"), theirs.weight.detach().float().numpy()
    )
