"""lamina.scan and remat, and jax.lax loops inside forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn
from lamina._core.errors import ForeignTransformError, LaminaError

XS = jax.random.normal(jax.random.key(0), (5, 2, 3))


class Cell(nn.Module):
    def __init__(self, counting=True):
        self.map = nn.Linear(3, 3)
        if counting:
            self.calls = nn.Buffer(jnp.asarray(0))
        self.counting = counting

    def forward(self, h, x):
        if self.counting:
            self.calls += 1
        h = jnp.tanh(self.map(h) + x)
        return h, h


def loop(cell, xs):
    h, ys = jnp.zeros((2, 3)), []
    for x in xs:
        h, y = cell(h, x)
        ys.append(y)
    return h, jnp.stack(ys)


def test_equals_a_loop():
    cell = Cell()
    expected = loop(cell, XS)
    found = lamina.scan(cell, jnp.zeros((2, 3)), XS)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert int(cell.calls) == 10


def test_options():
    cell = Cell()
    h, ys = lamina.scan(cell, jnp.zeros((2, 3)), XS, reverse=True, unroll=2)
    expected = loop(cell, XS[::-1])
    np.testing.assert_allclose(h, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ys, expected[1][::-1], rtol=1e-5, atol=1e-6)
    total, _ = lamina.scan(lambda c, _: (c + 1, None), 0, length=4)
    assert int(total) == 4


def test_random_draws_go_on_from_step_to_step():
    _, ys = lamina.scan(lambda c, x: (c, nn.functional.dropout(x)), 0.0, jnp.ones((4, 64)))
    assert len({np.asarray(y).tobytes() for y in ys}) == 4
    lamina.manual_seed(0)
    eager = [nn.functional.dropout(jnp.ones(64)) for _ in range(3)]
    lamina.manual_seed(0)
    _, ys = lamina.scan(lambda c, x: (c, nn.functional.dropout(x)), 0.0, jnp.ones((3, 64)))
    np.testing.assert_array_equal(ys, jnp.stack(eager))


def test_gradient_through_scan():
    cell = Cell(counting=False)
    found = lamina.grad(lambda cell: lamina.scan(cell, jnp.zeros((2, 3)), XS)[0].sum())(cell)
    expected = lamina.grad(lambda cell: loop(cell, XS)[0].sum())(cell)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_batch_norm_in_scan():
    one, two = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    lamina.scan(lambda c, x: (c, one(x)), 0.0, XS)
    for x in XS:
        two(x)
    for name, value in two.state_dict().items():
        np.testing.assert_allclose(one.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_stacked_blocks():
    blocks = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(3)]
    stacked = lamina.stack(blocks)
    x = XS[0]
    found, _ = lamina.scan(lambda h, block: (block(h), None), x, stacked)
    for block in blocks:
        x = block(x)
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-4)
    for i, block in enumerate(blocks):
        np.testing.assert_allclose(
            stacked[1].running_mean[i], block[1].running_mean, rtol=1e-4, atol=1e-5
        )


def test_gradient_of_stacked_blocks():
    blocks = [nn.Linear(3, 3) for _ in range(3)]
    stacked = lamina.stack(blocks)
    found = lamina.jit(
        lambda net: lamina.grad(
            lambda net: lamina.scan(lambda h, b: (jnp.tanh(b(h)), None), XS[0], net)[0].sum()
        )(net)
    )(stacked)

    def chained(blocks):
        h = XS[0]
        for block in blocks:
            h = jnp.tanh(block(h))
        return h.sum()

    for i, expected in enumerate(lamina.grad(chained)(blocks)):
        np.testing.assert_allclose(found["weight"][i], expected["weight"], rtol=1e-4, atol=1e-5)


def test_unshaped_cell():
    net = nn.Sequential(nn.LazyLinear(3))
    h, _ = lamina.scan(lambda h, x: (net(h) + x, None), jnp.zeros((2, 3)), XS)
    assert net[0].weight.shape == (3, 3)
    assert h.shape == (2, 3)


def test_scan_in_jit():
    cell = Cell()
    f = lamina.jit(lambda cell, xs: lamina.scan(cell, jnp.zeros((2, 3)), xs)[0])
    expected = loop(cell, XS)[0]
    np.testing.assert_allclose(f(cell, XS), expected, rtol=1e-5, atol=1e-6)
    f(cell, XS)
    assert int(cell.calls) == 15


def test_constants_in_carry_and_output():
    (h, name), ys = lamina.scan(
        lambda c, x: ((c[0] + x.sum(), c[1]), {"y": x, "tag": "t"}), (0.0, "fixed"), XS
    )
    assert name == "fixed"
    assert ys["tag"] == "t"
    np.testing.assert_allclose(h, XS.sum(), rtol=1e-4, atol=1e-5)


# remat.


@pytest.mark.parametrize(
    "wrap", [lambda net: net, lambda net: lambda x: net(x)], ids=["module", "fn"]
)
def test_remat_equals_plain(wrap):
    lamina.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
    expected = lamina.grad(lambda net: (net(XS[0]) ** 2).sum())(net)
    state = net.state_dict()
    lamina.manual_seed(0)
    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
    found = lamina.grad(lambda net: (lamina.remat(wrap(net))(XS[0]) ** 2).sum())(twin)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    for name, value in twin.state_dict().items():
        np.testing.assert_allclose(value, state[name], rtol=1e-5, atol=1e-6)


def test_remat_in_jit_and_policy():
    net = nn.Linear(3, 1)

    @lamina.jit
    def f(net):
        policy = jax.checkpoint_policies.nothing_saveable
        return lamina.grad(lambda net: lamina.remat(net, policy=policy)(XS[0]).sum())(net)

    np.testing.assert_allclose(f(net)["weight"], XS[0].sum(0, keepdims=True), rtol=1e-5)
    net.weight.data = net.weight.data * 3
    np.testing.assert_allclose(lamina.remat(net)(XS[0]), net(XS[0]), rtol=1e-5)


def test_remat_really_recomputes():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    with_remat = lamina.jit(lambda net: lamina.grad(lambda n: lamina.remat(n)(XS[0]).sum())(net))
    assert "optimization_barrier" in with_remat.lower(net).as_text()


# jax.lax inside forward.


class WithLambda(nn.Module):
    def __init__(self):
        self.cell = Cell(counting=False)

    def forward(self, xs):
        return jax.lax.scan(lambda h, x: self.cell(h, x), jnp.zeros((2, 3)), xs)[0]


class WithMethod(WithLambda):
    def step(self, h, x):
        return self.cell(h, x)

    def forward(self, xs):
        return jax.lax.scan(self.step, jnp.zeros((2, 3)), xs)[0]


class WithForward(WithLambda):
    def forward(self, xs):
        return jax.lax.scan(self.cell.forward, jnp.zeros((2, 3)), xs)[0]


class WithModule(WithLambda):
    def forward(self, xs):
        return jax.lax.scan(self.cell, jnp.zeros((2, 3)), xs)[0]


class WithPartial(WithLambda):
    def __init__(self):
        super().__init__()
        self.step = functools.partial(self.cell)

    def forward(self, xs):
        return jax.lax.scan(self.step, jnp.zeros((2, 3)), xs)[0]


class WithCheckpoint(WithLambda):
    def forward(self, xs):
        h = jnp.zeros((2, 3))
        for x in xs:
            h, _ = jax.checkpoint(self.cell)(h, x)
        return h


class WithMap(WithLambda):
    def forward(self, xs):
        return jax.lax.map(lambda x: self.cell(x, x)[0], xs).sum(0)


class WithCond(WithLambda):
    def forward(self, xs):
        return jax.lax.cond(xs.sum() > 1e6, lambda x: x, lambda x: self.cell(x, x)[0], xs[0])


def check_never_stale(net):
    xs = XS
    twin = WithLambda()
    twin.cell = net.cell

    def plain(net):
        if isinstance(net, WithMap):
            return sum(net.cell(x, x)[0] for x in xs)
        if isinstance(net, WithCond):
            return net.cell(xs[0], xs[0])[0]
        return loop(net.cell, xs)[0]

    f = lamina.jit(lambda net: net(xs))
    for _ in range(2):
        expected = plain(net)
        np.testing.assert_allclose(net(xs), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(f(net), expected, rtol=1e-5, atol=1e-6)
        found = lamina.grad(lambda net: net(xs).sum())(net)
        wanted = lamina.grad(lambda net: plain(net).sum())(net)
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)
        net.cell.map.weight.data = net.cell.map.weight.data + 1
        net(xs)


@pytest.mark.parametrize("kind", [WithLambda, WithMethod, WithForward, WithMap, WithCond])
def test_lax_inside_forward(kind):
    check_never_stale(kind())


@pytest.mark.parametrize("kind", [WithModule, WithPartial, WithCheckpoint])
def test_foreign_scan_of_a_module_is_never_stale(kind):
    """JAX remembers what it traced by the identity of the function; a module lives long."""
    try:
        check_never_stale(kind())
    except ForeignTransformError as error:
        assert "lamina." in str(error)  # noqa: PT017


def test_write_in_a_plain_scan_is_refused():
    class Counting(WithLambda):
        def __init__(self):
            self.cell = Cell()

    net = Counting()
    with pytest.raises(ForeignTransformError, match=r"buffer 'cell\.calls'[\s\S]*lamina"):
        net(XS)
    assert int(net.cell.calls) == 0
    with pytest.raises(ForeignTransformError, match=r"cell\.calls[\s\S]*lamina\.scan"):
        lamina.jit(net)(XS)
    assert int(net.cell.calls) == 0


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        lambda net: functools.partial(jax.eval_shape, net),
        jax.checkpoint,
        lambda net: jax.jit(lambda x: net(x)),
        lambda net: jax.jit(jax.vmap(net)),
        lambda net: lambda x: jax.lax.map(net, x),
    ],
    ids=["jit", "eval_shape", "checkpoint", "lambda", "vmap", "map"],
)
def test_plain_compilation_of_a_module_is_refused(transform):
    net = nn.Linear(3, 2)
    with pytest.raises(
        ForeignTransformError, match=r"plain JAX transform[\s\S]*lamina\.jit[\s\S]*functional_call"
    ):
        transform(net)(XS)


@pytest.mark.parametrize("write", ["parameter", "buffer", "random"])
def test_writes_under_plain_jit_are_refused(write):
    net = nn.Linear(3, 2)
    net.count = nn.Buffer(jnp.asarray(0))
    lamina.manual_seed(0)
    key = lamina.next_key()
    lamina.manual_seed(0)

    def f(x):
        if write == "parameter":
            net.bias.data = x
        elif write == "buffer":
            net.count += 1
        else:
            nn.functional.dropout(x)
        return x

    with pytest.raises(
        ForeignTransformError, match=r"plain JAX transform[\s\S]*right:  lamina\.jit"
    ):
        jax.jit(f)(jnp.ones(2))
    assert int(net.count) == 0
    assert (lamina.next_key() == key).all()


def test_constant_write_under_plain_jit_is_refused():
    net = nn.Linear(3, 2)
    zeros = jnp.zeros(2)
    before = np.array(net.bias.data)

    def f(x):
        net.bias.data = zeros
        return x

    with pytest.raises(LaminaError, match="plain JAX transform"):
        jax.jit(f)(jnp.ones(2))
    np.testing.assert_array_equal(net.bias.data, before)


def test_modules_without_state_work_under_plain_jit():
    net = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Softmax(-1))
    np.testing.assert_allclose(jax.jit(net)(XS), net(XS), rtol=1e-6)
