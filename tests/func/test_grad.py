"""lamina.grad and value_and_grad, and what plain JAX gradients may and may not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn
from lamina._core.errors import ForeignTransformError, RuleError
from lamina.nn import functional as F

X = jax.random.normal(jax.random.key(0), (4, 3))
Y = jnp.array([0, 1, 1, 0])


def mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(net):
    return F.cross_entropy(net(X), Y)


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(
            np.asarray(found[name]), np.asarray(expected[name]), rtol=1e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.parity
def test_gradients_equal_torch(torch):
    net = mlp()
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in net.state_dict().items()})
    loss = torch.nn.functional.cross_entropy(
        theirs(torch.tensor(np.array(X))), torch.tensor(np.array(Y)).long()
    )
    loss.backward()
    value, grads = lamina.value_and_grad(loss_of)(net)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    assert list(grads) == [name for name, _ in theirs.named_parameters()]
    check_same(grads, {name: p.grad.numpy() for name, p in theirs.named_parameters()})


@pytest.mark.parity
def test_tied_gradients_add_up(torch):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
    theirs[2].weight = theirs[0].weight
    theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in net.state_dict().items()})
    (theirs(torch.tensor(np.array(X))) ** 2).sum().backward()
    grads = lamina.grad(lambda net: (net(X) ** 2).sum())(net)
    check_same(grads, {name: p.grad.numpy() for name, p in theirs.named_parameters()})


def test_grad_is_the_second_half():
    net = mlp()
    check_same(lamina.grad(loss_of)(net), lamina.value_and_grad(loss_of)(net)[1])


def test_aux():
    net = mlp()
    (_, aux), grads = lamina.value_and_grad(
        lambda net: (loss_of(net), {"out": net(X), "name": "mlp", "net": net}), has_aux=True
    )(net)
    np.testing.assert_allclose(aux["out"], net(X), rtol=1e-5)
    assert aux["name"] == "mlp"
    assert aux["net"] is net
    again, aux = lamina.grad(lambda net: (loss_of(net), 3), has_aux=True)(net)
    check_same(again, grads)
    assert aux == 3


def test_argnums():
    net = mlp()

    def f(x, net, scale):
        return (net(x) * scale["s"]).sum()

    scale = {"s": jnp.asarray(2.0)}
    by_x = lamina.grad(f)(X, net, scale)
    assert by_x.shape == X.shape
    both = lamina.grad(f, argnums=(1, 2))(X, net, scale)
    np.testing.assert_allclose(both[1]["s"], net(X).sum(), rtol=1e-5)
    assert list(both[0]) == [name for name, _ in net.named_parameters()]
    np.testing.assert_allclose(by_x, jax.grad(lambda x: f(x, net, scale))(X), rtol=1e-5, atol=1e-6)


def test_lists_and_dicts_of_modules():
    nets = [nn.Linear(3, 1), {"b": nn.Linear(3, 1)}]
    grads = lamina.grad(lambda nets: (nets[0](X) * nets[1]["b"](X)).sum())(nets)
    assert grads[0]["weight"].shape == (1, 3)
    assert list(grads[1]["b"]) == ["weight", "bias"]


def test_one_module_twice_in_the_arguments():
    net = nn.Linear(3, 1)
    one = lamina.grad(lambda net: (net(X) + net(X)).sum())(net)
    twice = lamina.grad(lambda nets: (nets[0](X) + nets[1](X)).sum())([net, net])
    check_same(twice[0], one)
    check_same(twice[1], one)


def test_frozen_parameters_are_left_out():
    net = mlp()
    net[0].requires_grad_(False)
    assert list(lamina.grad(loss_of)(net)) == ["2.weight", "2.bias"]


@pytest.mark.parametrize(
    ("wrt", "names"),
    [
        ("2.*", ["2.weight", "2.bias"]),
        (["*.bias", "0.weight"], ["0.weight", "0.bias", "2.bias"]),
        (lambda name, p: p.ndim == 2, ["0.weight", "2.weight"]),
    ],
)
def test_wrt(wrt, names):
    net = mlp()
    grads = lamina.grad(loss_of, wrt=wrt)(net)
    assert list(grads) == names
    full = lamina.grad(loss_of)(net)
    check_same(grads, {name: full[name] for name in names})


def test_wrt_parameters_also_frozen_ones():
    net = mlp()
    net.requires_grad_(False)
    assert list(lamina.grad(loss_of, wrt=[net[2].bias])(net)) == ["2.bias"]
    assert list(lamina.grad(loss_of, wrt=net[0].weight)(net)) == ["0.weight"]


def test_wrt_nothing():
    with pytest.raises(
        RuleError, match=r"wrt='2\.wieght' selects none[\s\S]*Did you mean '2\.weight'"
    ):
        lamina.grad(loss_of, wrt="2.wieght")(mlp())


def test_integer_parameters_are_left_out():
    net = nn.Linear(3, 1)
    net.steps = nn.Parameter(jnp.asarray(3), requires_grad=False)
    assert list(lamina.grad(lambda net: net(X).sum())(net)) == ["weight", "bias"]


def test_written_state_stays():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout())
    lamina.grad(lambda net: net(X).sum())(net)
    assert int(net[1].num_batches_tracked) == 1
    assert not any(isinstance(b.data, jax.core.Tracer) for b in net.buffers())


def test_written_parameter_stays():
    net = nn.Linear(3, 1)
    net.bias.fill_(0.0)

    def f(net):
        out = net(X).sum()
        net.bias.fill_(5.0)
        return out

    lamina.grad(f)(net)
    np.testing.assert_array_equal(net.bias.data, [5.0])


def test_in_place_write_before_use_has_pytorch_gradients():
    net = nn.Linear(3, 1)

    def f(net):
        net.weight.data = net.weight.data * 2
        return net(X).sum()

    grads = lamina.grad(f)(net)
    np.testing.assert_allclose(grads["weight"], 2 * X.sum(0, keepdims=True), rtol=1e-5)


def test_unshaped_model():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    grads = lamina.grad(loss_of)(net)
    assert {name: g.shape for name, g in grads.items()} == {
        name: p.shape for name, p in net.named_parameters()
    }
    assert len(grads) == 6
    assert int(net[1].num_batches_tracked) == 1


def test_unshaped_wrt():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2))
    assert list(lamina.grad(loss_of, wrt="1.*")(net)) == ["1.weight", "1.bias"]


def test_abstract_values_are_the_same_as_read_ones():
    lamina.manual_seed(0)
    first = lamina.grad(loss_of)(mlp())
    lamina.manual_seed(0)
    net = lamina.materialize(mlp())
    check_same(lamina.grad(loss_of)(net), first)


def test_second_derivative():
    net = nn.Linear(3, 1)
    net.weight.data = jnp.ones((1, 3))

    def outer(net):
        inner = lamina.grad(lambda net: (net.weight.data**3).sum())(net)
        return inner["weight"].sum()

    np.testing.assert_allclose(lamina.grad(outer)(net)["weight"], np.full((1, 3), 6.0))


def test_grad_of_a_module_by_input():
    net = mlp()
    found = lamina.grad(lambda x: net(x).sum())(X)
    np.testing.assert_allclose(found, jax.grad(lambda x: net(x).sum())(X), rtol=1e-6)


def test_detach_stops_the_gradient():
    net = nn.Linear(3, 1)
    grads = lamina.grad(lambda net: (X @ net.weight.detach().T).sum() + 4 * net.bias.sum())(net)
    assert not grads["weight"].any()
    np.testing.assert_allclose(grads["bias"], [4.0])


# Plain JAX.


def test_plain_grad_by_input_of_a_stateless_call():
    net = mlp()
    found = jax.grad(lambda x: net(x).sum())(X)
    expected = lamina.jit(lambda x: lamina.grad(lambda x: net(x).sum())(x))(X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_plain_grad_with_a_write_is_refused():
    class Remembers(nn.Module):
        def __init__(self):
            self.last = nn.Buffer(jnp.zeros((4, 3)))

        def forward(self, x):
            self.last = x * 2
            return x.sum()

    net = nn.Sequential(Remembers())
    with pytest.raises(
        ForeignTransformError,
        match=r"buffer '0\.last' is written under a plain JAX[\s\S]*lamina\.grad",
    ):
        jax.grad(net)(X)
    assert not net[0].last.any()


def test_plain_grad_of_batch_norm_loses_nothing():
    net, twin = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    try:
        jax.grad(lambda x: net(x).sum())(X)
    except ForeignTransformError:
        return
    twin(X)
    for name, value in twin.state_dict().items():
        np.testing.assert_allclose(net.state_dict()[name], value, rtol=1e-6)


def test_plain_grad_with_dropout():
    net = nn.Dropout(0.5)
    key = jax.random.key(1)

    def f(x, key):
        with lamina.rng(key):
            return net(x).sum()

    first = jax.grad(f)(X, key)
    np.testing.assert_array_equal(first, jax.jit(jax.grad(f))(X, key))
    assert set(np.unique(first)) == {0.0, 2.0}


def test_plain_grad_inside_lamina_grad():
    net = nn.Linear(3, 1)
    grads = lamina.grad(
        lambda net: (jax.vmap(jax.grad(lambda x: (net(x) ** 2).sum()))(X) ** 2).sum()
    )(net)
    expected = jax.grad(
        lambda w: (jax.vmap(jax.grad(lambda x: ((w @ x + net.bias.data) ** 2).sum()))(X) ** 2).sum()
    )(net.weight.data)
    np.testing.assert_allclose(grads["weight"], expected, rtol=1e-4)


def test_write_in_a_plain_transform_inside_a_lamina_one_is_refused():
    net = nn.BatchNorm1d(3)
    with pytest.raises(ForeignTransformError, match=r"nested in lamina's[\s\S]*Use lamina\.scan"):
        lamina.jit(lambda x: jax.vmap(lambda x: net(x), axis_name="a")(x))(jnp.ones((2, 4, 3)))
    assert int(net.num_batches_tracked) == 0
