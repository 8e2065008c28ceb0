import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn
from lamina.show import describe, statistics


@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)])
def test_numbers_are_numpys(shape):
    x = np.random.default_rng(0).normal(2.0, 3.0, shape).astype(np.float32)
    found = describe(x).value
    assert found.minimum == x.min()
    assert found.maximum == x.max()
    np.testing.assert_allclose(found.mean, x.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.std, x.std(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.norm, np.linalg.norm(x.ravel()), rtol=1e-5)
    assert sum(found.histogram) == x.size


def test_histogram_is_numpys():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    expected, _ = np.histogram(x, bins=32)
    assert describe(x).value.histogram == tuple(expected)


def test_what_is_not_finite_is_counted_apart():
    found = describe(jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0, -0.0, 3.0])).value
    assert (found.nans, found.infs, found.zeros) == (1, 2, 2)
    assert (found.minimum, found.maximum, found.mean) == (0.0, 3.0, 1.0)
    assert sum(found.histogram) == 3
    nothing = describe(jnp.array([jnp.nan])).value
    assert np.isnan(nothing.minimum)
    assert np.isnan(nothing.norm)
    assert nothing.bars() == ""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "uint32", "bool", "complex64"])
def test_dtypes(dtype):
    x = jnp.asarray([0, 1, 1, 1]).astype(dtype)
    found = describe(x)
    assert found.dtype == dtype
    assert found.value.mean == 0.75
    assert found.value.zeros == 1


def test_large_and_small_numbers_do_not_overflow():
    np.testing.assert_allclose(describe(jnp.array([3e38, -4e37])).value.norm, 3.0265e38, rtol=1e-3)
    half = jnp.full(1000, 60000, jnp.float16)
    np.testing.assert_allclose(describe(half).value.mean, 60000, rtol=1e-6)
    np.testing.assert_allclose(describe(jnp.array([3e-30, 4e-30])).value.norm, 5e-30, rtol=1e-5)


def test_an_empty_array():
    found = describe(jnp.zeros((0, 3)))
    assert found.value.histogram == ()
    assert "nan" in str(found)


def test_a_parameter_and_its_gradient():
    net = nn.Sequential(nn.Linear(3, 2))
    lamina.backward(lambda: net(jnp.ones((4, 3))).sum())
    found = describe(net[0].weight)
    assert found.grad.mean == 4
    text = str(found)
    assert text.startswith("parameter '0.weight': float32 (2, 3), recipe KaimingUniform")
    assert "trainable" in text
    assert "gradient" in text
    given = describe(net[0].bias.requires_grad_(False), grad=jnp.ones(2))
    assert given.grad.norm == pytest.approx(2**0.5)
    assert "frozen" in str(given)


def test_what_has_no_value_gets_none():
    net = nn.LazyLinear(4)
    found = describe(net.weight)
    assert found.value is None
    assert "(4, ?)" in str(found)
    assert "no value yet" in str(found)
    bias = nn.Linear(2, 3).bias
    describe(bias)
    assert not bias.is_material


def test_a_buffer():
    norm = nn.BatchNorm1d(3)
    norm(jnp.ones((2, 3)))
    text = str(describe(norm.get_buffer("running_mean")))
    assert text.startswith("buffer 'running_mean'")
    assert "trainable" not in text


def test_bars_show_every_bin_that_holds_something():
    found = describe(jnp.array([0.0] * 1000 + [1.0])).value
    assert found.bars()[0] == "█"
    assert found.bars()[-1] == "▁"
    assert found.bars()[1:-1].strip() == ""
    assert describe(jnp.ones(5)).value.bars().strip() == "█"


def test_large_arrays_go_block_by_block(monkeypatch):
    x = np.random.default_rng(0).normal(size=(100, 7)).astype(np.float32)
    whole = describe(x).value
    monkeypatch.setattr(statistics, "_BLOCK", 13)
    parts = describe(x).value
    assert parts.histogram == whole.histogram
    assert parts.std == pytest.approx(whole.std, rel=1e-12)


def test_a_sharded_array():
    mesh = jax.make_mesh((8,), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    found = describe(jax.device_put(x, place)).value
    np.testing.assert_allclose(found.mean, x.mean(), rtol=1e-4)
    assert found.maximum == x.max()
    assert sum(found.histogram) == x.size
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert sum(describe(jax.device_put(x, everywhere)).value.histogram) == x.size


def test_what_is_no_array_is_refused():
    with pytest.raises(TypeError, match="expected a parameter, a buffer or an array"):
        describe("weight")
