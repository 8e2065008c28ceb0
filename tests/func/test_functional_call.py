"""functional_call: a module as a pure function, for plain JAX transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn
from lamina._core.errors import ForeignTransformError, LoadError

X = jax.random.normal(jax.random.key(0), (4, 3))


def values(net):
    return {name: value + 1 for name, value in net.state_dict().items()}


def test_uses_the_values_and_leaves_the_module_alone():
    net = nn.Linear(3, 2)
    before = net.state_dict()
    params = values(net)
    out = lamina.functional_call(net, params, X)
    np.testing.assert_allclose(out, X @ params["weight"].T + params["bias"][None], rtol=1e-5)
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, lamina.jit], ids=["eager", "jax", "lamina"]
)
def test_under_transforms(transform):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    params = values(net)

    def loss(params, x):
        return (lamina.functional_call(net, params, x) ** 2).sum()

    twin = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    twin.load_state_dict(params)
    expected = lamina.grad(lambda net: (net(X) ** 2).sum())(twin)
    found = transform(jax.grad(loss))(params, X)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


def test_under_vmap_over_parameters():
    nets = [nn.Linear(3, 2) for _ in range(3)]
    stacked = {
        name: jnp.stack([net.state_dict()[name] for net in nets]) for name in ("weight", "bias")
    }
    out = jax.vmap(lambda p: lamina.functional_call(nets[0], p, X))(stacked)
    for i, net in enumerate(nets):
        np.testing.assert_allclose(out[i], net(X), rtol=1e-5, atol=1e-6)


def test_part_of_the_values_and_tuples():
    net = nn.Linear(3, 2)
    out = lamina.functional_call(net, {"bias": jnp.zeros(2)}, X)
    np.testing.assert_allclose(out, X @ net.weight.T, rtol=1e-5)
    both = lamina.functional_call(net, ({"bias": jnp.zeros(2)}, {"weight": jnp.zeros((2, 3))}), X)
    assert not both.any()


@pytest.mark.parity
def test_ties_as_in_torch(torch):
    """A value given under any name of a tied parameter holds for all of them."""
    ours, theirs = (
        lib.Sequential(lib.Linear(2, 2, bias=False), lib.Linear(2, 2, bias=False))
        for lib in (nn, torch.nn)
    )
    ours[1].weight = ours[0].weight
    theirs[1].weight = theirs[0].weight
    new, x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), np.ones((1, 2), np.float32)
    for name in ("0.weight", "1.weight"):
        expected = torch.func.functional_call(theirs, {name: torch.tensor(new)}, torch.tensor(x))
        np.testing.assert_allclose(
            lamina.functional_call(ours, {name: new}, x), expected.detach().numpy()
        )


def test_keyword_arguments_of_the_call():
    class Net(nn.Module):
        def __init__(self):
            self.w = nn.Parameter(jnp.ones(()))

        def forward(self, x, *, factor):
            return x * self.w * factor

    out = lamina.functional_call(Net(), {"w": jnp.asarray(3.0)}, X, factor=2)
    np.testing.assert_allclose(out, 6 * X)


def test_all_problems_at_once():
    with pytest.raises(
        LoadError,
        match=r"unexpected: wieght\. Did you mean 'weight'[\s\S]*bias: expected shape \(2,\), got \(3,\)",
    ):
        lamina.functional_call(nn.Linear(3, 2), {"wieght": 1, "bias": jnp.ones(3)}, X)


def test_state_is_returned():
    net = nn.BatchNorm1d(3)
    params = dict(net.state_dict())

    @jax.jit
    def f(params, x):
        return lamina.functional_call(net, params, x, return_state=True)

    out, state = f(params, X)
    assert set(state) == {"running_mean", "running_var", "num_batches_tracked"}
    assert int(net.num_batches_tracked) == 0
    expected = net(X)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state["running_mean"], net.running_mean, rtol=1e-4, atol=1e-6)
    _, again = f({**params, **state}, X)
    assert int(again["num_batches_tracked"]) == 2


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_lost_state_is_refused(transform):
    net = nn.BatchNorm1d(3)
    params = dict(net.state_dict())
    with pytest.raises(ForeignTransformError, match=r"running_mean[\s\S]*return_state=True"):
        transform(lambda p, x: lamina.functional_call(net, p, x))(params, X)
    assert int(net.num_batches_tracked) == 0


def test_state_that_is_not_given_is_written_to_the_module():
    net = nn.BatchNorm1d(3)
    lamina.functional_call(net, {"weight": jnp.ones(3)}, X)
    assert int(net.num_batches_tracked) == 1
    with pytest.raises(ForeignTransformError, match="plain JAX transform"):
        jax.jit(lambda x: lamina.functional_call(net, {"weight": jnp.ones(3)}, x))(X)
    assert int(net.num_batches_tracked) == 1


def test_random_layers_under_plain_jit():
    net = nn.Sequential(nn.Linear(3, 64), nn.Dropout())
    params = dict(net.state_dict())

    @jax.jit
    def f(params, x, key):
        with lamina.rng(key):
            return lamina.functional_call(net, params, x)

    one, two = f(params, X, jax.random.key(0)), f(params, X, jax.random.key(1))
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(one, f(params, X, jax.random.key(0)))
    with pytest.raises(ForeignTransformError, match=r"lamina\.rng\(key\)"):
        jax.jit(lambda p, x: lamina.functional_call(net, p, x))(params, X)


def test_unshaped_module():
    net = nn.LazyLinear(2)
    out = lamina.functional_call(net, {"weight": jnp.ones((2, 3)), "bias": jnp.zeros(2)}, X)
    np.testing.assert_allclose(out, X.sum(1, keepdims=True).repeat(2, 1), rtol=1e-5)


def test_exception_leaves_the_module_alone():
    net = nn.Linear(3, 2)
    before = net.weight.data
    with pytest.raises(Exception, match="in_features|dot_general"):
        lamina.functional_call(net, {"weight": jnp.zeros((2, 3))}, jnp.ones((2, 7)))
    assert net.weight.data is before


def test_gradient_by_values_inside_lamina_grad():
    net, other = nn.Linear(3, 1), nn.Linear(3, 1)
    grads = lamina.grad(
        lambda other: lamina.functional_call(net, {"weight": other.weight.data * 2}, X).sum()
    )(other)
    np.testing.assert_allclose(grads["weight"], 2 * X.sum(0, keepdims=True), rtol=1e-5)
