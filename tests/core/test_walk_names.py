"""The walker: order, names, ties, and its cache."""

import jax.numpy as jnp
import pytest

from lamina import nn
from lamina._core.walk import describe, identify, path_of, root_of, walk


def names(net):
    return [name for name, _ in walk(net).entries]


def test_parameters_before_buffers_parents_before_children():
    class Net(nn.Module):
        def __init__(self):
            self.child = nn.Linear(1, 1)
            self.buffer = nn.Buffer(jnp.ones(1))
            self.weight = nn.Parameter(jnp.ones(1))

    assert names(Net()) == ["weight", "buffer", "child.weight", "child.bias"]


@pytest.mark.parity
def test_reassigned_names_keep_or_lose_their_place_as_in_torch(torch):
    def make(m):
        net = m.Module()
        net.a, net.b, net.c = m.Linear(1, 1), m.Linear(1, 1), m.Linear(1, 1)
        net.a = m.Linear(1, 1, bias=False)
        del net.b
        net.b = m.Linear(1, 1)
        return net

    assert list(make(nn).state_dict()) == list(make(torch.nn).state_dict())


@pytest.mark.parity
def test_parameter_turned_buffer_as_in_torch(torch):
    def make(m, ones):
        net = m.Module()
        net.a = m.Parameter(ones)
        net.b = m.Parameter(ones)
        del net.a
        net.register_buffer("a", ones)
        return net

    ours = make(nn, jnp.ones(1))
    theirs = make(torch.nn, torch.ones(1))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_ties():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    net[2] = net[0]
    tree = walk(net)
    assert names(net) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert list(tree.names.values()) == ["0.weight", "0.bias", "1.bias"]
    assert tree.aliases == net.ties()
    assert net.ties() == {"1.weight": "0.weight", "2.weight": "0.weight", "2.bias": "0.bias"}


def test_tied_buffers():
    net = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
    net[1].running_mean = net[0].get_buffer("running_mean")
    assert net.ties() == {"1.running_mean": "0.running_mean"}


CHANGES = {
    "attribute": lambda net: setattr(net[0], "weight", nn.Parameter(jnp.ones(1))),
    "delete": lambda net: delattr(net[0], "bias"),
    "none": lambda net: setattr(net[0], "bias", None),
    "registry": lambda net: net[0]._parameters.__delitem__("bias"),
    "registry pop": lambda net: net[0]._parameters.pop("bias"),
    "registry update": lambda net: net._modules.update(x=nn.Linear(1, 1)),
    "registry clear": lambda net: net[0]._parameters.clear(),
    "registry popitem": lambda net: net[0]._parameters.popitem(),
    "registry setdefault": lambda net: net._modules.setdefault("y", nn.Linear(1, 1)),
    "registry or": lambda net: net._modules.__ior__({"z": nn.Linear(1, 1)}),
    "append": lambda net: net.append(nn.Linear(1, 1)),
    "buffer": lambda net: net[1].register_buffer("b", jnp.ones(1)),
    "set_submodule": lambda net: net.set_submodule("0", nn.Linear(1, 1, bias=False)),
    "list": lambda net: setattr(net, "later", [nn.Linear(1, 1)]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(change):
    net = nn.Sequential(nn.Linear(1, 1), nn.Sequential())
    net.later = []
    entries = list(walk(net).entries)  # keeps the boxes alive: an id may be used again
    before = [(name, id(box)) for name, box in entries]
    change(net)
    after = [(name, id(box)) for name, box in walk(net).entries]
    assert after != before
    assert list(net.state_dict(keep_vars=True)) == [name for name, _ in after]


def test_moving_a_part_renames_it():
    net = nn.Sequential(nn.Linear(1, 1))
    box = net[0].weight
    assert identify(box) == (net, "0.weight")
    outer = nn.Module()
    outer.body = net
    assert identify(box) == (outer, "body.0.weight")
    assert describe(box) == "parameter 'body.0.weight'"
    assert path_of(net[0]) == "body.0"
    assert root_of(net[0]) is outer
    del outer.body
    assert identify(box) == (net, "0.weight")
    assert path_of(net) == "Sequential"


def test_a_part_outlives_its_parent():
    outer = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    inner = outer[0]
    del outer
    import gc

    gc.collect()
    assert identify(inner[0].weight) == (inner, "0.weight")


def test_a_parameter_of_nobody():
    p = nn.Parameter(jnp.ones(1))
    assert identify(p) == (None, "")
    assert describe(p) == "parameter"


def test_a_parameter_that_was_replaced():
    net = nn.Linear(1, 1)
    old = net.weight
    net.weight = nn.Parameter(jnp.ones((1, 1)))
    assert describe(old) == "parameter"
    old.data = jnp.zeros((1, 1))
    assert float(net.weight.sum()) == 1


def test_a_parameter_moved_to_another_model():
    one, two = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1))
    p = one.weight
    two[0].weight = p
    del one.weight
    assert describe(p) == "parameter '0.weight'"
