"""What PyTorch users write by habit: it works as there, or the error names what to write."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import lamina
from lamina import nn
from lamina.errors import DeferredError, LaminaError, LoadError

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
VALUE = np.array([[1.0, -2.0, 3.0], [0.5, 4.0, -6.0]], np.float32)
OTHER = np.array([[2.0, 0.5, -1.0], [3.0, 0.25, 8.0]], np.float32)
ROW = np.array([[3.0, -0.5, 2.0]], np.float32)
EAGER_AND_JIT = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])


def numbers(value):
    """The value of an array, tensor or box of either library, or a plain number."""
    if hasattr(value, "detach"):
        value = value.detach()
    if "bfloat16" in str(getattr(value, "dtype", "")):
        value = value.float() if hasattr(value, "float") else value.astype(jnp.float32)
    return np.asarray(value)


# reset_parameters: every module, from the recipes.

LAYERS = {
    "Linear": lambda m: m.Linear(3, 4),
    "no bias": lambda m: m.Linear(3, 4, bias=False),
    "Conv2d": lambda m: m.Conv2d(2, 4, 3),
    "BatchNorm1d": lambda m: m.BatchNorm1d(3),
    "BatchNorm2d": lambda m: m.BatchNorm2d(3, affine=False),
    "no statistics": lambda m: m.BatchNorm1d(3, track_running_stats=False),
    "LayerNorm": lambda m: m.LayerNorm(3),
    "Embedding": lambda m: m.Embedding(7, 3),
    "padding": lambda m: m.Embedding(7, 3, padding_idx=2),
}


def spoil(net, wrap):
    """Overwrite everything with a value that no recipe gives."""
    net.load_state_dict({
        name: wrap(np.full(tuple(value.shape), 1000, numbers(value).dtype))
        for name, value in net.state_dict().items()
    })  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_are_reset_as_in_torch(torch, make):
    """The same entries are constants, with the same values; the rest is drawn, as it is wide."""
    ours, theirs = make(nn), make(torch.nn)
    spoil(ours, jnp.asarray)
    spoil(theirs, torch.tensor)
    assert ours.reset_parameters() is None
    theirs.reset_parameters()
    for name, value in theirs.state_dict().items():
        expected, found = numbers(value), numbers(ours.state_dict()[name])
        if np.ptp(expected) == 0:
            np.testing.assert_array_equal(found, expected, err_msg=name)
            continue
        assert 0 < np.abs(found).max() < 10, name
        if name == "weight" and expected.ndim == 2 and not expected[2].any():
            assert not found[2].any()
        else:
            assert found.all(), name


MODELS = {
    "Sequential": lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4))),
    "ModuleList": lambda: nn.ModuleList([nn.Linear(3, 4), nn.BatchNorm1d(4)]),
    "ModuleDict": lambda: nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.BatchNorm1d(4)}),
    "ParameterList": lambda: nn.ParameterList([nn.Parameter(shape=(3,), init=nn.init.Normal())]),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_containers_reset_everything_below(make):
    net = make()
    spoil(net, jnp.asarray)
    net.reset_parameters()
    for name, value in net.state_dict().items():
        assert np.abs(value).max() < 10, name
    assert all(not value.any() for name, value in net.state_dict().items() if "mean" in name)


def test_a_module_of_ones_own_is_reset():
    class Own(nn.Module):
        def __init__(self):
            self.weight = nn.Parameter(shape=(2, 3), init=nn.init.Constant(3.0))
            self.table = nn.Buffer(shape=(2,), init=nn.init.Ones())
            self.hidden = nn.Buffer(shape=(2,), init=nn.init.Ones(), persistent=False)
            self.given = nn.Parameter(jnp.full(2, 5.0))
            self.layers = [nn.Linear(3, 3)]

    net = Own()
    net.weight.data = jnp.zeros((2, 3))
    net.table = jnp.zeros(2)
    net.hidden = jnp.zeros(2)
    net.layers[0].bias.data = jnp.full(3, 1000.0)
    net.reset_parameters()
    np.testing.assert_array_equal(net.weight.data, np.full((2, 3), 3.0))
    np.testing.assert_array_equal(net.table, np.ones(2))
    np.testing.assert_array_equal(net.hidden, np.ones(2))
    np.testing.assert_array_equal(net.given.data, np.full(2, 5.0))
    assert np.abs(net.layers[0].bias.data).max() < 1


def test_a_model_trained_and_reset():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    opt = lamina.Optimizer(net, optax.sgd(0.1))
    step = lamina.jit(lambda net, opt: opt.step(lamina.grad(lambda net: (net(X) ** 2).sum())(net)))
    net(X)
    for _ in range(3):
        step(net, opt)
    trained, boxes = net.state_dict(), dict(net.named_parameters())
    net.reset_parameters()
    state = net.state_dict()
    assert int(state["1.num_batches_tracked"]) == 0
    np.testing.assert_array_equal(state["1.running_mean"], np.zeros(4))
    np.testing.assert_array_equal(state["1.running_var"], np.ones(4))
    np.testing.assert_array_equal(state["1.weight"], np.ones(4))
    assert not np.array_equal(state["0.weight"], trained["0.weight"])
    assert all(net.get_parameter(name) is box for name, box in boxes.items())
    step(net, opt)
    assert int(net.state_dict()["1.num_batches_tracked"]) == 1


def test_resetting_follows_the_seed():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net(X)

    def values(seed):
        lamina.manual_seed(seed)
        net.reset_parameters()
        return {name: np.asarray(value).tobytes() for name, value in net.state_dict().items()}

    one = values(1)
    assert values(2) != one
    assert values(1) == one


def test_resetting_keeps_all_but_the_values():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).bfloat16()
    net[1].weight = net[0].weight
    nn.init.rules(net, {"0.bias": nn.init.Constant(2.0)})
    net[1].bias.requires_grad = False
    net[0].bias.data = jnp.zeros(3, jnp.bfloat16)
    net.reset_parameters()
    assert {p.dtype for p in net.parameters()} == {jnp.dtype("bfloat16")}
    assert net.ties() == {"1.weight": "0.weight"}
    assert not net[1].bias.requires_grad
    np.testing.assert_array_equal(net[0].bias.data, np.full(3, 2.0))


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(3, 4), lambda: nn.LazyLinear(4)], ids=["abstract", "lazy"]
)
def test_resetting_before_values_makes_none(make):
    net = nn.Sequential(make(), nn.LazyBatchNorm1d())
    net.reset_parameters()
    assert not any(p.is_material for p in net.parameters())
    net(X)
    assert np.abs(net[0].weight.data).max() < 1


def test_resetting_in_a_compiled_function_is_right_or_refused():
    """Under another seed the values are other ones, compiled or not."""
    net = nn.Linear(3, 4)
    net(X)
    reset = lamina.jit(lambda net: net.reset_parameters())
    for seed in (1, 2):
        lamina.manual_seed(seed)
        try:
            reset(net)
        except LaminaError:
            return
        found = np.asarray(net.weight.data)
        lamina.manual_seed(seed)
        net.reset_parameters()
        np.testing.assert_array_equal(found, net.weight.data)


# has_uninitialized_params.

LAZY = {
    "LazyLinear": (lambda m: m.LazyLinear(2), (4, 3)),
    "LazyConv2d": (lambda m: m.LazyConv2d(2, 3), (1, 3, 5, 5)),
    "LazyBatchNorm1d": (lambda m: m.LazyBatchNorm1d(), (4, 3)),
    "LazyBatchNorm2d": (lambda m: m.LazyBatchNorm2d(), (1, 3, 5, 5)),
}


@pytest.mark.parity
@pytest.mark.parametrize(("make", "shape"), LAZY.values(), ids=LAZY)
def test_uninitialized_parameters_as_in_torch(torch, make, shape):
    ours, theirs = make(nn), make(torch.nn)
    assert ours.has_uninitialized_params() is theirs.has_uninitialized_params() is True
    ours(jnp.ones(shape))
    assert ours.has_uninitialized_params() is False


def test_uninitialized_parameters_of_other_modules():
    assert not nn.Linear(3, 2).has_uninitialized_params()
    assert not nn.ReLU().has_uninitialized_params()
    assert nn.Linear(None, 2).has_uninitialized_params()
    net = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.LazyLinear(1)))
    assert net.has_uninitialized_params()
    lamina.infer(net, jax.ShapeDtypeStruct((4, 3), jnp.float32))
    assert not net.has_uninitialized_params()
    assert not net[0].weight.is_material


# In-place methods, against torch.

IN_PLACE = {
    "mul_ number": lambda p, a: p.mul_(2.5),
    "mul_ array": lambda p, a: p.mul_(a(OTHER)),
    "mul_ row": lambda p, a: p.mul_(a(ROW)),
    "mul_ scalar array": lambda p, a: p.mul_(a(np.float32(3))),
    "mul_ itself": lambda p, a: p.mul_(p),
    "add_ number": lambda p, a: p.add_(2),
    "add_ array": lambda p, a: p.add_(a(OTHER)),
    "add_ alpha": lambda p, a: p.add_(a(OTHER), alpha=-0.5),
    "add_ number alpha": lambda p, a: p.add_(2, alpha=3),
    "sub_ row": lambda p, a: p.sub_(a(ROW)),
    "sub_ alpha": lambda p, a: p.sub_(a(OTHER), alpha=2),
    "sub_ itself": lambda p, a: p.sub_(p),
    "div_ number": lambda p, a: p.div_(4),
    "div_ array": lambda p, a: p.div_(a(OTHER)),
    "lerp_ number": lambda p, a: p.lerp_(a(OTHER), 0.25),
    "lerp_ array": lambda p, a: p.lerp_(a(OTHER), a(np.abs(ROW))),
    "lerp_ ends": lambda p, a: p.lerp_(a(OTHER), 1.0),
    "clamp_ both": lambda p, a: p.clamp_(-1, 2),
    "clamp_ min": lambda p, a: p.clamp_(min=0.75),
    "clamp_ max": lambda p, a: p.clamp_(max=0.75),
    "clamp_ positional": lambda p, a: p.clamp_(0.5),
    "clamp_ arrays": lambda p, a: p.clamp_(a(ROW) - 1, a(ROW)),
    "clamp_ crossed": lambda p, a: p.clamp_(2, 1),
    "chain": lambda p, a: p.mul_(0.9).add_(a(OTHER), alpha=0.1).clamp_(max=3).sub_(1).div_(2),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_place_methods_as_in_torch(torch, name, dtype):
    """Also with float32 operands of a bfloat16 parameter, where PyTorch takes them."""
    update, narrow = IN_PLACE[name], getattr(torch, dtype)
    operand = dtype if name.startswith("lerp_") else "float32"
    ours = nn.Parameter(jnp.asarray(VALUE, dtype))
    theirs = torch.nn.Parameter(torch.tensor(VALUE).to(narrow))
    with torch.no_grad():
        assert update(theirs, lambda v: torch.tensor(v).to(getattr(torch, operand))) is theirs
    assert update(ours, lambda v: jnp.asarray(v, operand)) is ours
    assert str(ours.dtype) == dtype
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "name", ["mul_ array", "add_ alpha", "lerp_ number", "clamp_ both", "chain"]
)
@pytest.mark.parametrize(
    "argument", [np.asarray, jnp.asarray, nn.Parameter], ids=["numpy", "jax", "parameter"]
)
def test_in_place_methods_in_compiled_functions(name, argument):
    """The new value comes out, call after call; arguments may be arrays or parameters."""
    eager, net = nn.Module(), nn.Module()
    eager.weight, net.weight = nn.Parameter(VALUE), nn.Parameter(VALUE)

    def step(net):
        IN_PLACE[name](net.weight, argument)

    compiled = lamina.jit(step)
    for _ in range(2):
        step(eager)
        compiled(net)
        np.testing.assert_allclose(net.weight.data, eager.weight.data, rtol=1e-6)


@pytest.mark.parametrize("name", ["mul_ array", "chain"])
def test_the_result_of_an_in_place_method_may_be_returned(name):
    """They return the parameter, which leaves a compiled function as its value."""
    eager, net = nn.Module(), nn.Module()
    eager.weight, net.weight = nn.Parameter(VALUE), nn.Parameter(VALUE)
    expected = IN_PLACE[name](eager.weight, jnp.asarray)
    found = lamina.jit(lambda net: IN_PLACE[name](net.weight, jnp.asarray))(net)
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-6)
    np.testing.assert_allclose(net.weight.data, eager.weight.data, rtol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(
    "update",
    [
        lambda p: p.mul_(3), lambda p: p.add_(2, alpha=3), lambda p: p.sub_(1),
        lambda p: p.clamp_(2, 3), lambda p: p.mul_(2.5), lambda p: p.add_(0.5),
        lambda p: p.div_(2), lambda p: p.add_(1, alpha=0.5),
    ],
    ids=["mul", "add", "sub", "clamp", "mul float", "add float", "div", "alpha float"],
)  # fmt: skip
def test_integers_as_in_torch(torch, update):
    """What does not fit into integers is refused, and nothing is changed."""
    ours = nn.Parameter(jnp.asarray([1, 2, 5], jnp.int32), requires_grad=False)
    theirs = torch.nn.Parameter(torch.tensor([1, 2, 5], dtype=torch.int32), requires_grad=False)
    refused = None
    try:
        update(theirs)
    except RuntimeError as error:
        refused = error
    if refused is None:
        update(ours)
    else:
        with pytest.raises(TypeError, match="dtype"):
            update(ours)
    np.testing.assert_array_equal(ours.data, theirs.numpy())
    assert ours.dtype == jnp.int32


@pytest.mark.parametrize("method", ["mul_", "add_", "sub_", "div_", "lerp_"])
@pytest.mark.parametrize(
    "other",
    [np.ones((4, 3)), np.ones((2, 4)), np.ones((2, 2, 3)), 1j],
    ids=["longer", "wider", "deeper", "complex"],
)
def test_what_does_not_fit_is_refused(method, other):
    p = nn.Parameter(ROW)
    other = jnp.asarray(other)
    with jax.numpy_rank_promotion("allow"), pytest.raises((TypeError, ValueError)):
        getattr(p, method)(*((other, 0.5) if method == "lerp_" else (other,)))
    np.testing.assert_array_equal(p.data, ROW)


@pytest.mark.parity
def test_vectors_are_broadcast_as_in_torch(torch):
    ours, theirs = nn.Parameter(VALUE), torch.nn.Parameter(torch.tensor(VALUE))
    with torch.no_grad():
        theirs.mul_(torch.tensor(ROW[0])).add_(torch.tensor(ROW[0]), alpha=2)
    with jax.numpy_rank_promotion("allow"):
        ours.mul_(jnp.asarray(ROW[0])).add_(jnp.asarray(ROW[0]), alpha=2)
    np.testing.assert_allclose(ours.data, numbers(theirs), rtol=1e-6)


def test_clamp_needs_a_bound():
    with pytest.raises((TypeError, ValueError)):
        nn.Parameter(VALUE).clamp_()


def test_values_that_do_not_exist_yet_are_drawn_first():
    p = nn.Parameter(shape=(2, 3), init=nn.init.Constant(4.0))
    np.testing.assert_array_equal(p.mul_(0.5).data, np.full((2, 3), 2.0))
    with pytest.raises(DeferredError):
        nn.Parameter(shape=(2, None), init=nn.init.Ones()).mul_(2)


def test_boxes_of_buffers_have_the_methods_too():
    net = nn.BatchNorm1d(3)
    net.get_buffer("running_var").mul_(0.5).add_(1).clamp_(max=1.25)
    np.testing.assert_array_equal(net.state_dict()["running_var"], np.full(3, 1.25))
    net.get_buffer("running_mean").lerp_(jnp.ones(3), 0.5)
    np.testing.assert_array_equal(net.state_dict()["running_mean"], np.full(3, 0.5))
    assert net.get_buffer("running_var").size() == (3,)


@pytest.mark.parity
@EAGER_AND_JIT
def test_a_moving_average_as_in_torch(torch, compiled):
    """The usual loop over the parameters of two models, both ways to write it."""

    def lerp(average, net):
        for a, p in zip(average.parameters(), net.parameters(), strict=True):
            a.lerp_(p, 0.1)

    def two_steps(average, net):
        for a, p in zip(average.parameters(), net.parameters(), strict=True):
            a.mul_(0.9).add_(p, alpha=0.1)

    ours = [nn.Linear(3, 2) for _ in range(2)]
    theirs = [torch.nn.Linear(3, 2) for _ in range(2)]
    for a, b in zip(ours, theirs, strict=True):
        b.load_state_dict({k: torch.tensor(np.array(v)) for k, v in a.state_dict().items()})
    for update in (lerp, two_steps):
        mine = lamina.jit(update) if compiled else update
        for _ in range(2):
            mine(*ours)
            with torch.no_grad():
                update(*theirs)
    for name, value in theirs[0].state_dict().items():
        np.testing.assert_allclose(ours[0].state_dict()[name], numbers(value), rtol=1e-5, atol=1e-6)


# Reading methods, against torch.

READING = {
    "clone": lambda p, m: p.clone(),
    "dim": lambda p, m: p.dim(),
    "size": lambda p, m: tuple(p.size()),
    "size first": lambda p, m: p.size(0),
    "size last": lambda p, m: p.size(-1),
    "size dim": lambda p, m: p.size(dim=1),
    "numel": lambda p, m: p.numel(),
    "t": lambda p, m: p.t(),
    "norm": lambda p, m: p.norm(),
    "norm 1": lambda p, m: p.norm(1),
    "norm p": lambda p, m: p.norm(p=3),
    "norm 0": lambda p, m: p.norm(0),
    "norm inf": lambda p, m: p.norm(float("inf")),
    "norm minus inf": lambda p, m: p.norm(float("-inf")),
    "norm fro": lambda p, m: p.norm("fro"),
    "norm dim": lambda p, m: p.norm(2, 1),
    "norm keepdim": lambda p, m: p.norm(2, dim=0, keepdim=True),
    "norm all dims": lambda p, m: p.norm(p=2, dim=(0, 1)),
    "norm last": lambda p, m: p.norm(1, dim=-1),
    "norm max of rows": lambda p, m: p.norm(float("inf"), dim=1),
    "new_zeros": lambda p, m: p.new_zeros(2, 3),
    "new_zeros tuple": lambda p, m: p.new_zeros((4,)),
    "new_zeros list": lambda p, m: p.new_zeros([2, 2]),
    "new_zeros one": lambda p, m: p.new_zeros(5),
    "new_zeros dtype": lambda p, m: p.new_zeros(2, dtype=m.int32),
    "new_zeros size": lambda p, m: p.new_zeros(p.size()),
    "to": lambda p, m: p.to(m.float16),
    "to dtype": lambda p, m: p.to(dtype=m.bfloat16),
    "to int": lambda p, m: p.to(m.int32),
    "to place": lambda p, m: p.to("cpu"),
    "to both": lambda p, m: p.to("cpu", m.float16),
    "to other": lambda p, m: p.to(p.new_zeros(1, dtype=m.float16)),
    "detach": lambda p, m: p.detach(),
}


@pytest.mark.parity
@pytest.mark.parametrize("read", READING.values(), ids=READING)
def test_reading_methods_as_in_torch(torch, read):
    ours, theirs = nn.Parameter(VALUE), torch.nn.Parameter(torch.tensor(VALUE))
    found, expected = read(ours, jnp), read(theirs, torch)
    if isinstance(expected, (int, tuple)):
        assert found == expected
        assert type(found) is type(expected)
    else:
        assert isinstance(found, jax.Array)
        assert str(found.dtype) == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_allclose(
            numbers(found), numbers(expected), rtol=1e-3 if found.dtype.itemsize < 4 else 1e-6
        )
    np.testing.assert_array_equal(ours.data, VALUE)
    assert ours.dtype == jnp.float32


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_transposing_as_in_torch(torch, shape):
    value = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    ours, theirs = nn.Parameter(value), torch.nn.Parameter(torch.tensor(value))
    np.testing.assert_array_equal(ours.t(), numbers(theirs.t()))
    assert ours.dim() == theirs.dim()
    assert tuple(ours.size()) == tuple(theirs.size())


def test_what_torch_refuses_is_refused():
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"t\(\)|2|two"):
        nn.Parameter(jnp.ones((2, 2, 2))).t()
    with pytest.raises(IndexError):
        nn.Parameter(VALUE).size(5)


def test_size_is_a_number_that_can_be_called():
    p = nn.Parameter(VALUE)
    assert p.size == 6
    assert p.size + 1 == 7
    assert isinstance(p.size, int)
    assert len(range(p.size)) == 6
    assert jnp.zeros(p.size).shape == (6,)
    assert p.size() == p.shape == (2, 3)
    assert p.size(0) == p.size(-2) == 2
    abstract = nn.Parameter(shape=(4, 5), init=nn.init.Ones())
    assert (abstract.size, abstract.size(), abstract.size(1), abstract.dim()) == (20, (4, 5), 5, 2)
    assert not abstract.is_material
    with pytest.raises(DeferredError):
        nn.Parameter(shape=(4, None)).size + 1


def test_parameters_go_to_places_without_moving():
    p, place = nn.Parameter(VALUE), jax.devices()[3]
    assert p.to(place).devices() == {place}
    assert p.to(SingleDeviceSharding(place)).devices() == {place}
    assert p.to("cpu:3", "float16").dtype == jnp.float16
    assert p.to(device=place, dtype=jnp.bfloat16).devices() == {place}
    assert p.data.devices() == {jax.devices()[0]}
    assert p.dtype == jnp.float32


def test_a_clone_stays_what_it_was():
    net = nn.Linear(3, 2)
    before, taken = np.array(net.weight.data), net.weight.clone()

    @lamina.jit
    def step(net):
        net.weight.mul_(0.5)

    for _ in range(3):
        step(net)
        later = net.weight.clone()
    np.testing.assert_array_equal(taken, before)
    np.testing.assert_allclose(later, before / 8, rtol=1e-6)


@pytest.mark.parity
@EAGER_AND_JIT
def test_gradients_flow_through_reading_methods_as_in_torch(torch, compiled):
    def loss(p, half):
        return (
            (p.clone() * p).sum() + p.norm() + p.norm(1, dim=1).sum() + (p.t() ** 3).sum()
            + p.to(half).sum() + (p.detach() * p).sum()
        )  # fmt: skip

    net = nn.Module()
    net.weight = nn.Parameter(VALUE)
    theirs = torch.nn.Parameter(torch.tensor(VALUE))
    loss(theirs, torch.float16).backward()
    gradient = lamina.grad(lambda net: loss(net.weight, jnp.float16).astype(jnp.float32))
    found = (lamina.jit(gradient) if compiled else gradient)(net)
    np.testing.assert_allclose(found["weight"], theirs.grad.numpy(), rtol=1e-4)


# Hooks on the gradients of parameters.


def double(grad):
    return grad * 2


HOOKS = {
    "replaced": lambda p, log: p.register_hook(double),
    "looked at": lambda p, log: p.register_hook(lambda g: log.append(float(g.sum()))),
    "two": lambda p, log: (p.register_hook(lambda g: g + 1), p.register_hook(double)),
    "one removed": lambda p, log: (p.register_hook(double), p.register_hook(double).remove()),
    "two and a look": lambda p, log: (
        p.register_hook(double), p.register_hook(lambda g: log.append(float(g.sum()))),
    ),
    "block": lambda p, log: p.register_hook(double).__enter__(),
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_gradient_hooks_as_in_torch(torch, hook):
    """Called once a pass with the whole gradient, wherever the parameter is used."""
    net, log, their_log = nn.Module(), [], []
    net.weight = nn.Parameter(VALUE)
    theirs = torch.nn.Parameter(torch.tensor(VALUE))
    hook(net.weight, log)
    hook(theirs, their_log)

    def loss(p):
        return (p * 3).sum() + (p * p).sum()

    for _ in range(2):
        loss(theirs).backward()
        lamina.backward(lambda: loss(net.weight))
    np.testing.assert_allclose(net.weight.grad, theirs.grad.numpy(), rtol=1e-6)
    assert log == their_log
    theirs.grad = None
    (expected,) = torch.autograd.grad(loss(theirs), theirs)
    found = lamina.grad(lambda net: loss(net.weight))(net)["weight"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert log == their_log


WAYS = {
    "grad": lambda net: lamina.grad(lambda net: net(X).sum())(net),
    "value_and_grad": lambda net: lamina.value_and_grad(lambda net: net(X).sum())(net)[1],
    "compiled": lamina.jit(lambda net: lamina.grad(lambda net: net(X).sum())(net)),
    "closure": lambda net: lamina.grad(lambda _: net(X).sum(), wrt="*")(net),
}


def by_backward(net):
    net.zero_grad()
    lamina.backward(lambda: net(X).sum())
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize(
    "way", [*WAYS.values(), by_backward, lamina.jit(by_backward)],
    ids=[*WAYS, "backward", "backward compiled"],
)  # fmt: skip
def test_gradient_hooks_everywhere(way):
    """Hooks that come and go are noticed, also by what is compiled."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    net[0].weight.data = jnp.eye(3)
    plain = {name: np.asarray(grad) for name, grad in way(net).items()}
    handle = net[0].weight.register_hook(lambda g: jnp.clip(g, -0.1, 0.1))
    hooked = way(net)
    np.testing.assert_allclose(hooked["0.weight"], np.clip(plain["0.weight"], -0.1, 0.1), rtol=1e-5)
    for name in ("0.bias", "1.weight", "1.bias"):
        np.testing.assert_allclose(hooked[name], plain[name], rtol=1e-5)
    handle.remove()
    handle.remove()
    np.testing.assert_allclose(way(net)["0.weight"], plain["0.weight"], rtol=1e-5)


def test_a_hook_of_a_tied_parameter_sees_the_total_once():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    total = lamina.grad(lambda net: net(X).sum())(net)["0.weight"]
    seen = []
    net[1].weight.register_hook(lambda g: seen.append(np.asarray(g)))
    lamina.backward(lambda: net(X).sum())
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0], total, rtol=1e-5)


def test_a_hook_of_a_parameter_without_shape():
    net = nn.LazyLinear(1, bias=False)
    net.weight.register_hook(double)
    grads = lamina.grad(lambda net: net(X).sum())(net)
    np.testing.assert_allclose(grads["weight"], 2 * X.sum(0, keepdims=True), rtol=1e-5)


@pytest.mark.parity
def test_hooks_that_torch_refuses(torch):
    for m, value in ((nn, jnp.ones(2)), (torch.nn, torch.ones(2))):
        with pytest.raises(RuntimeError, match="grad"):
            m.Parameter(value, requires_grad=False).register_hook(double)


def test_a_hook_that_returns_another_shape():
    net = nn.Linear(3, 1)
    net.weight.register_hook(lambda g: g.sum())
    with pytest.raises((TypeError, ValueError, RuntimeError), match="shape"):
        lamina.grad(lambda net: net(X).sum())(net)


def test_optimizers_see_what_hooks_return():
    net = nn.Linear(3, 1)
    net.weight.register_hook(jnp.zeros_like)
    opt = lamina.Optimizer(net, optax.sgd(0.1))
    before = net.state_dict()
    opt.step(lamina.grad(lambda net: net(X).sum())(net))
    np.testing.assert_array_equal(net.weight.data, before["weight"])
    assert not np.array_equal(net.bias.data, before["bias"])


# Names that do not exist here say what to write instead.

MISSING = {
    "lamina.no_grad": (lambda: lamina, "no_grad", r"detach|stop_gradient|requires_grad_|lamina\.grad"),
    "lamina.autocast": (lambda: lamina, "autocast", r"bfloat16|\.half\(|\.to\("),
    "net.cuda": (lambda: nn.Linear(1, 1), "cuda", r"\.to\("),
    "sequential.cuda": (lambda: nn.Sequential(nn.ReLU()), "cuda", r"\.to\("),
    "p.backward": (lambda: nn.Parameter(VALUE), "backward", r"lamina\.backward"),
    "opt.param_groups": (
        lambda: lamina.Optimizer(nn.Linear(1, 1), optax.adam(0.1)), "param_groups", "hyperparams",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "name", "replacement"), MISSING.values(), ids=MISSING)
def test_missing_names_say_what_to_write(make, name, replacement):
    thing = make()
    with pytest.raises(AttributeError, match=rf"fix:[\s\S]*(?:{replacement})"):
        getattr(thing, name)
    assert not hasattr(thing, name)
    assert getattr(thing, name, None) is None
    assert name not in dir(thing)


def test_other_names_are_missing_as_ever():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lamina.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="nothing"):
        lamina.Optimizer(nn.Linear(1, 1), optax.adam(0.1)).nothing  # noqa: B018
    with pytest.raises(ImportError):
        from lamina import no_grad  # noqa: F401


def test_names_of_ones_own_are_not_in_the_way():
    class Own(nn.Module):
        def __init__(self):
            self.autocast = 3

        def cuda(self):
            return "mine"

    net = Own()
    assert (net.cuda(), net.autocast) == ("mine", 3)
    part = nn.Module()
    part.cuda = nn.Linear(2, 2)
    assert list(part.state_dict()) == ["cuda.weight", "cuda.bias"]
    assert part.cuda.in_features == 2


# data and detach.


@EAGER_AND_JIT
def test_data_is_not_detached_and_detach_is(compiled):
    """Unlike PyTorch's: under ``grad`` the value is the one that is differentiated."""
    net = nn.Module()
    net.weight = nn.Parameter(VALUE)

    def gradient(net, read):
        return lamina.grad(lambda net: (read(net.weight) * net.weight).sum())(net)["weight"]

    for read, expected in [
        (lambda p: p.data, 2 * VALUE),
        (lambda p: p.clone(), 2 * VALUE),
        (lambda p: p.detach(), VALUE),
        (lambda p: jax.lax.stop_gradient(p.data), VALUE),
    ]:
        take = lambda net, read=read: gradient(net, read)  # noqa: E731
        found = (lamina.jit(take) if compiled else take)(net)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    lamina.backward(lambda: (net.weight.detach() * net.weight).sum())
    np.testing.assert_allclose(net.weight.grad, VALUE, rtol=1e-6)


def test_the_difference_is_documented():
    assert "detach" in inspect.getdoc(nn.Parameter.data)


# Two values for one tie.


def tied():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    return net


ONE, TWO = jnp.eye(3), 2 * jnp.eye(3)


@pytest.mark.parity
def test_two_values_for_one_tie_are_refused_as_in_torch(torch):
    ours, theirs = tied(), torch.nn.Sequential(
        torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
    )  # fmt: skip
    theirs[1].weight = theirs[0].weight
    with pytest.raises(ValueError, match=r"0\.weight"):
        torch.func.functional_call(
            theirs, {"0.weight": torch.eye(3), "1.weight": 2 * torch.eye(3)}, torch.tensor(X)
        )
    with pytest.raises(LoadError, match=r"1\.weight[\s\S]*0\.weight|0\.weight[\s\S]*1\.weight"):
        lamina.functional_call(ours, {"0.weight": ONE, "1.weight": TWO}, X)


@pytest.mark.parametrize(
    "params",
    [
        {"1.weight": TWO, "0.weight": ONE},
        {"0.weight": ONE, "1.weight": np.asarray(TWO)},
        ({"0.weight": ONE}, {"1.weight": TWO}),
    ],
    ids=["other order", "other kind", "two dicts"],
)
def test_two_values_in_any_form(params):
    with pytest.raises(LoadError, match=r"0\.weight"):
        lamina.functional_call(tied(), params, X)


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.grad, lamina.jit], ids=["jit", "grad", "lamina"]
)
def test_two_values_under_transforms(transform):
    net = tied()
    with pytest.raises(LoadError, match=r"0\.weight"):
        transform(lambda p: lamina.functional_call(net, p, X).sum())(
            {"0.weight": ONE, "1.weight": TWO}
        )


@pytest.mark.parametrize(
    "params",
    [
        {"0.weight": TWO},
        {"1.weight": TWO},
        {"0.weight": TWO, "1.weight": TWO},
        {"0.weight": TWO, "1.weight": np.asarray(TWO)},
    ],
    ids=["first", "second", "the same twice", "equal"],
)
def test_one_value_for_one_tie(params):
    net = tied()
    np.testing.assert_allclose(lamina.functional_call(net, params, X), 4 * X, rtol=1e-6)
    assert net[1].weight is net[0].weight


def test_the_values_of_a_tied_model_are_its_own():
    net = tied()
    np.testing.assert_allclose(
        lamina.functional_call(net, dict(net.state_dict()), X), net(X), rtol=1e-6
    )


# Sharded parameters.

MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
PLACES = {
    "rows": NamedSharding(MESH, PartitionSpec("a")),
    "both": NamedSharding(MESH, PartitionSpec("b", "a")),
    "everywhere": NamedSharding(MESH, PartitionSpec()),
}
NEW = np.arange(64, dtype=np.float32).reshape(8, 8)


class Holder(nn.Module):
    def __init__(self, **options):
        self.weight = nn.Parameter(shape=(8, 8), init=nn.init.Normal(), **options)

    def forward(self, x):
        return x @ self.weight


def made_with(place):
    return Holder(sharding=place)


def set_later(place):
    net = Holder()
    net.weight.sharding = place
    return net


def moved(place):
    return Holder().to(place)


def moved_with_value(place):
    net = Holder()
    net.weight.sum()
    return net.to(place)


def materialised(place):
    return lamina.materialize(Holder(), shardings={"weight": place})


def given(place):
    net = nn.Module()
    net.weight = nn.Parameter(jax.device_put(jnp.ones((8, 8)), place))
    return net


def assign(net, value):
    net.weight = value


def load(net, value):
    net.load_state_dict({"weight": value})


def set_part(net, value):
    net.weight[:] = value


def add_in_place(net, value):
    net.weight += value


WRITES = {
    "attribute": assign,
    "data": lambda net, value: setattr(net.weight, "data", value),
    "index": set_part,
    "+=": add_in_place,
    "copy_": lambda net, value: net.weight.copy_(value),
    "fill_": lambda net, value: net.weight.fill_(3),
    "mul_": lambda net, value: net.weight.mul_(value),
    "lerp_": lambda net, value: net.weight.lerp_(value, 0.5),
    "load": load,
    "optimizer": lambda net, value: lamina.Optimizer(net, optax.adam(0.1)).step({"weight": value}),
}
NOT_COMPILED = {"load", "optimizer"}


def assert_placed(net, place):
    for sharding in (net.weight.data.sharding, net.weight.sharding):
        assert sharding.is_equivalent_to(place, 2), sharding


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_keeps_the_sharding(write):
    net = made_with(PLACES["rows"])
    for value in (np.asarray, jnp.asarray):
        write(net, value(NEW))
        assert_placed(net, PLACES["rows"])


@pytest.mark.parametrize("name", [name for name in WRITES if name not in NOT_COMPILED])
def test_writing_in_a_compiled_function_keeps_the_sharding(name):
    eager, net = made_with(PLACES["both"]), made_with(PLACES["both"])
    eager.weight, net.weight = NEW + 1, NEW + 1

    @lamina.jit
    def step(net):
        WRITES[name](net, jnp.zeros((8, 8)) + 2)

    for _ in range(3):
        step(net)
        WRITES[name](eager, jnp.full((8, 8), 2.0))
        assert_placed(net, PLACES["both"])
        np.testing.assert_allclose(net.weight.data, eager.weight.data, rtol=1e-6)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(
    "make", [made_with, set_later, moved, moved_with_value, materialised, given],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_however_it_came_to_be_sharded(make, place):
    net = make(place)
    net.weight = jnp.asarray(NEW)
    assert_placed(net, place)
    np.testing.assert_array_equal(net.weight.data, NEW)
    net.weight[0] = 7.0
    assert_placed(net, place)


def test_a_compiled_training_step_keeps_the_sharding():
    net = made_with(PLACES["rows"])
    opt = lamina.Optimizer(net, optax.adam(0.1))
    step = lamina.jit(
        lambda net, opt: opt.step(lamina.grad(lambda net: (net(NEW) ** 2).sum())(net))
    )
    net.weight = np.ones((8, 8), np.float32)
    for _ in range(3):
        step(net, opt)
        assert_placed(net, PLACES["rows"])


def test_a_value_for_another_place_comes_to_the_parameter_s_place():
    there, other = jax.devices()[5], jax.devices()[2]
    net = made_with(SingleDeviceSharding(there))
    for write in (assign, set_part, add_in_place, load):
        write(net, jnp.asarray(NEW))
        assert net.weight.data.devices() == {there}
    net.weight = jax.device_put(jnp.asarray(NEW), other)
    assert net.weight.data.devices() == {there}
    net = made_with(PLACES["rows"])
    net.weight = jax.device_put(jnp.asarray(NEW), PLACES["both"])
    assert_placed(net, PLACES["rows"])


def test_a_new_dtype_keeps_the_sharding():
    net = made_with(PLACES["rows"])
    net.weight = NEW
    net.bfloat16()
    assert_placed(net, PLACES["rows"])
    net.reset_parameters()
    assert_placed(net, PLACES["rows"])


@EAGER_AND_JIT
def test_a_sharded_buffer(compiled):
    net = nn.Module()
    net.table = nn.Buffer(shape=(8, 8), init=nn.init.Zeros(), sharding=PLACES["rows"])

    def step(net):
        net.table = jnp.ones((8, 8)) * 3

    (lamina.jit(step) if compiled else step)(net)
    box = net.get_buffer("table")
    assert box.data.sharding.is_equivalent_to(PLACES["rows"], 2)
    np.testing.assert_array_equal(box.data, np.full((8, 8), 3.0))
