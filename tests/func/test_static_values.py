"""What a compiled function depends on beside arrays: known and followed, or refused."""

import array
import collections
import dataclasses
import enum
import importlib.util
import io
import itertools
import pathlib
import queue
import random
import threading
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lamina
from lamina import nn
from lamina.errors import LaminaError, StaticWriteError
from lamina.nn import functional as F

_PATH = pathlib.Path(__file__).parents[1] / "counting.py"
_LOADER = importlib.util.spec_from_file_location("lamina_counting", _PATH)
counting = importlib.util.module_from_spec(_LOADER)
_LOADER.loader.exec_module(counting)
Watch = counting.Watch

X = jnp.ones(2)


class Scale(nn.Module):
    def __init__(self, factor=1.0):
        self.weight = nn.Parameter(jnp.ones(()))
        self.factor = factor

    def forward(self, x):
        return x * self.weight * self.factor


def call(net, x):
    return net(x)


def plain(fn):
    """Stand in for ``lamina.jit`` where the uncompiled result is wanted."""
    return fn


def value(out):
    """Return the one number that all elements of a result are."""
    out = np.asarray(out)
    assert (out == out.flat[0]).all()
    return float(out.flat[0])


def in_namespace(source, **names):
    """Run source as a user's script would be run, and return its globals."""
    names["__name__"] = "user_code"
    exec(source, names)
    return names


# Plain objects with fields are containers.


@dataclasses.dataclass
class Config:
    factor: float = 2.0
    flag: bool = True
    steps: list = dataclasses.field(default_factory=lambda: [1.0])
    table: dict = dataclasses.field(default_factory=lambda: {"a": {"b": 1.0}})
    inner: Any = None
    name: str = "sin"

    def bias(self):
        return 3.0 if self.flag else 4.0


class Plain:
    """The same fields, without any help from dataclasses."""

    def __init__(self):
        self.factor, self.flag, self.name = 2.0, True, "sin"
        self.steps, self.table, self.inner = [1.0], {"a": {"b": 1.0}}, None

    def bias(self):
        return 3.0 if self.flag else 4.0


class Inherited(Plain):
    """Adds nothing: all fields come from the base class."""


def namespace():
    fields = vars(Plain())
    config = types.SimpleNamespace(**fields)
    config.bias = lambda: 3.0 if config.flag else 4.0
    return config


def with_inner(config):
    config.inner = Config(factor=5.0)
    return config


def use(config, x):
    """Read every field; some decide Python's control flow."""
    if config.flag:
        x = x + 1
    for step in config.steps:
        x = x * 2 + step
    if config.inner is not None:
        x = x + config.inner.factor
    x = x + config.table["a"]["b"] + config.bias()
    return getattr(jnp, config.name)(x) * config.factor


OBJECTS = {
    "dataclass": Config,
    "plain object": Plain,
    "inherited": Inherited,
    "namespace": namespace,
    "object in an object": lambda: with_inner(Config()),
}

EDITS = {
    "field": lambda config: setattr(config, "factor", 7.0),
    "flag": lambda config: setattr(config, "flag", False),
    "string": lambda config: setattr(config, "name", "cos"),
    "list append": lambda config: config.steps.append(3.0),
    "list element": lambda config: config.steps.__setitem__(0, 4.0),
    "list replaced": lambda config: setattr(config, "steps", [5.0, 6.0]),
    "dict value": lambda config: config.table["a"].update(b=8.0),
    "dict in a dict": lambda config: config.table.update(a={"b": 9.0}),
    "object put in": lambda config: setattr(config, "inner", Config(factor=11.0)),
    "field through vars": lambda config: vars(config).update(factor=13.0),
    "type": lambda config: setattr(config, "factor", 3),
}

HOW = {
    "argument": lambda jit, config: (lambda f: lambda x: f(config, x))(jit(use)),
    "argument in a dict": lambda jit, config: (lambda f: lambda x: f({"config": config}, x))(
        jit(lambda state, x: use(state["config"], x))
    ),
    "keyword": lambda jit, config: (lambda f: lambda x: f(x, config=config))(
        jit(lambda x, *, config: use(config, x))
    ),
    "closure": lambda jit, config: jit(lambda x: use(config, x)),
    "closure of a helper": lambda jit, config: (lambda help: jit(lambda x: help(x)))(
        lambda x: use(config, x)
    ),
    "object of a module": lambda jit, config: (lambda net: jit(lambda x: use(net.config, x)))(
        holding(config)
    ),
    "object of an argument": lambda jit, config: (lambda net, f: lambda x: f(net, x))(
        holding(config), jit(lambda net, x: use(net.config, net(x)))
    ),
}


def holding(config):
    net = nn.Identity()
    net.config = config
    return net


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_changed_fields_are_noticed(make, how):
    """One change after another, each compared with the uncompiled function."""
    config = make()
    f, expected = how(lamina.jit, config), how(plain, config)
    np.testing.assert_allclose(f(X), expected(X), rtol=1e-6)
    for name, edit in EDITS.items():
        before = np.asarray(f(X))
        edit(config)
        after = np.asarray(f(X))
        np.testing.assert_allclose(after, expected(X), rtol=1e-5, err_msg=name)
        assert not np.array_equal(before, after), name
        np.testing.assert_allclose(f(X), expected(X), rtol=1e-5, err_msg=name)


def test_fields_that_come_and_go():
    config = types.SimpleNamespace()

    def read(config, x):
        x = x * getattr(config, "factor", 1.0)
        return x + sum(v for name, v in sorted(vars(config).items()) if name.startswith("extra"))

    f = lamina.jit(read)
    assert value(f(config, X)) == 1
    config.factor = 3.0
    assert value(f(config, X)) == 3
    config.extra_a = 5.0
    assert value(f(config, X)) == 8
    del config.factor
    assert value(f(config, X)) == 6
    del config.extra_a
    assert value(f(config, X)) == 1


def test_an_object_of_another_class_is_noticed():
    class Other(Plain):
        def bias(self):
            return 100.0

    f = lamina.jit(lambda config, x: x + config.bias())
    assert value(f(Plain(), X)) == 4
    assert value(f(Other(), X)) == 101
    config = Plain()
    assert value(f(config, X)) == 4
    config.__class__ = Other
    assert value(f(config, X)) == 101


def test_an_equal_object_shares_the_program():
    net = Scale()

    def step(net, config, x):
        return use(config, net(x))

    f = lamina.jit(step)
    first = Config(inner=Config())
    expected = f(net, first, X)
    f(net, first, X)
    with Watch(step) as runs:
        for _ in range(3):
            np.testing.assert_array_equal(f(net, Config(inner=Config()), X), expected)
    assert runs.runs <= 3
    assert runs.compiles == 0
    with Watch(step) as runs:
        f(net, first, X)
        f(net, first, X)
    assert runs.runs == 0


def test_equality_of_objects_is_not_believed():
    """Fields decide, not what ``__eq__`` says about them."""

    @dataclasses.dataclass(frozen=True)
    class Hidden:
        name: str
        factor: float = dataclasses.field(compare=False)

    class AlwaysEqual:
        def __init__(self, factor):
            self.factor = factor

        def __eq__(self, other):
            return True

        def __hash__(self):
            return 0

    for make in (lambda k: Hidden("a", k), AlwaysEqual):
        f = lamina.jit(lambda config, x: x * config.factor)
        g = lamina.jit(call)
        for factor in (2.0, 3.0):
            assert value(f(make(factor), X)) == factor
            assert value(g(Reads(make(factor)), X)) == factor


class Reads(nn.Module):
    def __init__(self, config):
        self.config = config

    def forward(self, x):
        return x * self.config.factor


def test_a_frozen_dataclass_that_is_replaced():
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        factor: float

    holder = types.SimpleNamespace(config=Frozen(2.0))
    f = lamina.jit(lambda x: x * holder.config.factor)
    assert value(f(X)) == 2
    holder.config = dataclasses.replace(holder.config, factor=3.0)
    assert value(f(X)) == 3
    object.__setattr__(holder.config, "factor", 4.0)
    assert value(f(X)) == 4


def test_an_object_that_contains_itself():
    class Node:
        def __init__(self, factor):
            self.factor, self.me, self.children = factor, self, [self]

    node = Node(2.0)
    f = lamina.jit(lambda node, x: x * node.me.children[0].factor)
    g = lamina.jit(lambda x: x * node.me.children[0].factor)
    assert (value(f(node, X)), value(g(X))) == (2, 2)
    node.factor = 3.0
    assert (value(f(node, X)), value(g(X))) == (3, 3)
    other = Node(5.0)
    node.me = other
    assert (value(f(node, X)), value(g(X))) == (5, 5)


def test_arrays_in_fields_are_inputs():
    net = Scale()

    def step(net, config, x):
        return net(x) * config.table + config.nested["a"][0]

    f = lamina.jit(step)
    config = types.SimpleNamespace(table=np.ones(2, np.float32), nested={"a": [jnp.zeros(())]})
    assert value(f(net, config, X)) == 1
    f(net, config, X)
    fours, one = jnp.full(2, 4.0, jnp.float32), jnp.ones(())
    with Watch(step) as runs:
        config.table[:] = 3.0
        assert value(f(net, config, X)) == 3
        config.table = fours
        assert value(f(net, config, X)) == 4
        config.nested["a"][0] = one
        assert value(f(net, config, X)) == 5
    assert runs.compiles == 0
    config.table = np.ones((1, 2), np.float32)
    assert f(net, config, jnp.ones((1, 2))).shape == (1, 2)


class Trainer:
    def __init__(self, factor=1.0):
        self.net = Scale()
        self.opt = lamina.Optimizer(self.net, optax.sgd(0.125))
        self.factor = factor
        self.clip = None

    def loss(self, x):
        loss = (self.net(x) * self.factor).sum()
        return loss if self.clip is None else jnp.minimum(loss, self.clip)

    @lamina.jit
    def step(self, x):
        return self.uncompiled(x)

    def uncompiled(self, x):
        loss, grads = lamina.value_and_grad(lambda net: self.loss(x))(self.net)
        self.opt.step(grads)
        return loss


TRAINERS = {
    "compiled method": lambda trainer: trainer.step,
    "argument": lambda trainer: lambda x: train(trainer, x),
    "closure": lambda trainer: lamina.jit(lambda x: trainer.uncompiled(x)),
    "bound method": lambda trainer: lamina.jit(trainer.uncompiled),
}

train = lamina.jit(lambda trainer, x: trainer.uncompiled(x))


@pytest.mark.parametrize("compiled", TRAINERS.values(), ids=TRAINERS)
def test_changed_fields_of_a_trainer_are_noticed(compiled):
    def run(choose):
        trainer, losses = Trainer(), []
        step = choose(trainer)
        losses += [step(X), step(X)]
        trainer.factor = 3.0
        losses += [step(X), step(X)]
        trainer.clip = 0.5
        losses.append(step(X))
        trainer.clip = None
        trainer.net.factor = 0.5
        losses.append(step(X))
        old, trainer.net = trainer.net, Scale(2.0)
        trainer.opt = lamina.Optimizer(trainer.net, optax.sgd(0.25))
        losses += [step(X), step(X)]
        return [*map(float, losses), float(old.weight), float(trainer.net.weight)]

    assert run(compiled) == run(lambda trainer: trainer.uncompiled)


def test_two_trainers_do_not_share_fields():
    one, two = Trainer(1.0), Trainer(3.0)
    for _ in range(2):
        one.step(X)
        two.step(X)
    assert (float(one.net.weight), float(two.net.weight)) == (1 - 2 * 0.25, 1 - 2 * 0.75)


# Closed-over and global values.

VALUES = {
    "cell": lambda: cell_of(2.0),
    "global": lambda: global_of("def f(x): return x * k", 2.0),
    "global of a helper": lambda: global_of("def g(x): return x * k\ndef f(x): return g(x)", 2.0),
    "field": lambda: field_of(types.SimpleNamespace(k=2.0)),
    "class attribute": lambda: field_of(type("Settings", (), {"k": 2.0})),
    "inherited class attribute": lambda: inherited_of(2.0),
    "python module": lambda: field_of(module_of(2.0)),
    "list": lambda: item_of([2.0], 0),
    "dict": lambda: item_of({"k": 2.0}, "k"),
    "dict in a dict": lambda: item_of({"k": 2.0}, "k", outer=True),
    "default": lambda: default_of(2.0),
    "forward's cell": lambda: forward_of(cell_of(2.0)),
    "forward's global": lambda: forward_of(global_of("def f(x): return x * k", 2.0)),
    "forward's python module": lambda: forward_of(field_of(module_of(2.0))),
}


def cell_of(k):
    def f(x):
        return x * k

    return f, lambda new: setattr(f.__closure__[0], "cell_contents", new)


def global_of(source, k):
    space = in_namespace(source, k=k)
    return space["f"], lambda new: space.update(k=new)


def module_of(k):
    config = types.ModuleType("config")
    config.k = k
    return config


def field_of(thing):
    return lambda x: x * thing.k, lambda new: setattr(thing, "k", new)


def inherited_of(k):
    Base = type("Base", (), {"k": k})
    thing = type("Child", (Base,), {})()
    return lambda x: x * thing.k, lambda new: setattr(Base, "k", new)


def item_of(container, key, outer=False):
    nested = {"container": container}
    if outer:
        return lambda x: x * nested["container"][key], lambda new: container.update({key: new})
    return lambda x: x * container[key], lambda new: container.__setitem__(key, new)


def default_of(k):
    def f(x, k=k):
        return x * k

    return lambda x: f(x), lambda new: setattr(f, "__defaults__", (new,))


def forward_of(made):
    fn, change = made

    class Uses(nn.Module):
        def __init__(self):
            self.weight = nn.Parameter(jnp.ones(()))

        def forward(self, x):
            return fn(x) * self.weight

    net, f = Uses(), lamina.jit(call)
    return lambda x: f(net, x), change


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_changed_constants_are_noticed(make):
    fn, change = make()
    f = lamina.jit(fn)
    assert [value(f(X)), value(f(X))] == [2, 2]
    change(5.0)
    assert [value(f(X)), value(f(X))] == [5, 5]
    change(jnp.asarray([7.0, 7.0]))
    assert value(f(X)) == 7
    change(jnp.asarray([9.0, 9.0]))
    assert value(f(X)) == 9
    change(2.0)
    assert value(f(X)) == 2


def test_a_changed_helper_is_noticed():
    space = in_namespace("def g(x): return x * 2\ndef f(x): return g(x)")
    f = lamina.jit(space["f"])
    assert value(f(X)) == 2
    exec("def g(x): return x * 3", space)
    assert value(f(X)) == 3
    holder = types.SimpleNamespace(act=jnp.sin)
    h = lamina.jit(lambda x: holder.act(x))
    np.testing.assert_allclose(h(X), jnp.sin(X), rtol=1e-6)
    holder.act = jnp.cos
    np.testing.assert_allclose(h(X), jnp.cos(X), rtol=1e-6)


def test_a_changed_method_is_noticed():
    class Settings:
        def scale(self, x):
            return x * 2

    settings = Settings()
    f = lamina.jit(lambda x: settings.scale(x))
    assert value(f(X)) == 2
    Settings.scale = lambda self, x: x * 3
    assert value(f(X)) == 3
    settings.scale = lambda x: x * 4
    assert value(f(X)) == 4


# Array attributes of modules are inputs.


class Tables(nn.Module):
    def __init__(self, table):
        self.weight = nn.Parameter(jnp.ones(()))
        self.table = table

    def forward(self, x):
        return x * self.weight * self.table


ARRAYS = {
    "numpy": lambda k: np.full(2, k, np.float32),
    "jax": lambda k: jnp.full(2, k),
    "numpy number in an array": lambda k: np.asarray(k, np.float32),
    "big numpy": lambda k: np.full(4000, k, np.float32),
}


@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS)
def test_instances_with_other_arrays_share_the_program(make):
    f = lamina.jit(call)
    first = Tables(make(2.0))
    x = jnp.ones(first.table.shape or 2)
    f(first, x)
    f(first, x)
    others = {number: Tables(make(number)) for number in (3.0, 4.0, 5.0)}
    with Watch(Tables.forward) as runs:
        for number, net in others.items():
            assert value(f(net, x)) == number
        assert value(f(first, x)) == 2
    assert runs.runs <= 3
    assert runs.compiles == 0


@pytest.mark.parametrize("as_argument", [True, False], ids=["argument", "closure"])
def test_a_changed_array_attribute_is_noticed(as_argument):
    net = Tables(np.full(2, 2.0, np.float32))

    def apply(net, x):
        return net(x)

    g = lamina.jit(apply)
    f = (lambda x: g(net, x)) if as_argument else lamina.jit(lambda x: apply(net, x))
    assert [value(f(X)), value(f(X))] == [2, 2]
    with Watch(apply) as runs:
        net.table[:] = 3.0
        assert value(f(X)) == 3
        net.table = np.full(2, 4.0, np.float32)
        assert value(f(X)) == 4
        net.table = jnp.full(2, 5.0)
        assert value(f(X)) == 5
        net.table = net.table * 2
        assert value(f(X)) == 10
    assert runs.runs <= 4
    net.table = np.full((3, 2), 6.0, np.float32)
    assert f(X[None]).shape == (3, 2)
    net.table = np.full(2, 7, np.int32)
    assert value(f(X)) == 7
    net.table = 8.0
    assert value(f(X)) == 8


def test_array_attributes_are_not_in_the_state_dict():
    net = Tables(np.full(2, 2.0, np.float32))
    lamina.jit(call)(net, X)
    assert list(net.state_dict()) == ["weight"]
    assert [name for name, _ in net.named_parameters()] == ["weight"]


def test_an_array_attribute_is_written_like_a_buffer():
    class Average(nn.Module):
        def __init__(self):
            self.mean = jnp.zeros(())
            self.count = np.zeros((), np.int32)

        def forward(self, x):
            self.mean = self.mean * 0.5 + x.mean() * 0.5
            self.count = self.count + 1
            return x - self.mean

    compiled, uncompiled = Average(), Average()
    f = lamina.jit(call)
    for number in (1.0, 2.0, 4.0):
        x = jnp.full(2, number)
        np.testing.assert_allclose(f(compiled, x), uncompiled(x))
        np.testing.assert_allclose(compiled.mean, uncompiled.mean)
    assert int(compiled.count) == int(uncompiled.count) == 3
    assert not isinstance(compiled.mean, jax.core.Tracer)


def test_a_large_array_attribute_is_no_constant_of_the_program():
    net = Tables(np.ones((300, 400), np.float32))
    text = lamina.jit(call).lower(net, jnp.ones((300, 400))).as_text()
    assert len(text) < 20_000
    assert text.count("tensor<300x400xf32>") >= 2


def test_arrays_in_lists_of_a_module():
    """Inputs, or followed by their content, or refused: never what they were at the trace."""
    net = Tables([np.full(2, 2.0, np.float32), jnp.ones(2)])
    f = lamina.jit(lambda net, x: x * net.table[0] * net.table[1])
    assert value(f(net, X)) == 2
    net.table[0][:] = 3.0
    assert value(f(net, X)) == 3
    net.table[1] = jnp.full(2, 4.0)
    assert value(f(net, X)) == 12


# NumPy arrays.


def test_a_numpy_argument_changed_in_place():
    net, given = Scale(), np.ones(2, np.float32)
    f = lamina.jit(lambda net, a: (net(a), a))
    out, same = f(net, given)
    given[:] = 5
    assert (value(out), value(same)) == (1, 1)
    assert value(f(net, given)[0]) == 5


SMALL = {
    "cell": lambda a: lambda x: x * a,
    "field": lambda a: (lambda holder: lambda x: x * holder.a)(types.SimpleNamespace(a=a)),
    "list": lambda a: (lambda arrays: lambda x: x * arrays[0])([a]),
    "default": lambda a: lambda x, a=a: x * a,
    "global": lambda a: in_namespace("def f(x): return x * a", a=a)["f"],
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_a_small_numpy_closure_changed_in_place(make):
    given = np.ones(2, np.float32)
    f = lamina.jit(make(given))
    assert [value(f(X)), value(f(X))] == [1, 1]
    given[:] = 5
    assert value(f(X)) == 5
    given[:] = -0.0
    assert np.signbit(f(X)).all()
    given[:] = np.nan
    assert np.isnan(f(X)).all()
    given[:] = 1
    assert value(f(X)) == 1


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_a_large_numpy_closure_is_refused(make):
    """Comparing it at every call would take too long, and so it must be an argument."""
    given, x = np.ones(1500, np.float32), jnp.ones(1500)
    assert given.nbytes > 4096
    f = lamina.jit(make(given))
    for _ in range(2):
        with pytest.raises(LaminaError, match="pass it as an argument") as caught:
            f(x)
        assert isinstance(caught.value, lamina.errors.UnprovenError)
    g = lamina.jit(lambda x, a: x * a)
    assert value(g(x, given)) == 1
    given[:] = 5
    assert value(g(x, given)) == 5


def test_a_jax_array_in_a_closure_may_be_large():
    """It can't change, so its identity says everything."""
    holder, x = types.SimpleNamespace(a=jnp.ones(1500)), jnp.ones(1500)
    f = lamina.jit(lambda x: x * holder.a)
    assert value(f(x)) == 1
    holder.a = holder.a * 3
    assert value(f(x)) == 3


def test_a_view_of_a_numpy_array():
    base = np.ones((2, 2), np.float32)
    row = base[0]
    f = lamina.jit(lambda x: x * row)
    assert value(f(X)) == 1
    base[:] = 4
    assert value(f(X)) == 4


def test_numpy_objects_and_strings_are_no_arrays():
    """What JAX can't take is static, followed by content, or refused."""
    net = Tables(np.array(["a", "b"]))
    f = lamina.jit(lambda net, x: x * (2.0 if net.table[0] == "a" else 3.0))
    try:
        assert value(f(net, X)) == 2
        net.table[0] = "c"
        assert value(f(net, X)) == 3
    except LaminaError:
        pass


# PyTorch's tensors, and whatever gives itself as an array.


def test_batches_of_a_torch_data_loader(torch):
    from torch.utils.data import DataLoader, TensorDataset

    data = np.arange(24, dtype=np.float32).reshape(8, 3) / 24
    loader = DataLoader(TensorDataset(torch.tensor(data), torch.tensor(data[:, :1])), batch_size=2)

    def run(jit):
        lamina.manual_seed(0)
        net = nn.Linear(3, 1)
        opt = lamina.Optimizer(net, optax.sgd(0.1))

        def step(net, opt, x, y):
            x, y = jnp.asarray(x), jnp.asarray(y)
            loss, grads = lamina.value_and_grad(lambda net: ((net(x) - y) ** 2).mean())(net)
            opt.step(grads)
            return loss

        compiled, losses, later = jit(step), [], 0
        for index, (x, y) in enumerate(loader):
            with Watch(step) as runs:
                losses.append(float(compiled(net, opt, x, y)))
            later += runs.runs if index else 0
        return [*losses, *np.asarray(net.weight.data).flat], later

    numbers, later = run(lamina.jit)
    assert later == 0
    np.testing.assert_allclose(numbers, run(plain)[0], rtol=1e-5)


def test_a_torch_tensor_needs_no_conversion(torch):
    """It comes in as an array, as NumPy's arrays do."""
    net = Scale(2.0)
    f = lamina.jit(call)
    assert value(f(net, torch.ones(2))) == 2
    assert value(f(net, torch.full((2,), 3.0))) == 6


def test_whole_batches_of_a_torch_data_loader(torch):
    """Batches as they come: lists and dicts of tensors."""
    from torch.utils.data import DataLoader

    rows = [{"x": torch.full((3,), float(i)), "y": i} for i in range(8)]
    net = Scale()

    def step(net, batch):
        return net(jnp.asarray(batch["x"])).sum() + jnp.asarray(batch["y"]).sum()

    f = lamina.jit(step)
    for index, batch in enumerate(DataLoader(rows, batch_size=2)):
        with Watch(step) as runs:
            total = float(f(net, batch))
        assert total == float(batch["x"].sum() + batch["y"].sum())
        assert not index or runs.runs == 0


def test_a_torch_tensor_changed_in_place(torch):
    net, tensor = Scale(), torch.ones(2)
    f = lamina.jit(lambda net, t: (net(jnp.asarray(t)), t))
    out, same = f(net, tensor)
    tensor.zero_()
    assert value(f(net, tensor)[0]) == 0
    assert (value(out), value(same)) == (1, 1)
    tensor.add_(3)
    assert value(f(net, tensor)[0]) == 3
    assert (value(out), value(same)) == (1, 1)


TORCH = {
    "float32": lambda torch: torch.tensor([1.5, 2.5]),
    "float16": lambda torch: torch.tensor([1.5, 2.5], dtype=torch.float16),
    "bfloat16": lambda torch: torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
    "int64": lambda torch: torch.tensor([1, 2]),
    "uint8": lambda torch: torch.tensor([1, 2], dtype=torch.uint8),
    "bool": lambda torch: torch.tensor([True, False]),
    "number": lambda torch: torch.tensor(3.0),
    "strided": lambda torch: torch.arange(6.0).reshape(3, 2).T[1],
    "empty": lambda torch: torch.zeros(0, 2),
}


@pytest.mark.parametrize("kind", TORCH)
def test_kinds_of_torch_tensors(torch, kind):
    tensor = TORCH[kind](torch)
    f = lamina.jit(lambda t: (t, t * 2, t.dtype == jnp.float32))
    for _ in range(2):
        same, double, is_float32 = f(tensor)
        wide = tensor.to(torch.float32).numpy() if tensor.dtype.is_floating_point else tensor
        np.testing.assert_array_equal(np.asarray(same, np.float32), np.asarray(wide, np.float32))
        expected = np.asarray(wide, np.float32) * 2
        np.testing.assert_array_equal(np.asarray(double, np.float32), expected)
        assert isinstance(same, jax.Array)
        assert bool(is_float32) == (tensor.dtype == torch.float32)
    assert str(same.dtype) == str(tensor.dtype).removeprefix("torch.").replace("int64", "int32")


def test_a_torch_tensor_that_wants_a_gradient(torch):
    """Its values, or an error of ours; not one from inside a compiler."""
    tensor = torch.ones(2, requires_grad=True)
    try:
        assert value(lamina.jit(lambda t: t * 3)(tensor)) == 3
    except (LaminaError, TypeError) as error:
        assert "detach" in str(error)  # noqa: PT017


TORCH_CLOSURES = {
    "cell": lambda t: lambda x: x * jnp.asarray(t),
    "field": lambda t: (lambda holder: lambda x: x * jnp.asarray(holder.t))(
        types.SimpleNamespace(t=t)
    ),
    "list": lambda t: (lambda tensors: lambda x: x * jnp.asarray(tensors[0]))([t]),
}


@pytest.mark.parametrize("make", TORCH_CLOSURES.values(), ids=TORCH_CLOSURES)
def test_a_torch_tensor_in_a_closure(torch, make):
    """Followed when it is changed in place, or refused at the first call."""
    tensor = torch.ones(2)
    f = lamina.jit(make(tensor))
    try:
        first = value(f(X))
    except LaminaError as error:
        assert "pass it as an argument" in str(error)  # noqa: PT017
        return
    assert first == 1
    tensor.mul_(5)
    assert value(f(X)) == 5


def test_a_torch_tensor_as_an_attribute(torch):
    net = Tables(torch.ones(2))
    f = lamina.jit(lambda net, x: x * jnp.asarray(net.table))
    try:
        first = value(f(net, X))
    except LaminaError as error:
        assert "fix:" in str(error)  # noqa: PT017
        return
    assert first == 1
    assert isinstance(net.table, jax.Array)  # a copy
    net.table = torch.full((2,), 7.0)
    assert value(f(net, X)) == 7


class Image:
    """Gives itself as an array, as images and data frames do."""

    def __init__(self, data):
        self.data = data

    def __array__(self, dtype=None, copy=None):
        return np.array(self.data, dtype)


class Exchanged:
    """Gives itself by the exchange protocol only, as tensors of other libraries do."""

    def __init__(self, data):
        self._data = data

    def __dlpack__(self, **options):
        return self._data.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._data.__dlpack_device__()


@pytest.mark.parametrize("kind", [Image, Exchanged])
def test_what_gives_itself_as_an_array(kind):
    net = Scale()

    def step(net, x):
        return net(x)

    f = lamina.jit(step)
    data = np.ones(2, np.float32)
    image = kind(data)
    assert [value(f(net, image)), value(f(net, image))] == [1, 1]
    with Watch(step) as runs:
        data[:] = 3
        assert value(f(net, image)) == 3
        assert value(f(net, kind(np.full(2, 4, np.float32)))) == 4
        assert value(f(net, jnp.full(2, 5.0, jnp.float32))) == 5
        assert value(f(net, np.full(2, 6, np.float32))) == 6
    assert runs.runs == 0


# What can change unseen is refused.


@dataclasses.dataclass
class Job:
    random: Any


def a_stream():
    yield from itertools.count()


OPAQUE = {
    "random numbers of numpy": lambda: np.random.default_rng(0),
    "old random numbers of numpy": lambda: np.random.RandomState(0),
    "random numbers of python": lambda: random.Random(0),
    "generator": a_stream,
    "counter": itertools.count,
    "list iterator": lambda: iter([1.0, 2.0]),
    "map": lambda: map(float, [1, 2]),
    "file": lambda: io.StringIO("1\n2\n"),
    "queue": queue.SimpleQueue,
}


def draw(source):
    """Take a number from a source; each call gives another one."""
    if hasattr(source, "random"):
        return float(source.random())
    if hasattr(source, "random_sample"):
        return float(source.random_sample())
    if hasattr(source, "readline"):
        return float(source.readline())
    if hasattr(source, "get"):
        source.put(1.0)
        return source.get()
    return float(next(source))


TAKEN = {
    "argument": lambda source: (lamina.jit(lambda source, x: x + draw(source)), (source, X)),
    "argument in a list": lambda source: (
        lamina.jit(lambda sources, x: x + draw(sources[0])), ([source], X)
    ),
    "field of an argument": lambda source: (
        lamina.jit(lambda job, x: x + draw(job.random)), (Job(source), X)
    ),
    "closure": lambda source: (lamina.jit(lambda x: x + draw(source)), (X,)),
    "field of a closure": lambda source: (
        (lambda job: lamina.jit(lambda x: x + draw(job.random)))(Job(source)), (X,)
    ),
    "attribute of a module": lambda source: (
        lamina.jit(lambda net, x: x + draw(net.config)), (holding(source), X)
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", OPAQUE.values(), ids=OPAQUE)
@pytest.mark.parametrize("how", TAKEN.values(), ids=TAKEN)
@pytest.mark.filterwarnings("ignore:Python iterable type:DeprecationWarning")  # JAX's own
def test_what_is_opaque_and_mutable_is_refused(make, how):
    """Such a thing would be asked once, while tracing, and its answer kept for ever."""
    f, args = how(make())
    for _ in range(2):
        with pytest.raises(LaminaError, match="fix:"):
            f(*args)


@pytest.mark.parametrize("kind", ["bytearray", "array"])
@pytest.mark.parametrize("as_argument", [True, False], ids=["argument", "closure"])
def test_mutable_bytes_are_followed_or_refused(kind, as_argument):
    data = bytearray(b"\x02") if kind == "bytearray" else array.array("d", [2.0])
    g = lamina.jit(lambda data, x: x * data[0])
    f = (lambda x: g(data, x)) if as_argument else lamina.jit(lambda x: x * data[0])
    try:
        first = value(f(X))
    except (LaminaError, TypeError):
        return
    assert first == 2
    data[0] = 3
    assert value(f(X)) == 3


class Color(enum.Enum):
    RED = 2.0
    BLUE = 3.0


class Number(enum.IntEnum):
    TWO = 2
    THREE = 3


Pair = collections.namedtuple("Pair", "a b")

CONSTANTS = {
    "enum": (Color.RED, Color.BLUE, lambda k: k.value),
    "int enum": (Number.TWO, Number.THREE, int),
    "string": ("aa", "aaa", len),
    "bytes": (b"aa", b"aaa", len),
    "tuple": ((1, 1), (1, 2), sum),
    "named tuple": (Pair(1, 1), Pair(1, 2), sum),
    "frozen set": (frozenset({2}), frozenset({3}), sum),
    "range": (range(2), range(3), len),
    "slice": (slice(0, 2), slice(0, 3), lambda k: len(range(10)[k])),
    "complex": (2 + 0j, 3 + 0j, lambda k: k.real),
    "type": (int, str, lambda k: 2.0 if k is int else 3.0),
    "dtype": (np.dtype("int16"), np.dtype("S3"), lambda k: k.itemsize),
    "jax dtype": (jnp.float16, jnp.float32, lambda k: 2.0 if k is jnp.float16 else 3.0),
    "function": (lambda: 2.0, lambda: 3.0, lambda k: k()),
    "builtin": (min, max, lambda k: k(2.0, 3.0)),
    "none": (None, Ellipsis, lambda k: 2.0 if k is None else 3.0),
    "nested": ({"a": [(1, {"b": 2})]}, {"a": [(1, {"b": 3})]}, lambda k: k["a"][0][1]["b"]),
}


@pytest.mark.parametrize("case", CONSTANTS.values(), ids=CONSTANTS)
def test_common_constants_are_understood(case):
    """As a field of an argument, a closure, and an attribute of a module."""
    two, three, read = case
    holder, net = types.SimpleNamespace(k=two), nn.Identity()
    net.k = two
    by_argument = lamina.jit(lambda holder, x: x * read(holder.k))
    by_closure = lamina.jit(lambda x: x * read(holder.k))
    by_module = lamina.jit(lambda net, x: x * read(net.k))

    def results():
        return [value(out) for out in (by_argument(holder, X), by_closure(X), by_module(net, X))]

    assert results() == results() == [float(read(two))] * 3
    holder.k = net.k = three
    assert results() == results() == [float(read(three))] * 3
    assert float(read(two)) != float(read(three))


# What is read of a module that is not called.


READS = {
    "training": (lambda net: 2.0 if net.training else 3.0, lambda net: net.eval()),
    "training of a part": (
        lambda net: 2.0 if net[1].training else 3.0,
        lambda net: setattr(net[1], "training", False),
    ),
    "dropout's probability": (lambda net: net[1].p, lambda net: setattr(net[1], "p", 0.25)),
    "length": (len, lambda net: net.append(nn.ReLU())),
    "kind of a part": (
        lambda net: 2.0 if isinstance(net[0], nn.Linear) else 3.0,
        lambda net: net.__setitem__(0, nn.Identity()),
    ),
    "presence of a bias": (
        lambda net: 2.0 if net[0].bias is None else 3.0,
        lambda net: setattr(net[0], "bias", None),
    ),
    "shape": (
        lambda net: float(net[0].weight.shape[0]),
        lambda net: net.__setitem__(0, nn.Linear(2, 5)),
    ),
    "requires_grad": (
        lambda net: 2.0 if net[0].weight.requires_grad else 3.0,
        lambda net: net.requires_grad_(False),
    ),
    "dtype": (
        lambda net: 2.0 if net[0].weight.dtype == jnp.float32 else 3.0,
        lambda net: net.half(),
    ),
    "names": (
        lambda net: float(len(list(net.named_parameters()))),
        lambda net: net.append(nn.Linear(2, 2)),
    ),
    "modes": (
        lambda net: float(sum(m.training for m in net.modules())),
        lambda net: net[0].eval(),
    ),
    "representation": (lambda net: float(len(repr(net))), lambda net: net.append(nn.ReLU())),
    "attribute that did not exist": (
        lambda net: getattr(net, "scale", 2.0),
        lambda net: setattr(net, "scale", 3.0),
    ),
    "attribute of a parameter": (
        lambda net: getattr(net[0].weight, "decay", 2.0),
        lambda net: setattr(net[0].weight, "decay", 3.0),
    ),
    "container in an attribute of a parameter": (
        lambda net: float(len(net[0].bias.groups)),
        lambda net: net[0].bias.groups.append("b"),
    ),
}

AS = {
    "closure": lambda net, read: lamina.jit(lambda x: x * read(net)),
    "closure of a helper": lambda net, read: (lambda help: lamina.jit(lambda x: x * help()))(
        lambda: read(net)
    ),
    "field of a closure": lambda net, read: (lambda job: lamina.jit(lambda x: x * read(job.net)))(
        types.SimpleNamespace(net=net)
    ),
    "argument": lambda net, read: (lambda f: lambda x: f(net, x))(
        lamina.jit(lambda net, x: x * read(net))
    ),
    "nested jit": lambda net, read: (lambda inner: lamina.jit(lambda x: inner(net, x)))(
        lamina.jit(lambda net, x: x * read(net))
    ),
    "field given to a nested jit": lambda net, read: (
        lambda inner, job: lamina.jit(lambda x: inner(job.net, x))
    )(lamina.jit(lambda net, x: x * read(net)), types.SimpleNamespace(net=net)),
}


@pytest.mark.parametrize("case", READS.values(), ids=READS)
@pytest.mark.parametrize("how", AS.values(), ids=AS)
def test_what_is_read_of_a_module_that_is_not_called(case, how):
    read, change = case
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    net[0].bias.groups = ["a"]
    f = how(net, read)
    before = value(f(X))
    assert value(f(X)) == before == float(read(net))
    change(net)
    for _ in range(2):
        assert value(f(X)) == float(read(net)) != before


@pytest.mark.parametrize("how", AS.values(), ids=AS)
def test_a_flag_that_is_handed_to_a_function(how):
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    def read(net):
        return F.dropout(jnp.ones(64), p=1.0, training=net.training)[0]

    f = how(net, read)
    assert value(f(X)) == 0
    net.eval()
    assert value(f(X)) == 1
    net.train()
    assert value(f(X)) == 0


@pytest.mark.parametrize("behind", ["a cell", "a field"])
def test_a_module_given_to_an_inner_jit(behind):
    job = types.SimpleNamespace(net=nn.Sequential(Scale(2.0), nn.Dropout(1.0)))
    net = job.net
    inner = lamina.jit(call)
    if behind == "a cell":
        outer = lamina.jit(lambda x: inner(net, x))
    else:
        outer = lamina.jit(lambda x: inner(job.net, x))
    assert value(outer(X)) == 0
    net.eval()
    assert value(outer(X)) == 2
    net[0].factor = 3.0
    assert value(outer(X)) == 3
    net[0] = Scale(5.0)
    assert value(outer(X)) == 5
    net = job.net = nn.Sequential(Scale(7.0))
    assert value(outer(X)) == 7
    net.append(Scale(2.0))
    assert value(outer(X)) == 14


def test_an_attribute_of_a_parameter_in_a_step():
    """Learning-rate factors kept beside the parameters they belong to."""

    def run(jit):
        net = nn.Sequential(Scale(), Scale())
        for p in net.parameters():
            p.rate = 0.125

        @jit
        def step(net, x):
            grads = lamina.grad(lambda net: net(x).sum())(net)
            for name, p in net.named_parameters():
                p.data = p.data - p.rate * grads[name]

        step(net, X)
        net[1].weight.rate = 0.0
        step(net, X)
        del net[1].weight.rate
        net[1].weight.rate = 0.5
        step(net, X)
        return [float(p) for p in net.parameters()]

    assert run(lamina.jit) == run(plain)


def test_a_class_attribute_of_a_module_is_noticed():
    class Base(nn.Module):
        factor = 2.0

        def forward(self, x):
            return x * self.factor

    class Derived(Base):
        pass

    net = Derived()
    f = lamina.jit(call)
    assert value(f(net, X)) == 2
    Base.factor = 3.0
    assert value(f(net, X)) == 3
    Derived.factor = 4.0
    assert value(f(net, X)) == 4
    net.factor = 5.0
    assert value(f(net, X)) == 5


# What the function changes.


class Recorder(nn.Module):
    def __init__(self):
        self.weight = nn.Parameter(jnp.ones(()))
        self.seen = [1.0]
        self.table = {"a": 1.0}
        self.nested = {"a": [1.0]}
        self.names = {"a"}
        self.last = collections.deque([1.0], maxlen=2)
        self.groups = collections.defaultdict(list, a=[1.0])
        self.ordered = collections.OrderedDict(a=1.0, b=2.0)
        self.counts = collections.Counter("a")
        self.space = types.SimpleNamespace(last=1.0, items=[1.0])
        self.record = Config()
        self.fixed = ([1.0], {"a": 1.0})

    def forward(self, x, change):
        x = x * self.weight
        change(self, x)
        return x


CHANGES = {
    "list append": lambda s, h: s.seen.append(h),
    "list append of a number": lambda s, h: s.seen.append(2.0),
    "list item": lambda s, h: s.seen.__setitem__(0, h),
    "list extend": lambda s, h: s.seen.extend([h, h]),
    "list clear": lambda s, h: s.seen.clear(),
    "list pop": lambda s, h: s.seen.pop(),
    "list reverse": lambda s, h: (s.seen.append(2.0), s.seen.reverse()),
    "dict item": lambda s, h: s.table.__setitem__("b", h),
    "dict value": lambda s, h: s.table.update(a=h),
    "dict counter": lambda s, h: s.table.update(a=s.table["a"] + 1),
    "dict pop": lambda s, h: s.table.pop("a"),
    "dict setdefault": lambda s, h: s.table.setdefault("b", 0.0),
    "dict order": lambda s, h: s.ordered.move_to_end("a"),
    "list in a dict": lambda s, h: s.nested["a"].append(h),
    "dict in a tuple": lambda s, h: s.fixed[1].update(a=h),
    "list in a tuple": lambda s, h: s.fixed[0].append(h),
    "set": lambda s, h: s.names.add("b"),
    "set discard": lambda s, h: s.names.discard("a"),
    "deque": lambda s, h: s.last.append(h),
    "full deque": lambda s, h: (s.last.append(h), s.last.append(h)),
    "default dict": lambda s, h: s.groups["b"].append(h),
    "read of a default dict": lambda s, h: s.groups["c"],
    "counter": lambda s, h: s.counts.update("a"),
    "namespace": lambda s, h: setattr(s.space, "last", h),
    "namespace number": lambda s, h: setattr(s.space, "last", 2.0),
    "new name in a namespace": lambda s, h: setattr(s.space, "new", h),
    "deleted name in a namespace": lambda s, h: delattr(s.space, "last"),
    "list in a namespace": lambda s, h: s.space.items.append(h),
    "dataclass": lambda s, h: setattr(s.record, "factor", h),
    "list in a dataclass": lambda s, h: s.record.steps.append(h),
    "dict in a dataclass": lambda s, h: s.record.table["a"].update(c=h),
}


def picture(thing, seen=()):
    """Write down the content of nested containers, with identities, to compare it later."""
    if id(thing) in seen:
        return "again"
    seen = (*seen, id(thing))
    if isinstance(thing, dict):
        return id(thing), [(key, picture(item, seen)) for key, item in thing.items()]
    if isinstance(thing, (list, tuple, collections.deque)):
        return id(thing), [picture(item, seen) for item in thing]
    if isinstance(thing, set):
        return id(thing), sorted(thing)
    if isinstance(thing, (Recorder, types.SimpleNamespace, Config, Plain)):
        fields = sorted(vars(thing).items())
        return id(thing), [(key, picture(item, seen)) for key, item in fields if key[0] != "_"]
    assert not isinstance(thing, jax.core.Tracer)
    return thing if isinstance(thing, (int, float, str, type(None))) else id(thing)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("as_argument", [True, False], ids=["argument", "closure"])
def test_changes_in_forward_are_refused_and_undone(change, as_argument):
    """They would happen once, while tracing; and what they store would be a tracer."""
    net = Recorder()
    g = lamina.jit(lambda net, x: net(x, change))
    f = (lambda x: g(net, x)) if as_argument else lamina.jit(lambda x: net(x, change))
    before = picture(net)
    for _ in range(2):
        with pytest.raises(StaticWriteError, match="fix:"):
            f(X)
        assert picture(net) == before
    assert not isinstance(net.weight.data, jax.core.Tracer)
    assert value(lamina.jit(lambda net, x: net(x, lambda s, h: None))(net, X)) == 1


@pytest.mark.parametrize("name", ["list append", "dict counter", "namespace number", "set"])
@pytest.mark.parametrize("around", ["grad", "scan", "remat", "vmap", "jit"])
def test_changes_inside_other_transforms_are_refused_too(name, around):
    net, change = Recorder(), CHANGES[name]

    def fn(x):
        return net(x, change).sum()

    forms = {
        "grad": lambda x: lamina.grad(fn)(x),
        "scan": lambda x: lamina.scan(lambda c, x: (c, fn(x)), 0.0, x[None])[1],
        "remat": lambda x: lamina.remat(fn)(x),
        "vmap": lambda x: lamina.vmap(fn)(x),
        "jit": lambda x: lamina.jit(fn)(x),
    }
    f = lamina.jit(forms[around])
    before = picture(net)
    with pytest.raises(StaticWriteError, match="fix:"):
        f(X)
    assert picture(net) == before


def test_the_message_names_the_attribute_and_the_mend():
    net = nn.Sequential(Recorder())
    f = lamina.jit(lambda net, x: net[0](x, lambda s, h: s.seen.append(h)))
    with pytest.raises(StaticWriteError, match="seen") as caught:
        f(net, X)
    last = str(caught.value).splitlines()[-1]
    assert last.startswith("    fix:")


OUTSIDE = {
    "list": (lambda: [1.0], lambda c, h: c.append(h)),
    "dict": (lambda: {"a": 1.0}, lambda c, h: c.update(b=h)),
    "dict in a dict": (lambda: {"a": {"b": 1.0}}, lambda c, h: c["a"].update(b=h)),
    "set": (lambda: {"a"}, lambda c, h: c.add("b")),
    "deque": (lambda: collections.deque([1.0]), lambda c, h: c.append(h)),
    "namespace": (lambda: types.SimpleNamespace(last=1.0), lambda c, h: setattr(c, "last", h)),
    "dataclass": (lambda: Config(), lambda c, h: setattr(c, "factor", h)),
    "object": (lambda: Plain(), lambda c, h: setattr(c, "factor", c.factor + 1)),
    "new attribute": (lambda: Plain(), lambda c, h: setattr(c, "loss", h)),
    "list of an object": (lambda: Plain(), lambda c, h: c.steps.append(h)),
    "deleted attribute": (lambda: Plain(), lambda c, h: delattr(c, "factor")),
}

GIVEN = {
    "argument": lambda c, change: (lambda f: lambda x: f(c, x))(
        lamina.jit(lambda c, x: (change(c, x * 2), x)[1])
    ),
    "closure": lambda c, change: lamina.jit(lambda x: (change(c, x * 2), x)[1]),
    "closure of a helper": lambda c, change: (lambda help: lamina.jit(lambda x: (help(x), x)[1]))(
        lambda x: change(c, x * 2)
    ),
    "field of a closure": lambda c, change: (
        lambda job: lamina.jit(lambda x: (change(job.random, x * 2), x)[1])
    )(Job(c)),
    "global": lambda c, change: lamina.jit(
        in_namespace("def f(x):\n    change(c, x * 2)\n    return x", c=c, change=change)["f"]
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("how", GIVEN.values(), ids=GIVEN)
def test_changes_outside_of_modules_are_refused_and_undone(name, how):
    make, change = OUTSIDE[name]
    container = make()
    f = how(container, change)
    before = picture(container)
    for _ in range(2):
        with pytest.raises(StaticWriteError, match="fix:"):
            f(X)
        assert picture(container) == before


def test_a_jitted_method_that_changes_its_object_is_refused():
    class Counting:
        def __init__(self):
            self.net, self.steps, self.losses = Scale(), 0, []

        @lamina.jit
        def count(self, x):
            self.steps += 1
            return self.net(x)

        @lamina.jit
        def log(self, x):
            out = self.net(x)
            self.losses.append(out)
            return out

    trainer = Counting()
    for method in (trainer.count, trainer.log):
        with pytest.raises(StaticWriteError, match="fix:"):
            method(X)
    assert (trainer.steps, trainer.losses) == (0, [])


NAMES = {
    "global": ("k = 0\ndef f(x):\n    global k\n    k += 1\n    return x", "k"),
    "global array": ("k = 0\ndef f(x):\n    global k\n    k = x\n    return x", "k"),
    "global of a helper": (
        "k = 0\ndef g():\n    global k\n    k += 1\ndef f(x):\n    g()\n    return x", "k",
    ),
    "class attribute": (
        "class A: pass\nA.k = k = 0\ndef f(x):\n    A.k += 1\n    return x", "k",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES.values(), ids=NAMES)
def test_a_changed_name_is_refused(case):
    source, name = case
    space = in_namespace(source)
    with pytest.raises(StaticWriteError, match="fix:"):
        lamina.jit(space["f"])(X)
    assert space[name] == 0
    if "A" in space:
        assert space["A"].k == 0


def test_a_changed_cell_is_refused():
    count = 0
    last = None

    @lamina.jit
    def f(x):
        nonlocal count, last
        count += 1
        last = x
        return x

    with pytest.raises(StaticWriteError, match="fix:"):
        f(X)
    assert count == 0
    assert last is None


def test_a_numpy_array_changed_inside_is_refused():
    counts = np.zeros(2)

    @lamina.jit
    def f(x):
        counts[0] += 1
        return x

    with pytest.raises((LaminaError, ValueError)):
        f(X)
    np.testing.assert_array_equal(counts, [0, 0])


def test_an_attribute_of_a_parameter_changed_inside_is_refused():
    net = Scale()

    @lamina.jit
    def f(net, x):
        net.weight.note = x * 2
        return net(x)

    with pytest.raises(StaticWriteError, match="fix:"):
        f(net, X)
    assert not hasattr(net.weight, "note")


def test_changes_that_leave_no_trace_are_free():
    """Local containers, and scratch space that is put back as it was."""
    net = Recorder()
    scratch = []

    def change(net, h):
        local = {"a": [h]}
        local["a"].append(h)
        local["b"] = types.SimpleNamespace(h=h)
        local["b"].h = local["a"].pop()
        net.seen.append(h)
        net.seen.pop()
        scratch.append(h)
        scratch.clear()
        net.table["b"] = h
        del net.table["b"]

    f = lamina.jit(lambda net, x: net(x, change))
    before = picture(net)
    for _ in range(2):
        assert value(f(net, X)) == 1
    assert picture(net) == before
    assert scratch == []


def test_uncompiled_changes_are_free():
    net = Recorder()
    for change in CHANGES.values():
        assert value(Recorder()(X, change)) == 1
    net(X, CHANGES["list append"])
    assert len(net.seen) == 2
    net.seen.clear()
    lamina.jit(lambda net, x: net(x, lambda s, h: None))(net, X)


def test_refused_changes_do_not_stop_what_is_right():
    """A trace that is refused leaves programs and values of other calls alone."""
    net = Recorder()
    flags = {"record": False}

    def maybe(net, h):
        if flags["record"]:
            net.seen.append(h)

    f = lamina.jit(lambda net, x: net(x, maybe))
    assert value(f(net, X)) == 1
    flags["record"] = True
    with pytest.raises(StaticWriteError):
        f(net, X)
    flags["record"] = False
    net.weight.data = jnp.asarray(2.0)
    assert value(f(net, X)) == 2
    assert net.seen == [1.0]


def test_opaque_things_that_are_not_used_do_no_harm():
    """A trainer may hold files, locks and iterators that its step does not touch."""

    class Busy(Trainer):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()
            self.file = io.StringIO()
            self.random = np.random.default_rng(0)
            self.batches = iter([1, 2, 3])
            self.big = np.zeros((1000, 1000), np.float32)

    trainer, expected = Busy(), Trainer()
    for compiled in TRAINERS.values():
        step = compiled(trainer)
        for _ in range(2):
            assert float(step(X)) == float(expected.uncompiled(X))
            next(trainer.batches, None)
            trainer.random.random()
            trainer.file.write("a")
            trainer.big[0] += 1
