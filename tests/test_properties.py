"""Properties of random module trees: names, ties, state dicts, compiled equals eager."""

import copy
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SIZE = 2
settings = hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
few = hypothesis.settings(settings, max_examples=5)

LEAVES = ("linear", "plain", "norm", "relu", "again")
TREES = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.tuples(
        st.sampled_from(["sequential", "list", "dict", "attributes"]),
        st.lists(inner, min_size=0, max_size=3),
    ),
    max_leaves=6,
)


def make(m, tree, made=None):
    """Build a tree with either library; the leaf "again" is the last linear layer once more."""
    made = [] if made is None else made
    if tree == "linear":
        made.append(m.Linear(SIZE, SIZE))
        return made[-1]
    if tree == "plain":
        layer = m.Linear(SIZE, SIZE, bias=False)
        if made:
            layer.weight = made[-1].weight
        return layer
    if tree == "norm":
        return m.LayerNorm(SIZE)
    if tree == "relu":
        return m.ReLU()
    if tree == "again":
        return made[-1] if made else m.Tanh()
    kind, parts = tree
    children = [make(m, part, made) for part in parts]
    if kind == "sequential":
        return m.Sequential(*children)
    if kind == "list":
        return m.ModuleList(children)
    if kind == "dict":
        return m.ModuleDict({f"k{i}": child for i, child in enumerate(children)})
    net = m.Module()
    for i, child in enumerate(children):
        setattr(net, f"part{i}", child)
    return net


def run(net, x):
    """Call all leaves in order."""
    for module in net.modules():
        if (
            not list(module.children())
            and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
            and type(module) is not nn.Module
        ):
            x = module(x)
    return x


X = np.array([[1.0, -2.0], [0.5, 3.0], [2.0, 0.1]], np.float32)


@pytest.mark.parity
@settings
@hypothesis.given(TREES)
def test_names_and_repr_equal_torch(tree):
    torch = pytest.importorskip("torch")
    ours, theirs = make(nn, tree), make(torch.nn, tree)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for options in ({}, {"remove_duplicate": False}):
        for method in ("named_parameters", "named_modules"):
            assert [n for n, _ in getattr(ours, method)(**options)] == [
                n for n, _ in getattr(theirs, method)(**options)
            ]
    assert repr(ours) == repr(theirs)


@settings
@hypothesis.given(TREES)
def test_ties_are_exactly_the_shared_boxes(tree):
    net = make(nn, tree)
    everything = dict(net.named_parameters(remove_duplicate=False))
    unique = dict(net.named_parameters())
    assert everything.keys() - unique.keys() == net.ties().keys()
    for name, first in net.ties().items():
        assert everything[name] is unique[first]
    assert len({id(p) for p in unique.values()}) == len(unique)


@settings
@hypothesis.given(TREES)
def test_values_do_not_depend_on_how_they_are_made(tree):
    def values(use):
        lamina.manual_seed(0)
        net = make(nn, tree)
        use(net)
        return {name: np.asarray(v).tobytes() for name, v in net.state_dict().items()}

    expected = values(lambda net: None)
    assert values(lamina.materialize) == expected
    assert values(lambda net: [p.data for p in reversed(list(net.parameters()))]) == expected
    assert values(lambda net: (repr(net), copy.deepcopy(net))) == expected


@settings
@hypothesis.given(TREES, st.booleans())
def test_state_dict_round_trip(tree, pickled):
    net = make(nn, tree)
    for i, p in enumerate(net.parameters()):
        p.fill_(i + 1)
    state = net.state_dict()
    if pickled:
        state = pickle.loads(pickle.dumps({name: np.asarray(v) for name, v in state.items()}))
    twin = make(nn, tree)
    result = twin.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert twin.ties() == net.ties()
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(twin.state_dict()[name], value)


@settings
@hypothesis.given(TREES, st.data())
def test_one_wrong_entry_changes_nothing(tree, data):
    net = make(nn, tree)
    state = {name: np.asarray(value) + 1 for name, value in net.state_dict().items()}
    if not state:
        return
    name = data.draw(st.sampled_from(sorted(state)))
    kind = data.draw(st.sampled_from(["shape", "dtype", "extra"]))
    if kind == "shape":
        state[name] = np.zeros((7, 7), np.float32)
    elif kind == "dtype":
        state[name] = state[name].astype(np.int32)
    else:
        state[name + "x"] = state[name]
    before = {n: np.array(v) for n, v in net.state_dict().items()}
    with pytest.raises(lamina._core.errors.LoadError, match="nothing was loaded"):
        net.load_state_dict(state)
    for n, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[n])


@settings
@hypothesis.given(TREES)
def test_copies_are_equal_and_apart(tree):
    net = make(nn, tree)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert repr(twin) == repr(net)
        assert twin.ties() == net.ties()
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
        for name, value in net.state_dict().items():
            np.testing.assert_array_equal(twin.state_dict()[name], value)


@few
@hypothesis.given(TREES)
def test_compiled_equals_eager(tree):
    net = make(nn, tree)

    def loss(net, x):
        return (run(net, x) ** 2).sum()

    expected, grads = lamina.value_and_grad(loss)(net, X)
    found, jitted = lamina.jit(lambda net, x: lamina.value_and_grad(loss)(net, x))(net, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert jitted.keys() == grads.keys() == dict(net.named_parameters()).keys()
    for name, value in grads.items():
        np.testing.assert_allclose(jitted[name], value, rtol=1e-3, atol=1e-4)


@few
@hypothesis.given(TREES, TREES)
def test_one_function_serves_every_structure(one, two):
    f = lamina.jit(lambda net, x: run(net, x))
    nets = [make(nn, one), make(nn, two), make(nn, one)]
    for net in (*nets, nets[0]):
        np.testing.assert_allclose(f(net, X), run(net, jnp.asarray(X)), rtol=1e-4, atol=1e-5)
