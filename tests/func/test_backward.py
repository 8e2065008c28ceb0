"""lamina.backward: loops written the PyTorch way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lamina
from lamina import nn

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def pair(torch, make):
    ours, theirs = make(nn), make(torch.nn)
    theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in ours.state_dict().items()})
    return ours, theirs


def check_grads(ours, theirs):
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
        else:
            np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parity
def test_loop_equals_torch(torch):
    """Two accumulated gradients, a step, zero_grad, and again."""
    ours, theirs = pair(
        torch, lambda m: m.Sequential(m.Linear(3, 4), m.BatchNorm1d(4), m.Tanh(), m.Linear(4, 1))
    )
    opt = lamina.Optimizer(ours, optax.sgd(0.1))
    their_opt = torch.optim.SGD(theirs.parameters(), lr=0.1)
    x = torch.tensor(X)
    for _ in range(3):
        opt.zero_grad()
        their_opt.zero_grad()
        for scale in (1.0, 2.0):
            loss = lamina.backward(lambda scale=scale: (ours(X) ** 2).mean() * scale)
            their_loss = (theirs(x) ** 2).mean() * scale
            their_loss.backward()
            np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-4, atol=1e-6)
        check_grads(ours, theirs)
        opt.step()
        their_opt.step()
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(
            ours.state_dict()[name], value.numpy(), rtol=1e-3, atol=1e-5, err_msg=name
        )


@pytest.mark.parity
def test_untouched_and_frozen_parameters_have_no_gradient(torch):
    ours, theirs = pair(torch, lambda m: m.ModuleList([m.Linear(3, 3) for _ in range(3)]))
    ours[1].requires_grad_(False)
    theirs[1].requires_grad_(False)
    lamina.backward(lambda: ours[1](ours[0](X)).sum())
    theirs[1](theirs[0](torch.tensor(X))).sum().backward()
    check_grads(ours, theirs)
    assert ours[2].weight.grad is None
    assert ours[1].weight.grad is None


@pytest.mark.parity
def test_ties(torch):
    def make(m):
        net = m.Sequential(m.Linear(3, 3), m.Tanh(), m.Linear(3, 3))
        net[2].weight = net[0].weight
        return net

    ours, theirs = pair(torch, make)
    lamina.backward(lambda: (ours(X) ** 2).sum())
    (theirs(torch.tensor(X)) ** 2).sum().backward()
    check_grads(ours, theirs)
    assert ours[2].weight.grad is ours[0].weight.grad


def test_modules_as_arguments_and_aux():
    net = nn.Linear(3, 1)
    loss, aux = lamina.backward(
        lambda net, x, *, k: (net(x).sum() * k, {"name": "n", "out": net(x)}),
        net,
        X,
        k=2,
        has_aux=True,
    )
    assert aux["name"] == "n"
    np.testing.assert_allclose(loss, 2 * aux["out"].sum(), rtol=1e-5)
    np.testing.assert_allclose(net.weight.grad, 2 * X.sum(0, keepdims=True), rtol=1e-5)


def test_several_modules():
    nets = [nn.Linear(3, 3), nn.Linear(3, 1)]
    loose = nn.Parameter(jnp.ones(()))
    lamina.backward(lambda: (nets[1](nets[0](X)) * loose).sum())
    assert all(p.grad is not None for net in nets for p in net.parameters())
    assert loose.grad.shape == ()


def test_parameters_touched_may_change_from_call_to_call():
    nets = [nn.Linear(3, 1), nn.Linear(3, 1)]

    def loss(i):
        return lamina.backward(lambda: nets[i](X).sum())

    loss(0)
    assert nets[1].weight.grad is None
    loss(1)
    np.testing.assert_allclose(nets[0].weight.grad, X.sum(0, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(nets[1].weight.grad, X.sum(0, keepdims=True), rtol=1e-5)


def test_buffers_are_written_once():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.LazyLinear(2), nn.Dropout())
    lamina.backward(lambda: net(X).sum())
    assert int(net[0].num_batches_tracked) == 1
    lamina.backward(lambda: net(X).sum())
    assert int(net[0].num_batches_tracked) == 2


def test_random_draws_are_the_same_as_without():
    drop = nn.Dropout()
    net = nn.Linear(3, 64)
    lamina.manual_seed(0)
    expected = [drop(net(X)).sum() for _ in range(2)]
    lamina.manual_seed(0)
    found = [lamina.backward(lambda: drop(net(X)).sum()) for _ in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_print_in_the_function_happens_once_when_parameters_are_known(capsys):
    net = nn.Linear(3, 1)

    def loss():
        print("called")
        return net(X).sum()

    lamina.backward(loss)
    capsys.readouterr()
    lamina.backward(loss)
    assert capsys.readouterr().out == "called\n"


def test_inside_jit_with_optimizer():
    net = nn.Linear(3, 1)
    opt = lamina.Optimizer(net, optax.adam(0.05))

    @lamina.jit
    def step(x):
        opt.zero_grad()
        loss = lamina.backward(lambda: (net(x) ** 2).mean())
        opt.step()
        return loss

    losses = [float(step(X)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert int(opt.state_dict()["0.count"]) == 8


def test_inside_grad():
    """The outer gradient does not see .grad, but it is filled all the same."""
    net, other = nn.Linear(3, 1), nn.Linear(3, 1)

    def f(other):
        lamina.backward(lambda: net(X).sum())
        return other(X).sum()

    grads = lamina.grad(f)(other)
    np.testing.assert_allclose(grads["weight"], net.weight.grad, rtol=1e-5)


def test_gradient_snapshot_stays_valid():
    net = nn.Linear(3, 1)

    @lamina.jit
    def accumulate(net):
        lamina.backward(lambda: net(X).sum())

    accumulate(net)
    held = net.weight.grad
    copy = np.array(held)
    accumulate(net)
    accumulate(net)
    np.testing.assert_array_equal(held, copy)
    np.testing.assert_allclose(net.weight.grad, 3 * copy, rtol=1e-5)


def test_loss_must_be_a_scalar():
    net = nn.Linear(3, 1)
    with pytest.raises(TypeError, match="scalar"):
        lamina.backward(lambda: net(X))
    assert net.weight.grad is None


@pytest.mark.parity
def test_backward_hooks_equal_torch(torch):
    ours, theirs = pair(torch, lambda m: m.Sequential(m.Linear(3, 2), m.Tanh(), m.Linear(2, 1)))
    seen = {"ours": [], "theirs": []}

    def hook(name):
        def run(module, grad_input, grad_output):
            seen[name].append((np.asarray(grad_input[0]), np.asarray(grad_output[0])))
            return (grad_input[0] * 2,)

        return run

    ours[1].register_full_backward_hook(hook("ours"))
    theirs[1].register_full_backward_hook(hook("theirs"))
    lamina.backward(lambda: ours(jnp.asarray(X)).sum())
    theirs(torch.tensor(X)).sum().backward()
    assert len(seen["ours"]) == len(seen["theirs"]) == 1
    for a, b in zip(seen["ours"][0], seen["theirs"][0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    check_grads(ours, theirs)


def test_gradient_assigned_by_hand():
    net = nn.Linear(3, 1)
    net.weight.grad = jnp.ones((1, 3))
    with pytest.raises(ValueError, match=r"gradient shape \(1, 3\), got \(2,\)"):
        net.weight.grad = jnp.ones(2)
    net.weight.grad = None
    assert net.weight.grad is None
    assert jax.tree.leaves(net.weight.grad) == []
