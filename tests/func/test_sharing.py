"""When compiled functions share a program, and how often Python runs the function.

Two counts say it: how often Python enters the user's function, and how often XLA compiles. Each row
of the tables is a promise: what may share a program does, and what must not, does not.
"""

import dataclasses
import enum
import functools
import gc
import importlib.util
import math
import pathlib
import sys
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lamina
from lamina import nn

_PATH = pathlib.Path(__file__).parents[1] / "counting.py"
_LOADER = importlib.util.spec_from_file_location("lamina_counting", _PATH)
counting = importlib.util.module_from_spec(_LOADER)
_LOADER.loader.exec_module(counting)
Watch = counting.Watch

X = jnp.ones((2, 3))


def call(net, x):
    return net(x)


def step(net, opt, x):
    loss, grads = lamina.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
    opt.step(grads)
    return loss


def small():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def made(net):
    """Return a model whose values exist, so that making them is not counted."""
    lamina.materialize(net)
    return net


def assert_same(out, expected):
    """Compare two results: structure, dtypes and numbers."""
    leaves, treedef = jax.tree.flatten(out)
    others, expected_treedef = jax.tree.flatten(expected)
    assert treedef == expected_treedef
    for leaf, other in zip(leaves, others, strict=True):
        assert jnp.result_type(leaf) == jnp.result_type(other)
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.signbit(leaf), np.signbit(other))


# The watch itself.


def test_what_is_counted():
    def fn(net, x):
        return net(x)

    net, f = made(small()), lamina.jit(fn)
    with Watch(fn) as watch:
        f(net, X)
    assert watch.runs >= 1
    assert watch.compiles == 1
    with Watch(fn) as watch:
        f(net, X)
    assert (watch.runs, watch.compiles) == (0, 0)


# The first calls.


def test_the_first_call_runs_the_function_twice_at_most():
    net = made(small())
    opt = lamina.Optimizer(net, optax.sgd(1e-2, momentum=0.9))
    opt.state_dict()
    for fn, args in ((call, (net, X)), (step, (net, opt, X))):
        with Watch(fn) as watch:
            lamina.jit(fn)(*args)
        assert 1 <= watch.runs <= 2


def test_the_second_call_runs_nothing():
    net = made(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)))
    opt = lamina.Optimizer(net, optax.sgd(1e-2, momentum=0.9))
    f = lamina.jit(step)
    f(net, opt, X)
    with Watch(step) as watch:
        for _ in range(5):
            f(net, opt, X)
    assert (watch.runs, watch.compiles) == (0, 0)


# A second instance of one structure.


class Tied(nn.Module):
    def __init__(self):
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


class Shared(nn.Module):
    def __init__(self):
        self.block = nn.Linear(3, 3)
        self.blocks = [self.block, nn.ReLU(), self.block]

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def frozen():
    net = small()
    net[0].requires_grad_(False)
    return net


def hooked():
    net = small()
    net[0].register_forward_hook(double)
    return net


def double(module, args, out):
    return out * 2


class Hidden(nn.Module):
    """Keeps a module where it is not registered, as one does with a teacher."""

    def __init__(self):
        self.student = nn.Linear(3, 3)
        self.other = types.SimpleNamespace(teacher=nn.Linear(3, 3))

    def forward(self, x):
        return self.student(x) - self.other.teacher(x)


STRUCTURES = {
    "layers": small,
    "running statistics": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)),
    "tied": Tied,
    "shared": Shared,
    "frozen": frozen,
    "hooked": hooked,
    "hidden": Hidden,
    "evaluation": lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval(),
    "no boxes": lambda: nn.Sequential(nn.ReLU(), nn.Flatten()),
}


@pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)
def test_a_second_instance_does_not_compile(make):
    f = lamina.jit(call)
    nets = [made(make()) for _ in range(4)]
    if make is Hidden:
        for net in nets:
            made(net.other.teacher)
    f(nets[0], X)
    f(nets[0], X)
    with Watch(call) as watch:
        outs = [f(net, X) for net in nets[1:]]
    assert watch.compiles == 0
    assert watch.runs <= 3
    with Watch(call) as watch:
        f(nets[2], X)
    assert (watch.runs, watch.compiles) == (0, 0)
    if make is not STRUCTURES["dropout"]:
        for net, out in zip(nets[1:], outs, strict=True):
            np.testing.assert_allclose(out, net(X), rtol=1e-3, atol=1e-3)


class Wraps(nn.Module):
    """Holds what it is given under a name that is given too."""

    def __init__(self, name, value):
        self.weight = nn.Parameter(jnp.ones(()))
        self.where = name
        setattr(self, name, value)

    def forward(self, x):
        value = getattr(self, self.where)
        return x * self.weight * (value(x) if isinstance(value, nn.Module) else value)


NAMES = [
    "net", "model", "module", "owner", "opt", "fn", "box", "data", "value", "init", "name", "path",
    "root", "kind", "key", "version", "state", "frame", "program", "cache", "names", "boxes",
    "_net", "_fn", "_value", "_box", "_cache", "_state", "_name", "_root", "_path", "_fingerprint",
    "_static", "_self", "_born", "_tree", "_origin",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES[:12])
def test_attributes_of_any_name_hold_modules(name):
    def fn(net, x):
        return net(x)

    f = lamina.jit(fn)
    one, two = (made(Wraps(name, nn.Linear(3, 3))) for _ in range(2))
    f(one, X)
    f(one, X)
    with Watch(fn) as watch:
        out = f(two, X)
    assert watch.runs <= 1
    assert watch.compiles == 0
    np.testing.assert_allclose(out, two(X), rtol=1e-5)
    one.eval()
    with Watch(fn) as watch:
        f(two, X)
    assert (watch.runs, watch.compiles) == (0, 0)
    found = [weakref.ref(thing) for net in (one, two) for thing in (net, getattr(net, name))]
    del one, two
    gc.collect()
    assert [reference() for reference in found] == [None] * 4


@pytest.mark.parametrize("name", NAMES)
def test_attributes_of_any_name_hold_numbers(name):
    """No name is so much lamina's own that a number under it would be overlooked."""
    f = lamina.jit(call)
    try:
        net = Wraps(name, 2.0)
        np.testing.assert_allclose(net(X), 2 * X)
    except Exception:
        return  # the name can't be used at all
    np.testing.assert_allclose(f(net, X), 2 * X)
    np.testing.assert_allclose(f(Wraps(name, 3.0), X), 3 * X)
    setattr(net, name, 4.0)
    np.testing.assert_allclose(f(net, X), 4 * X)


def test_a_second_instance_in_a_container():
    def fn(state, x):
        return state["net"](x) + state["heads"][0](x)

    f = lamina.jit(fn)
    states = [{"net": made(small()), "heads": [made(nn.Linear(3, 3))]} for _ in range(3)]
    f(states[0], X)
    f(states[0], X)
    with Watch(fn) as watch:
        outs = [f(state, X) for state in states]
        f({**states[2]}, X)
    assert watch.runs <= 2
    assert watch.compiles == 0
    for state, out in zip(states, outs, strict=True):
        np.testing.assert_allclose(out, fn(state, X), rtol=1e-5)


def test_a_second_instance_beside_a_closure():
    base = made(nn.Linear(3, 3))
    holder = types.SimpleNamespace(base=base)

    def score(x):
        return base(x) * holder.base(x)

    def fn(net, x):
        return net(x) + score(x)

    f = lamina.jit(fn)
    nets = [made(small()) for _ in range(3)]
    f(nets[0], X)
    f(nets[0], X)
    with Watch(fn) as watch:
        outs = [f(net, X) for net in nets[1:]]
    assert watch.runs <= 2
    assert watch.compiles == 0
    for net, out in zip(nets[1:], outs, strict=True):
        np.testing.assert_allclose(out, fn(net, X), rtol=1e-5)


def test_a_replaced_closure_of_the_same_structure():
    holder = types.SimpleNamespace(net=made(small()))

    def fn(x):
        return holder.net(x)

    f = lamina.jit(fn)
    f(X)
    f(X)
    holder.net = made(small())
    with Watch(fn) as watch:
        out = f(X)
        f(X)
    assert watch.runs <= 1
    assert watch.compiles == 0
    np.testing.assert_allclose(out, holder.net(X), rtol=1e-5)


def test_a_second_model_with_a_compiled_method():
    class Model(nn.Module):
        def __init__(self):
            self.layer = nn.Linear(3, 1)

        def run(self, x):
            return self.layer(x).sum()

        compiled = lamina.jit(run)

    one, two = made(Model()), made(Model())
    one.compiled(X)
    one.compiled(X)
    with Watch(Model.run) as watch:
        out = two.compiled(X)
    assert watch.runs <= 1
    assert watch.compiles == 0
    np.testing.assert_allclose(out, two.run(X), rtol=1e-5)


class Trainer:
    """A trainer as users write it."""

    def __init__(self):
        self.net = made(small())
        self.opt = lamina.Optimizer(self.net, optax.sgd(0.5))
        self.opt.state_dict()
        self.step_count = 0
        self.history = []
        self.best = {}
        self.started = None

    def run(self, x):
        return step(self.net, self.opt, x)

    compiled = lamina.jit(run)


def test_a_second_trainer():
    one, two = Trainer(), Trainer()
    one.compiled(X)
    one.compiled(X)
    with Watch(Trainer.run) as watch:
        two.compiled(X)
    assert watch.runs <= 1
    assert watch.compiles == 0
    with Watch(Trainer.run) as watch:
        two.compiled(X)
        one.compiled(X)
    assert (watch.runs, watch.compiles) == (0, 0)


HOW = {
    "compiled method": lambda trainer: trainer.compiled,
    "bound method": lambda trainer: lamina.jit(trainer.run),
    "closure": lambda trainer: lamina.jit(lambda x: trainer.run(x)),
    "argument": lambda trainer: (lambda f: lambda x: f(trainer, x))(
        lamina.jit(lambda trainer, x: trainer.run(x))
    ),
    "fields": lambda trainer: (lambda f: lambda x: f(trainer.net, trainer.opt, x))(
        lamina.jit(lambda net, opt, x: step(net, opt, x))
    ),
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_fields_that_the_step_does_not_mention_do_not_matter(how):
    """Counters, histories and clocks beside the model change at each step of any real loop."""
    trainer = Trainer()
    f = how(trainer)
    for _ in range(2):
        trainer.history.append(float(f(X)))
        trainer.step_count += 1
    with Watch(step) as watch:
        for _ in range(5):
            trainer.history.append(float(f(X)))
            trainer.step_count += 1
            trainer.best[trainer.step_count] = trainer.history[-1]
            trainer.started = object()
            trainer.comment = str(trainer.step_count)
    assert (watch.runs, watch.compiles) == (0, 0)
    assert len(set(trainer.history)) == 7


def test_globals_that_the_step_does_not_mention_do_not_matter():
    space = {"__name__": "user_code", "net": made(small()), "count": 0, "log": []}
    exec("def f(x): return net(x)", space)
    f = lamina.jit(space["f"])
    f(X)
    f(X)
    with Watch(space["f"]) as watch:
        for _ in range(3):
            space["count"] += 1
            space["log"].append(f(X))
            space["other"] = nn.Linear(2, 2)
    assert (watch.runs, watch.compiles) == (0, 0)


def test_a_second_instance_whose_shapes_are_unknown():
    def lazy():
        return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(2))

    f = lamina.jit(call)
    f(lazy(), X)
    f(lazy(), X)
    net = lazy()
    with Watch(call) as watch:
        f(net, X)
    assert watch.compiles == 0
    assert watch.runs <= 2
    assert net[0].weight.shape == (4, 3)
    assert int(net[1].num_batches_tracked) == 1


def test_many_instances():
    f = lamina.jit(call)
    nets = [made(nn.Linear(3, 2)) for _ in range(20)]
    f(nets[0], X)
    with Watch(call) as watch:
        for _ in range(3):
            for net in nets:
                f(net, X)
    assert watch.runs <= 20
    assert watch.compiles == 0


def test_equal_values_of_another_kind_share():
    """NumPy or JAX, writable or not, a number or one made a moment later."""
    net = made(small())

    def fn(net, x, rate):
        return net(x) * rate

    f = lamina.jit(fn)
    f(net, np.ones((2, 3), np.float32), 0.5)
    f(net, X, 0.5)
    with Watch(fn) as watch:
        for x in (np.ones((2, 3), np.float32), X, np.asfortranarray(np.ones((2, 3), np.float32))):
            for rate in (0.5, 0.25, 1.0):
                f(net, x, rate)
    assert (watch.runs, watch.compiles) == (0, 0)


# lower() leaks nothing.


def test_lower_keeps_nothing_alive():
    f = lamina.jit(step)
    net = made(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    opt = lamina.Optimizer(net, optax.sgd(1e-2, momentum=0.9))
    lowered = f.lower(net, opt, X)
    found = [weakref.ref(thing) for thing in (net, opt, net[0].weight, net[1])]
    del net, opt
    gc.collect()
    assert [reference() for reference in found] == [None] * 4
    assert "dot_general" in lowered.as_text()


def test_lower_of_closures_keeps_nothing_alive():
    trainer = Trainer()
    f = lamina.jit(lambda x: trainer.run(x))
    f.lower(X)
    found = [weakref.ref(thing) for thing in (trainer, trainer.net, trainer.opt)]
    trainer = Trainer()
    gc.collect()
    assert [reference() for reference in found] == [None] * 3
    f(X)


def test_lower_changes_nothing():
    net = made(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()))
    before = {name: np.asarray(value) for name, value in net.state_dict().items()}
    lamina.manual_seed(3)
    key = lamina.next_key()
    lamina.manual_seed(3)
    f = lamina.jit(call)
    text = f.lower(net, X).as_text()
    assert (lamina.next_key() == key).all()
    for name, value in net.state_dict().items():
        assert not isinstance(value, jax.core.Tracer)
        np.testing.assert_array_equal(value, before[name])
    assert f.lower(net, X).as_text() == text
    lamina.manual_seed(3)
    out = f(net, X)
    net.load_state_dict(before)
    lamina.manual_seed(3)
    np.testing.assert_allclose(out, net(X), rtol=1e-4, atol=1e-5)


# Optimizers.

WARMUP = optax.linear_schedule(0.0, 0.1, 10)

TX = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-3, weight_decay=0.1),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "named schedule": lambda: optax.sgd(WARMUP),
    "hyperparameters": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
}


def pair(tx):
    net = made(nn.Linear(3, 2))
    opt = lamina.Optimizer(net, tx)
    opt.state_dict()
    return net, opt


@pytest.mark.parametrize("make", TX.values(), ids=TX)
def test_an_equal_fresh_optimizer_does_not_compile(make):
    f = lamina.jit(step)
    first, second, third = pair(make()), pair(make()), pair(make())
    net = first[0]
    f(*first, X)
    f(*first, X)
    fresh = lamina.Optimizer(net, make())
    fresh.state_dict()
    with Watch(step) as watch:
        f(*second, X)
        f(*third, X)
        f(net, fresh, X)
    assert watch.compiles == 0
    assert watch.runs <= 3
    with Watch(step) as watch:
        f(*first, X)
        f(*second, X)
        f(net, fresh, X)
    assert (watch.runs, watch.compiles) == (0, 0)


OTHER_TX = {
    "rate": (lambda: optax.adam(1e-2), lambda: optax.adam(1e-1)),
    "rate and state": (lambda: optax.sgd(0.1), lambda: optax.sgd(0.1, momentum=0.9)),
    "momentum": (
        lambda: optax.sgd(0.1, momentum=0.9), lambda: optax.sgd(0.1, momentum=0.5)
    ),
    "nesterov": (
        lambda: optax.sgd(0.1, momentum=0.9), lambda: optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
    "b1": (lambda: optax.adam(0.1, b1=0.9), lambda: optax.adam(0.1, b1=0.1)),
    "eps": (lambda: optax.adam(0.1), lambda: optax.adam(0.1, eps=1.0)),
    "decay": (
        lambda: optax.adamw(0.1, weight_decay=0.1), lambda: optax.adamw(0.1, weight_decay=0.5)
    ),
    "mask": (
        lambda: optax.adamw(0.1, weight_decay=0.5, mask=lambda p: {n: n == "bias" for n in p}),
        lambda: optax.adamw(0.1, weight_decay=0.5, mask=lambda p: {n: n != "bias" for n in p}),
    ),
    "norm": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    ),
    "order": (
        lambda: optax.chain(optax.clip(0.01), optax.scale(-2.0)),
        lambda: optax.chain(optax.scale(-2.0), optax.clip(0.01)),
    ),
    "sign": (lambda: optax.sgd(0.1), lambda: optax.sgd(-0.1)),
    "schedule": (
        lambda: optax.sgd(optax.linear_schedule(0.1, 0.0, 10)),
        lambda: optax.sgd(optax.linear_schedule(0.1, 0.0, 2)),
    ),
    "schedule and number": (
        lambda: optax.sgd(optax.constant_schedule(0.1)),
        lambda: optax.sgd(optax.constant_schedule(0.2)),
    ),
    "own schedule": (
        lambda: optax.sgd(lambda count: 0.1 / (count + 1)),
        lambda: optax.sgd(lambda count: 0.5 / (count + 1)),
    ),
    "schedule of a closure": (lambda: scheduled(0.1), lambda: scheduled(0.3)),
    "own transformation": (lambda: scaled(-0.1), lambda: scaled(-0.3)),
    "gradient accumulation": (
        lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
        lambda: optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(),
    ),
}  # fmt: skip


def scheduled(rate):
    return optax.sgd(lambda count: rate / (count + 1))


def scaled(factor):
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * factor, updates))


START = {"weight": jnp.full((2, 3), 0.5), "bias": jnp.ones(2)}


def with_lamina(run_step, tx):
    net = nn.Linear(3, 2)
    net.load_state_dict(START)
    opt = lamina.Optimizer(net, tx)
    for _ in range(3):
        run_step(net, opt, X)
    return dict(net.state_dict())


def with_optax(tx):
    def loss(params):
        return ((X @ params["weight"].T + params["bias"][None]) ** 2).mean()

    params, state = START, tx.init(START)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("case", OTHER_TX.values(), ids=OTHER_TX)
def test_another_optimizer_computes_differently(case):
    one, other = case
    f = lamina.jit(step)
    first = with_lamina(f, one())
    second = with_lamina(f, other())
    assert_same(first, with_optax(one()))
    assert_same(second, with_optax(other()))
    assert_same(with_lamina(f, one()), first)
    assert not all(np.allclose(first[name], second[name], rtol=1e-4) for name in first)


def test_another_optimizer_for_the_same_model():
    """The rate is changed by making a new optimizer, as in a schedule by hand."""
    net, params, f = nn.Linear(3, 2), START, lamina.jit(step)
    net.load_state_dict(START)
    for rate in (1e-2, 1e-1, 1e-2):
        opt, tx = lamina.Optimizer(net, optax.adam(rate)), optax.adam(rate)
        state = tx.init(params)
        for _ in range(2):
            f(net, opt, X)
            grads = jax.grad(lambda p: ((X @ p["weight"].T + p["bias"][None]) ** 2).mean())(params)
            updates, state = tx.update(grads, state)
            params = optax.apply_updates(params, updates)
    assert_same(dict(net.state_dict()), params)


# What shares a program, and what does not.


class Static(nn.Module):
    """Computes with a plain attribute."""

    def __init__(self, k, read):
        self.weight = nn.Parameter(jnp.ones(()))
        self.k, self.read = k, read

    def forward(self, x):
        return self.read(self.k, x * self.weight)


@dataclasses.dataclass
class Config:
    factor: float
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class Frozen:
    factor: float


class Plain:
    def __init__(self, factor):
        self.factor = factor


class Color(enum.Enum):
    RED = 2.0
    BLUE = 3.0


class Rank(enum.IntEnum):
    TWO = 2


def multiplies(k):
    return lambda x: x * k


def with_default(k):
    def fn(x, k=k):
        return x * k

    return fn


def with_keyword(k):
    def fn(x, *, k=k):
        return x * k

    return fn


def with_helper(k):
    def helper(x):
        return x * k

    return lambda x: helper(x)


def with_global(k):
    space = {"__name__": "user_code", "k": k}
    exec("def fn(x): return x * k", space)
    return space["fn"]


def from_source(source):
    space = {"__name__": "user_code"}
    exec(source, space)
    return space["fn"]


def times(k, x):
    return x * k


def apply(k, x):
    return k(x)


def field(k, x):
    return x * k.factor


def in_order(k, x):
    """Multiply and add in the order of a dict."""
    for name, number in k.items():
        x = x * number if name == "times" else x + number
    return x


def length(k, x):
    return x * len(k)


def listed(k, x):
    return x * (2.0 if isinstance(k, list) else 3.0)


# Each row: how to make two equal things, another one, and how to compute with them.
STATICS = {
    "float": (lambda: 2.5, lambda: 3.5, times),
    "int": (lambda: 1000 + 1, lambda: 1000 + 2, times),
    "ints of equal hash": (lambda: -1, lambda: -2, times),
    "string": (lambda: "".join("ab"), lambda: "abc", length),
    "bytes": (lambda: bytes(2), lambda: bytes(3), length),
    "none": (lambda: None, lambda: 2.0, lambda k, x: x if k is None else x * k),
    "tuple": (lambda: (1, 2.5), lambda: (1, 3.5), lambda k, x: x * k[1]),
    "list": (lambda: [1, 2.5], lambda: [1, 3.5], lambda k, x: x * k[1]),
    "order of a list": (lambda: [2.0, 3.0], lambda: [3.0, 2.0], lambda k, x: x * k[0] + k[1]),
    "list or tuple": (lambda: [2.0], lambda: (2.0,), listed),
    "dict": (lambda: {"a": 2.0}, lambda: {"a": 3.0}, lambda k, x: x * k["a"]),
    "keys of a dict": (lambda: {"a": 2.0}, lambda: {"ab": 2.0}, lambda k, x: x * len(min(k))),
    "order of a dict": (
        lambda: {"times": 2.0, "plus": 3.0}, lambda: {"plus": 3.0, "times": 2.0}, in_order
    ),
    "set": (lambda: {1, 2}, lambda: {1, 2, 3}, length),
    "nested": (
        lambda: {"a": [(1, {"b": 2.0})]},
        lambda: {"a": [(1, {"b": 3.0})]},
        lambda k, x: x * k["a"][0][1]["b"],
    ),
    "slice": (lambda: slice(0, 1), lambda: slice(0, 2), lambda k, x: x[:, k]),
    "range": (lambda: range(2), lambda: range(3), lambda k, x: x * sum(k)),
    "path": (
        lambda: pathlib.Path("a") / "b", lambda: pathlib.Path("a") / "bcd",
        lambda k, x: x * len(k.name),
    ),
    "dtype": (lambda: jnp.float16, lambda: jnp.float32, lambda k, x: x.astype(k)),
    "numpy dtype": (lambda: np.dtype("f2"), lambda: np.dtype("f4"), lambda k, x: x.astype(k)),
    "enum": (lambda: Color.RED, lambda: Color.BLUE, lambda k, x: x * k.value),
    "dataclass": (lambda: Config(2.0), lambda: Config(3.0), field),
    "frozen dataclass": (lambda: Frozen(2.0), lambda: Frozen(3.0), field),
    "namespace": (
        lambda: types.SimpleNamespace(factor=2.0), lambda: types.SimpleNamespace(factor=3.0), field
    ),
    "plain object": (lambda: Plain(2.0), lambda: Plain(3.0), field),
    "function": (lambda: jnp.sin, lambda: jnp.cos, apply),
    "builtin": (lambda: math.floor, lambda: math.ceil, lambda k, x: x * k(2.5)),
    "partial": (
        lambda: functools.partial(times, 2.0), lambda: functools.partial(times, 3.0), apply
    ),
    "partial with a keyword": (
        lambda: functools.partial(jnp.clip, max=0.25),
        lambda: functools.partial(jnp.clip, max=0.5),
        apply,
    ),
    "closure": (lambda: multiplies(2.0), lambda: multiplies(3.0), apply),
    "default": (lambda: with_default(2.0), lambda: with_default(3.0), apply),
    "default of a keyword": (lambda: with_keyword(2.0), lambda: with_keyword(3.0), apply),
    "helper": (lambda: with_helper(2.0), lambda: with_helper(3.0), apply),
    "bound method": (
        lambda: Bound(2.0).scale, lambda: Bound(3.0).scale, apply
    ),
    "object that is called": (lambda: Bound(2.0), lambda: Bound(3.0), apply),
}  # fmt: skip


class Bound:
    def __init__(self, factor):
        self.factor = factor

    def scale(self, x):
        return x * self.factor

    __call__ = scale


@pytest.mark.parametrize("row", STATICS.values(), ids=STATICS)
def test_equal_attributes_share_and_others_do_not(row):
    make, other, read = row

    f = lamina.jit(call)
    one, two, third = (made(Static(k(), read)) for k in (make, make, other))
    assert_same(f(one, X), one(X))
    f(one, X)
    with Watch(call) as watch:
        out = f(two, X)
    assert watch.compiles == 0
    assert watch.runs <= 1
    assert_same(out, two(X))
    assert_same(f(third, X), third(X))
    with Watch(call) as watch:
        assert_same(f(one, X), one(X))
        f(two, X)
        f(third, X)
    assert watch.runs == 0


B = jnp.asarray([[True, False]])

# Each row: things that look equal to Python, and how to compute with them.
LOOK_EQUAL = {
    "1 and 1.0 and True": ((1, 1.0, True), times),
    "in a tuple": (((1,), (1.0,), (True,)), lambda k, x: x * k[0]),
    "in a list": (([1], [1.0], [True]), lambda k, x: x * k[0]),
    "in a dict": (({"a": 1}, {"a": 1.0}, {"a": True}), lambda k, x: x * k["a"]),
    "key of a dict": (({1: 2}, {1.0: 2}, {True: 2}), lambda k, x: x * next(iter(k))),
    "in a set": (({1}, {1.0}, {True}), lambda k, x: x * next(iter(k))),
    "in an object": ((Plain(1), Plain(1.0), Plain(True)), field),
    "in a dataclass": ((Config(1), Config(1.0), Config(True)), field),
    "in a frozen dataclass": ((Frozen(1), Frozen(1.0), Frozen(True)), field),
    "in a closure": ((multiplies(1), multiplies(1.0), multiplies(True)), apply),
    "in a partial": (tuple(functools.partial(times, k) for k in (1, 1.0, True)), apply),
    "in a default": ((with_default(1), with_default(1.0), with_default(True)), apply),
    "zeros": ((0.0, -0.0, 0), lambda k, x: x.astype(jnp.float32) * math.copysign(2, k)),
    "zeros in a tuple": (
        ((0.0,), (-0.0,)),
        lambda k, x: x.astype(jnp.float32) * math.copysign(2, k[0]),
    ),
    "zeros in an object": (
        (Plain(0.0), Plain(-0.0)),
        lambda k, x: x.astype(jnp.float32) * math.copysign(2, k.factor),
    ),
    "zeros in a closure": (
        (multiplies(0.0), multiplies(-0.0)),
        lambda k, x: k(x.astype(jnp.float32)),
    ),
    "complex": ((1.0, 1 + 0j), times),
    "numpy numbers": ((1, np.int8(1), np.float16(1)), times),
    "int and enum": ((2, Rank.TWO), lambda k, x: x * len(repr(k))),
    "nan and zero": ((math.nan, 0.0, math.inf), lambda k, x: x.astype(jnp.float32) + k),
    "strings and bytes": (("a", b"a"), lambda k, x: x * len(repr(k))),
    "classes of equal objects": (
        (Config(2), Frozen(2), Plain(2), Bound(2)),
        lambda k, x: x * len(type(k).__name__),
    ),
    "false and none": ((False, None, 0, "", ()), lambda k, x: x * len(repr(k))),
}


@pytest.mark.parametrize("row", LOOK_EQUAL.values(), ids=LOOK_EQUAL)
@pytest.mark.parametrize("as_argument", [True, False], ids=["argument", "closure"])
def test_things_that_look_equal_do_not_share(row, as_argument):
    things, read = row

    def run(net, x):
        return net(x)

    holder = types.SimpleNamespace(net=None)
    g = lamina.jit(run) if as_argument else lamina.jit(lambda x: run(holder.net, x))
    for _ in range(2):
        for k in things:
            net = holder.net = Reads(k, read)
            expected = jax.jit(functools.partial(read, k))(B)  # XLA loses the sign of some zeros
            out = g(net, B) if as_argument else g(B)
            assert out.dtype == expected.dtype
            np.testing.assert_array_equal(out, expected)
            np.testing.assert_array_equal(np.signbit(np.real(out)), np.signbit(np.real(expected)))


class Reads(nn.Module):
    """Computes with a plain attribute, and has no parameter that would promote dtypes."""

    def __init__(self, k, read):
        self.k, self.read = k, read

    def forward(self, x):
        return self.read(self.k, x)


@pytest.mark.parametrize("as_argument", [True, False], ids=["argument", "closure"])
def test_look_equal_when_assigned_one_after_another(as_argument):
    net = Reads(1, times)
    f = lamina.jit(call)
    g = (lambda x: f(net, x)) if as_argument else lamina.jit(lambda x: net(x))
    for net.k in (1, 1.0, True, 0.0, -0.0, 1, math.nan, -0.0, False, 0, 1.0):
        for _ in range(2):
            out, expected = g(B), net(B)
            assert out.dtype == expected.dtype
            np.testing.assert_array_equal(out, expected)
            np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))


def test_nan_is_equal_to_itself():
    """A program is found again, though nan != nan."""
    nets = [Reads(float("nan"), lambda k, x: x + k) for _ in range(2)]
    nets.append(Reads([float("nan")], lambda k, x: x + k[0]))
    f = lamina.jit(call)
    for net in nets:
        f(net, X)
        with Watch(call) as watch:
            for _ in range(3):
                nets[0].training = nets[0].training
                f(net, X)
        assert (watch.runs, watch.compiles) == (0, 0)


CODES = {
    "constant": ("def fn(x): return x * 2", "def fn(x): return x * 3"),
    "operator": ("def fn(x): return x * 2", "def fn(x): return x + 2"),
    "name": (
        "import jax.numpy as jnp\ndef fn(x): return jnp.sin(x)",
        "import jax.numpy as jnp\ndef fn(x): return jnp.cos(x)",
    ),
    "kind of a constant": ("def fn(x): return x * 1", "def fn(x): return x * 1.0"),
    "sign of a zero": (
        "import math\ndef fn(x): return x * math.copysign(2, 0.0)",
        "import math\ndef fn(x): return x * math.copysign(2, -0.0)",
    ),
    "inner function": (
        "def fn(x): return (lambda y: y * 2)(x)",
        "def fn(x): return (lambda y: y * 3)(x)",
    ),
    "helper": (
        "def helper(x): return x * 2\ndef fn(x): return helper(x)",
        "def helper(x): return x * 3\ndef fn(x): return helper(x)",
    ),
    "helper of a helper": (
        "def a(x): return x * 2\ndef b(x): return a(x)\ndef fn(x): return b(x)",
        "def a(x): return x * 3\ndef b(x): return a(x)\ndef fn(x): return b(x)",
    ),
    "global number": ("k = 2\ndef fn(x): return x * k", "k = 3\ndef fn(x): return x * k"),
    "global zero": (
        "import math\nk = 0.0\ndef fn(x): return x * math.copysign(2, k)",
        "import math\nk = -0.0\ndef fn(x): return x * math.copysign(2, k)",
    ),
    "default": ("def fn(x, k=2): return x * k", "def fn(x, k=3): return x * k"),
    "default of a helper": (
        "def helper(x, k=2): return x * k\ndef fn(x): return helper(x)",
        "def helper(x, k=3): return x * k\ndef fn(x): return helper(x)",
    ),
    "class": (
        "class A:\n    k = 2\ndef fn(x): return x * A.k",
        "class A:\n    k = 3\ndef fn(x): return x * A.k",
    ),
    "method": (
        "class A:\n    def f(self, x): return x * 2\ndef fn(x): return A().f(x)",
        "class A:\n    def f(self, x): return x * 3\ndef fn(x): return A().f(x)",
    ),
    "order of names": (
        "a, b = 2, 3\ndef fn(x): return x * a + b",
        "a, b = 2, 3\ndef fn(x): return x * b + a",
    ),
}


@pytest.mark.parametrize("sources", CODES.values(), ids=CODES)
@pytest.mark.parametrize("where", ["attribute", "argument", "closure", "hook"])
def test_functions_of_other_code_do_not_share(sources, where):
    fns = [from_source(source) for source in sources]
    holder = types.SimpleNamespace(fn=None)

    def hook(fn):
        net = nn.Identity()
        net.register_forward_hook(lambda module, args, out: fn(out))
        return net

    runs = {
        "attribute": (f := lamina.jit(call)) and (lambda fn: f(Reads(fn, apply), B)),
        "argument": (g := lamina.jit(lambda fn, x: fn(x))) and (lambda fn: g(fn, B)),
        "closure": (h := lamina.jit(lambda x: holder.fn(x))) and (
            lambda fn: (setattr(holder, "fn", fn), h(B))[1]
        ),
        "hook": lambda fn: f(hook(fn), B),
    }  # fmt: skip
    for _ in range(2):
        for fn in fns:
            out, expected = runs[where](fn), fn(B)
            assert out.dtype == expected.dtype
            np.testing.assert_allclose(out, expected, rtol=1e-6)


class Named(nn.Module):
    """Two layers under names that are given; both orders compute the same sizes."""

    def __init__(self, *names):
        for name in names:
            setattr(self, name, nn.Linear(3, 3))

    def forward(self, x):
        for _, child in self.named_children():
            x = child(x)
        return x


def tied(*pairs):
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
    for one, two in pairs:
        net[two].weight = net[one].weight
    return net


def sharing(*order):
    blocks = [nn.Linear(3, 3) for _ in range(3)]
    return nn.Sequential(*[blocks[i] for i in order])


def freezing(*names):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for name in names:
        net.get_parameter(name).requires_grad = False
    return net


def in_mode(*flags):
    net = nn.Sequential(*[nn.Dropout(1.0) for _ in flags], nn.Linear(3, 3))
    for layer, flag in zip(net, flags, strict=False):
        layer.train(flag)
    return net


class Sines(nn.Module):
    def __init__(self):
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return jnp.sin(self.layer(x))


class Cosines(Sines):
    def forward(self, x):
        return jnp.cos(self.layer(x))


def overridden(factor):
    net = nn.Linear(3, 3)
    net.forward = lambda x: x * factor
    return net


def with_pre_hook(factor):
    net = nn.Linear(3, 3)
    net.register_forward_pre_hook(lambda module, args: (args[0] * factor,))
    return net


def with_backward_hook(factor):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].register_full_backward_hook(
        lambda module, grad_in, grad_out: tuple(g * factor for g in grad_in)
    )
    return net


def with_note(note):
    net = nn.Linear(3, 3)
    net.weight.note = note
    net.forward = lambda x: x @ net.weight.T * net.weight.note
    return net


# Each row: models whose differences show in the gradients or in their names.
DIFFERENT = {
    "names": (lambda: Named("a", "b"), lambda: Named("b", "a"), lambda: Named("a", "c")),
    "one name": (lambda: Named("fc"), lambda: Named("fc1")),
    "ties": (
        lambda: tied(), lambda: tied((0, 1)), lambda: tied((0, 2)), lambda: tied((0, 1), (2, 3)),
        lambda: tied((0, 1), (0, 2)), lambda: tied((1, 2)),
    ),
    "shared layers": (
        lambda: sharing(0, 1, 2), lambda: sharing(0, 0, 1), lambda: sharing(0, 1, 0),
        lambda: sharing(0, 0, 0), lambda: sharing(0, 1, 1),
    ),
    "requires_grad": (
        lambda: freezing(), lambda: freezing("0.weight"), lambda: freezing("0.bias"),
        lambda: freezing("1.weight"), lambda: freezing("0.weight", "1.bias"),
    ),
    "modes": (
        lambda: in_mode(True, False), lambda: in_mode(False, False), lambda: in_mode(False, True),
    ),
    "bias": (lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 3, bias=False)),
    "order": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Sigmoid()),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Tanh()),
    ),
    "class": (Sines, Cosines),
    "nesting": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
    ),
    "shape": (lambda: nn.Linear(3, 2), lambda: nn.Linear(3, 4)),
    "dtype": (lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 3).bfloat16()),
    "forward of an instance": (lambda: overridden(2.0), lambda: overridden(3.0)),
    "pre-hook": (lambda: with_pre_hook(2.0), lambda: with_pre_hook(3.0)),
    "backward hook": (lambda: with_backward_hook(2.0), lambda: with_backward_hook(3.0)),
    "attribute of a parameter": (lambda: with_note(2.0), lambda: with_note(3.0)),
    "probability": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(1.0)),
    ),
    "hidden teacher": (Hidden, Hidden, Hidden),
}  # fmt: skip


@pytest.mark.parametrize("makes", DIFFERENT.values(), ids=DIFFERENT)
def test_different_models_do_not_share(makes):
    def fn(net, x):
        return lamina.value_and_grad(lambda net: (net(x) ** 2).sum())(net)

    f = lamina.jit(fn)
    cases = []
    for make in makes:
        net = made(make())
        x = X.astype(next(p.dtype for p in net.parameters()))
        cases.append((net, x, *fn(net, x)))
    for _ in range(2):
        for net, x, expected_loss, expected in cases:
            loss, grads = f(net, x)
            assert grads.keys() == expected.keys()
            rtol = 1e-4 if x.dtype == jnp.float32 else 5e-2
            np.testing.assert_allclose(
                np.float32(loss), np.float32(expected_loss), rtol=rtol, atol=1e-6
            )
            for name, grad in grads.items():
                assert grad.shape == expected[name].shape
                assert grad.dtype == expected[name].dtype
                np.testing.assert_allclose(
                    np.float32(grad), np.float32(expected[name]), rtol=rtol, atol=1e-5
                )


def test_two_arguments_that_are_one():
    """Which arguments are the same object, or share a parameter, belongs to the program."""

    def fn(a, b, x):
        a.weight.data = a.weight.data * 2
        return (a(x) - b(x)).sum()

    f = lamina.jit(fn)

    def pairs():
        one, two, tied, other = (nn.Linear(3, 3) for _ in range(4))
        for place, net in enumerate((one, two, tied, other)):
            net.weight.data = jnp.full((3, 3), place + 1.0)
            net.bias.data = jnp.zeros(3)
        tied.weight = one.weight
        return [
            (one, two), (one, one), (one, tied), (two, two), (tied, one), (two, other), (one, two)
        ]  # fmt: skip

    for (a, b), (c, d) in zip(pairs(), pairs(), strict=True):
        np.testing.assert_allclose(f(a, b, X), fn(c, d, X), rtol=1e-5)


# What other models do, does not matter.


def test_an_unrelated_module_does_not_matter():
    net, other = made(small()), nn.Dropout(0.5)
    opt = lamina.Optimizer(net, optax.sgd(1e-2, momentum=0.9))
    f, g = lamina.jit(step), lamina.jit(lambda x: net(x))
    for _ in range(2):
        f(net, opt, X)
        g(X)
    changes = [
        lambda: setattr(other, "p", other.p / 2),
        other.eval,
        lambda: setattr(other, "weight", nn.Parameter(jnp.ones(2))),
        lambda: other.requires_grad_(False),
        lambda: lamina.materialize(nn.Linear(2, 2)),
        lambda: other.register_forward_hook(double),
        lambda: lamina.jit(other)(X),
        lambda: lamina.manual_seed(1),
        lambda: lamina.infer(nn.LazyLinear(3), X),
        lambda: lamina.Optimizer(made(nn.Linear(2, 2)), optax.sgd(0.1)).state_dict(),
    ]
    for change in changes:
        change()
        with Watch(step, small) as watch:
            f(net, opt, X)
            g(X)
        assert (watch.runs, watch.compiles) == (0, 0)


class Calls:
    """Counts the Python functions of lamina that are entered."""

    def __enter__(self):
        self.before, self.count = sys.getprofile(), 0
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_):
        sys.setprofile(self.before)

    def note(self, frame, event, _):
        if event == "call" and frame.f_globals.get("__name__", "").startswith("lamina."):
            self.count += 1


@pytest.mark.parametrize("how", ["argument", "closure"])
def test_an_unrelated_module_costs_nothing(how):
    """The work of a step beside an unrelated module that changes does not grow with the model."""
    other, costs = nn.Dropout(0.5), []
    for depth in (2, 12):
        net = made(nn.Sequential(*[nn.Linear(3, 3) for _ in range(depth)]))
        opt = lamina.Optimizer(net, optax.sgd(1e-2))
        f = lamina.jit(step)
        g = lamina.jit(lambda x, net=net, opt=opt: step(net, opt, x))
        run = (lambda net=net, opt=opt, f=f: f(net, opt, X)) if how == "argument" else (
            lambda g=g: g(X)
        )  # fmt: skip
        for _ in range(3):
            run()
        with Calls() as quiet:
            run()
        other.p /= 2
        with Calls() as busy:
            run()
        costs.append((quiet.count, busy.count))
    assert costs[0] == costs[1]
    assert costs[0][1] <= costs[0][0] + 5


# Flags that change to and fro.


@pytest.mark.parametrize("how", ["argument", "closure", "field", "trainer"])
def test_flips_go_back_to_programs_that_exist(how):
    net = made(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)))
    holder = types.SimpleNamespace(net=net)

    def fn(net, x):
        return net(x)

    f = lamina.jit(fn)
    run = {
        "argument": lambda: f(net, X),
        "closure": (g := lamina.jit(lambda x: fn(net, x))) and (lambda: g(X)),
        "field": (h := lamina.jit(lambda x: fn(holder.net, x))) and (lambda: h(X)),
        "trainer": (i := lamina.jit(lambda holder, x: fn(holder.net, x)))
        and (lambda: i(holder, X)),
    }[how]
    for flip in (net.train, net.eval, net.train, net.eval):
        flip()
        run()
        run()
    with Watch(fn) as watch:
        for _ in range(3):
            net.train()
            run()
            net.eval()
            out = run()
    assert (watch.runs, watch.compiles) == (0, 0)
    np.testing.assert_allclose(out, net(X), rtol=1e-4, atol=1e-5)


HANDLES = []

FLIPS = {
    "attribute": (
        lambda net: setattr(net[2], "p", 0.25), lambda net: setattr(net[2], "p", 0.5)
    ),
    "freezing": (
        lambda net: net[0].requires_grad_(False), lambda net: net[0].requires_grad_(True)
    ),
    "part": (
        lambda net: net.__setitem__(1, nn.Identity()), lambda net: net.__setitem__(1, nn.Tanh())
    ),
    "hook": (
        lambda net: HANDLES.append(net[0].register_forward_hook(double)),
        lambda net: HANDLES.pop().remove(),
    ),
    "list": (lambda net: net.sizes.append(3), lambda net: net.sizes.pop()),
    "plain attribute": (
        lambda net: setattr(net, "note", "a"), lambda net: delattr(net, "note")
    ),
}  # fmt: skip


@pytest.mark.parametrize("flips", FLIPS.values(), ids=FLIPS)
def test_changing_back_needs_no_compilation(flips):
    change, back = flips
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.5))
    net.sizes = [1, 2]
    made(net)

    def fn(net, x):
        return lamina.grad(lambda net: net(x).sum() * len(net.sizes))(net)

    f = lamina.jit(fn)
    for _ in range(2):
        f(net, X)
        change(net)
        f(net, X)
        back(net)
    with Watch(fn) as watch:
        f(net, X)
        change(net)
        f(net, X)
        back(net)
        f(net, X)
    assert watch.compiles == 0
    assert watch.runs <= 2


def test_shapes_that_take_turns():
    net = made(small())
    f = lamina.jit(call)
    for size in (2, 4, 2, 4):
        f(net, jnp.ones((size, 3)))
    with Watch(call) as watch:
        for size in (2, 4, 2, 4):
            f(net, jnp.ones((size, 3)))
    assert (watch.runs, watch.compiles) == (0, 0)


def test_new_values_need_nothing():
    net = made(small())
    other = {name: np.ones_like(value) for name, value in net.state_dict().items()}
    f = lamina.jit(call)
    f(net, X)
    f(net, X)
    zeros = jnp.zeros((4, 3))
    with Watch(call) as watch:
        net[0].weight.data = zeros
        f(net, X)
        net.load_state_dict(other)
        np.testing.assert_allclose(f(net, X), np.full((2, 3), 1 + 4 * math.tanh(4)), rtol=1e-5)
    assert watch.runs == 0


def test_flags_of_different_parameters_do_not_cancel_out():
    """One flag set and another set back is another state; all set back is the old one."""
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    links, seen = net._links, set()
    first = links.revision
    for p in net.parameters():
        p.requires_grad = False
        seen.add(links.revision)
        p.requires_grad = True
        assert links.revision == first
    assert len(seen) == 40
    for one, other in zip(net[::2].parameters(), net[1::2].parameters(), strict=True):
        one.requires_grad = False
        seen.add(links.revision)
        one.requires_grad, other.requires_grad = True, False
        seen.add(links.revision)
        other.requires_grad = True
    assert len(seen) == 40
    assert links.revision == first
