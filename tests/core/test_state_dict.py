"""state_dict and load_state_dict: against torch, all or nothing, every problem at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn
from lamina._core.errors import DeferredError, LoadError


def convnet(m):
    net = m.Sequential(
        m.Conv2d(1, 2, 3), m.BatchNorm2d(2), m.ReLU(), m.Flatten(), m.Linear(2 * 4 * 4, 3)
    )
    net.tail = m.Linear(3, 3)
    return net


def to_torch(torch, state):
    return {name: torch.tensor(np.asarray(value)) for name, value in state.items()}


# Against torch.


@pytest.mark.parity
def test_names_order_shapes_and_dtypes(torch):
    ours, theirs = convnet(nn).state_dict(), convnet(torch.nn).state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert tuple(ours[name].shape) == tuple(value.shape)
        dtype = str(value.dtype).removeprefix("torch.")
        assert str(ours.wide.get(name, ours[name].dtype)) == dtype


@pytest.mark.parity
def test_round_trip_through_torch(torch):
    ours, theirs = convnet(nn), convnet(torch.nn)
    theirs.load_state_dict(to_torch(torch, ours.state_dict()))
    twin = convnet(nn)
    result = twin.load_state_dict(theirs.state_dict())
    assert str(result) == "<All keys matched successfully>"
    for name, value in ours.state_dict().items():
        np.testing.assert_array_equal(twin.state_dict()[name], value)


@pytest.mark.parity
def test_prefix_and_destination(torch):
    ours, theirs = convnet(nn), convnet(torch.nn)
    assert list(ours.state_dict(prefix="a.")) == list(theirs.state_dict(prefix="a."))
    target = {}
    ours.state_dict(destination=target, prefix="b.")
    assert list(target) == list(theirs.state_dict(prefix="b."))


@pytest.mark.parity
def test_buffers_that_are_not_saved(torch):
    def make(m, value):
        net = m.Module()
        net.register_buffer("kept", value)
        net.register_buffer("dropped", value + 1, persistent=False)
        net.register_buffer("none", None)
        return net

    ours, theirs = make(nn, jnp.ones(1)), make(torch.nn, torch.ones(1))
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["kept"]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]


@pytest.mark.parity
def test_not_strict_reports_as_torch(torch):
    state = {"weight": np.ones((2, 3), np.float32), "extra": np.ones(1)}
    ours = nn.Linear(3, 2).load_state_dict(state, strict=False)
    theirs = torch.nn.Linear(3, 2).load_state_dict(to_torch(torch, state), strict=False)
    assert ours.missing_keys == theirs.missing_keys == ["bias"]
    assert ours.unexpected_keys == theirs.unexpected_keys == ["extra"]
    assert repr(ours).replace("IncompatibleKeys", "") == repr(theirs).replace(
        "_IncompatibleKeys", ""
    )


@pytest.mark.parity
def test_extra_state(torch):
    def make(m):
        class Net(m.Module):
            def __init__(self):
                super().__init__()
                self.fc = m.Linear(1, 1)
                self.version = 3

            def get_extra_state(self):
                return {"version": self.version}

            def set_extra_state(self, state):
                self.version = state["version"]

        return Net()

    ours, theirs = make(nn), make(torch.nn)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.version = 9
    twin = make(nn)
    twin.load_state_dict(ours.state_dict())
    assert twin.version == 9
    with pytest.raises(LoadError, match="missing: _extra_state"):
        twin.load_state_dict(
            {"fc.weight": np.ones((1, 1), np.float32), "fc.bias": np.ones(1, np.float32)}
        )


# Snapshots.


def test_a_snapshot_does_not_change():
    net = nn.Linear(3, 2)
    held = net.state_dict()
    before = {name: np.array(value) for name, value in held.items()}

    @lamina.jit
    def step(net):
        net.weight.fill_(0.0)

    step(net)
    net.bias[0] = 5.0
    step(net)
    for name, value in held.items():
        np.testing.assert_array_equal(value, before[name])


def test_keep_vars():
    net = nn.Linear(3, 2)
    assert net.state_dict(keep_vars=True)["weight"] is net.weight
    assert nn.LazyLinear(2).state_dict(keep_vars=True)["weight"].is_unshaped


def test_deferred_names_are_listed():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    with pytest.raises(
        DeferredError,
        match=r"0\.weight: \(4, \?\)[\s\S]*1\.running_mean: \(\?,\)[\s\S]*lamina\.infer",
    ):
        net.state_dict()


# Ties.


def tied():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    return net


def test_a_tied_value_appears_under_each_name():
    state = tied().state_dict()
    assert state["0.weight"] is state["1.weight"]
    assert state.ties == {"1.weight": "0.weight"}


@pytest.mark.parametrize("kept", ["0.weight", "1.weight"])
def test_a_tied_value_may_come_under_any_name(kept):
    net = tied()
    state = dict(net.state_dict())
    value = state.pop("0.weight")
    del state["1.weight"]
    state[kept] = value + 1
    result = net.load_state_dict(state)
    assert result.missing_keys == []
    np.testing.assert_array_equal(net[0].weight.data, value + 1)
    assert net[1].weight is net[0].weight


def test_two_values_for_a_tie_are_refused():
    net = tied()
    state = dict(net.state_dict())
    state["1.weight"] = state["1.weight"] + 1
    before = np.array(net[0].weight.data)
    with pytest.raises(
        LoadError, match=r"1\.weight: tied to 0\.weight, but the state dict holds two"
    ):
        net.load_state_dict(state)
    np.testing.assert_array_equal(net[0].weight.data, before)


def test_equal_values_for_a_tie_are_fine():
    net = tied()
    net.load_state_dict({name: np.array(value) for name, value in net.state_dict().items()})


# Loading.


def test_every_problem_at_once_and_nothing_changes():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 4))
    state = {name: np.asarray(value) + 1 for name, value in net.state_dict().items()}
    state["0.wieght"] = state.pop("0.weight")
    state["1.weight"] = np.ones(3, np.float32)
    state["2.weight"] = state["2.weight"].T
    state["2.bias"] = state["2.bias"].astype(np.float16)
    before = {name: np.array(value) for name, value in net.state_dict().items()}
    with pytest.raises(LoadError, match="nothing was loaded") as caught:
        net.load_state_dict(state)
    text = str(caught.value)
    for part in (
        "the state dict does not fit Sequential",
        "missing: 0.weight Did you mean '0.wieght'?",
        "unexpected: 0.wieght Did you mean '0.weight'?",
        "1.weight: expected shape (2,), got (3,)",
        "2.weight: expected shape (4, 2), got (2, 4); it fits transposed: value.T",
        "2.bias: expected dtype float32, got float16; pass cast=True to convert it or assign=True",
        "fix: rename the keys, or load_state_dict(state, strict=False)",
    ):
        assert part in text
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_shapes_are_checked_also_when_not_strict():
    net = nn.Linear(3, 2)
    before = np.array(net.bias.data)
    with pytest.raises(LoadError, match=r"weight: expected shape \(2, 3\), got \(1,\)"):
        net.load_state_dict({"weight": np.ones(1, np.float32), "bias": before + 1}, strict=False)
    np.testing.assert_array_equal(net.bias.data, before)


def test_not_strict_with_nothing_in_common():
    with pytest.raises(
        LoadError, match=r"none of the 1 names in the state dict belongs to the model"
    ):
        nn.Linear(3, 2).load_state_dict(
            {"module.weight": np.ones((2, 3), np.float32)}, strict=False
        )


def test_not_a_mapping():
    with pytest.raises(TypeError, match="expected a mapping of names to arrays, got list"):
        nn.Linear(1, 1).load_state_dict([1])


def test_cast_and_assign():
    net = nn.Linear(2, 1)
    half = {"weight": np.ones((1, 2), np.float16), "bias": np.ones(1, np.float16)}
    net.load_state_dict(half, cast=True)
    assert net.weight.dtype == jnp.float32
    box = net.weight
    net.load_state_dict(half, assign=True)
    assert net.weight.dtype == jnp.float16
    assert net.weight is box


def test_a_failed_assign_changes_nothing():
    net = nn.Linear(2, 1)
    net.weight.sum()
    with pytest.raises(LoadError):
        net.load_state_dict(
            {"weight": np.ones((1, 2), np.float16), "bias": np.ones(3, np.float16)}, assign=True
        )
    assert net.weight.dtype == jnp.float32
    assert net(jnp.ones((1, 2))).dtype == jnp.float32


@pytest.mark.parametrize("lazy", [True, False])
def test_loading_into_a_model_without_values_draws_nothing(lazy):
    source = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = source.state_dict()
    if lazy:
        net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    else:
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    drawn = []
    for p in net.parameters():
        p.init = lambda key, shape, dtype: drawn.append(shape) or jnp.zeros(shape, dtype)
    net.load_state_dict(state)
    assert drawn == []
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, state[name])
    x = jnp.ones((2, 3))
    np.testing.assert_allclose(net.eval()(x), source.eval()(x), rtol=1e-6)
    assert drawn == []
    assert repr(net[0]) == "Linear(in_features=3, out_features=4, bias=True)"


def test_loading_keeps_the_sharding():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[4])
    net = nn.Linear(3, 2)
    net.weight.sharding = place
    net.load_state_dict({"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)})
    assert net.weight.data.devices() == {jax.devices()[4]}


def test_loaded_values_are_copies_of_numpy_arrays():
    net = nn.Linear(3, 2)
    source = np.ones((2, 3), np.float32)
    net.load_state_dict({"weight": source, "bias": np.zeros(2, np.float32)})
    source[:] = 7
    np.testing.assert_array_equal(net.weight.data, np.ones((2, 3)))


def test_loading_from_another_models_boxes():
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    one.load_state_dict(two.state_dict(keep_vars=True))
    two.weight.fill_(0)
    assert one.weight.any()


# Overriding and hooks.


def test_custom_load():
    class Renamed(nn.Module):
        def __init__(self):
            self.new = nn.Parameter(jnp.zeros(1))

        def _load_from_state_dict(self, state_dict, prefix, *args):
            if prefix + "old" in state_dict:
                state_dict[prefix + "new"] = state_dict.pop(prefix + "old")
            super()._load_from_state_dict(state_dict, prefix, *args)

    net = nn.Sequential(Renamed())
    given = {"0.old": np.ones(1, np.float32)}
    net.load_state_dict(given)
    assert float(net[0].new.sum()) == 1
    assert list(given) == ["0.old"]


@pytest.mark.parity
def test_hooks_as_in_torch(torch):
    def run(m, value):
        net, log = m.Sequential(m.Linear(1, 1)), []
        net.register_state_dict_pre_hook(
            lambda mod, prefix, keep: log.append(("pre", prefix, keep))
        )
        net.register_state_dict_post_hook(
            lambda mod, state, prefix, meta: log.append(("post", list(state), prefix))
        )
        net[0].register_load_state_dict_pre_hook(
            lambda mod, state, prefix, *rest: log.append(("load pre", prefix, sorted(state)))
        )

        def forgive(module, keys):
            log.append(("load post", list(keys.missing_keys)))
            keys.missing_keys.clear()

        net.register_load_state_dict_post_hook(forgive)
        net.state_dict()
        net.load_state_dict({"0.weight": value})
        return log

    ours = run(nn, np.ones((1, 1), np.float32))
    assert ours == run(torch.nn, torch.ones(1, 1))


def test_hook_handles_are_removed():
    net, log = nn.Linear(1, 1), []
    handles = [
        net.register_state_dict_pre_hook(lambda *a: log.append(1)),
        net.register_state_dict_post_hook(lambda *a: log.append(2)),
        net.register_load_state_dict_pre_hook(lambda *a: log.append(3)),
        net.register_load_state_dict_post_hook(lambda *a: log.append(4)),
    ]
    net.load_state_dict(net.state_dict())
    assert log == [1, 2, 3, 4]
    for handle in handles:
        handle.remove()
    net.load_state_dict(net.state_dict())
    assert log == [1, 2, 3, 4]
