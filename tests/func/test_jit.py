"""lamina.jit: effects in place, when it compiles again, donation, errors, interrupts, threads."""

import gc
import subprocess
import sys
import textwrap
import threading
import unittest.mock
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lamina
from lamina import nn
from lamina._core.errors import DataDependentError, LaminaError, StaticWriteError
from lamina.nn import functional as F

X = jnp.ones((2, 3))


class Traced:
    """A function that counts how often it is traced."""

    def __init__(self, fn):
        # Not a number in a field: a compiled function must not change what outlives the call.
        self.probe = probe = unittest.mock.Mock()

        def counted(*args, **kwargs):
            probe()
            return fn(*args, **kwargs)

        self.jit = lamina.jit(counted)

    @property
    def count(self):
        return self.probe.call_count

    def __call__(self, *args, **kwargs):
        return self.jit(*args, **kwargs)

    def settled(self, *args, **kwargs):
        """Call twice, then return how many more traces a third call needs."""
        self.jit(*args, **kwargs)
        self.jit(*args, **kwargs)
        before = self.count
        self.jit(*args, **kwargs)
        return self.count - before


def forward(net, x):
    return net(x)


class Counter(nn.Module):
    def __init__(self):
        self.calls = nn.Buffer(jnp.asarray(0))
        self.scale = nn.Parameter(jnp.ones(()))

    def forward(self, x):
        self.calls += 1
        return x * self.scale


# Effects.


def test_equals_eager():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    np.testing.assert_allclose(lamina.jit(forward)(net, X), net(X), rtol=1e-6)


def test_buffer_written_in_forward():
    net = Counter()
    f = lamina.jit(forward)
    for expected in (1, 2, 3):
        f(net, X)
        assert int(net.calls) == expected


def test_parameter_written_in_every_way():
    @lamina.jit
    def edit(net):
        net.weight[0, 0] = 42.0
        net.weight[1:] += 1
        net.bias.data = jnp.zeros(2)
        net.bias.fill_(3.0)
        net.weight *= 2

    net = nn.Linear(3, 2)
    expected = np.array(net.weight.data)
    edit(net)
    expected[0, 0] = 42
    expected[1:] += 1
    np.testing.assert_allclose(net.weight.data, expected * 2, rtol=1e-6)
    np.testing.assert_array_equal(net.bias.data, [3.0, 3.0])


def test_gradient_written_inside():
    @lamina.jit
    def accumulate(net, x):
        return lamina.backward(lambda: net(x).sum())

    net = nn.Linear(3, 1)
    for times in (1, 2, 3):
        accumulate(net, X)
        np.testing.assert_allclose(net.weight.grad, np.full((1, 3), 2.0 * times))
    net.zero_grad()
    accumulate(net, X)
    np.testing.assert_allclose(net.weight.grad, np.full((1, 3), 2.0))


def test_gradient_cleared_inside():
    @lamina.jit
    def clear(net):
        net.zero_grad()

    net = nn.Linear(3, 1)
    lamina.backward(lambda: net(X).sum())
    clear(net)
    assert net.weight.grad is None
    lamina.backward(lambda: net(X).sum())
    np.testing.assert_allclose(net.weight.grad, np.full((1, 3), 2.0))


def test_random_stream_goes_on():
    drop = nn.Dropout()
    x = jnp.ones(64)
    lamina.manual_seed(0)
    eager = [drop(x) for _ in range(4)]
    lamina.manual_seed(0)
    f = lamina.jit(forward)
    mixed = [f(drop, x), drop(x), f(drop, x), f(drop, x)]
    for a, b in zip(eager, mixed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_manual_seed_inside_and_outside():
    f = lamina.jit(lambda x: F.dropout(x))
    x = jnp.ones(64)
    lamina.manual_seed(3)
    first = f(x)
    f(x)
    lamina.manual_seed(3)
    np.testing.assert_array_equal(f(x), first)

    @lamina.jit
    def seeded(x):
        lamina.manual_seed(3)
        return F.dropout(x)

    np.testing.assert_array_equal(seeded(x), first)
    np.testing.assert_array_equal(seeded(x), first)


def test_rng_block_around_and_inside():
    x = jnp.ones(64)
    f = lamina.jit(lambda x: F.dropout(x))
    with lamina.rng(5):
        outside = f(x)

    @lamina.jit
    def inside(x):
        with lamina.rng(5):
            return F.dropout(x)

    lamina.manual_seed(0)
    np.testing.assert_array_equal(inside(x), outside)
    after = F.dropout(x)
    lamina.manual_seed(0)
    np.testing.assert_array_equal(F.dropout(x), after)


def test_training_step_equals_eager():
    def step(net, opt, x, y):
        loss, grads = lamina.value_and_grad(lambda net: ((net(x) - y) ** 2).mean())(net)
        opt.step(grads)
        return loss

    runs = []
    for run in (step, lamina.jit(step)):
        lamina.manual_seed(0)
        # No bias before the normalisation: its gradient is zero but for rounding.
        net = nn.Sequential(
            nn.LazyLinear(4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1)
        )
        opt = lamina.Optimizer(net, optax.adam(1e-2))
        x = jax.random.normal(jax.random.key(0), (6, 3))
        runs.append(([run(net, opt, x, x[:, :1]) for _ in range(4)], net.state_dict()))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-6)
    for name, value in runs[0][1].items():
        np.testing.assert_allclose(value, runs[1][1][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_unshaped_model_is_inferred_by_the_call():
    net = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    out = lamina.jit(forward)(net, X)
    assert out.shape == (2, 2)
    assert type(net[0]) is nn.Linear
    np.testing.assert_allclose(net(X), out, rtol=1e-6)


# Ways to pass things.


def test_closure():
    net = Counter()
    f = Traced(lambda x: net(x))
    assert f.settled(X) == 0
    assert int(net.calls) == 3
    net.scale.data = jnp.asarray(5.0)
    np.testing.assert_allclose(f(X), np.full((2, 3), 5.0))


def test_closure_and_argument_at_once():
    net = Counter()

    @lamina.jit
    def f(other, x):
        return net(x) + other(x)

    for _ in range(3):
        f(net, X)
    assert int(net.calls) == 6
    other = Counter()
    f(other, X)
    assert (int(net.calls), int(other.calls)) == (7, 1)
    f(net, X)
    assert (int(net.calls), int(other.calls)) == (9, 1)


def test_keywords_lists_and_dicts():
    @lamina.jit
    def f(nets, *, extra, x):
        return nets[0](x) + nets[1]["a"](x) + extra(x)

    nets = [Counter(), {"a": Counter()}]
    extra = Counter()
    for _ in range(3):
        f(nets, extra=extra, x=X)
    assert [int(n.calls) for n in (nets[0], nets[1]["a"], extra)] == [3, 3, 3]


def test_one_module_passed_twice():
    @lamina.jit
    def f(a, b, x):
        return a(x) + b(x)

    one, two = Counter(), Counter()
    f(one, one, X)
    f(one, one, X)
    assert int(one.calls) == 4
    f(one, two, X)
    assert (int(one.calls), int(two.calls)) == (5, 1)


def test_a_module_and_its_part():
    @lamina.jit
    def f(whole, part, x):
        part[0].weight.data = part[0].weight.data + 1
        return whole(x)

    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3)))
    before = np.array(net[0][0].weight.data)
    f(net, net[0], X)
    out = f(net, net[0], X)
    np.testing.assert_allclose(net[0][0].weight.data, before + 2, rtol=1e-6)
    np.testing.assert_allclose(out, net(X), rtol=1e-6)


def test_of_a_module():
    net = Counter()
    f = lamina.jit(net)
    np.testing.assert_allclose(f(X), X)
    assert int(net.calls) == 1
    net.scale.data = jnp.asarray(2.0)
    np.testing.assert_allclose(f(X), 2 * X)


def test_compile_method():
    net = Counter()
    net.compile()
    net(X)
    net(X)
    assert int(net.calls) == 2


def test_of_a_method():
    class Model(Counter):
        @lamina.jit
        def step(self, x, factor=1):
            return self(x) * factor

    one, two = Model(), Model()
    two.scale.data = jnp.asarray(3.0)
    np.testing.assert_allclose(one.step(X), X)
    np.testing.assert_allclose(two.step(X, factor=2), 6 * X)
    assert (int(one.calls), int(two.calls)) == (1, 1)


def test_of_a_method_of_a_plain_object():
    class Trainer:
        def __init__(self):
            self.net = Counter()

        @lamina.jit
        def step(self, x):
            return self.net(x)

    one, two = Trainer(), Trainer()
    one.step(X)
    one.step(X)
    two.step(X)
    assert (int(one.net.calls), int(two.net.calls)) == (2, 1)


def test_as_decorator_with_options():
    @lamina.jit(static_argnames="mode", static_argnums=1)
    def f(net, times, mode="plus"):
        total = sum(net(X).sum() for _ in range(times))
        return total if mode == "plus" else -total

    net = Counter()
    assert float(f(net, 2)) == 12
    assert float(f(net, 3, mode="minus")) == -18
    assert int(net.calls) == 5


def test_strings_are_static():
    f = Traced(lambda net, activation, x: getattr(jnp, activation)(net(x)))
    net = Counter()
    np.testing.assert_allclose(f(net, "sin", X), jnp.sin(X), rtol=1e-6)
    np.testing.assert_allclose(f(net, "cos", X), jnp.cos(X), rtol=1e-6)
    assert f.settled(net, "sin", X) == 0


def test_functions_are_static():
    f = Traced(lambda net, activation, x: activation(net(x)))
    net = Counter()
    np.testing.assert_allclose(f(net, jnp.sin, X), jnp.sin(X), rtol=1e-6)
    np.testing.assert_allclose(f(net, jnp.cos, X), jnp.cos(X), rtol=1e-6)


def test_parameters_as_arguments_are_values():
    net = nn.Linear(3, 2)
    out = lamina.jit(lambda p, x: x @ p.T)(net.weight, X)
    np.testing.assert_allclose(out, X @ net.weight.T, rtol=1e-6)


def test_numbers_do_not_compile_again():
    f = Traced(lambda net, x, rate: net(x) * rate)
    net = Counter()
    f(net, X, 0.1)
    f(net, X, 0.1)
    before = f.count
    np.testing.assert_allclose(f(net, X, 0.5), 0.5 * X)
    assert f.count == before


def test_results_of_any_kind():
    net = Counter()

    @lamina.jit
    def f(net, x):
        return {"out": net(x), "name": "counter", "net": net, "none": None, "n": 3}

    for _ in range(2):
        out = f(net, X)
        assert out["name"] == "counter"
        assert out["net"] is net
        assert out["none"] is None
        assert int(out["n"]) == 3


def test_results_of_another_instance():
    f = lamina.jit(lambda net, x: (net, net(x)))
    one, two = Counter(), Counter()
    assert f(one, X)[0] is one
    assert f(one, X)[0] is one
    assert f(two, X)[0] is two
    assert f(two, X)[0] is two


# When it compiles again.


def test_same_structure_does_not_compile_again():
    f = Traced(forward)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(3)]
    f.settled(nets[0], X)
    before = f.count
    for net in nets:
        f(net, X)
    assert f.count <= before + 2  # a look at each of the two new ones
    assert [int(net[1].num_batches_tracked) for net in nets] == [4, 1, 1]


def test_new_values_do_not_compile_again():
    net = nn.Linear(3, 2)
    f = Traced(forward)
    f.settled(net, X)
    before = f.count
    net.weight.data = jnp.zeros((2, 3))
    net.bias[0] = 7.0
    net.load_state_dict({"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)})
    np.testing.assert_allclose(f(net, X), np.full((2, 2), 4.0))
    assert f.count == before


def test_building_another_model_does_not_compile_again():
    net = nn.Linear(3, 2)
    f = Traced(forward)
    f.settled(net, X)
    before = f.count
    nn.Linear(5, 5).weight.sum()
    f(net, X)
    assert f.count == before


@pytest.mark.parametrize("as_argument", [True, False], ids=["argument", "closure"])
def test_mode_is_noticed(as_argument):
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(1.0))
    g = lamina.jit(forward)
    f = (lambda x: g(net, x)) if as_argument else lamina.jit(lambda x: net(x))
    for _ in range(2):
        assert not f(X).any()
    net.eval()
    for _ in range(2):
        np.testing.assert_allclose(f(X), net(X), rtol=1e-6)
    net.train()
    assert not f(X).any()
    net[1].training = False
    np.testing.assert_allclose(f(X), net(X), rtol=1e-6)


def test_mode_of_a_closure_without_boxes_is_noticed():
    drop = nn.Dropout(1.0)
    f = lamina.jit(lambda x: drop(x))
    assert not f(X).any()
    drop.eval()
    np.testing.assert_allclose(f(X), X)


def test_mode_of_a_closure_called_inside_a_module_is_noticed():
    drop = nn.Dropout(1.0)

    class Uses(nn.Module):
        def forward(self, x):
            return drop(x)

    f = lamina.jit(forward)
    net = Uses()
    assert not f(net, X).any()
    drop.eval()
    np.testing.assert_allclose(f(net, X), X)


def test_module_reached_through_a_plain_object_is_noticed():
    class Trainer:
        def __init__(self):
            self.drop = nn.Dropout(1.0)

    trainer = Trainer()
    f = lamina.jit(lambda x: trainer.drop(x))
    assert not f(X).any()
    trainer.drop.eval()
    np.testing.assert_allclose(f(X), X)


class Scaled(nn.Module):
    def __init__(self):
        self.weight = nn.Parameter(jnp.ones(()))
        self.factor = 1.0
        self.steps = [1.0, 2.0]
        self.table = {"a": 1.0}
        self.names = {"a"}
        self.nested = ([1.0], {"k": [2.0]})

    def forward(self, x):
        total = self.factor + sum(self.steps) + self.table["a"] + len(self.names)
        return x * self.weight * (total + self.nested[0][0] + self.nested[1]["k"][0])


CHANGES = {
    "attribute": lambda net: setattr(net, "factor", 5.0),
    "list element": lambda net: net.steps.__setitem__(0, 9.0),
    "list append": lambda net: net.steps.append(9.0),
    "dict value": lambda net: net.table.update(a=7.0),
    "set": lambda net: net.names.add("b"),
    "nested list": lambda net: net.nested[0].__setitem__(0, 4.0),
    "nested dict": lambda net: (
        net.nested[1]["k"].append(4.0) or net.nested[1]["k"].__setitem__(0, 8.0)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("as_argument", [True, False], ids=["argument", "closure"])
def test_static_change_is_noticed(change, as_argument):
    net = Scaled()
    g = lamina.jit(forward)
    f = (lambda x: g(net, x)) if as_argument else lamina.jit(lambda x: net(x))
    before = f(X)
    f(X)
    change(net)
    np.testing.assert_allclose(f(X), net(X))
    assert not np.allclose(f(X), before)
    np.testing.assert_allclose(f(X), net(X))


def test_changing_back_uses_the_old_program():
    net = Scaled()
    f = Traced(forward)
    f.settled(net, X)
    net.factor = 2.0
    f.settled(net, X)
    before = f.count
    net.factor = 1.0
    np.testing.assert_allclose(f(net, X), net(X))
    assert f.count == before


def test_equal_assignment_does_not_compile_again():
    net = Scaled()
    f = Traced(forward)
    f.settled(net, X)
    before = f.count
    net.factor = 1.0
    net.train()
    f(net, X)
    assert f.count == before


STRUCTURE = {
    "replace a module": lambda net: net.__setitem__(1, nn.Tanh()),
    "replace by an equal module": lambda net: net.__setitem__(0, nn.Linear(3, 3)),
    "append a module": lambda net: net.append(nn.Tanh()),
    "remove a module": lambda net: net.pop(1),
    "replace a parameter": lambda net: setattr(net[0], "weight", nn.Parameter(jnp.ones((3, 3)))),
    "remove the bias": lambda net: setattr(net[0], "bias", None),
    "tie": lambda net: setattr(net[2], "weight", net[0].weight),
    "edit the registry": lambda net: net._modules.__setitem__("1", nn.Sigmoid()),
    "forward hook": lambda net: net[0].register_forward_hook(lambda m, a, out: out * 2),
    "freeze": lambda net: net[0].requires_grad_(False),
}


@pytest.mark.parametrize("change", STRUCTURE.values(), ids=STRUCTURE)
@pytest.mark.parametrize("as_argument", [True, False], ids=["argument", "closure"])
def test_structure_change_is_noticed(change, as_argument):
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))

    def grads(net, x):
        return lamina.value_and_grad(lambda net: net(x).sum())(net)

    g = lamina.jit(grads)
    f = (lambda x: g(net, x)) if as_argument else lamina.jit(lambda x: grads(net, x))
    f(X)
    f(X)
    change(net)
    for _ in range(2):
        (loss, found), (expected_loss, expected) = f(X), grads(net, X)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_removing_a_hook_is_noticed():
    net = nn.Identity()
    net.weight = nn.Parameter(jnp.ones(()))
    handle = net.register_forward_pre_hook(lambda m, args: (args[0] * 5,))
    f = lamina.jit(forward)
    np.testing.assert_allclose(f(net, X), 5 * X)
    handle.remove()
    np.testing.assert_allclose(f(net, X), X)


def test_backward_pre_hook_is_noticed():
    net = nn.Linear(3, 1)
    f = lamina.jit(lambda net, x: lamina.grad(lambda net: net(x).sum())(net))
    before = f(net, X)["weight"]
    net.register_full_backward_pre_hook(lambda m, grads: tuple(g * 2 for g in grads))
    np.testing.assert_allclose(f(net, X)["weight"], 2 * before)


def test_shape_and_dtype_change():
    net = nn.Linear(3, 2)
    f = lamina.jit(forward)
    assert f(net, X).shape == (2, 2)
    assert f(net, jnp.ones((5, 3))).shape == (5, 2)
    net.half()
    assert f(net, X.astype(jnp.float16)).dtype == jnp.float16


def test_two_structures_take_turns():
    f = Traced(forward)
    a, b = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for _ in range(3):
        f(a, X)
        f(b, X)
    before = f.count
    for _ in range(3):
        f(a, X)
        f(b, X)
    assert f.count == before
    assert int(b[1].num_batches_tracked) == 6


def test_rebound_global_is_noticed():
    space = {"net": Counter()}
    exec("def f(x): return net(x)", space)
    f = lamina.jit(space["f"])
    f(X)
    space["net"] = other = Counter()
    other.scale.data = jnp.asarray(4.0)
    np.testing.assert_allclose(f(X), 4 * X)
    assert int(other.calls) == 1


# Donation.


def bump(net):
    net.weight += 1


@pytest.mark.parametrize("read", [
    lambda net: net.weight.data,
    lambda net: net.state_dict()["weight"],
    lambda net: net.state_dict(keep_vars=True)["weight"].data,
    lambda net: net.weight.detach(),
    lambda net: net.weight.T.T,
    lambda net: net.weight[:],
    lambda net: net.weight.__jax_array__(),
    lambda net: jax.tree.leaves(net.weight)[0],
    lambda net: next(iter(net.parameters())).data,
    lambda net: net.weight.numpy(),
    lambda net: np.asarray(net.weight),
], ids=range(11))  # fmt: skip
def test_donation_keeps_what_the_user_holds(read):
    net = nn.Linear(3, 2)
    f = lamina.jit(bump)
    f(net)
    f(net)
    held = read(net)
    copy = np.array(held, copy=True)
    f(net)
    f(net)
    np.testing.assert_array_equal(np.asarray(held), copy)
    np.testing.assert_allclose(net.weight.data, copy + 2, rtol=1e-6)


def test_donation_keeps_what_the_user_gave():
    net = nn.Linear(3, 2)
    given = jnp.zeros((2, 3))
    net.weight.data = given
    state = {"weight": given, "bias": jnp.zeros(2)}
    f = lamina.jit(bump)
    f(net)
    f(net)
    assert not np.asarray(given).any()
    net.load_state_dict(state)
    f(net)
    f(net)
    assert not np.asarray(given).any()
    other = nn.Parameter(given)
    net.weight = other
    f(net)
    f(net)
    assert not np.asarray(given).any()


def test_donation_keeps_a_copied_model():
    import copy

    net = nn.Linear(3, 2)
    f = lamina.jit(bump)
    f(net)
    twin = copy.deepcopy(net)
    f(net)
    f(twin)
    f(net)
    np.testing.assert_allclose(net.weight.data, np.asarray(twin.weight.data) + 1, rtol=1e-6)


def test_donation_of_values_passed_on():
    """Outputs that are inputs, or one value written twice, must not share one array."""
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    x = jnp.ones((2, 2))

    @lamina.jit
    def take(a, b):
        b.weight.data = a.weight.data

    @lamina.jit
    def set_both(a, b, x):
        a.weight.data = x
        b.weight.data = x
        return x

    @lamina.jit
    def read(a):
        return a.weight.data

    one = lamina.jit(bump)
    for _ in range(2):
        take(a, b)
        one(b)
        one(a)
        got = set_both(a, b, x)
        one(a)
        held = read(a)
        one(a)
        one(b)
        take(a, b)
        one(b)
    for array in (x, got, held, a.weight.data, b.weight.data):
        assert np.isfinite(np.asarray(array)).all()
    np.testing.assert_array_equal(x, np.ones((2, 2)))


def test_donation_of_swapped_values():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    first, second = np.array(a.weight.data), np.array(b.weight.data)

    @lamina.jit
    def swap(a, b):
        a.weight.data, b.weight.data = b.weight.data, a.weight.data

    for _ in range(3):
        swap(a, b)
    np.testing.assert_array_equal(a.weight.data, second)
    np.testing.assert_array_equal(b.weight.data, first)


def test_donated_memory_is_reused():
    net = nn.Linear(64, 64)
    f = lamina.jit(bump)
    f(net)
    f(net)
    before = net.weight._value.unsafe_buffer_pointer()
    f(net)
    assert net.weight._value.unsafe_buffer_pointer() == before


def test_result_that_is_a_written_value_stays_valid():
    @lamina.jit
    def f(net):
        net.weight += 1
        return net.weight.data, net.weight.data

    net = nn.Linear(3, 2)
    first, again = f(net)
    copy = np.array(first)
    f(net)
    f(net)
    np.testing.assert_array_equal(first, copy)
    np.testing.assert_array_equal(again, copy)


def test_optimizer_state_snapshot_stays_valid():
    net = nn.Linear(3, 1)
    opt = lamina.Optimizer(net, optax.adam(0.1))

    @lamina.jit
    def step(net, opt):
        opt.step(lamina.grad(lambda net: net(X).sum())(net))

    step(net, opt)
    held = opt.state_dict()
    copies = {k: np.array(v) for k, v in held.items()}
    step(net, opt)
    step(net, opt)
    for name, value in held.items():
        np.testing.assert_array_equal(value, copies[name])


# Errors.


def snapshot(net):
    return [(name, p._value, p.shape, p.requires_grad) for name, p in net.named_parameters()]


@pytest.mark.parametrize(
    "transform", ["jit", "grad", "vmap", "scan", "remat", "backward", "jit-grad"]
)
def test_exception_in_a_trace_restores_every_box(transform):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    lamina.materialize(net)
    boxes = [*net.parameters(), *net.buffers()]
    before = [box._value for box in boxes]
    lamina.manual_seed(0)
    key = lamina.next_key()
    lamina.manual_seed(0)

    def fail(x):
        net[0].weight *= 2
        net(x)
        lamina.next_key()
        raise RuntimeError("on purpose")

    runs = {
        "jit": lambda: lamina.jit(fail)(X),
        "grad": lambda: lamina.grad(lambda net: fail(X))(net),
        "vmap": lambda: lamina.vmap(fail)(jnp.ones((4, 2, 3))),
        "scan": lambda: lamina.scan(lambda c, x: fail(x), 0.0, jnp.ones((4, 2, 3))),
        "remat": lambda: lamina.remat(fail)(X),
        "backward": lambda: lamina.backward(lambda: fail(X)),
        "jit-grad": lambda: lamina.jit(lambda: lamina.grad(lambda net: fail(X))(net))(),
    }
    with pytest.raises(RuntimeError, match="on purpose"):
        runs[transform]()
    assert all(box._value is value for box, value in zip(boxes, before, strict=True))
    assert (lamina.next_key() == key).all()
    net.eval()(X)


def test_exception_restores_unshaped_layers():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(5, 2))
    text = repr(net)
    with pytest.raises(Exception, match="in module '1'"):
        lamina.jit(net)(X)
    assert net[0].weight.shape == (4, None)
    assert repr(net) == text
    net[1] = nn.Linear(4, 2)
    assert lamina.jit(net)(X).shape == (2, 2)


def test_weak_types_do_not_compile_twice():
    """Python scalars make weakly typed arrays; a box must not keep that."""
    net = nn.Module()
    net.count = nn.Buffer(jnp.asarray(0))
    net.scale = nn.Parameter(jnp.asarray(1.0))

    def f(net):
        net.count += 1
        net.scale *= 2

    traced = Traced(f)
    traced(net)
    before = traced.count
    traced(net)
    assert traced.count == before


def test_exception_after_a_good_call():
    flag = {"fail": False}

    @lamina.jit
    def f(net, x):
        out = net(x)
        if flag["fail"]:
            raise RuntimeError("on purpose")
        return out

    net = Counter()
    f(net, X)
    flag["fail"] = True
    with pytest.raises(RuntimeError, match="on purpose"):
        f(net, jnp.ones((4, 3)))
    assert int(net.calls) == 1
    flag["fail"] = False
    f(net, X)
    assert int(net.calls) == 2


def test_static_write_is_refused():
    class Bad(nn.Module):
        def __init__(self):
            self.count = 0

        def forward(self, x):
            self.count += 1
            return x

    net = Bad()
    with pytest.raises(
        StaticWriteError, match=r"Bad\.count is a plain Python attribute[\s\S]*nn\.Buffer"
    ):
        lamina.jit(net)(X)
    assert net.count == 0
    net(X)
    assert net.count == 1


def test_tracer_in_a_plain_attribute_is_refused():
    class Bad(nn.Module):
        def forward(self, x):
            self.last = x * 2
            return x

    for transform in (lamina.jit, lamina.remat, lambda f: lamina.vmap(f)):
        net = Bad()
        with pytest.raises(
            StaticWriteError, match=r"Bad\.last[\s\S]*self\.register_buffer\('last', None"
        ):
            transform(net)(X)
        assert not hasattr(net, "last")


def test_declared_buffer_takes_any_array():
    class Good(nn.Module):
        def __init__(self):
            self.register_buffer("last", None, persistent=False)

        def forward(self, x):
            self.last = x * 2
            return x

    net = Good()
    assert net.last is None
    f = lamina.jit(net)
    f(X)
    np.testing.assert_array_equal(net.last, 2 * X)
    f(jnp.ones((5, 3)))
    assert net.last.shape == (5, 3)
    assert not net.state_dict()


def test_structure_write_is_refused():
    net = nn.Sequential(nn.Linear(3, 3))

    @lamina.jit
    def f(net, x):
        net.append(nn.ReLU())
        return net(x)

    with pytest.raises(
        StaticWriteError, match="added, replaced or removed inside a compiled function"
    ):
        f(net, X)
    assert len(net) == 1


def test_module_mode_changed_inside_is_refused():
    net = nn.Sequential(nn.Dropout())

    @lamina.jit
    def f(net, x):
        net.eval()
        return net(x)

    with pytest.raises(StaticWriteError, match=r"Sequential\.training|Dropout\.training"):
        f(net, X)
    assert net.training
    assert net[0].training


def test_modules_made_inside_are_free():
    @lamina.jit
    def f(x):
        tmp = nn.Sequential(nn.ReLU(), nn.Identity())
        tmp.note = x
        tmp.append(nn.Tanh())
        return tmp(x)

    np.testing.assert_allclose(f(X), jnp.tanh(X), rtol=1e-6)
    np.testing.assert_allclose(f(X), jnp.tanh(X), rtol=1e-6)


def test_parameters_made_inside():
    @lamina.jit
    def f(x):
        return nn.Linear(3, 2)(x)

    try:
        f(X)
    except LaminaError as error:
        assert "build its modules outside" in str(error)  # noqa: PT017


def test_data_dependent_control_flow_names_the_layer():
    class Shrink(nn.Module):
        def forward(self, x):
            while jnp.abs(x).sum() > 1:
                x = x / 2
            return x

    net = nn.Sequential(nn.Identity(), Shrink())
    assert float(jnp.abs(net(X)).sum()) <= 1
    with pytest.raises(
        DataDependentError, match=r"in module '1': Shrink\(\)[\s\S]*while_loop[\s\S]*lamina\.scan"
    ):
        lamina.jit(net)(X)


def test_error_in_forward_names_path_and_shapes():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 2)))
    for call in (net, lamina.jit(net)):
        with pytest.raises(Exception, match="in_features|dot_general") as caught:
            call(X)
        text = str(caught.value) + "\n".join(getattr(caught.value, "__notes__", []))
        assert "in module '0.0': Linear(in_features=4, out_features=2, bias=True)" in text
        assert "float32[2, 3]" in text


def test_jit_of_something_else():
    with pytest.raises(TypeError, match=r"lamina\.jit: expected a function or a module, got int"):
        lamina.jit(3)


# Nesting.


def test_jit_in_jit():
    inner = lamina.jit(forward)
    outer = lamina.jit(lambda net, x: inner(net, x) + inner(net, x))
    net = Counter()
    for _ in range(3):
        np.testing.assert_allclose(outer(net, X), 2 * X)
    assert int(net.calls) == 6
    inner(net, X)
    assert int(net.calls) == 7


def test_jit_in_jit_by_closure():
    net = Counter()
    inner = lamina.jit(lambda x: net(x))
    outer = lamina.jit(lambda x: inner(x) * 2)
    for _ in range(3):
        outer(X)
    assert int(net.calls) == 3
    net.scale.data = jnp.asarray(3.0)
    np.testing.assert_allclose(outer(X), 6 * X)


def test_jit_in_jit_notices_modes():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(1.0))
    inner = lamina.jit(lambda x: net(x))
    outer = lamina.jit(lambda x: inner(x))
    assert not outer(X).any()
    net.eval()
    np.testing.assert_allclose(outer(X), net(X), rtol=1e-6)


def test_inner_jit_with_lazy_layers():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    inner = lamina.jit(forward)
    out = lamina.jit(lambda net, x: inner(net, x))(net, X)
    assert out.shape == (2, 4)
    assert int(net[1].num_batches_tracked) == 1


def test_jit_in_grad_and_grad_in_jit():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = jax.random.normal(jax.random.key(0), (5, 3))

    def loss(net):
        return (net(x) ** 2).sum()

    eager = lamina.grad(loss)(net)
    jitted = lamina.jit(loss)
    inside = lamina.grad(lambda net: jitted(net))(net)
    outside = lamina.jit(lamina.grad(loss))(net)
    for name, value in eager.items():
        np.testing.assert_allclose(inside[name], value, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(outside[name], value, rtol=1e-4, atol=1e-5)
    assert int(net[1].num_batches_tracked) == 3


def test_jit_in_backward():
    net = nn.Linear(3, 1)
    jitted = lamina.jit(lambda x: net(x).sum())
    lamina.backward(lambda: jitted(X))
    np.testing.assert_allclose(net.weight.grad, np.full((1, 3), 2.0))


def test_jit_in_vmap_and_vmap_in_jit():
    net = nn.Linear(3, 2)
    xs = jax.random.normal(jax.random.key(0), (4, 3))
    jitted = lamina.jit(forward)
    np.testing.assert_allclose(lamina.vmap(lambda x: jitted(net, x))(xs), net(xs), rtol=1e-5)
    np.testing.assert_allclose(lamina.jit(lambda x: lamina.vmap(net)(x))(xs), net(xs), rtol=1e-5)


def test_jit_in_scan():
    net = Counter()
    jitted = lamina.jit(forward)
    _, out = lamina.scan(lambda c, x: (c, jitted(net, x)), 0.0, jnp.ones((4, 3)))
    assert out.shape == (4, 3)
    assert int(net.calls) == 4


def test_closure_updated_between_two_compiled_functions():
    net = nn.Linear(3, 1)
    predict = lamina.jit(lambda x: net(x))

    @lamina.jit
    def update():
        net.weight.data = net.weight.data + 1

    before = predict(X)
    update()
    np.testing.assert_allclose(predict(X), before + 3, rtol=1e-5)
    update()
    np.testing.assert_allclose(predict(X), before + 6, rtol=1e-5)


def test_foreign_jit_inside_is_never_stale():
    """A plain jax.jit of a function that calls a module is refused, also inside lamina.jit."""
    net = nn.Linear(3, 2)
    inner = jax.jit(lambda x: net(x))
    outer = lamina.jit(lambda x: inner(x))
    try:
        outer(X)
        net.weight.data = net.weight.data + 1
        np.testing.assert_allclose(outer(X), net(X), rtol=1e-5)
    except LaminaError as error:
        assert "lamina.jit" in str(error)  # noqa: PT017


# Memory.


def test_a_deleted_module_is_freed():
    f = lamina.jit(forward)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    f(net, X)
    f(net, X)
    reference, box = weakref.ref(net), weakref.ref(net[0].weight)
    del net
    gc.collect()
    assert reference() is None
    assert box() is None


def test_a_deleted_optimizer_is_freed():
    @lamina.jit
    def step(net, opt):
        opt.step(lamina.grad(lambda net: net(X).sum())(net))

    net = nn.Linear(3, 1)
    opt = lamina.Optimizer(net, optax.adam(0.1))
    step(net, opt)
    step(net, opt)
    references = [weakref.ref(net), weakref.ref(opt)]
    del net, opt
    gc.collect()
    assert [r() for r in references] == [None, None]


def test_a_deleted_module_is_freed_after_other_transforms():
    net = nn.Linear(3, 1)
    lamina.backward(lambda: net(X).sum())
    lamina.vmap(net)(X)
    lamina.remat(net)(X)
    lamina.scan(lambda c, x: (c, net(x)), 0.0, X)
    lamina.infer(net, X)
    reference = weakref.ref(net)
    net = None
    gc.collect()
    assert reference() is None


def test_many_modules_leave_no_entries_behind():
    f = lamina.jit(forward)
    for _ in range(5):
        f(nn.Linear(3, 2), X)
    gc.collect()
    assert len(f._bindings) <= 1


# Interrupts and threads.


INTERRUPTED = """
import os, random, signal, sys, threading, time
import jax, jax.numpy as jnp, numpy as np, optax
import lamina
from lamina import nn

net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)], nn.BatchNorm1d(16))
opt = lamina.Optimizer(net, optax.adam(1e-3))
x = jnp.ones((4, 16))

@lamina.jit
def step(net, opt, x):
    loss, grads = lamina.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
    opt.step(grads)
    return loss

for _ in range(3):
    step(net, opt, x)
caught = 0
main = threading.main_thread().ident
generator = random.Random(0)
for round in range(60):
    timer = threading.Timer(generator.random() * 0.01, signal.pthread_kill, (main, signal.SIGINT))
    timer.daemon = True
    try:
        timer.start()
        # An interrupt that arrives in a weak-reference callback is swallowed by Python, so the
        # loop ends by itself.
        for _ in range(2000):
            step(net, opt, x)
            if not timer.is_alive():
                break
    except KeyboardInterrupt:
        caught += 1
    timer.join()
    for name, value in (net.state_dict() | opt.state_dict()).items():
        assert np.isfinite(np.asarray(value)).all(), name
assert caught > 20, caught
step(net, opt, x)
print("fine", int(net[4].num_batches_tracked) > 20)
"""


def test_interrupt_during_compiled_steps():
    """A real SIGINT at random moments; every value must stay usable."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout.strip() == "fine True", done.stderr[-3000:]


def run_threads(*targets):
    errors = []

    def guarded(target):
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_share_a_compiled_function():
    f = lamina.jit(forward)
    nets = [Counter() for _ in range(4)]

    def work(net):
        def run():
            for _ in range(25):
                f(net, X)

        return run

    run_threads(*map(work, nets))
    assert [int(net.calls) for net in nets] == [25] * 4


def test_threads_share_a_model():
    f = lamina.jit(forward)
    net = Counter()

    def run():
        for _ in range(25):
            f(net, X)

    run_threads(run, run, run)
    assert int(net.calls) == 75


def test_a_thread_reads_while_another_trains():
    """What a reader gets is a snapshot, valid whatever the training thread does meanwhile."""
    net = nn.Linear(400, 400)

    @lamina.jit
    def step(net):
        for _ in range(8):
            net.weight.data = jnp.tanh(net.weight.data @ net.weight.data) + 1

    step(net)
    done = threading.Event()

    def train():
        try:
            for _ in range(60):
                step(net)
        finally:
            done.set()

    def read():
        while not done.is_set():
            assert np.isfinite(np.asarray(net.weight.data)).all()
            assert np.isfinite(np.asarray(net.state_dict()["bias"])).all()

    run_threads(train, read)


def test_tracing_in_one_thread_does_not_disturb_another():
    net = nn.Linear(3, 2)
    expected = net(X)
    inside, go_on = threading.Event(), threading.Event()

    @lamina.jit
    def slow(net, x):
        inside.set()
        go_on.wait(1.0)
        return net(x)

    def other():
        inside.wait(10)
        try:
            np.testing.assert_allclose(net(X), expected, rtol=1e-6)
        finally:
            go_on.set()

    run_threads(lambda: slow(net, X), other)


# Looking at it.


def test_lower_and_repr():
    net = nn.Linear(3, 2)
    f = lamina.jit(forward)
    assert "dot_general" in f.lower(net, X).as_text()
    assert repr(f) == "<lamina.jit of forward>"
    assert f.__name__ == "forward"


def test_returned_function_keeps_the_documentation():
    def documented(x):
        """Say something."""
        return x

    assert lamina.jit(documented).__doc__ == "Say something."
