"""A model's train, eval, to, half, requires_grad_ and apply go through each child's own method."""

import copy
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lamina
from lamina import nn

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def frozen_batch_norm(m):
    """The usual way to keep a batch norm in evaluation mode while the rest is trained."""

    class FrozenBatchNorm(m.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    return FrozenBatchNorm(3)


def flags(net):
    return {name: module.training for name, module in net.named_modules()}


# Training mode, against torch.


def by_class(m):
    return m.Sequential(m.Linear(3, 3), frozen_batch_norm(m), m.Dropout(0.0))


def by_nesting(m):
    return m.Sequential(m.Sequential(m.Sequential(frozen_batch_norm(m))), m.Dropout())


def by_model(m):
    """As torchvision's detection models do it: the model itself goes back over its parts."""

    class Backbone(m.Module):
        def __init__(self):
            super().__init__()
            self.norm = m.BatchNorm1d(3)
            self.drop = m.Dropout()

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    return m.Sequential(Backbone(), m.BatchNorm1d(3))


def by_instance(m):
    """As latent-diffusion does it: the method of one instance is replaced."""
    net = m.Sequential(m.Sequential(m.Dropout()), m.Dropout())
    net[0].eval()
    net[0].train = types.MethodType(lambda self, mode=True: self, net[0])
    return net


def by_property_of_the_parent(m):
    """A parent whose own override reaches the children that it wants to."""

    class Partly(m.Module):
        def __init__(self):
            super().__init__()
            self.kept = m.Dropout()
            self.other = m.Sequential(m.Dropout(), frozen_batch_norm(m))

        def train(self, mode=True):
            self.training = mode
            self.other.train(mode)
            return self

    net = m.Sequential(Partly(), m.Dropout())
    net[0].kept.eval()
    return net


def by_containers(m):
    class Holder(m.Module):
        def __init__(self):
            super().__init__()
            self.listed = m.ModuleList([frozen_batch_norm(m), m.Dropout()])
            self.named = m.ModuleDict({"a": m.Sequential(frozen_batch_norm(m))})
            self.nothing = None
            self.register_module("absent", None)

    return Holder()


def by_copy(m):
    return copy.deepcopy(by_class(m))


MODELS = [by_class, by_nesting, by_model, by_instance, by_property_of_the_parent, by_containers]
SCRIPTS = [["train"], ["eval"], ["eval", "train"], ["train", "eval", "train", "train"]]


@pytest.mark.parity
@pytest.mark.parametrize("make", [*MODELS, by_copy], ids=lambda make: make.__name__)
@pytest.mark.parametrize("script", SCRIPTS, ids=" ".join)
def test_training_mode_as_in_torch(torch, make, script):
    ours, theirs = make(nn), make(torch.nn)
    for method in script:
        assert getattr(ours, method)() is ours
        getattr(theirs, method)()
        assert flags(ours) == flags(theirs)


@pytest.mark.parity
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_frozen_batch_norm_computes_as_in_torch(torch, compiled):
    ours, theirs = by_class(nn).train(), by_class(torch.nn).train()
    theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in ours.state_dict().items()})
    call = lamina.jit(lambda net, x: net(x)) if compiled else lambda net, x: net(x)
    for mode in (True, False, True):
        ours.train(mode)
        theirs.train(mode)
        np.testing.assert_allclose(
            call(ours, X), theirs(torch.tensor(X)).detach().numpy(), rtol=1e-5, atol=1e-6
        )
    state = ours.state_dict()
    assert int(state["1.num_batches_tracked"]) == 0
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(state[name], value.numpy(), rtol=1e-5, err_msg=name)


@pytest.mark.parity
def test_order_and_number_of_calls_as_in_torch(torch):
    def scenario(m):
        log = []

        class Logged(m.Module):
            def __init__(self, name, *children):
                super().__init__()
                self.name = name
                self.below = m.ModuleList(children)

            def train(self, mode=True):
                log.append((self.name, mode))
                return super().train(mode)

            def apply(self, fn):
                log.append((self.name, "apply"))
                return super().apply(fn)

        shared = Logged("shared")
        net = Logged("root", Logged("a", Logged("b"), shared), shared, Logged("c"))
        net.train()
        net.eval()
        net.apply(lambda module: log.append(type(module).__name__))
        return log

    assert scenario(nn) == scenario(torch.nn)


def test_lists_and_dicts_assigned_as_attributes():
    class Holder(nn.Module):
        def __init__(self):
            self.layers = [frozen_batch_norm(nn), nn.Dropout()]
            self.table = {"a": (frozen_batch_norm(nn),)}

    net = Holder().train()
    frozen = [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm1d)]
    assert frozen == ["layers.0", "table.a.0"]
    assert {name for name, mode in flags(net).items() if not mode} == set(frozen)


def test_a_frozen_layer_before_shapes_are_known():
    class Frozen(nn.LazyBatchNorm1d):
        cls_to_become = None

        def train(self, mode=True):
            return super().train(False)

    net = nn.Sequential(nn.LazyLinear(3), Frozen()).train()
    before = np.asarray(net(X))
    np.testing.assert_allclose(before, net[0](X), rtol=1e-4, atol=1e-5)
    assert int(net.train().state_dict()["1.num_batches_tracked"]) == 0


def test_a_compiled_training_step_leaves_a_frozen_layer_alone():
    net = nn.Sequential(nn.Linear(3, 3), frozen_batch_norm(nn), nn.Linear(3, 1))
    opt = lamina.Optimizer(net, optax.sgd(0.1))
    step = lamina.jit(
        lambda net, opt, x: opt.step(lamina.grad(lambda net: (net(x) ** 2).mean())(net))
    )
    for _ in range(3):
        net.eval()
        net.train()
        step(net, opt, X)
    state = net.state_dict()
    np.testing.assert_array_equal(state["1.running_mean"], np.zeros(3))
    np.testing.assert_array_equal(state["1.running_var"], np.ones(3))


# Every method that goes over the children calls the child's own.

CALLS = {
    "train": lambda net: net.train(),
    "eval": lambda net: net.eval(),
    "requires_grad_": lambda net: net.requires_grad_(False),
    "to": lambda net: net.to(jnp.bfloat16),
    "half": lambda net: net.half(),
    "bfloat16": lambda net: net.bfloat16(),
    "float": lambda net: net.float(),
    "double": lambda net: net.double(),
    "type": lambda net: net.type(jnp.float16),
    "cpu": lambda net: net.cpu(),
    "apply": lambda net: net.apply(lambda module: None),
}
WHERE = ["child", "grandchild", "listed", "named", "replaced on the instance"]


def model_with(layer, where):
    if where == "grandchild":
        return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Sequential(layer)))
    if where == "listed":
        net = nn.Module()
        net.layers = [nn.Linear(3, 3), layer]
        return net
    if where == "named":
        return nn.ModuleDict({"a": nn.Linear(3, 3), "b": layer})
    return nn.Sequential(nn.Linear(3, 3), layer)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("method", CALLS)
def test_the_child_s_own_method_is_called_once(method, where):
    calls = []

    def override(self, *args, **kwargs):
        calls.append((args, kwargs))
        return self

    if where == "replaced on the instance":
        layer = nn.Linear(3, 3)
        setattr(layer, method, types.MethodType(override, layer))
    else:
        layer = type("Own", (nn.Linear,), {method: override})(3, 3)
    before = (layer.training, layer.weight.dtype, layer.weight.requires_grad)
    net = model_with(layer, where)
    assert CALLS[method](net) is net
    assert len(calls) == 1
    assert (layer.training, layer.weight.dtype, layer.weight.requires_grad) == before


@pytest.mark.parametrize("method", CALLS)
def test_the_rest_of_the_model_is_changed_as_ever(method):
    class Own(nn.Linear):
        pass

    setattr(Own, method, lambda self, *args, **kwargs: self)
    net = nn.Sequential(nn.Linear(3, 3), Own(3, 3), nn.Sequential(nn.Linear(3, 3)))
    twin = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    CALLS[method](net)
    CALLS[method](twin)
    for index in (0, 2):
        for ours, expected in zip(net[index].modules(), twin[index].modules(), strict=True):
            assert ours.training == expected.training
        for ours, expected in zip(net[index].parameters(), twin[index].parameters(), strict=True):
            assert (ours.dtype, ours.requires_grad) == (expected.dtype, expected.requires_grad)


@pytest.mark.parametrize("method", CALLS)
def test_an_override_may_call_super(method):
    calls = []

    def override(self, *args, **kwargs):
        calls.append(self)
        return getattr(super(Own, self), method)(*args, **kwargs)

    Own = type("Own", (nn.Sequential,), {method: override})
    inner, outer = Own(nn.Linear(3, 3)), None
    outer = Own(inner, nn.Linear(3, 3))
    twin = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))
    CALLS[method](nn.Sequential(outer))
    CALLS[method](twin)
    assert calls == [outer, inner]
    for ours, expected in zip(outer.modules(), twin.modules(), strict=True):
        assert ours.training == expected.training
    for ours, expected in zip(outer.parameters(), twin.parameters(), strict=True):
        assert (ours.dtype, ours.requires_grad) == (expected.dtype, expected.requires_grad)


@pytest.mark.parametrize("lazy", [False, True], ids=["abstract", "without shape"])
@pytest.mark.parametrize("narrow", ["half", "bfloat16", "to"])
def test_a_norm_that_stays_in_float32(narrow, lazy):
    """The usual mixed precision: everything is narrow except the normalisation."""

    class Wide(nn.LazyBatchNorm1d if lazy else nn.BatchNorm1d):
        def half(self):
            return self

        bfloat16 = half

        def to(self, *targets, dtype=None, device=None):
            return super().to(device=device)

        def forward(self, x):
            return super().forward(x.astype(jnp.float32)).astype(x.dtype)

    net = nn.Sequential(nn.LazyLinear(3), Wide() if lazy else Wide(3), nn.LazyLinear(1))
    dtype = {"half": jnp.float16, "bfloat16": jnp.bfloat16, "to": jnp.float16}[narrow]
    CALLS[narrow](net) if narrow != "to" else net.to(dtype)
    net(jnp.asarray(X, dtype))
    dtypes = {name: value.dtype for name, value in net.state_dict().items()}
    assert {name for name, found in dtypes.items() if found == jnp.float32} == {
        "1.weight", "1.bias", "1.running_mean", "1.running_var",
    }  # fmt: skip
    assert dtypes["0.weight"] == dtypes["2.bias"] == dtype


def test_arguments_reach_the_child():
    seen = []

    class Own(nn.Linear):
        def to(self, *targets, dtype=None, device=None):
            seen.append((targets, dtype, device))
            return super().to(*targets, dtype=dtype, device=device)

    place = jax.devices()[2]
    net = nn.Sequential(Own(3, 3))
    net.to(place, "bfloat16")
    net.to(dtype=jnp.float16, device="cpu:1")
    assert len(seen) == 2
    assert net[0].weight.dtype == jnp.float16
    assert net[0].weight.data.devices() == {jax.devices()[1]}


def test_parts_that_can_not_be_thawed():
    class Teacher(nn.Sequential):
        def requires_grad_(self, requires_grad=True):
            return super().requires_grad_(False)

    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(Teacher(nn.Linear(3, 3))), nn.LazyLinear(1))
    net.requires_grad_(False)
    net.requires_grad_(True)
    net(X)
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ["1.0.0.weight", "1.0.0.bias"]
    assert list(lamina.grad(lambda net: net(X).sum())(net)) == [
        "0.weight", "0.bias", "2.weight", "2.bias",
    ]  # fmt: skip


@pytest.mark.parity
def test_apply_skips_what_a_child_hides_as_in_torch(torch):
    def scenario(m):
        class Opaque(m.Sequential):
            def apply(self, fn):
                fn(self)
                return self

        seen = []
        net = m.Sequential(m.Linear(1, 1), m.Sequential(Opaque(m.ReLU())), m.Tanh())
        net.apply(lambda module: seen.append(type(module).__name__))
        return seen

    assert scenario(nn) == scenario(torch.nn)


def test_a_child_s_own_way_of_resetting():
    """A layer in the style of PyTorch says itself how its parameters begin."""

    class Own(nn.Module):
        def __init__(self):
            self.weight = nn.Parameter(shape=(2, 3), init=nn.init.Zeros())
            self.reset_parameters()

        def reset_parameters(self):
            nn.init.constant_(self.weight, 7.0)

    net = nn.Sequential(nn.Sequential(Own()), nn.Linear(3, 3))
    net[0][0].weight.data = jnp.zeros((2, 3))
    net.reset_parameters()
    np.testing.assert_array_equal(net[0][0].weight.data, np.full((2, 3), 7.0))


def test_a_model_without_overrides_is_unchanged():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net[1].weight = net[0].bias
    net.half().eval().requires_grad_(False)
    assert {p.dtype for p in net.parameters()} == {jnp.dtype("float16")}
    assert net.state_dict()["1.num_batches_tracked"].dtype == jnp.int32
    assert not any(flags(net).values())
    assert net.ties() == {"1.weight": "0.bias"}
