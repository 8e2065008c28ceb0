"""Containers, against torch: contents, names, repr and errors after every operation."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest

from lamina import nn


def names(net):
    return [name for name, _ in net.named_parameters()]


def kinds(items):
    return [type(item).__name__ for item in items]


SEQUENTIAL = {
    "args": lambda m: m.Sequential(m.Linear(1, 2), m.ReLU()),
    "ordered dict": lambda m: m.Sequential(
        collections.OrderedDict([("a", m.Linear(1, 2)), ("b", m.ReLU())])
    ),
    "empty": lambda m: m.Sequential(),
    "append": lambda m: m.Sequential(m.ReLU()).append(m.Linear(1, 1)),
    "extend": lambda m: m.Sequential(m.ReLU()).extend([m.Tanh(), m.Linear(1, 1)]),
    "extend by sequential": lambda m: m.Sequential(m.ReLU()).extend(
        m.Sequential(m.Tanh(), m.Tanh())
    ),
    "insert": lambda m: m.Sequential(m.ReLU(), m.Tanh()).insert(1, m.Linear(1, 1)),
    "insert first": lambda m: m.Sequential(m.ReLU()).insert(0, m.Linear(1, 1)),
    "insert negative": lambda m: m.Sequential(m.ReLU(), m.Tanh()).insert(-1, m.Linear(1, 1)),
    "add": lambda m: m.Sequential(m.ReLU()) + m.Sequential(m.Linear(1, 1)),
    "mul": lambda m: m.Sequential(m.Linear(1, 1), m.ReLU()) * 2,
    "rmul": lambda m: 2 * m.Sequential(m.Linear(1, 1)),
    "slice": lambda m: m.Sequential(m.ReLU(), m.Linear(1, 1), m.Tanh())[1:],
    "slice of named": lambda m: m.Sequential(
        collections.OrderedDict([("a", m.Linear(1, 2)), ("b", m.ReLU())])
    )[1:],
    "nested": lambda m: m.Sequential(m.Sequential(m.Linear(1, 1)), m.Sequential()),
    "list": lambda m: m.ModuleList([m.Linear(1, 1), m.ReLU()]),
    "equal in a list": lambda m: m.ModuleList([m.Linear(1, 1) for _ in range(3)] + [m.ReLU()]),
    "blocks in a list": lambda m: m.ModuleList([m.Sequential(m.Linear(1, 1), m.ReLU())] * 2),
    "list in a sequential": lambda m: m.Sequential(m.ModuleList([m.ReLU(), m.ReLU()])),
    "empty list": lambda m: m.ModuleList(),
    "list append": lambda m: m.ModuleList([m.ReLU()]).append(m.Linear(1, 1)),
    "list add": lambda m: m.ModuleList([m.ReLU()]) + m.ModuleList([m.Linear(1, 1)]),
    "list slice": lambda m: m.ModuleList([m.ReLU(), m.Linear(1, 1), m.Tanh()])[1:],
    "dict": lambda m: m.ModuleDict({"a": m.Linear(1, 1), "b": m.ReLU()}),
    "dict of pairs": lambda m: m.ModuleDict([("b", m.Linear(1, 1)), ("a", m.ReLU())]),
    "empty dict": lambda m: m.ModuleDict(),
}


@pytest.mark.parity
@pytest.mark.parametrize("make", SEQUENTIAL.values(), ids=SEQUENTIAL)
def test_same_as_torch(torch, make):
    ours, theirs = make(nn), make(torch.nn)
    assert type(ours).__name__ == type(theirs).__name__
    assert names(ours) == names(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert repr(ours) == repr(theirs)
    assert len(ours) == len(theirs)
    if not isinstance(ours, nn.ModuleDict):
        assert kinds(ours) == kinds(theirs)


def iadd(net, m):
    net += m.Sequential(m.Tanh()) if isinstance(net, (m.Sequential,)) else [m.Tanh()]


def imul(net, m):
    net *= 2


CHANGES = {
    "set": lambda net, m: net.__setitem__(1, m.Linear(2, 2)),
    "set negative": lambda net, m: net.__setitem__(-1, m.Linear(2, 2)),
    "delete": lambda net, m: net.__delitem__(0),
    "delete negative": lambda net, m: net.__delitem__(-1),
    "delete slice": lambda net, m: net.__delitem__(slice(0, 2)),
    "pop": lambda net, m: net.pop(1),
    "pop last": lambda net, m: net.pop(-1),
    "iadd": iadd,
}


@pytest.mark.parity
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["Sequential", "ModuleList"])
def test_same_changes_as_torch(torch, change, kind):
    results = []
    for m in (nn, torch.nn):
        parts = [m.Linear(1, 1), m.ReLU(), m.Linear(3, 3)]
        net = m.Sequential(*parts) if kind == "Sequential" else m.ModuleList(parts)
        change(net, m)
        results.append((list(net._modules), kinds(net), names(net), repr(net)))
    assert results[0] == results[1]


@pytest.mark.parity
def test_deleting_from_a_named_sequential(torch):
    results = []
    for m in (nn, torch.nn):
        net = m.Sequential(collections.OrderedDict(a=m.ReLU(), b=m.Tanh(), c=m.Linear(1, 1)))
        del net[0]
        net.append(m.ReLU())
        results.append((list(net._modules), kinds(net)))
    assert results[0] == results[1]


@pytest.mark.parity
@pytest.mark.parametrize(
    "method", ["keys", "values", "items", "clear", "pop", "update", "contains", "del"]
)
def test_module_dict_methods(torch, method):
    def run(m):
        net = m.ModuleDict({"b": m.ReLU(), "a": m.Linear(1, 1)})
        if method == "contains":
            return "a" in net, "z" in net, list(net)
        if method == "del":
            del net["b"]
        elif method == "pop":
            net.pop("b")
        elif method == "update":
            net.update({"c": m.Tanh(), "b": m.Tanh()})
            net.update([("d", m.ReLU())])
        else:
            result = getattr(net, method)()
            if method == "keys":
                return list(result)
            if method == "values":
                return kinds(result)
            if method == "items":
                return [(k, type(v).__name__) for k, v in result]
        return list(net._modules), names(net), repr(net)

    assert run(nn) == run(torch.nn)


def test_index_types_and_errors():
    net = nn.Sequential(nn.ReLU(), nn.Tanh())
    assert isinstance(net[np.int64(1)], nn.Tanh)
    assert isinstance(net[-2], nn.ReLU)
    for bad in (2, -3):
        with pytest.raises(IndexError, match=f"index {bad} is out of range for 2 modules"):
            net[bad]
    with pytest.raises(IndexError):
        net.insert(5, nn.ReLU())
    with pytest.raises(TypeError, match=r"Sequential: expected modules, got list; unpack the list"):
        nn.Sequential([nn.ReLU()])
    with pytest.raises(TypeError, match="expected modules, got function"):
        nn.Sequential(lambda x: x)
    with pytest.raises(TypeError, match="expected an iterable of modules, got Linear"):
        nn.ModuleList().extend(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="expected an int, got float"):
        net * 2.0
    with pytest.raises(ValueError, match="expected a positive int, got 0"):
        net * 0
    with pytest.raises(KeyError, match="no module 'lef'. Did you mean 'left'"):
        nn.ModuleDict({"left": nn.ReLU()})["lef"]


def test_insert_and_negative_slices_share_parts():
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    part = net[::2]
    assert part[1] is net[2]
    assert names(net) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert net[0].weight is part[0].weight


def test_times_shares_parts():
    net = nn.Sequential(nn.Linear(1, 1)) * 3
    assert len(list(net.parameters())) == 2
    assert net.ties()["2.weight"] == "0.weight"
    net *= 2
    assert len(net) == 6


def test_no_module_list_call():
    with pytest.raises(TypeError, match="ModuleList has no forward method"):
        nn.ModuleList()(1)


# Parameters.


@pytest.mark.parity
def test_parameter_list(torch):
    def run(m, ones):
        net = m.ParameterList([m.Parameter(ones), ones])
        net.append(m.Parameter(ones * 2))
        net.extend([m.Parameter(ones * 3)])
        net += [m.Parameter(ones * 4)]
        net[1] = m.Parameter(ones * 9)
        return (
            len(net),
            names(net),
            list(net.state_dict()),
            [float(p.sum().item()) for p in net],
            len(net[1:3]),
        )

    assert run(nn, jnp.ones(2)) == run(torch.nn, torch.ones(2))


@pytest.mark.parity
def test_parameter_dict(torch):
    def run(m, ones):
        net = m.ParameterDict({"b": m.Parameter(ones), "a": ones})
        net["c"] = m.Parameter(ones * 3)
        net.update({"d": m.Parameter(ones * 4)})
        net.setdefault("b", m.Parameter(ones * 7))
        net.setdefault("e", m.Parameter(ones * 5))
        popped = net.pop("a")
        other = net.copy()
        del net["d"]
        return (
            names(net),
            list(net.keys()),
            list(other.keys()),
            float(popped.sum().item()),
            "b" in net,
            "a" in net,
            list(reversed(net)),
            net.get("zz", 3),
            list((net | other).keys()),
            len(net),
            [float(v.sum().item()) for v in net.values()],
            net.popitem()[0],
            list(net.fromkeys(["x", "y"])),
        )

    assert run(nn, jnp.ones(2)) == run(torch.nn, torch.ones(2))


def test_parameter_containers_show_their_values():
    net = nn.ParameterList([jnp.ones((2, 3)), nn.Parameter(shape=(None, 2))])
    assert repr(net) == (
        "ParameterList(\n"
        "  (0): Parameter containing: [float32 of size (2, 3)]\n"
        "  (1): Parameter containing: [float32 of size (?, 2)]\n)"
    )
    assert repr(nn.ParameterDict()) == "ParameterDict()"


def test_parameter_containers_refuse():
    with pytest.raises(IndexError, match="out of range for 1 parameters"):
        nn.ParameterList([jnp.ones(1)])[1]
    with pytest.raises(TypeError, match="expected an iterable of parameters, got Parameter"):
        nn.ParameterList().extend(nn.Parameter(jnp.ones(1)))
    with pytest.raises(KeyError, match="no parameter 'lef'. Did you mean 'left'"):
        nn.ParameterDict({"left": jnp.ones(1)})["lef"]
    with pytest.raises(TypeError, match="a name is a str, got int"):
        nn.ParameterDict()[1] = jnp.ones(1)


def test_parameter_dict_with_names_of_methods():
    """Names such as "items" must not hide or be hidden by attributes."""
    net = nn.ParameterDict({"weight": jnp.ones(1)})
    try:
        net["items"] = jnp.ones(2)
    except (KeyError, AttributeError, TypeError):
        return
    assert net["items"].shape == (2,)
    assert dict(net.items())["items"].shape == (2,)
    assert names(net) == ["weight", "items"]


def test_module_dict_refuses_names_of_methods():
    with pytest.raises(KeyError, match="has an attribute 'keys' already"):
        nn.ModuleDict({"keys": nn.ReLU()})
