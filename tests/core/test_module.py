"""Module: registration, attributes, looking at parts, repr, casting, copying, errors."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn
from lamina._core.errors import LaminaError, ShapeError


class Net(nn.Module):
    def __init__(self):
        self.conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
        self.scale = nn.Parameter(jnp.ones(2))
        self.register_buffer("mask", jnp.zeros(3), persistent=False)
        self.head = nn.Linear(4, 2)


# Registration.


def test_super_init_is_optional():
    class With(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

    class Without(nn.Module):
        def __init__(self):
            self.fc = nn.Linear(2, 2)

    assert list(With().state_dict()) == list(Without().state_dict()) == ["fc.weight", "fc.bias"]


def test_init_takes_no_arguments():
    with pytest.raises(TypeError, match=r"Module\(\) takes no arguments; define Module\.__init__"):
        nn.Module(3)


@pytest.mark.parity
def test_registries_are_dicts(torch):
    ours, theirs = nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    for registry in ("_parameters", "_buffers", "_modules"):
        assert list(getattr(ours, registry)) == list(getattr(theirs, registry))
    ours._parameters["weight"] = None
    assert ours.weight is None
    ours._modules["extra"] = nn.ReLU()
    assert isinstance(ours.extra, nn.ReLU)
    assert [name for name, _ in ours.named_modules()] == ["", "extra"]
    del ours._modules["extra"]
    assert not hasattr(ours, "extra")


def test_one_name_one_kind():
    net = nn.Module()
    net.a = 3
    net.a = nn.Parameter(jnp.ones(1))
    assert "a" not in net.__dict__
    net.a = nn.Linear(1, 1)
    assert not net._parameters
    net.a = nn.Buffer(jnp.ones(1))
    assert not net._modules
    del net.a
    assert not hasattr(net, "a")
    net.a = 4
    assert net.a == 4


def test_arrays_are_written_into_parameters():
    net = nn.Linear(3, 2)
    box = net.weight
    net.weight = jnp.zeros((2, 3))
    assert net.weight is box
    assert not box.any()
    net.weight = np.ones((2, 3), np.float32)
    assert float(box.sum()) == 6
    with pytest.raises(
        ShapeError, match=r"parameter 'weight': expected shape \(2, 3\), got \(3, 2\)"
    ):
        net.weight = jnp.zeros((3, 2))
    with pytest.raises(TypeError, match="expected dtype float32, got int32"):
        net.weight = jnp.zeros((2, 3), jnp.int32)
    assert float(box.sum()) == 6


def test_arrays_are_plain_attributes_otherwise():
    net = nn.Module()
    net.table = jnp.ones(2)
    assert not net.state_dict()
    net.table = jnp.ones(3)
    assert net.table.shape == (3,)


def test_none_takes_a_parameter_away():
    net = nn.Linear(3, 2)
    net.bias = None
    assert net.bias is None
    assert list(net.state_dict()) == ["weight"]
    with pytest.raises(
        TypeError, match=r"Linear\.bias is a parameter set to None; assign an nn\.Parameter"
    ):
        net.bias = jnp.zeros(2)
    net.bias = nn.Parameter(jnp.zeros(2))
    assert list(net.state_dict()) == ["weight", "bias"]


def test_modules_are_not_overwritten_by_other_things():
    net = nn.Sequential(nn.ReLU())
    net.child = nn.ReLU()
    with pytest.raises(TypeError, match=r"Sequential\.child is a module; can't assign int"):
        net.child = 3
    net.child = None
    assert net.child is None


def test_lists_tuples_and_dicts_are_registered():
    class Lists(nn.Module):
        def __init__(self):
            self.layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
            self.pair = (nn.Linear(2, 2, bias=False),)
            self.heads = {"a": nn.Linear(2, 1, bias=False)}
            self.weights = [nn.Parameter(jnp.ones(1))]
            self.table = {"x": nn.Parameter(jnp.ones(1))}
            self.nested = [[nn.Linear(2, 2, bias=False)], {"k": nn.Linear(2, 2, bias=False)}]
            self.sizes = [1, 2, 3]

    assert list(Lists().state_dict()) == [
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.weight",
        "layers.1.bias",
        "pair.0.weight",
        "heads.a.weight",
        "weights.0",
        "table.x",
        "nested.0.0.weight",
        "nested.1.k.weight",
    ]
    assert Lists().sizes == [1, 2, 3]


@pytest.mark.parametrize("kind", [list, dict])
def test_lists_that_are_filled_later_are_refused(kind):
    """They would be lost from the model; the first look at its parts says so."""

    class Later(nn.Module):
        def __init__(self):
            self.parts = kind()
            if kind is list:
                self.parts.append(nn.Linear(1, 1))
            else:
                self.parts["a"] = nn.Linear(1, 1)

    for use in (nn.Module.state_dict, lambda net: list(net.parameters()), lambda net: net.eval()):
        with pytest.raises(TypeError, match=r"Later\.parts[\s\S]*fix: self\.parts = nn\.Module"):
            use(Later())


def test_mixed_lists_are_refused():
    net = nn.Module()
    with pytest.raises(
        TypeError, match=r"Module\.parts: a list of Linear, int; modules or parameters in it"
    ):
        net.parts = [nn.Linear(1, 1), 3]
    with pytest.raises(
        TypeError, match=r"names of modules and parameters are strings, got the keys \[1\]"
    ):
        net.parts = {1: nn.Linear(1, 1)}


BAD_NAMES = ["", "a.b", 3, "forward", "fc"]


@pytest.mark.parity
@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("method", ["register_parameter", "register_buffer", "add_module"])
def test_names_that_torch_refuses(torch, name, method):
    ours, theirs = nn.Module(), torch.nn.Module()
    ours.fc, theirs.fc = nn.ReLU(), torch.nn.ReLU()
    if method == "add_module" and name == "fc":
        pytest.skip("replacing a module is allowed")
    with pytest.raises((KeyError, TypeError)) as expected:
        getattr(theirs, method)(name, None)
    with pytest.raises(expected.type, match=r"name|attribute"):
        getattr(ours, method)(name, None)


def test_registering_the_wrong_kind():
    net = nn.Module()
    with pytest.raises(TypeError, match=r"expected nn\.Parameter or None, got ArrayImpl"):
        net.register_parameter("p", jnp.ones(1))
    with pytest.raises(TypeError, match="expected a module or None, got int"):
        net.add_module("m", 3)


def test_unknown_attribute_has_a_hint():
    with pytest.raises(
        AttributeError, match=r"'Linear' object has no attribute 'wieght'\. Did you mean 'weight'"
    ):
        nn.Linear(1, 1).wieght  # noqa: B018


def test_error_in_a_property_is_not_hidden():
    class Net(nn.Module):
        @property
        def broken(self):
            return self.missing_thing

    with pytest.raises(AttributeError, match="missing_thing"):
        Net().broken  # noqa: B018


def test_property_setters_work():
    class Net(nn.Module):
        @property
        def value(self):
            return self.hidden

        @value.setter
        def value(self, new):
            self.hidden = new * 2

    net = Net()
    net.value = 3
    assert net.value == 6


def test_dir_lists_parts():
    assert {"weight", "bias", "forward", "in_features"} <= set(dir(nn.Linear(1, 1)))


# Looking at parts, against torch.


def pair(torch):
    def make(m):
        shared = m.Linear(2, 2)
        net = m.Sequential(m.Linear(2, 2), m.Sequential(shared, m.BatchNorm1d(2)), shared, m.ReLU())
        net.extra = m.Linear(2, 2, bias=False)
        net[0].weight = net.extra.weight
        return net

    return make(nn), make(torch.nn)


@pytest.mark.parity
@pytest.mark.parametrize(
    "method", ["named_parameters", "named_buffers", "named_modules", "named_children"]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"prefix": "p"}, {"recurse": False}, {"remove_duplicate": False}],
    ids=["plain", "prefix", "no recursion", "duplicates"],
)
def test_names_and_order(torch, method, options):
    ours, theirs = pair(torch)
    if method == "named_children" and options:
        pytest.skip("takes no options")
    if method == "named_modules" and "recurse" in options:
        pytest.skip("takes no such option")
    expected = [name for name, _ in getattr(theirs, method)(**options)]
    assert [name for name, _ in getattr(ours, method)(**options)] == expected


@pytest.mark.parity
def test_unnamed_forms(torch):
    ours, theirs = pair(torch)
    for method in ("parameters", "buffers", "children", "modules"):
        assert len(list(getattr(ours, method)())) == len(list(getattr(theirs, method)())), method
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)


def test_paths():
    net = Net()
    assert net.get_submodule("conv.0") is net.conv[0]
    assert net.get_submodule("") is net
    assert net.get_parameter("conv.0.weight") is net.conv[0].weight
    assert net.get_buffer("mask").data is net.mask
    with pytest.raises(AttributeError, match=r"no submodule 'cnov\.0'\. Did you mean 'conv\.0'"):
        net.get_submodule("cnov.0")
    with pytest.raises(
        AttributeError, match=r"no parameter 'head\.wieght'\. Did you mean 'head\.weight'"
    ):
        net.get_parameter("head.wieght")
    with pytest.raises(AttributeError, match="no buffer 'scale'"):
        net.get_buffer("scale")


def test_set_submodule():
    net = Net()
    net.set_submodule("conv.1", nn.Tanh())
    assert isinstance(net.conv[1], nn.Tanh)
    net.set_submodule("conv.new", nn.ReLU())
    with pytest.raises(AttributeError, match=r"no submodule 'conv\.other'"):
        net.set_submodule("conv.other", nn.ReLU(), strict=True)
    with pytest.raises(ValueError, match="needs a path"):
        net.set_submodule("", nn.ReLU())


def test_a_module_that_contains_itself():
    net = nn.Sequential(nn.ReLU())
    net.add_module("self", net)
    with pytest.raises(LaminaError, match="contains itself"):
        list(net.parameters())


# Changing all parts.


@pytest.mark.parity
def test_apply_order(torch):
    ours, theirs = pair(torch)
    seen = {"ours": [], "theirs": []}
    assert ours.apply(lambda m: seen["ours"].append(type(m).__name__)) is ours
    theirs.apply(lambda m: seen["theirs"].append(type(m).__name__))
    assert seen["ours"] == seen["theirs"]


def test_apply_before_shapes_are_known():
    net = nn.Sequential(nn.LazyLinear(2), nn.ReLU(), nn.LazyLinear(1))

    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)
            nn.init.zeros_(module.bias)

    net.apply(init)
    np.testing.assert_allclose(net(jnp.ones((1, 4))), [[2.0]])


def test_train_and_eval():
    net = nn.Sequential(nn.Sequential(nn.Dropout()))
    assert net.training
    assert net.eval() is net
    assert not net[0][0].training
    net.train()
    assert net[0][0].training
    with pytest.raises(ValueError, match=r"train\(mode\): expected a bool, got 3"):
        net.train(3)


def test_requires_grad():
    net = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    assert net.requires_grad_(False) is net
    assert not any(p.requires_grad for p in net.parameters())
    net(jnp.ones((1, 3)))
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("call", "dtype"),
    [
        (lambda net: net.half(), jnp.float16),
        (lambda net: net.bfloat16(), jnp.bfloat16),
        (lambda net: net.to("bfloat16"), jnp.bfloat16),
        (lambda net: net.to(dtype=jnp.float16), jnp.float16),
        (lambda net: net.to(jnp.zeros((), jnp.float16)), jnp.float16),
        (lambda net: net.half().float(), jnp.float32),
        (lambda net: net.type(jnp.float16), jnp.float16),
    ],
    ids=["half", "bfloat16", "to name", "to dtype", "to array", "twice", "type"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_casting(call, dtype, when):
    net = nn.Sequential(nn.LazyLinear(2))
    if when == "after":
        net(jnp.ones((1, 3)))
    result = call(net)
    assert result is net
    if when == "before":
        net(jnp.ones((1, 3), dtype))
    assert net[0].weight.dtype == net[0].bias.dtype == dtype


def test_integers_keep_their_dtype():
    net = nn.BatchNorm1d(2).half()
    assert net.num_batches_tracked.dtype == jnp.int32
    with pytest.raises(TypeError, match=r"to\(dtype\): expected a floating or complex dtype, got"):
        net.to(jnp.int32)


def test_devices():
    place = jax.devices()[2]
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LazyLinear(3))
    net[0].weight.sum()
    net.to(place)
    net(jax.device_put(jnp.ones((3, 2)), place))
    for box in [*net.parameters(), *net.buffers()]:
        assert box.data.devices() == {place}
    net.cpu()
    for box in [*net.parameters(), *net.buffers()]:
        assert box.data.devices() == {jax.devices()[0]}
    net.to("cpu:3", "bfloat16")
    assert net[0].weight.data.devices() == {jax.devices()[3]}
    assert net[0].weight.dtype == jnp.bfloat16


def test_apply_to_values():
    net = nn.Linear(2, 2)
    before = np.array(net.weight.data)
    assert net._apply(lambda value: value * 2) is net
    np.testing.assert_allclose(net.weight.data, before * 2)


def test_zero_grad():
    net = nn.Linear(2, 1)
    lamina.backward(lambda: net(jnp.ones((1, 2))).sum())
    net.zero_grad(set_to_none=False)
    assert not net.weight.grad.any()
    net.zero_grad()
    assert net.weight.grad is None


# Showing.


def test_repr_of_a_custom_module():
    class Custom(nn.Module):
        def __init__(self):
            self.fc = nn.Linear(1, 1)

        def extra_repr(self):
            return "a=1\nb=2"

    expected = "Custom(\n  a=1\n  b=2\n  (fc): Linear(in_features=1, out_features=1, bias=True)\n)"
    assert repr(Custom()) == expected


# Copying.


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("state", ["unshaped", "abstract", "material"])
def test_copies(duplicate, state):
    net = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3))
    net[3].weight = nn.Parameter(shape=(3, 3), init=nn.init.Normal(std=0.5))
    net.tail = nn.Linear(3, 3, bias=False)
    net.tail.weight = net[3].weight
    net[0].bias.requires_grad = False
    net.eval()
    net.sizes = [1, 2]
    if state == "abstract":
        lamina.infer(net, jnp.ones((2, 4)))
    elif state == "material":
        net(jnp.ones((2, 4)))
        net[0].weight.data = net[0].weight.data + 1
        net[0].weight.grad = jnp.ones((3, 4))
    twin = duplicate(net)
    assert repr(twin) == repr(net)
    assert twin.ties() == net.ties() == {"tail.weight": "3.weight"}
    assert not twin.training
    assert not twin[0].bias.requires_grad
    assert twin.sizes == [1, 2]
    assert twin.sizes is not net.sizes
    assert twin[3].weight.init == net[3].weight.init
    assert twin[0].weight is not net[0].weight
    if state == "material":
        np.testing.assert_array_equal(twin[0].weight.grad, np.ones((3, 4)))
    x = jnp.ones((2, 4))
    np.testing.assert_array_equal(twin(x), net(x))
    twin[3].weight.data = twin[3].weight.data * 0
    assert net[3].weight.any()
    assert not twin.tail.weight.any()


def test_deepcopy_keeps_hooks_of_modules_apart():
    net = nn.Sequential(nn.ReLU())
    calls = []
    net[0].register_forward_hook(lambda m, a, o: calls.append(1))
    twin = copy.deepcopy(net)
    twin(jnp.ones(1))
    assert calls == [1]
    net[0]._forward_hooks.clear()
    twin(jnp.ones(1))
    assert calls == [1, 1]


def test_copied_model_is_noticed_by_compiled_functions():
    f = lamina.jit(lambda net, x: net(x))
    net = nn.BatchNorm1d(2)
    x = jnp.ones((3, 2))
    f(net, x)
    twin = copy.deepcopy(net)
    f(twin, x)
    assert (int(net.num_batches_tracked), int(twin.num_batches_tracked)) == (1, 2)


# Calling.


def test_forward_is_required():
    with pytest.raises(TypeError, match=r"Module has no forward method; define `def forward"):
        nn.Module()(1)


def test_any_python_in_forward():
    class Halve(nn.Module):
        def forward(self, x):
            while jnp.abs(x).sum() > 1:
                x = x / 2
            return x

    assert float(jnp.abs(Halve()(jnp.ones(8))).sum()) <= 1


def test_error_carries_the_path_once():
    net = nn.Sequential(nn.Sequential(nn.Identity(), nn.Linear(4, 2)))
    with pytest.raises(Exception, match="in_features=4") as caught:
        net(jnp.ones((2, 3)))
    notes = caught.value.__notes__
    assert len(notes) == 1
    assert notes[0] == (
        "in module '0.1': Linear(in_features=4, out_features=2, bias=True), "
        "called with (float32[2, 3])"
    )
