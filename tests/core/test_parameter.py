"""Parameter and Buffer: values in expressions, in-place edits, refused values, printing."""

import copy
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn
from lamina._core.errors import DeferredError, ShapeError, TypeMismatchError
from lamina.nn import functional as F

VALUE = np.arange(6, dtype=np.float32).reshape(2, 3) + 1


def param(**options):
    return nn.Parameter(VALUE.copy(), **options)


OPERATORS = {
    "p + 1": lambda p: p + 1,
    "1 - p": lambda p: 1 - p,
    "p * p": lambda p: p * p,
    "2 / p": lambda p: 2 / p,
    "p // 2": lambda p: p // 2,
    "p % 2": lambda p: p % 2,
    "p ** 2": lambda p: p**2,
    "2 ** p": lambda p: 2**p,
    "-p": lambda p: -p,
    "+p": lambda p: +p,
    "abs": lambda p: abs(-p),
    "p @ p.T": lambda p: p @ p.T,
    "array @ p": lambda p: np.ones((1, 2), np.float32) @ p,
    "array + p": lambda p: VALUE + p,
    "p == 2": lambda p: p == 2,
    "p != p": lambda p: p != p,
    "p < 3": lambda p: p < 3,
    "p >= 3": lambda p: p >= 3,
    "3 > p": lambda p: p < 3,
    "p[0]": lambda p: p[0],
    "p[:, 1:]": lambda p: p[:, 1:],
    "p[p > 2]": lambda p: p[p > 2],
    "p.T": lambda p: p.T,
    "p.mean(0)": lambda p: p.mean(0),
    "p.sum()": lambda p: p.sum(),
    "p.astype": lambda p: p.astype("int32"),
    "p.reshape": lambda p: p.reshape(3, 2),
    "p.at": lambda p: p.at[0].set(0),
}


@pytest.mark.parametrize("expression", OPERATORS.values(), ids=OPERATORS)
def test_operators_equal_arrays(expression):
    found, expected = expression(param()), expression(jnp.asarray(VALUE))
    assert type(found) is type(expected)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype


FUNCTIONS = {
    "jnp.sum": lambda p: jnp.sum(p),
    "jnp.exp": lambda p: jnp.exp(p),
    "jnp.dot": lambda p: jnp.dot(p, p.T),
    "jnp.einsum": lambda p: jnp.einsum("ij,kj->ik", p, p),
    "jnp.concatenate": lambda p: jnp.concatenate([p, p]),
    "jnp.stack": lambda p: jnp.stack([p, p]),
    "jnp.where": lambda p: jnp.where(p > 2, p, 0),
    "jnp.linalg.norm": lambda p: jnp.linalg.norm(p),
    "jnp.asarray": lambda p: jnp.asarray(p),
    "jnp.array": lambda p: jnp.array(p),
    "jnp.clip": lambda p: jnp.clip(p, 1, 2),
    "jnp.zeros_like": lambda p: jnp.zeros_like(p),
    "jnp.broadcast_to": lambda p: jnp.broadcast_to(p, (2, 2, 3)),
    "jax.nn.relu": lambda p: jax.nn.relu(p),
    "jax.nn.softmax": lambda p: jax.nn.softmax(p),
    "np.asarray": lambda p: np.asarray(p),
    "np.float64": lambda p: np.asarray(p, np.float64),
    "F.linear": lambda p: F.linear(np.ones((1, 3), np.float32), p),
    "jax.tree.map": lambda p: jax.tree.map(lambda x: x * 2, p),
    "jax.device_get": lambda p: np.asarray(jax.device_get(p)),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_equal_arrays(function):
    np.testing.assert_allclose(function(param()), function(jnp.asarray(VALUE)), rtol=1e-6)


def test_lax_primitives_take_the_data():
    np.testing.assert_allclose(jax.lax.exp(param().data), np.exp(VALUE), rtol=1e-5)


def test_scalars():
    p = nn.Parameter(2.5)
    assert (float(p), int(p), bool(p), p.item()) == (2.5, 2, True, 2.5)
    assert f"{p:.2f}" == "2.50"
    assert list(range(5))[nn.Parameter(jnp.asarray(2), requires_grad=False)] == 2
    with pytest.raises(Exception, match="ambiguous"):
        bool(param())
    assert math.isclose(math.sqrt(nn.Parameter(4.0)), 2)


def test_sequence_protocol():
    assert len(param()) == 2
    assert [np.asarray(row).tolist() for row in param()] == VALUE.tolist()


def test_facts():
    p = param()
    assert (p.shape, p.ndim, p.size, p.numel(), p.nbytes, p.dtype) == (
        (2, 3),
        2,
        6,
        6,
        24,
        jnp.float32,
    )
    assert p.is_material
    assert not p.is_unshaped
    assert p.requires_grad
    assert param(requires_grad=False).requires_grad is False
    assert p.requires_grad_(False) is p
    assert not p.requires_grad
    assert p.sharding == p.data.sharding


def test_hashable_by_identity():
    p = param()
    assert {p: 1}[p] == 1
    assert len({p, param()}) == 2


def test_missing_method():
    with pytest.raises(AttributeError, match="'Parameter' object has no attribute 'foo'"):
        param().foo  # noqa: B018


# Edits.


EDITS = {
    "element": lambda p: p.__setitem__((0, 0), 42),
    "slice": lambda p: p.__setitem__((slice(None), 1), 7.0),
    "row": lambda p: p.__setitem__(1, np.zeros(3, np.float32)),
    "everything": lambda p: p.__setitem__(Ellipsis, 3),
    "mask": lambda p: p.__setitem__(np.asarray(p) > 3, 0),
    "fancy": lambda p: p.__setitem__(np.array([0, 1]), 5),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_item_assignment_equals_numpy(edit):
    p, expected = param(), VALUE.copy()
    edit(p)
    edit(expected)
    np.testing.assert_array_equal(p.data, expected)


@pytest.mark.parametrize("symbol", ["+=", "-=", "*=", "/=", "**=", "//=", "%="])
def test_in_place_operators_equal_numpy(symbol):
    space = {"p": param(), "n": VALUE.copy()}
    box = space["p"]
    exec(f"p {symbol} 2; n {symbol} 2", space)
    assert space["p"] is box
    np.testing.assert_allclose(box.data, space["n"], rtol=1e-6)


def test_in_place_on_a_slice():
    p = param()
    p[:] += 1
    p[0] *= 2
    expected = VALUE + 1
    expected[0] *= 2
    np.testing.assert_array_equal(p.data, expected)


@pytest.mark.parity
def test_pytorch_methods(torch):
    ours, theirs = param(), torch.nn.Parameter(torch.tensor(VALUE))
    with torch.no_grad():
        for call in (
            lambda p, t: p.copy_(t(np.ones((1, 3), np.float32))),
            lambda p, t: p.fill_(3.5),
            lambda p, t: p.zero_(),
        ):
            assert call(ours, jnp.asarray) is ours
            call(theirs, torch.tensor)
            np.testing.assert_array_equal(ours.numpy(), theirs.detach().numpy())
    assert ours.detach().shape == theirs.detach().shape


def test_random_fills():
    p = nn.Parameter(jnp.zeros((50, 50)))
    assert p.normal_(mean=3.0, std=0.1) is p
    assert abs(float(p.mean()) - 3) < 0.05
    p.uniform_(-2.0, -1.0)
    assert -2 <= float(p.min()) < float(p.max()) <= -1


def test_old_values_are_snapshots():
    p = param()
    held = p.data
    p[0, 0] = 100
    p *= 2
    np.testing.assert_array_equal(held, VALUE)


def test_wrong_values_are_never_stored():
    net = nn.Sequential(nn.Linear(3, 2))
    p = net[0].weight
    p.data = VALUE
    for wrong, error, text in [
        (VALUE.T, ShapeError, r"parameter '0\.weight': expected shape \(2, 3\), got \(3, 2\)"),
        (1.0, ShapeError, r"expected shape \(2, 3\), got \(\)"),
        (VALUE.astype(np.float16), TypeMismatchError, "expected dtype float32, got float16"),
        (VALUE.astype(np.int32), TypeMismatchError, "expected dtype float32, got int32"),
        (VALUE + 1j, TypeMismatchError, "expected dtype float32, got complex64"),
    ]:
        with pytest.raises(error, match=text):
            p.data = wrong
    with pytest.raises(TypeMismatchError, match=r"fix: value\.astype\('float32'\)"):
        p.data = VALUE.astype(np.float16)
    with pytest.raises(ShapeError, match=r"fix: reshape the value, or replace"):
        p.data = VALUE[0]
    with pytest.raises((TypeError, ValueError)):
        p.data = None
    with pytest.raises((TypeError, ValueError)):
        p.data = "text"
    row = nn.Parameter(jnp.ones((1, 3)))
    with pytest.raises(ShapeError, match=r"expected shape \(1, 3\), got \(4, 3\)"):
        row += np.ones((4, 3), np.float32)
    with pytest.raises(TypeMismatchError):
        p[0, 0] = 1j
    count = nn.Buffer(jnp.asarray(0))
    with pytest.raises(TypeMismatchError, match="expected dtype int32, got float"):
        count.data = 0.5
    np.testing.assert_array_equal(p.data, VALUE)


@pytest.mark.parity
def test_setting_items_with_broadcasting_errors_as_torch(torch):
    p, t = param(), torch.tensor(VALUE)
    with pytest.raises(RuntimeError):
        t[0] = torch.ones(4)
    with pytest.raises(ValueError, match="broadcast|shape"):
        p[0] = np.ones(4, np.float32)


def test_python_values_take_the_dtype():
    p = nn.Parameter(jnp.zeros(2, jnp.bfloat16))
    p.data = [1, 2]
    p += 1.5
    p[0] = 7
    assert p.dtype == jnp.bfloat16
    assert not p.data.weak_type
    np.testing.assert_array_equal(np.asarray(p.data, np.float32), [7.0, 3.5])


def test_both_data_and_shape():
    with pytest.raises(TypeError, match="give either data or shape, not both"):
        nn.Parameter(VALUE, shape=(2, 3))


def test_gradient_slot():
    p = param()
    assert p.grad is None
    p.grad = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(p.grad, np.ones((2, 3)))
    with pytest.raises(ShapeError, match=r"expected gradient shape \(2, 3\), got \(3,\)"):
        p.grad = jnp.ones(3)
    p.grad = None
    assert p.grad is None


# States.


def test_unshaped():
    p = nn.Parameter(shape=(2, None), init=nn.init.Ones())
    assert p.shape == (2, None)
    assert p.is_unshaped
    with pytest.raises(DeferredError, match=r"some of its sizes are unknown[\s\S]*lamina\.infer"):
        p.data  # noqa: B018
    with pytest.raises(DeferredError):
        p.numel()
    with pytest.raises(DeferredError):
        p.fill_(0)
    p.shape = (2, 3)
    assert not p.is_unshaped
    assert not p.is_material
    assert float(p.sum()) == 6


def test_writing_a_value_settles_the_shape():
    p = nn.Parameter(shape=(2, None), init=nn.init.Ones())
    with pytest.raises(ShapeError, match=r"expected shape \(2, \?\), got \(3, 3\)"):
        p.data = jnp.ones((3, 3))
    p.data = jnp.zeros((2, 5))
    assert p.shape == (2, 5)
    assert p.is_material


def test_known_sizes_stay():
    p = nn.Parameter(shape=(2, None))
    with pytest.raises(ShapeError, match=r"its shape is \(2, \?\) and can't become \(3, 3\)"):
        p.shape = (3, 3)
    with pytest.raises(ShapeError, match=r"\(2, \?\) and can't become \(2, 3, 3\)"):
        p.shape = (2, 3, 3)
    with pytest.raises(ShapeError, match="no negative sizes"):
        nn.Parameter(shape=(-1,))


def test_no_recipe():
    p = nn.Parameter(shape=(2,))
    with pytest.raises(DeferredError, match=r"no recipe to make one[\s\S]*init=nn\.init\.Normal"):
        p.data  # noqa: B018


def test_recipe():
    p = nn.Parameter(shape=(2,), init=nn.init.Ones())
    assert p.init == nn.init.Ones()
    p.init = nn.init.Zeros()
    assert not p.any()
    p.init = nn.init.Constant(3.0)
    np.testing.assert_array_equal(p.data, [3, 3])
    with pytest.raises(
        TypeMismatchError, match=r"a recipe is a function[\s\S]*got float; for fixed values"
    ):
        p.init = 3.0


def test_explicit_key():
    make = lambda key: nn.Parameter(shape=(4,)).initialize(nn.init.Normal(), key).data  # noqa: E731
    np.testing.assert_array_equal(make(jax.random.key(1)), make(jax.random.key(1)))
    assert not np.array_equal(make(jax.random.key(1)), make(jax.random.key(2)))


def test_sixty_four_bit_dtypes_are_remembered():
    net = nn.BatchNorm1d(2)
    assert net.num_batches_tracked.dtype == jnp.int32
    assert net.state_dict().wide == {"num_batches_tracked": np.dtype(np.int64)}


# Printing.


def test_printing():
    assert repr(nn.Parameter(jnp.zeros(2))) == (
        "Parameter containing:\nArray([0., 0.], dtype=float32, requires_grad=True)"
    )
    p = nn.Parameter(shape=(2, None), init=nn.init.Normal(std=0.5), requires_grad=False)
    assert repr(p) == (
        "Parameter containing:\n"
        "unshaped (2, ?), float32, init=Normal(mean=0.0, std=0.5), requires_grad=False"
    )
    p.shape = (2, 3)
    assert "abstract (2, 3), float32" in repr(p)
    assert not p.is_material
    assert repr(nn.Buffer(jnp.zeros(1))).startswith("Buffer containing:\nArray([0.]")
    assert "(?)" in repr(nn.UninitializedParameter())
    assert f"{nn.Buffer(shape=(), init=nn.init.Zeros())}".startswith("Buffer containing:")


# Copies.


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies(duplicate):
    p = param(requires_grad=False)
    p.init = nn.init.Normal(std=3.0)
    p.data = VALUE
    p.tag = "note"
    p.grad = np.ones((2, 3), np.float32)
    twin = duplicate(p)
    assert type(twin) is nn.Parameter
    assert (twin.init, twin.requires_grad, twin.tag) == (p.init, False, "note")
    np.testing.assert_array_equal(twin.grad, p.grad)
    twin[0, 0] = 99
    np.testing.assert_array_equal(p.data, VALUE)
    buffer = duplicate(nn.Buffer(VALUE, persistent=False))
    assert buffer.persistent is False


def test_optional_buffer():
    net = nn.Module()
    net.register_buffer("cache", None)
    assert net.cache is None
    assert list(net.buffers()) == []
    net.cache = jnp.ones(3)
    assert net.cache.shape == (3,)
    net.cache = jnp.ones((2, 2))
    assert net.cache.shape == (2, 2)
    net.cache = None
    assert net.cache is None


def test_value_on_a_device():
    place = jax.devices()[5]
    p = nn.Parameter(VALUE, sharding=jax.sharding.SingleDeviceSharding(place))
    assert p.data.devices() == {place}
    p.data = p.data + 1
    assert p.data.devices() == {place}


def test_parameter_shared_by_two_models():
    p = param()
    one, two = nn.Module(), nn.Module()
    one.weight, two.weight = p, p
    one.weight[0, 0] = 50
    assert float(two.weight[0, 0]) == 50
    assert lamina.jit(lambda a, b: a.weight.sum() + b.weight.sum())(one, two) == 2 * p.sum()
