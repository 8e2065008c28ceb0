"""Clipping and flattening, against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn
from lamina.errors import ForeignTransformError, ShapeError

VALUES = [np.array([[3.0, -4.0], [1.0, 2.0]], np.float32), np.array([12.0, 0.5], np.float32)]


def with_gradients():
    params = [nn.Parameter(jnp.zeros(v.shape)) for v in VALUES]
    for p, v in zip(params, VALUES, strict=True):
        p.grad = v
    return params


@pytest.mark.parity
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("limit", [0.7, 100.0])
def test_clip_grad_norm_is_torchs(torch, norm_type, limit):
    theirs = [torch.nn.Parameter(torch.zeros(v.shape)) for v in VALUES]
    for p, v in zip(theirs, VALUES, strict=True):
        p.grad = torch.tensor(v)
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit, norm_type)
    ours = with_gradients()
    np.testing.assert_allclose(nn.utils.clip_grad_norm_(ours, limit, norm_type), norm, rtol=1e-6)
    grads = {str(i): jnp.asarray(v) for i, v in enumerate(VALUES)}
    np.testing.assert_allclose(nn.utils.clip_grad_norm_(grads, limit, norm_type), norm, rtol=1e-6)
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(mine.grad, other.grad, rtol=1e-6)
        np.testing.assert_allclose(grads[str(i)], other.grad, rtol=1e-6)


def test_clip_grad_norm_of_non_finite_gradients():
    grads = {"w": jnp.array([jnp.inf])}
    with pytest.raises(RuntimeError, match="the total norm of order 2.0 of the gradients is inf"):
        nn.utils.clip_grad_norm_(grads, 1.0, error_if_nonfinite=True)


def test_clip_grad_value():
    params = with_gradients()
    nn.utils.clip_grad_value_(params, 2.0)
    for p, v in zip(params, VALUES, strict=True):
        np.testing.assert_array_equal(p.grad, v.clip(-2, 2))


def test_clipping_inside_a_compiled_step():
    net = nn.Linear(3, 1)

    @lamina.jit
    def step(x):
        loss = lamina.backward(lambda: (net(x) * 1000).sum())
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        return loss

    step(jnp.ones((2, 3)))
    total = nn.utils.get_total_norm([p.grad for p in net.parameters()])
    np.testing.assert_allclose(total, 1.0, rtol=1e-4)


def test_vectors_go_there_and_back():
    net = nn.Linear(2, 3)
    vector = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(vector * 2, net.parameters())
    np.testing.assert_allclose(nn.utils.parameters_to_vector(net.parameters()), vector * 2)
    with pytest.raises(ShapeError, match=r"expected shape \(9,\), got \(8,\)"):
        nn.utils.vector_to_parameters(vector[:8], net.parameters())
    np.testing.assert_allclose(nn.utils.parameters_to_vector(net.parameters()), vector * 2)


def test_a_raw_parameter_under_plain_jit_is_refused():
    net = nn.Linear(2, 3)
    with pytest.raises(
        ForeignTransformError, match="'weight' was read under a plain JAX transform"
    ):
        jax.jit(lambda x: x @ net.weight.T)(jnp.ones((1, 2)))
    # as an argument it is a value like any other
    np.testing.assert_array_equal(jax.jit(lambda w: w * 2)(net.weight), net.weight.data * 2)
