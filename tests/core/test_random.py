"""The default generator, generators of one's own, and rng blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn
from lamina.nn import functional as F


def data(key):
    return jax.random.key_data(key).tolist()


def test_keys_differ_and_repeat():
    lamina.manual_seed(1)
    first = [data(lamina.next_key()) for _ in range(20)]
    assert len({tuple(key) for key in first}) == 20
    lamina.manual_seed(1)
    assert [data(lamina.next_key()) for _ in range(20)] == first
    lamina.manual_seed(2)
    assert data(lamina.next_key()) not in first


def test_manual_seed_returns_the_generator():
    assert lamina.manual_seed(3) is lamina.manual_seed(4)


@pytest.mark.parametrize("seed", [-1, 2**32 + 1, 2**63, np.int64(7), np.uint32(7)])
def test_seeds_of_any_size(seed):
    lamina.manual_seed(seed)
    first = data(lamina.next_key())
    lamina.manual_seed(int(seed))
    assert data(lamina.next_key()) == first


def test_generators_are_independent():
    lamina.manual_seed(0)
    expected = data(lamina.next_key())
    lamina.manual_seed(0)
    own = lamina.Generator(5)
    keys = [data(own.next_key()) for _ in range(3)]
    assert data(lamina.next_key()) == expected
    assert [data(own.manual_seed(5).next_key())] == keys[:1]


def test_state_round_trip():
    own = lamina.Generator(5)
    own.next_key()
    state = own.get_state()
    expected = [data(own.next_key()) for _ in range(3)]
    other = lamina.Generator()
    other.set_state({name: np.asarray(value) for name, value in state.items()})
    assert [data(other.next_key()) for _ in range(3)] == expected


def test_generator_from_a_key():
    one, two = (lamina.Generator(jax.random.key(s)).next_key() for s in (1, 2))
    assert data(one) != data(two)
    again = lamina.Generator(jax.random.PRNGKey(1)).next_key()
    assert data(again) == data(one)


@pytest.mark.parametrize("as_closure", [True, False])
def test_own_generator_in_compiled_functions(as_closure):
    own = lamina.Generator(5)
    expected = [data(own.next_key()) for _ in range(3)]
    own.manual_seed(5)
    if as_closure:
        f = lamina.jit(lambda: own.next_key())
        found = [data(f()) for _ in range(3)]
    else:
        f = lamina.jit(lambda generator: generator.next_key())
        found = [data(f(own)) for _ in range(3)]
    assert found == expected


def test_rng_block():
    x = jnp.ones(64)
    lamina.manual_seed(0)
    expected = F.dropout(x)
    lamina.manual_seed(0)
    with lamina.rng(1) as generator:
        first = F.dropout(x)
        assert generator is lamina.manual_seed.__globals__["DEFAULT"]
    with lamina.rng(1):
        second = F.dropout(x)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(F.dropout(x), expected)


def test_rng_block_ends_after_an_error():
    lamina.manual_seed(0)
    expected = data(lamina.next_key())
    lamina.manual_seed(0)
    with pytest.raises(RuntimeError, match="on purpose"), lamina.rng(1):
        lamina.next_key()
        raise RuntimeError("on purpose")
    assert data(lamina.next_key()) == expected


def test_rng_blocks_nest():
    with lamina.rng(1):
        first = data(lamina.next_key())
        with lamina.rng(2):
            inner = data(lamina.next_key())
        second = data(lamina.next_key())
    with lamina.rng(1):
        assert [data(lamina.next_key()), data(lamina.next_key())] == [first, second]
    with lamina.rng(2):
        assert data(lamina.next_key()) == inner


def test_rng_block_keeps_written_buffers():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    x = jnp.ones((4, 3))

    @lamina.jit
    def f(net, x, key):
        with lamina.rng(key):
            return net(x)

    f(net, x, jax.random.key(0))
    f(net, x, jax.random.key(1))
    assert int(net[0].num_batches_tracked) == 2


def test_rng_block_with_a_traced_key_under_plain_jax():
    def f(key, x):
        with lamina.rng(key):
            return F.dropout(x)

    keys, x = jax.random.split(jax.random.key(0), 3), jnp.ones(64)
    eager = jnp.stack([f(key, x) for key in keys])
    np.testing.assert_array_equal(jax.vmap(f, (0, None))(keys, x), eager)
    np.testing.assert_array_equal(jax.jit(f)(keys[0], x), eager[0])


def test_seeding_repeats_models_and_draws():
    lamina.manual_seed(11)
    one = (nn.Linear(3, 3).weight.numpy(), F.dropout(jnp.ones(32)))
    lamina.manual_seed(11)
    two = (nn.Linear(3, 3).weight.numpy(), F.dropout(jnp.ones(32)))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])


def test_models_built_in_an_rng_block():
    with lamina.rng(11):
        one = nn.Linear(3, 3).weight.numpy()
    with lamina.rng(11):
        two = nn.Linear(3, 3).weight.numpy()
    lamina.manual_seed(11)
    three = nn.Linear(3, 3).weight.numpy()
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)


def test_an_rng_block_does_not_repeat_the_models_around_it():
    lamina.manual_seed(0)
    one = nn.Linear(3, 3)
    with lamina.rng(5):
        nn.Linear(3, 3)
    two = nn.Linear(3, 3)
    assert not np.array_equal(one.weight.data, two.weight.data)
