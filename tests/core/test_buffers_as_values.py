"""A buffer attribute reads as its value, a plain array; its box is ``get_buffer(name)``."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lamina
from lamina import nn
from lamina.errors import DeferredError, ShapeError, TypeMismatchError

X = jnp.asarray([1.0, -2.0, 3.0])
INPUTS = [X, 2 * X, X - 1]


class Stateful(nn.Module):
    """Two vectors and a counter, with a ``forward`` given from outside."""

    def __init__(self, how=None):
        self.scale = nn.Parameter(jnp.asarray([1.0, 2.0, 0.5]))
        self.h = nn.Buffer(jnp.asarray([0.5, 0.25, 0.125]))
        self.register_buffer("k", jnp.asarray([1.0, 1.0, 2.0]))
        self.n = nn.Buffer(jnp.asarray(1))
        self.how = how

    def forward(self, x):
        return self.how(self, x * self.scale)


def start():
    return {
        "h": jnp.asarray([0.5, 0.25, 0.125]), "k": jnp.asarray([1.0, 1.0, 2.0]), "n": jnp.asarray(1)
    }  # fmt: skip


# Each program is written as in PyTorch, and again in plain JAX, from (state, x) to (out, state).


def difference(net, x):
    before = net.h
    net.h = x
    return net.h - before


def states(net, x):
    outs = []
    for _ in range(3):
        outs.append(net.h)
        net.h = net.h * 0.5 + x
    return jnp.stack([*outs, net.h])


def pure_states(s, x):
    outs, h = [], s["h"]
    for _ in range(3):
        outs.append(h)
        h = h * 0.5 + x
    return jnp.stack([*outs, h]), s | {"h": h}


def returned(net, x):
    net.h = 2 * x
    return net.h


def both(net, x):
    net.h = net.h + x
    return net.h, {"before": net.k, "after": net.h}


def augmented(net, x):
    net.h += x
    net.k *= 2
    net.h -= net.k
    return net.h


def exchanged(net, x):
    net.h, net.k = net.k, net.h
    return net.h * x


def at_once(net, x):
    old, net.h = net.h, x
    return old


def kept_in_a_closure(net, x):
    before = net.h

    def later():
        return before

    net.h = x
    return later() + net.h


def default_argument(net, x):
    def later(before=net.h):
        return before

    net.h = x
    return later()


def copied_over(net, x):
    net.k = net.h
    net.h = x
    return net.k


def rolled(net, x):
    net.h = jnp.roll(net.h, 1).at[0].set(x[0])
    return net.h


def counted(net, x):
    n = net.n
    net.n = n + 1
    return x * n


def by_the_box(net, x):
    before = net.h
    net.get_buffer("h")[...] = x
    return net.h - before


def by_an_item(net, x):
    before = net.h
    net.get_buffer("h")[0] = x[0]
    return net.h - before


def filled(net, x):
    before = net.h
    net.get_buffer("h").fill_(3.0)
    return net.h * x + before


def from_named_buffers(net, x):
    before = net.h
    for name, box in net.named_buffers():
        if name == "h":
            box.copy_(x)
    return net.h - before


def conditionally(net, x):
    net.h = jax.lax.cond(x[0] > 0, lambda h: h + x, lambda h: h - x, net.h)
    return net.h


PROGRAMS = {
    "difference": (difference, lambda s, x: (x - s["h"], s | {"h": x})),
    "states": (states, pure_states),
    "returned": (returned, lambda s, x: (2 * x, s | {"h": 2 * x})),
    "both": (both, lambda s, x: (
        (s["h"] + x, {"before": s["k"], "after": s["h"] + x}), s | {"h": s["h"] + x}
    )),
    "augmented": (augmented, lambda s, x: (
        s["h"] + x - 2 * s["k"], s | {"h": s["h"] + x - 2 * s["k"], "k": 2 * s["k"]}
    )),
    "exchanged": (exchanged, lambda s, x: (s["k"] * x, s | {"h": s["k"], "k": s["h"]})),
    "at once": (at_once, lambda s, x: (s["h"], s | {"h": x})),
    "closure": (kept_in_a_closure, lambda s, x: (s["h"] + x, s | {"h": x})),
    "default argument": (default_argument, lambda s, x: (s["h"], s | {"h": x})),
    "copied over": (copied_over, lambda s, x: (s["h"], s | {"k": s["h"], "h": x})),
    "rolled": (rolled, lambda s, x: (
        jnp.stack([x[0], s["h"][0], s["h"][1]]),
        s | {"h": jnp.stack([x[0], s["h"][0], s["h"][1]])},
    )),
    "counted": (counted, lambda s, x: (x * s["n"], s | {"n": s["n"] + 1})),
    "box": (by_the_box, lambda s, x: (x - s["h"], s | {"h": x})),
    "item": (by_an_item, lambda s, x: (
        jnp.zeros(3).at[0].set(x[0] - s["h"][0]), s | {"h": s["h"].at[0].set(x[0])}
    )),
    "filled": (filled, lambda s, x: (3 * x + s["h"], s | {"h": jnp.full(3, 3.0)})),
    "named_buffers": (from_named_buffers, lambda s, x: (x - s["h"], s | {"h": x})),
    "cond": (conditionally, lambda s, x: (
        jnp.where(x[0] > 0, s["h"] + x, s["h"] - x),
        s | {"h": jnp.where(x[0] > 0, s["h"] + x, s["h"] - x)},
    )),
}  # fmt: skip


def jit_of_an_argument(net):
    compiled = lamina.jit(lambda net, x: net(x))
    return lambda x: compiled(net, x)


def aux_of_grad(net, x):
    return lamina.grad(lambda net: (0.0 * net.scale.sum(), net(x)), has_aux=True)(net)[1]


def by_functional_call(net, x):
    out, state = lamina.functional_call(net, net.state_dict(), x, return_state=True)
    for name, value in state.items():
        setattr(net, name, value)
    return out


WAYS = {
    "eager": lambda net: net,
    "jit": lamina.jit,
    "jit of an argument": jit_of_an_argument,
    "remat": lamina.remat,
    "scan": lambda net: (
        lambda x: jax.tree.map(
            lambda y: y[0], lamina.scan(lambda c, x: (c, net(x)), 0.0, x[None])[1]
        )
    ),
    "grad": lambda net: lambda x: aux_of_grad(net, x),
    "jit of grad": lambda net: lamina.jit(lambda x: aux_of_grad(net, x)),
    "backward": lambda net: (
        lambda x: lamina.backward(lambda: (0.0 * net.scale.sum(), net(x)), has_aux=True)[1]
    ),
    "functional_call": lambda net: lambda x: by_functional_call(net, x),
    "ensemble": lambda net: Ensemble(net),
}


class Ensemble:
    """Two copies in the lanes of ``vmap``; both compute the same."""

    def __init__(self, net):
        self.net, self.pair = net, lamina.stack([net, net])

    def __call__(self, x):
        out = lamina.vmap(lambda net: self.net.how(net, x * net.scale))(self.pair)
        for name, box in self.net.named_buffers():
            box.data = lamina.unstack(self.pair)[1].get_buffer(name).data
        return jax.tree.map(lambda y: y[1], out)


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def is_plain(value):
    return (
        isinstance(value, jax.Array)
        and not isinstance(value, (jax.core.Tracer, nn.Buffer))
        and not value.is_deleted()
    )


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("way", WAYS)
def test_state_written_as_in_torch(way, program):
    """Equal to plain JAX at every call, and what came out of earlier calls stays as it was."""
    how, pure = PROGRAMS[program]
    net, state = Stateful(how), start()
    run = WAYS[way](net)
    outs, expected = [], []
    for x in INPUTS:
        outs.append(run(x))
        out, state = pure(state, x * net.scale.data)
        expected.append(out)
        assert all(map(is_plain, jax.tree.leaves(outs[-1])))
        assert all(is_plain(getattr(net, name)) for name in state)
        same({name: getattr(net, name) for name in state}, state)
    same(outs, expected)


@pytest.mark.parametrize("program", ["difference", "states", "augmented", "closure", "item"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_through_state(program, compiled):
    how, pure = PROGRAMS[program]
    net = Stateful(how)

    def loss(net):
        return sum((net(x) ** 2).sum() for x in INPUTS)

    def pure_loss(scale):
        total, state = 0.0, start()
        for x in INPUTS:
            out, state = pure(state, x * scale)
            total += (out**2).sum()
        return total

    grad = lamina.grad(loss)
    found = (lamina.jit(grad) if compiled else grad)(net)
    same(found["scale"], jax.grad(pure_loss)(net.scale.data))


# Uses of the value.


class Tables(nn.Module):
    def __init__(self):
        self.perm = nn.Buffer(jnp.asarray([2, 0, 1]))
        self.i = nn.Buffer(jnp.asarray(1))
        self.mask = nn.Buffer(jnp.asarray([True, False, True]))
        self.flag = nn.Buffer(jnp.asarray(True))
        self.m = nn.Buffer(jnp.arange(9.0).reshape(3, 3))
        self.k = nn.Buffer(jnp.ones((2, 1, 3, 3)) / 9)
        self.v = nn.Buffer(jnp.asarray([1.0, 2.0, 3.0]))


@jax.custom_vjp
def tripled(x):
    return 3 * x


tripled.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))

IMAGE = jnp.arange(32.0).reshape(2, 1, 4, 4)
MATRIX = jnp.arange(9.0, 18.0).reshape(3, 3)

USES = {
    "index": lambda t: MATRIX[:, t.perm],
    "two indices": lambda t: MATRIX[t.perm, t.perm],
    "scalar index": lambda t: MATRIX[t.i],
    "mask": lambda t: jnp.where(t.mask, MATRIX, 0.0),
    "at": lambda t: MATRIX.at[t.perm].multiply(t.m),
    "own at": lambda t: t.m.at[0].set(t.v),
    "take": lambda t: jnp.take(MATRIX, t.perm, axis=1),
    "conv": lambda t: jax.lax.conv_general_dilated(IMAGE, t.k, (1, 1), "SAME"),
    "conv2d": lambda t: nn.functional.conv2d(IMAGE, t.k),
    "lax.dot": lambda t: jax.lax.dot(MATRIX, t.m),
    "lax.dot_general": lambda t: jax.lax.dot_general(t.m, t.v, (((1,), (0,)), ((), ()))),
    "lax.add": lambda t: jax.lax.add(t.v, t.v),
    "lax.select": lambda t: jax.lax.select(t.mask, t.v, -t.v),
    "lax.dynamic_slice": lambda t: jax.lax.dynamic_slice(MATRIX, (t.i, t.i), (1, 2)),
    "lax.dynamic_update_slice": lambda t: jax.lax.dynamic_update_slice(t.v, t.v[:1] * 9, (t.i,)),
    "lax.sort": lambda t: jax.lax.sort(-t.v),
    "lax.broadcast": lambda t: jax.lax.broadcast(t.v, (2,)),
    "lax.convert_element_type": lambda t: jax.lax.convert_element_type(t.perm, jnp.float32),
    "lax.cond": lambda t: jax.lax.cond(t.flag, lambda v: v, lambda v: -v, t.v),
    "lax.scan": lambda t: jax.lax.scan(lambda c, row: (c + row, c), t.v, t.m),
    "lax.fori_loop": lambda t: jax.lax.fori_loop(0, t.i + 2, lambda i, v: v * 2, t.v),
    "lax.while_loop": lambda t: jax.lax.while_loop(lambda v: v[0] < 9, lambda v: v * 2, t.v),
    "lax.switch": lambda t: jax.lax.switch(t.i, [jnp.sin, jnp.cos], t.v),
    "lax.map": lambda t: jax.lax.map(lambda row: row.sum(), t.m),
    "jax.vmap": lambda t: jax.vmap(jnp.dot, in_axes=(0, None))(t.m, t.v),
    "jax.jit": lambda t: jax.jit(jnp.dot)(t.m, t.v),
    "jax.grad": lambda t: jax.grad(lambda v: (v**2).sum())(t.v),
    "jax.checkpoint": lambda t: jax.checkpoint(jnp.sin)(t.v),
    "custom_vjp": lambda t: tripled(t.v),
    "einsum": lambda t: jnp.einsum("ij,j->i", t.m, t.v),
    "operators": lambda t: (t.m @ t.v + 1) * 2 - t.v / 2**t.v,
    "right operators": lambda t: 1 - MATRIX @ t.v,
    "comparison": lambda t: (t.v > 1) & t.mask,
    "methods": lambda t: t.m.T.reshape(-1).sum() + t.v.mean(),
    "iteration": lambda t: sum(row for row in t.m),
    "stack": lambda t: jnp.stack([t.v, t.v]),
    "one_hot": lambda t: jax.nn.one_hot(t.perm, 3),
    "tree": lambda t: jax.tree.map(lambda a: a + 1, {"a": t.v, "b": [t.m]}),
    "optax": lambda t: optax.apply_updates({"v": t.v}, {"v": t.v}),
    "astype": lambda t: t.perm.astype(jnp.float32),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_value_works_wherever_an_array_does(use, compiled):
    net = Tables()

    class Arrays:
        pass

    for name, box in net.named_buffers():
        setattr(Arrays, name, box.data)
    fn = lamina.jit(USES[use]) if compiled else USES[use]
    same(fn(net), USES[use](Arrays))


def test_concrete_values_outside():
    net = Tables()
    assert int(net.i) == 1
    assert float(net.v[1]) == 2.0
    assert [10, 20, 30][net.i] == 20
    assert net.flag
    assert len(net.v) == 3
    assert net.v.tolist() == [1.0, 2.0, 3.0]
    assert f"{net.v.sum():.1f}" == "6.0"
    np.testing.assert_array_equal(np.asarray(net.v) + np.ones(3), [2.0, 3.0, 4.0])
    np.testing.assert_array_equal(np.ones(3) + net.v, [2.0, 3.0, 4.0])
    assert hash(net.v.shape) == hash((3,))
    assert net.v.devices() == {jax.devices()[0]}


def test_the_value_is_an_array_and_the_box_is_a_buffer():
    net = Stateful()
    for name in ("h", "k", "n"):
        assert is_plain(getattr(net, name))
        assert isinstance(net.get_buffer(name), nn.Buffer)
        assert net.get_buffer(name) is net.get_buffer(name)
        assert dict(net.named_buffers())[name] is net.get_buffer(name)
        assert hasattr(net, name)
        assert name in dir(net)
    assert all(isinstance(box, nn.Buffer) for box in net.buffers())
    assert all(isinstance(box, nn.Buffer) for _, box in net.named_buffers())
    assert isinstance(net.state_dict(keep_vars=True)["h"], nn.Buffer)
    assert isinstance(net.scale, nn.Parameter)


def test_buffers_of_layers():
    net = nn.Sequential(nn.BatchNorm1d(3))
    net(jnp.ones((2, 3)))
    assert is_plain(net[0].running_mean)
    assert is_plain(net[0].num_batches_tracked)
    assert int(net[0].num_batches_tracked) == 1
    assert isinstance(net.get_buffer("0.running_mean"), nn.Buffer)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_was_read_is_a_snapshot(compiled):
    net = Stateful(augmented)
    run = lamina.jit(net) if compiled else net
    held, copies = [], []
    for _ in range(4):
        run(X)
        held += [net.h, net.k]
        copies += [jnp.copy(net.h), jnp.copy(net.k)]
    for value, expected in zip(held, copies, strict=True):
        assert not value.is_deleted()
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_was_assigned_stays_the_users(compiled):
    net = Stateful(augmented)
    run = lamina.jit(net) if compiled else net
    run(X)
    given = jnp.asarray([4.0, 5.0, 6.0])
    net.h = given
    for _ in range(3):
        run(X)
    np.testing.assert_array_equal(given, [4.0, 5.0, 6.0])


def test_assigning_one_buffer_to_another_ties_nothing():
    one, two = Stateful(), Stateful()
    two.h = one.h
    two.k = two.h
    one.h = X
    np.testing.assert_array_equal(two.h, [0.5, 0.25, 0.125])
    two.h = X
    np.testing.assert_array_equal(two.k, [0.5, 0.25, 0.125])
    assert not two.ties()


def test_assigning_a_box_shares_it():
    one, two = Stateful(), Stateful()
    two.h = one.get_buffer("h")
    one.h = X
    np.testing.assert_array_equal(two.h, X)


@pytest.mark.parametrize(
    "value",
    [np.asarray([1.0, 2.0, 3.0], np.float32), [1.0, 2.0, 3.0], (1, 2, 3), jnp.arange(1.0, 4.0)],
    ids=["numpy", "list", "tuple", "jax"],
)
def test_assigned_values_of_other_kinds(value):
    net = Stateful()
    box = net.get_buffer("h")
    net.h = value
    assert is_plain(net.h)
    assert net.get_buffer("h") is box
    assert net.h.dtype == jnp.float32
    np.testing.assert_array_equal(net.h, [1.0, 2.0, 3.0])


def test_a_new_array_must_fit():
    net = Stateful()
    with pytest.raises(ShapeError, match="h"):
        net.h = jnp.ones(4)
    with pytest.raises(TypeMismatchError, match="h"):
        net.h = jnp.ones(3, jnp.complex64)
    with pytest.raises(TypeMismatchError, match="n"):
        net.n = jnp.ones((), jnp.float32)
    with pytest.raises(TypeMismatchError, match="n"):
        net.n = 1.5
    same({name: getattr(net, name) for name in start()}, start())


@pytest.mark.parametrize(("name", "value"), [("h", 1j * jnp.ones(3)), ("n", jnp.asarray(1.5))])
def test_a_weakly_typed_array_must_fit_too(name, value):
    net = Stateful()
    with pytest.raises(TypeMismatchError, match=name):
        setattr(net, name, value)
    same({name: getattr(net, name) for name in start()}, start())


def test_a_value_cannot_be_edited_in_place():
    """It is a plain array; the box can."""
    net = Stateful()
    with pytest.raises(TypeError):
        net.h[0] = 1.0
    net.get_buffer("h")[0] = 9.0
    np.testing.assert_array_equal(net.h, [9.0, 0.25, 0.125])


def test_a_new_box_replaces_the_old_one():
    net = Stateful()
    net.h = nn.Buffer(jnp.ones(5), persistent=False)
    assert net.h.shape == (5,)
    assert not net.get_buffer("h").persistent
    assert "h" not in net.state_dict()
    del net.h
    assert not hasattr(net, "h")


# Places without an array.


class Remembering(nn.Module):
    def __init__(self):
        self.register_buffer("last", None, persistent=False)

    def forward(self, x):
        out = x if self.last is None else x + self.last
        self.last = x
        return out


REMEMBERING = {name: WAYS[name] for name in ("eager", "jit", "jit of an argument", "remat")}


@pytest.mark.parametrize("way", REMEMBERING)
def test_an_empty_place_reads_none(way):
    net = Remembering()
    assert net.last is None
    assert isinstance(net.get_buffer("last"), nn.Buffer)
    run = WAYS[way](net)
    outs = [run(x) for x in INPUTS]
    same(outs, [INPUTS[0], INPUTS[0] + INPUTS[1], INPUTS[1] + INPUTS[2]])
    assert is_plain(net.last)
    np.testing.assert_array_equal(net.last, INPUTS[2])
    net.last = None
    assert net.last is None
    same(run(X), X)
    net.last = jnp.ones((2, 2))
    assert net.last.shape == (2, 2)


@pytest.mark.parametrize("way", ["eager", "jit", "remat"])
def test_an_array_is_taken_out_again(way):
    class Emptying(nn.Module):
        def __init__(self):
            self.register_buffer("last", None)

        def forward(self, x):
            before, self.last = self.last, None
            return x if before is None else x + before

    net = Emptying()
    net.last = X
    run = WAYS[way](net)
    same(run(X), 2 * X)
    assert net.last is None
    same(run(X), X)


# Values that do not exist yet.


def test_reading_makes_a_deferred_value():
    net = nn.Module()
    net.h = nn.Buffer(shape=(2, 3), init=nn.init.Constant(2.0))
    assert not net.get_buffer("h").is_material
    assert net.get_buffer("h").init == nn.init.Constant(2.0)
    np.testing.assert_array_equal(net.h, np.full((2, 3), 2.0))
    assert net.get_buffer("h").is_material


def test_reading_an_unshaped_buffer_names_it():
    net = nn.Sequential(nn.Module())
    net[0].table = nn.Buffer(shape=(None, 3), init=nn.init.Zeros())
    with pytest.raises(DeferredError, match=r"0\.table"):
        _ = net[0].table
    net[0].get_buffer("table").shape = (2, 3)
    assert net[0].table.shape == (2, 3)


def test_a_layer_infers_the_shape_of_its_buffer():
    class Shifted(nn.Module):
        def __init__(self):
            self.shift = nn.Buffer(shape=(None,), init=nn.init.Ones())

        def infer_shapes(self, x):
            self.get_buffer("shift").shape = x.shape[-1:]

        def forward(self, x):
            return jax.lax.add(x, self.shift)

    for wrap in (lambda net: net, lamina.jit, lamina.remat):
        net = Shifted()
        same(wrap(net)(X), X + 1)
        assert is_plain(net.shift)


def test_options_of_the_box():
    net = Stateful()
    box = net.get_buffer("h")
    assert box.persistent
    box.persistent = False
    assert "h" not in net.state_dict()
    box.init = nn.init.Constant(7.0)
    np.testing.assert_array_equal(net.h, np.full(3, 7.0))
    box.zero_()
    assert not net.h.any()
    net.to(jnp.bfloat16)
    assert net.h.dtype == jnp.bfloat16
    assert net.n.dtype == jnp.int32


@pytest.mark.parametrize(
    "twin",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), lambda net: net.clone()],
    ids=["deepcopy", "pickle", "clone"],
)
def test_copies(twin):
    net = Stateful()
    net.h = X
    other = twin(net)
    assert is_plain(other.h)
    np.testing.assert_array_equal(other.h, X)
    other.h = 2 * X
    np.testing.assert_array_equal(net.h, X)
