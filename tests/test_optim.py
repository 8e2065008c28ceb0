"""Optimizer: against torch.optim, and everything that changes after it is made."""

import copy
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lamina
from lamina import nn
from lamina._core.errors import DeferredError, LoadError

X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)


def mlp(m=nn):
    return m.Sequential(m.Linear(3, 4), m.Tanh(), m.Linear(4, 1))


def loss_of(net):
    return ((net(X) - 1) ** 2).mean()


def train(net, opt, steps=3):
    for _ in range(steps):
        opt.step(lamina.grad(loss_of)(net))


ALGORITHMS = {
    "sgd": (lambda o, p: o.SGD(p, lr=0.1), optax.sgd(0.1)),
    "momentum": (lambda o, p: o.SGD(p, lr=0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
    "nesterov": (
        lambda o, p: o.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    ),
    "adam": (lambda o, p: o.Adam(p, lr=0.05), optax.adam(0.05)),
    "adamw": (
        lambda o, p: o.AdamW(p, lr=0.05, weight_decay=0.1),
        optax.adamw(0.05, weight_decay=0.1),
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", ALGORITHMS)
def test_equals_torch(torch, name):
    make, tx = ALGORITHMS[name]
    ours, theirs = mlp(), mlp(torch.nn)
    theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in ours.state_dict().items()})
    opt, their_opt = lamina.Optimizer(ours, tx), make(torch.optim, theirs.parameters())
    step = lamina.jit(lambda net, opt: opt.step(lamina.grad(loss_of)(net)))
    for _ in range(5):
        step(ours, opt)
        their_opt.zero_grad()
        ((theirs(torch.tensor(X)) - 1) ** 2).mean().backward()
        their_opt.step()
    for key, value in theirs.state_dict().items():
        np.testing.assert_allclose(
            ours.state_dict()[key], value.numpy(), rtol=1e-4, atol=1e-5, err_msg=key
        )


def test_equals_plain_optax():
    net = mlp()
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01))
    params = dict(net.state_dict())
    state = tx.init(params)
    opt = lamina.Optimizer(net, tx)
    for _ in range(3):
        grads = lamina.grad(loss_of)(net)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        opt.step(grads)
    for name, value in params.items():
        np.testing.assert_allclose(net.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    assert jax.tree.structure(opt.state) == jax.tree.structure(state)


def test_extra_arguments_reach_the_transformation():
    net = mlp()
    tx = optax.contrib.reduce_on_plateau(patience=1) if hasattr(optax, "contrib") else None
    opt = lamina.Optimizer(net, optax.chain(optax.sgd(0.1), tx))
    loss, grads = lamina.value_and_grad(loss_of)(net)
    opt.step(grads, value=loss)


def test_schedules_inside_compiled_steps():
    net = nn.Linear(3, 1)
    opt = lamina.Optimizer(net, optax.sgd(lambda count: jnp.where(count < 2, 1.0, 0.0)))
    step = lamina.jit(lambda net, opt: opt.step({"weight": jnp.ones((1, 3)), "bias": jnp.ones(1)}))
    before = np.array(net.weight.data)
    for _ in range(4):
        step(net, opt)
    np.testing.assert_allclose(net.weight.data, before - 2, rtol=1e-5)


# Things that change later.


def test_made_before_shapes_are_known():
    lamina.manual_seed(0)
    net = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1))
    opt = lamina.Optimizer(net, optax.adam(0.05))
    assert repr(opt)
    net(X)
    train(net, opt)
    lamina.manual_seed(0)
    eager = mlp()
    train(eager, lamina.Optimizer(eager, optax.adam(0.05)))
    for name, value in eager.state_dict().items():
        np.testing.assert_allclose(net.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_stepping_before_shapes_are_known():
    net = nn.Sequential(nn.LazyLinear(4))
    opt = lamina.Optimizer(net, optax.adam(0.05))
    with pytest.raises(DeferredError, match=r"sizes are unknown: 0\.weight[\s\S]*net\(x\)"):
        opt.step({})


def test_tied_parameters_have_one_state():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    opt = lamina.Optimizer(net, optax.adam(0.05))
    assert sorted(k for k in opt.state_dict() if "weight" in k) == [
        "0.mu.0.weight",
        "0.nu.0.weight",
    ]
    train(net, opt)
    assert net[1].weight is net[0].weight


def test_frozen_from_the_start():
    net = mlp()
    net[0].requires_grad_(False)
    opt = lamina.Optimizer(net, optax.adam(0.05))
    before = np.array(net[0].weight.data)
    assert not any(".0." in name for name in opt.state_dict())
    train(net, opt)
    np.testing.assert_array_equal(net[0].weight.data, before)


def test_frozen_and_thawed_later():
    net = mlp()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    train(net, opt)
    mu = np.array(opt.state_dict()["0.mu.2.weight"])
    net[0].requires_grad_(False)
    before = np.array(net[0].weight.data)
    assert "0.mu.0.weight" not in opt.state_dict()
    np.testing.assert_array_equal(opt.state_dict()["0.mu.2.weight"], mu)
    assert int(opt.state_dict()["0.count"]) == 3
    train(net, opt)
    np.testing.assert_array_equal(net[0].weight.data, before)
    net[0].requires_grad_(True)
    train(net, opt)
    assert not np.array_equal(net[0].weight.data, before)
    assert int(opt.state_dict()["0.count"]) == 9


def test_layer_added_later():
    net = mlp()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    train(net, opt)
    mu = np.array(opt.state_dict()["0.mu.0.weight"])
    net.append(nn.Linear(1, 1))
    np.testing.assert_array_equal(opt.state_dict()["0.mu.0.weight"], mu)
    assert not opt.state_dict()["0.mu.3.weight"].any()
    before = np.array(net[3].weight.data)
    train(net, opt)
    assert not np.array_equal(net[3].weight.data, before)


def test_changes_are_followed_by_a_compiled_step():
    net = mlp()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    step = lamina.jit(lambda net, opt: opt.step(lamina.grad(loss_of)(net)))
    step(net, opt)
    net[0].requires_grad_(False)
    frozen = np.array(net[0].weight.data)
    step(net, opt)
    np.testing.assert_array_equal(net[0].weight.data, frozen)
    net.append(nn.Linear(1, 1))
    added = np.array(net[3].weight.data)
    step(net, opt)
    assert not np.array_equal(net[3].weight.data, added)
    assert int(opt.state_dict()["0.count"]) == 3


def test_changes_are_followed_by_a_closure():
    net = mlp()
    opt = lamina.Optimizer(net, optax.adam(0.05))

    @lamina.jit
    def step():
        opt.step(lamina.grad(loss_of)(net))

    step()
    net[0].requires_grad_(False)
    frozen = np.array(net[0].weight.data)
    step()
    np.testing.assert_array_equal(net[0].weight.data, frozen)


def test_state_outlives_a_change_of_dtype():
    net = mlp()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    train(net, opt)
    mu = np.array(opt.state_dict()["0.mu.0.weight"])
    net.to("bfloat16")
    net.append(nn.Identity())
    found = np.asarray(opt.state_dict()["0.mu.0.weight"].astype(jnp.float32))
    np.testing.assert_allclose(found, mu, rtol=1e-2)
    train(net, opt)
    assert net[0].weight.dtype == jnp.bfloat16


def test_two_optimizers_share_a_model():
    net = mlp()
    head = lamina.Optimizer(net[2], optax.sgd(0.1))
    body = lamina.Optimizer(net[0], optax.sgd(0.01))
    grads = lamina.grad(loss_of)(net)
    before = net.state_dict()
    head.step({k[2:]: v for k, v in grads.items() if k.startswith("2.")})
    body.step({k[2:]: v for k, v in grads.items() if k.startswith("0.")})
    np.testing.assert_allclose(
        net[2].weight.data, before["2.weight"] - 0.1 * grads["2.weight"], rtol=1e-5
    )
    np.testing.assert_allclose(
        net[0].weight.data, before["0.weight"] - 0.01 * grads["0.weight"], rtol=1e-5
    )


def test_part_of_the_gradients():
    net = mlp()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    before = net.state_dict()
    opt.step({"2.bias": jnp.ones(1)})
    after = net.state_dict()
    changed = [n for n in after if not np.array_equal(after[n], before[n])]
    assert changed == ["2.bias"]
    assert not opt.state_dict()["0.mu.0.weight"].any()


def test_weights_are_not_decayed_without_gradient():
    """As in PyTorch: a parameter whose .grad is None is skipped altogether."""
    net = mlp()
    opt = lamina.Optimizer(net, optax.adamw(0.05, weight_decay=0.5))
    before = np.array(net[0].weight.data)
    lamina.backward(lambda: net[2](jnp.ones((1, 4))).sum())
    opt.step()
    np.testing.assert_array_equal(net[0].weight.data, before)


# State.


def test_state_dict_round_trip():
    net = mlp()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    train(net, opt)
    state, values = opt.state_dict(), net.state_dict()
    train(net, opt)
    expected = net.state_dict()

    twin = mlp()
    twin.load_state_dict(values)
    other = lamina.Optimizer(twin, optax.adam(0.05))
    other.load_state_dict({name: np.asarray(value) for name, value in state.items()})
    train(twin, other)
    for name, value in expected.items():
        np.testing.assert_allclose(twin.state_dict()[name], value, rtol=1e-6)


def test_state_is_an_optax_state():
    net = mlp()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    train(net, opt)
    state = opt.state
    assert int(state[0].count) == 3
    opt.state = jax.tree.map(jnp.zeros_like, state)
    assert int(opt.state_dict()["0.count"]) == 0
    with pytest.raises(LoadError, match="another structure"):
        opt.state = {"a": 1}


def test_loading_is_all_or_nothing():
    net = mlp()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    train(net, opt)
    state = opt.state_dict()
    before = {k: np.array(v) for k, v in state.items()}
    bad = dict(state)
    bad["0.count"] = jnp.asarray(77, jnp.int32)
    bad["0.nu.0.weight"] = jnp.ones((4, 5))
    bad["0.mu.2.bais"] = bad.pop("0.mu.2.bias")
    with pytest.raises(
        LoadError,
        match=r"missing: 0\.mu\.2\.bias[\s\S]*0\.nu\.0\.weight: expected float32\[4, 3\], got float32\[4, 5\]"
        r"[\s\S]*unexpected: 0\.mu\.2\.bais",
    ):
        opt.load_state_dict(bad)
    for name, value in opt.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_state_before_the_first_step():
    opt = lamina.Optimizer(mlp(), optax.adam(0.05))
    assert all(not v.any() for v in opt.state_dict().values())


def test_injected_hyperparameters():
    net = mlp()
    opt = lamina.Optimizer(net, optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    grads = lamina.grad(loss_of)(net)
    with pytest.raises(TypeError, match=r"snapshot[\s\S]*fix: opt\.hyperparams"):
        opt.state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    opt.hyperparams["learning_rate"] = 0.0
    before = np.array(net[0].weight.data)
    opt.step(grads)
    np.testing.assert_array_equal(net[0].weight.data, before)


def test_deepcopy_of_model_and_optimizer_together():
    net = mlp()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    train(net, opt)
    twin, other = copy.deepcopy((net, opt))
    assert other.net is twin
    before = np.array(net[0].weight.data)
    train(twin, other)
    np.testing.assert_array_equal(net[0].weight.data, before)
    train(net, opt)
    np.testing.assert_allclose(net[0].weight.data, twin[0].weight.data, rtol=1e-5)


def test_optimizer_is_freed():
    net = mlp()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    train(net, opt, 1)
    reference = weakref.ref(opt)
    del opt
    gc.collect()
    assert reference() is None


# Errors.


def test_wrong_gradients_are_all_listed():
    net = mlp()
    net[0].bias.requires_grad = False
    opt = lamina.Optimizer(net, optax.sgd(0.1))
    before = net.state_dict()
    with pytest.raises(
        LoadError,
        match=r"0\.wieght: is no parameter of the model\. Did you mean '0\.weight'"
        r"[\s\S]*0\.bias: is frozen or tied[\s\S]*2\.weight: expected shape \(1, 4\), got \(4, 1\)",
    ):
        opt.step({"0.wieght": 1, "0.bias": jnp.ones(4), "2.weight": jnp.ones((4, 1))})
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_no_gradients():
    opt = lamina.Optimizer(mlp(), optax.sgd(0.1))
    with pytest.raises(DeferredError, match=r"no parameter has a gradient[\s\S]*lamina\.backward"):
        opt.step()


def test_wrong_arguments():
    with pytest.raises(
        TypeError, match=r"expected a module, got generator[\s\S]*requires_grad_\(False\)"
    ):
        lamina.Optimizer(mlp().parameters(), optax.sgd(0.1))
    with pytest.raises(TypeError, match="expected an optax transformation, got float"):
        lamina.Optimizer(mlp(), 0.1)
