"""lamina.vmap, stack and unstack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn
from lamina._core.errors import ForeignTransformError, ShapeError

X = jax.random.normal(jax.random.key(0), (4, 3))


def ensemble(count=3):
    models = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(count)]
    return models, lamina.stack(models)


def test_shared_module():
    net = nn.Linear(3, 2)
    np.testing.assert_allclose(lamina.vmap(net)(X), net(X), rtol=1e-5)
    np.testing.assert_allclose(
        lamina.vmap(lambda net, x: net(x), in_axes=(None, 0))(net, X), net(X), rtol=1e-5
    )


def test_axes():
    net = nn.Linear(4, 2)
    out = lamina.vmap(lambda x: {"y": net(x), "n": "name"}, in_axes=1, out_axes=1)(X)
    np.testing.assert_allclose(out["y"], net(X.T).T, rtol=1e-5)
    assert out["n"] == "name"
    pair = lamina.vmap(lambda x, y: (x + y, x), in_axes=(0, None), out_axes=(0, 1))(X, jnp.ones(3))
    np.testing.assert_allclose(pair[0], X + 1)
    np.testing.assert_allclose(pair[1], X.T)


def test_ensemble():
    models, stacked = ensemble()
    stacked.eval()
    out = lamina.vmap(lambda net, x: net(x), in_axes=(0, None))(stacked, X)
    for i, model in enumerate(models):
        np.testing.assert_allclose(out[i], model.eval()(X), rtol=1e-4, atol=1e-6)


def test_ensemble_writes_go_to_their_lanes():
    models, stacked = ensemble()
    lamina.vmap(lambda net, x: net(x), in_axes=(0, None))(stacked, X)
    for i, model in enumerate(models):
        model(X)
        for name, value in model.state_dict().items():
            np.testing.assert_allclose(
                stacked.state_dict()[name][i], value, rtol=1e-4, atol=1e-6, err_msg=name
            )


def test_ensemble_training_equals_separate_training():
    models = [nn.Linear(3, 1) for _ in range(3)]
    stacked = lamina.stack(models)

    @lamina.jit
    def step(net):
        grads = lamina.vmap(lambda net: lamina.grad(lambda net: (net(X) ** 2).mean())(net))(net)
        for name, p in net.named_parameters():
            p.data = p.data - 0.1 * grads[name]

    step(stacked)
    step(stacked)
    for model in models:
        for _ in range(2):
            for name, g in lamina.grad(lambda net: (net(X) ** 2).mean())(model).items():
                p = model.get_parameter(name)
                p.data = p.data - 0.1 * g
    for model, piece in zip(models, lamina.unstack(stacked), strict=True):
        np.testing.assert_allclose(piece.weight.data, model.weight.data, rtol=1e-5)


def test_dropout_differs_between_lanes():
    out = lamina.vmap(nn.Dropout())(jnp.ones((4, 64)))
    assert len({np.asarray(row).tobytes() for row in out}) == 4


def test_dropout_goes_on_between_calls():
    f = lamina.vmap(nn.Dropout())
    x = jnp.ones((2, 64))
    lamina.manual_seed(0)
    first, second = f(x), f(x)
    assert not np.array_equal(first, second)
    lamina.manual_seed(0)
    np.testing.assert_array_equal(f(x), first)


def test_writing_a_shared_box_differently_is_refused():
    net = nn.BatchNorm1d(3)
    with pytest.raises(
        ForeignTransformError, match=r"lanes of lamina\.vmap[\s\S]*running_mean[\s\S]*stack"
    ):
        lamina.vmap(lambda x: net(x))(jax.random.normal(jax.random.key(0), (2, 4, 3)))
    assert int(net.num_batches_tracked) == 0


def test_writing_a_shared_box_equally():
    net = nn.Module()
    net.calls = nn.Buffer(jnp.asarray(0))

    def f(x):
        net.calls += 1
        return x

    lamina.vmap(f)(X)
    assert int(net.calls) == 1


def test_unshaped_module():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    assert lamina.vmap(net)(X).shape == (4, 2)
    assert net[0].weight.shape == (4, 3)


def test_vmap_in_jit_in_grad():
    net = nn.Linear(3, 1)
    f = lamina.jit(lambda net: lamina.vmap(net)(X).sum())
    np.testing.assert_allclose(lamina.grad(f)(net)["weight"], X.sum(0, keepdims=True), rtol=1e-5)


def test_axis_size_without_mapped_arguments():
    assert lamina.vmap(lambda: nn.functional.dropout(jnp.ones(8)), axis_size=3)().shape == (3, 8)
    with pytest.raises(ValueError, match="nothing is mapped"):
        lamina.vmap(lambda: 1.0)()


def test_wrong_number_of_axes():
    with pytest.raises(ValueError, match="in_axes has 2 entries for 1 positional"):
        lamina.vmap(lambda x: x, in_axes=(0, 0))(X)


def test_axis_name():
    out = lamina.vmap(lambda x: x - jax.lax.pmean(x, "rows"), axis_name="rows")(X)
    np.testing.assert_allclose(out, X - X.mean(0, keepdims=True), rtol=1e-5, atol=1e-6)


def test_plain_vmap_of_a_stateless_call():
    net = nn.Linear(3, 2)
    np.testing.assert_allclose(jax.vmap(net)(X), net(X), rtol=1e-5)


def test_plain_vmap_of_a_model_that_has_no_values_yet():
    net = nn.Sequential(nn.LazyLinear(4))
    out = jax.vmap(net)(X)
    np.testing.assert_allclose(out, net(X), rtol=1e-5)


def test_plain_vmap_with_a_write_is_refused():
    net = nn.BatchNorm1d(3)
    with pytest.raises(ForeignTransformError, match=r"plain JAX transform[\s\S]*lamina\.vmap"):
        jax.vmap(lambda x: net(x))(jnp.ones((2, 4, 3)))
    assert not net.running_mean.any()


def test_plain_vmap_with_a_constant_write_is_refused():
    """Also a write whose value is no tracer is lost or doubled under a plain transform."""
    net = nn.Linear(3, 2)
    net.calls = nn.Buffer(jnp.asarray(0))

    def f(x):
        net.calls += 1
        return net(x)

    try:
        jax.vmap(f)(X)
    except ForeignTransformError:
        assert int(net.calls) == 0
    else:
        assert int(net.calls) == 1


# stack and unstack.


def test_round_trip():
    models, stacked = ensemble()
    assert stacked[0].weight.shape == (3, 2, 3)
    for model, piece in zip(models, lamina.unstack(stacked), strict=True):
        assert list(piece.state_dict()) == list(model.state_dict())
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(piece.state_dict()[name], value)


def test_stack_leaves_the_models_alone():
    models, stacked = ensemble(2)
    before = np.array(models[0][0].weight.data)
    stacked[0].weight.data = stacked[0].weight.data * 0
    np.testing.assert_array_equal(models[0][0].weight.data, before)


def test_stack_keeps_ties():
    def tied():
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net

    stacked = lamina.stack([tied(), tied()])
    assert stacked[1].weight is stacked[0].weight
    assert stacked.ties() == {"1.weight": "0.weight"}


def test_stack_lists_all_differences():
    with pytest.raises(
        ShapeError,
        match=r"bias: only in model 0[\s\S]*weight: \(2, 3\) in model 0, \(4, 3\) in model 1",
    ):
        lamina.stack([nn.Linear(3, 2), nn.Linear(3, 4, bias=False)])
    with pytest.raises(ValueError, match="at least one model"):
        lamina.stack([])


def test_unstack_needs_one_size():
    with pytest.raises(ShapeError, match="one common first axis"):
        lamina.unstack(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5)))
