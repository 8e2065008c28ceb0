"""Forward and backward hooks, against torch."""

import unittest.mock

import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn


def arrays(torch):
    return (nn, jnp.ones((1, 2))), (torch.nn, torch.ones(1, 2))


def both(torch, scenario):
    """Run a scenario in both libraries and compare its log."""
    logs = [scenario(m, x) for m, x in arrays(torch)]
    assert logs[0] == logs[1]
    return logs[0]


def numbers(value):
    return np.asarray(value.detach() if hasattr(value, "detach") else value).tolist()


@pytest.mark.parity
def test_order_and_prepend(torch):
    def scenario(m, x):
        net, log = m.Identity(), []
        for kind in ("register_forward_pre_hook", "register_forward_hook"):
            for name, options in (("a", {}), ("b", {}), ("c", {"prepend": True})):
                getattr(net, kind)(lambda *args, n=name, k=kind: log.append((k, n)), **options)
        net(x)
        return log

    assert len(both(torch, scenario)) == 6


@pytest.mark.parity
def test_replacing_inputs_and_outputs(torch):
    def scenario(m, x):
        net = m.Identity()
        log = []
        net.register_forward_pre_hook(lambda mod, args: args[0] + 1)
        net.register_forward_pre_hook(lambda mod, args: (args[0] * 2,))
        net.register_forward_hook(lambda mod, args, out: log.append(numbers(args[0])))
        net.register_forward_hook(lambda mod, args, out: out + 10)
        log.append(numbers(net(x)))
        return log

    assert both(torch, scenario) == [[[4.0, 4.0]], [[14.0, 14.0]]]


@pytest.mark.parity
def test_keyword_arguments(torch):
    def scenario(m, x):
        class Net(m.Module):
            def forward(self, x, *, factor):
                return x * factor

        net, log = Net(), []
        net.register_forward_pre_hook(
            lambda mod, args, kwargs: (args, {"factor": kwargs["factor"] + 1}), with_kwargs=True
        )
        net.register_forward_hook(
            lambda mod, args, kwargs, out: log.append(kwargs["factor"]), with_kwargs=True
        )
        log.append(numbers(net(x, factor=2)))
        return log

    assert both(torch, scenario) == [3, [[3.0, 3.0]]]


@pytest.mark.parity
def test_always_call(torch):
    def scenario(m, x):
        class Bad(m.Module):
            def forward(self, x):
                raise RuntimeError("on purpose")

        net, log = Bad(), []
        net.register_forward_hook(lambda mod, args, out: log.append("never"))
        net.register_forward_hook(lambda mod, args, out: log.append(out), always_call=True)
        with pytest.raises(RuntimeError, match="on purpose"):
            net(x)
        return log

    assert both(torch, scenario) == [None]


@pytest.mark.parity
def test_handles(torch):
    def scenario(m, x):
        net, log = m.Identity(), []
        handle = net.register_forward_hook(lambda *a: log.append("one"))
        with net.register_forward_hook(lambda *a: log.append("two")):
            net(x)
        net(x)
        handle.remove()
        handle.remove()
        net(x)
        return log

    assert both(torch, scenario) == ["one", "two", "one"]


@pytest.mark.parity
def test_hook_that_removes_itself(torch):
    def scenario(m, x):
        net, log = m.Identity(), []

        def once(*args):
            log.append("once")
            handles[0].remove()

        handles = [net.register_forward_hook(once)]
        net.register_forward_hook(lambda *a: log.append("always"))
        net(x)
        net(x)
        return log

    assert both(torch, scenario) == ["once", "always", "always"]


@pytest.mark.parity
def test_backward_pre_hook_changes_the_gradient(torch):
    ours, theirs = nn.Linear(2, 1), torch.nn.Linear(2, 1)
    x = np.ones((3, 2), np.float32)
    for net in (ours, theirs):
        net.register_full_backward_pre_hook(lambda mod, grads: tuple(g * 3 for g in grads))
    lamina.backward(lambda: ours(x).sum())
    theirs(torch.tensor(x, requires_grad=True)).sum().backward()
    np.testing.assert_allclose(ours.weight.grad, theirs.weight.grad.numpy())


def test_hook_before_lazy_shapes():
    net = nn.LazyLinear(2)
    net.register_forward_pre_hook(lambda mod, args: (args[0][:, :3],))
    assert net(jnp.ones((1, 5))).shape == (1, 2)
    assert net.weight.shape == (2, 3)


def test_hooks_in_compiled_functions():
    net, seen = nn.Linear(3, 2), unittest.mock.Mock()
    net.register_forward_hook(lambda mod, args, out: seen(out.shape) and None)
    net.register_forward_hook(lambda mod, args, out: out * 0)
    f = lamina.jit(net)
    assert not f(jnp.ones((4, 3))).any()
    assert {call.args for call in seen.call_args_list} == {((4, 2),)}


def test_forward_hook_that_writes_a_buffer():
    net = nn.Linear(3, 2)
    net.register_buffer("last", None, persistent=False)

    def remember(module, args, out):
        module.last = out

    net.register_forward_hook(remember)
    f = lamina.jit(net)
    out = f(jnp.ones((4, 3)))
    np.testing.assert_array_equal(net.last, out)


@pytest.mark.parametrize("transform", [lambda f: f, lamina.jit], ids=["eager", "jit"])
def test_backward_hooks_on_several_inputs_and_outputs(transform):
    class Both(nn.Module):
        def __init__(self):
            self.w = nn.Parameter(jnp.asarray(2.0))

        def forward(self, a, b):
            return a * self.w, b * self.w

    net, seen = Both(), unittest.mock.Mock(return_value=None)
    net.register_full_backward_hook(
        lambda mod, into, out: seen(len(into), len(out)) or tuple(g * 10 for g in into)
    )
    x = jnp.ones(2)

    @transform
    def f(net, x):
        return lamina.value_and_grad(lambda x: sum(y.sum() for y in net(x, x)))(x)

    loss, grads = f(net, x)
    assert float(loss) == 8
    np.testing.assert_allclose(grads, [40.0, 40.0])
    assert {call.args for call in seen.call_args_list} == {(2, 2)}
