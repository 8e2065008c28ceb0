"""The state of an optimizer: frozen and thawed, copied, pickled, and its hyperparameters."""

import copy
import gc
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lamina
from lamina import nn
from lamina.errors import LaminaError

X = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)


class Net(nn.Module):
    """Layers of one shape, whose names are not in alphabetical order."""

    def __init__(self, lazy=False):
        self.z = nn.LazyLinear(3) if lazy else nn.Linear(3, 3)
        self.a = nn.Linear(3, 3)
        self.m = nn.Linear(3, 3)

    def forward(self, x):
        return self.m(jnp.tanh(self.a(jnp.tanh(self.z(x)))))


LAYERS = ("z", "a", "m")


def gradients(net, number):
    """Other gradients for every name and step."""
    return {
        name: jnp.asarray(np.random.default_rng([number, *name.encode()]).normal(size=p.shape))
        .astype(p.dtype)
        for name, p in net.named_parameters()
        if p.requires_grad
    }  # fmt: skip


class ByHand:
    """optax alone: every leaf of the state by its path, so that what is frozen rests."""

    def __init__(self, net, tx):
        self.tx = optax.with_extra_args_support(tx)
        self.params = {name: jnp.asarray(p.data) for name, p in net.named_parameters()}
        self.leaves = {}

    def state(self, names):
        fresh = self.tx.init({name: self.params[name] for name in names})
        leaves, treedef = jax.tree_util.tree_flatten_with_path(fresh)
        return treedef.unflatten([self.leaves.get(path, leaf) for path, leaf in leaves])

    def step(self, grads):
        params = {name: self.params[name] for name in grads}
        updates, state = self.tx.update(dict(grads), self.state(grads), params)
        self.params |= optax.apply_updates(params, updates)
        self.leaves |= dict(jax.tree_util.tree_flatten_with_path(state)[0])


def assert_same(net, opt, hand):
    for name, value in net.state_dict().items():
        np.testing.assert_allclose(value, hand.params[name], rtol=1e-5, atol=1e-6, err_msg=name)
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    found, expected = opt.state, hand.state(names)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


def take_step(net, opt, grads):
    opt.step(grads)


EAGER_AND_JIT = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])


def by_label(params):
    return {name: "slow" if name.startswith(("z", "0")) else "fast" for name in params}


def no_bias(params):
    return {name: "bias" not in name for name in params}


TRANSFORMS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.05),
    "masked decay": optax.adamw(0.05, weight_decay=0.1, mask=no_bias),
    "labels": optax.multi_transform(
        {"slow": optax.sgd(0.5, momentum=0.9), "fast": optax.adam(0.01)}, by_label
    ),
    "chain": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(optax.linear_schedule(1, 0, 9))),
}  # fmt: skip


# Freezing.


def freeze(net, *layers):
    net.requires_grad_(True)
    for layer in layers:
        getattr(net, layer).requires_grad_(False)


PHASES = {
    "and thawed": [(), ("z",), ()],
    "others": [("z",), ("a",), ("m",)],
    "alternating": [("z",), ("a", "m")] * 2,
    "more and less": [(), ("m",), ("m", "a"), ("a",), ()],
    "all of them": [(), LAYERS, ()],
    "from the start": [("a", "z"), ()],
}


def train_in_phases(tx, phases, step=take_step):
    net = Net()
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    number = 0
    for frozen in phases:
        freeze(net, *frozen)
        for _ in range(2):
            grads = gradients(net, number)
            if grads:
                step(net, opt, grads)
                hand.step(grads)
            number += 1
        assert_same(net, opt, hand)


@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
def test_frozen(phases):
    train_in_phases(TRANSFORMS["adam"], phases)


@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_frozen_under_other_transformations(tx):
    train_in_phases(tx, [("z",), ("a",), ()])


@pytest.mark.parametrize("phases", ["others", "alternating", "more and less"])
def test_frozen_in_a_compiled_step(phases):
    train_in_phases(TRANSFORMS["adam"], PHASES[phases], lamina.jit(take_step))


READS = {
    "nothing": lambda opt, path: None,
    "state_dict": lambda opt, path: opt.state_dict(),
    "state": lambda opt, path: opt.state,
    "repr": lambda opt, path: repr(opt),
    "save": lambda opt, path: lamina.save(opt, path / "opt.safetensors"),
    "deepcopy": lambda opt, path: copy.deepcopy(opt),
    "pickle": lambda opt, path: pickle.dumps(opt),
    "written": lambda opt, path: setattr(opt, "state", opt.state),
    "loaded": lambda opt, path: opt.load_state_dict(opt.state_dict()),
    "zero_grad": lambda opt, path: opt.zero_grad(),
}


def read_while_frozen(read, path, step):
    net, tx = Net(), optax.adam(0.05)
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    for number, frozen in enumerate([(), ("z",), ("z",), (), ("a", "m"), ()]):
        freeze(net, *frozen)
        read(opt, path)
        grads = gradients(net, number)
        step(net, opt, grads)
        hand.step(grads)
        read(opt, path)
    assert_same(net, opt, hand)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reading_while_frozen_forgets_nothing(read, tmp_path):
    read_while_frozen(read, tmp_path, take_step)


def test_reading_between_compiled_steps_forgets_nothing(tmp_path):
    read_while_frozen(READS["state"], tmp_path, lamina.jit(take_step))


def test_moments_come_back_as_they_were():
    net = Net()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    opt.step(gradients(net, 0))
    before = opt.state_dict()
    net.z.requires_grad_(False)
    resting = opt.state_dict()
    assert set(before) - set(resting) == {
        f"0.{moment}.z.{kind}" for moment in ("mu", "nu") for kind in ("weight", "bias")
    }
    net.z.requires_grad_(True)
    after = opt.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_one_parameter_is_frozen():
    net, tx = Net(), optax.adam(0.05)
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    for number, flag in enumerate([True, False, True]):
        net.a.bias.requires_grad = flag
        opt.state_dict()
        grads = gradients(net, number)
        assert ("a.bias" in grads) is flag
        opt.step(grads)
        hand.step(grads)
    assert_same(net, opt, hand)


@EAGER_AND_JIT
def test_frozen_under_a_closure(compiled):
    net, tx = Net(), optax.adam(0.05)
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)

    def step(grads):
        opt.step(grads)

    step = lamina.jit(step) if compiled else step
    for number, frozen in enumerate([(), ("a",), ("z",), ()]):
        freeze(net, *frozen)
        grads = gradients(net, number)
        step(grads)
        hand.step(grads)
    assert_same(net, opt, hand)


@pytest.mark.parity
def test_frozen_and_thawed_as_in_torch(torch):
    """Momentum rests while a layer is frozen, and goes on from there."""
    ours, theirs = (m.Sequential(m.Linear(3, 3), m.Tanh(), m.Linear(3, 3)) for m in (nn, torch.nn))
    theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in ours.state_dict().items()})
    opt = lamina.Optimizer(ours, optax.sgd(0.1, momentum=0.9))
    their_opt = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for frozen in (None, 0, 0, None, 2, 2, None):
        for net in (ours, theirs):
            net.requires_grad_(True)
            if frozen is not None:
                net[frozen].requires_grad_(False)
        opt.zero_grad()
        lamina.backward(lambda: (ours(X) ** 2).sum())
        opt.state_dict()
        opt.step()
        their_opt.zero_grad()
        (theirs(torch.tensor(X)) ** 2).sum().backward()
        their_opt.step()
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(
            ours.state_dict()[name], value.numpy(), rtol=1e-3, atol=1e-4, err_msg=name
        )


def test_gradients_of_what_is_frozen_are_refused_by_name():
    net = Net()
    opt = lamina.Optimizer(net, optax.adam(0.05))
    grads = gradients(net, 0)
    opt.step(grads)
    net.a.requires_grad_(False)
    before = net.state_dict()
    with pytest.raises(LaminaError, match=r"a\.weight: is frozen"):
        opt.step(grads)
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    net.z.requires_grad_(False)
    net.a.requires_grad_(True)
    with pytest.raises(LaminaError, match=r"z\.weight: is frozen"):
        opt.step(grads)


@EAGER_AND_JIT
def test_moments_follow_their_parameters_when_names_change(compiled):
    """A layer put before the others gives them other names, and is not given their moments."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    net = nn.Sequential(first, second)
    opt = lamina.Optimizer(net, optax.sgd(0.1, momentum=0.9))
    step = lamina.jit(take_step) if compiled else take_step
    step(net, opt, {name: jnp.ones(p.shape) for name, p in net.named_parameters()})
    net.insert(0, nn.Linear(3, 3))
    before = net.state_dict()
    step(net, opt, {name: jnp.zeros(p.shape) for name, p in net.named_parameters()})
    after = net.state_dict()
    for name, value in after.items():
        move = 0.0 if name.startswith("0.") else 0.09
        np.testing.assert_allclose(before[name] - value, move, rtol=1e-3, atol=1e-6, err_msg=name)


# Ties.


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


@EAGER_AND_JIT
def test_tied_parameters_are_frozen_under_either_name(compiled):
    net, tx = tied(), optax.adam(0.05)
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    step = lamina.jit(take_step) if compiled else take_step
    for number, flag in enumerate([True, False, False, True]):
        net[2].weight.requires_grad = flag
        assert ("0.mu.0.weight" in opt.state_dict()) is flag
        grads = gradients(net, number)
        assert "2.weight" not in grads
        step(net, opt, grads)
        hand.step(grads)
    assert net[2].weight is net[0].weight
    hand.params["2.weight"] = hand.params["0.weight"]
    assert_same(net, opt, hand)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_ties(duplicate):
    net, tx = tied(), optax.adam(0.05)
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    opt.step(gradients(net, 0))
    hand.step(gradients(net, 0))
    twin, other = duplicate((net, opt))
    assert twin[2].weight is twin[0].weight
    assert [n for n in other.state_dict() if ".mu." in n and "weight" in n] == [
        "0.mu.0.weight", "0.mu.1.weight",
    ]  # fmt: skip
    other.step(gradients(twin, 1))
    hand.step(gradients(net, 1))
    hand.params["2.weight"] = hand.params["0.weight"]
    assert_same(twin, other, hand)


def test_untied_parameters_begin_anew():
    net = tied()
    opt = lamina.Optimizer(net, optax.sgd(0.1, momentum=0.9))
    opt.step({name: jnp.ones(p.shape) for name, p in net.named_parameters()})
    net[2].weight = nn.Parameter(jnp.zeros((3, 3)))
    state = opt.state_dict()
    np.testing.assert_array_equal(state["0.trace.0.weight"], np.ones((3, 3)))
    np.testing.assert_array_equal(state["0.trace.2.weight"], np.zeros((3, 3)))
    opt.step({name: jnp.ones(p.shape) for name, p in net.named_parameters()})
    np.testing.assert_allclose(net[2].weight.data, np.full((3, 3), -0.1), rtol=1e-6)


# Copies.


class Trainer:
    """A plain object that holds a model and its optimizer."""

    def __init__(self, net, opt):
        self.net, self.opt, self.losses = net, opt, []


class TrainerModule(nn.Module):
    def __init__(self, net, opt):
        self.net, self.opt = net, opt


def by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


COPIES = pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"]
)


def of_trainer(trainer):
    return trainer.net, trainer.opt


TOGETHER = {
    "tuple": (lambda net, opt: (net, opt), lambda both: both),
    "optimizer first": (lambda net, opt: [opt, net], lambda both: both[::-1]),
    "dict": (lambda net, opt: {"net": net, "opt": opt}, lambda d: (d["net"], d["opt"])),
    "trainer": (Trainer, of_trainer),
    "module": (TrainerModule, of_trainer),
    "alone": (lambda net, opt: opt, lambda opt: (opt.net, opt)),
}


def train_original_and_copy(hold, open_, duplicate, step):
    net, tx = Net(), optax.adam(0.05)
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    for number in range(2):
        grads = gradients(net, number)
        step(net, opt, grads)
        hand.step(grads)
    twin, other = open_(duplicate(hold(net, opt)))
    twins_hand = copy.deepcopy(hand)
    assert other is not opt
    assert other.net is twin is not net
    for number in range(2, 4):
        grads = gradients(twin, number)
        step(twin, other, grads)
        twins_hand.step(grads)
    assert_same(net, opt, hand)
    assert_same(twin, other, twins_hand)
    for number in range(8, 10):
        grads = gradients(net, number)
        step(net, opt, grads)
        hand.step(grads)
    assert_same(net, opt, hand)
    assert_same(twin, other, twins_hand)


@COPIES
@pytest.mark.parametrize("held", TOGETHER)
def test_a_copy_trains_by_itself(held, duplicate):
    train_original_and_copy(*TOGETHER[held], duplicate, take_step)


@pytest.mark.parametrize("held", ["tuple", "trainer", "alone"])
def test_a_copy_trains_by_itself_in_the_same_compiled_step(held):
    train_original_and_copy(*TOGETHER[held], copy.deepcopy, lamina.jit(take_step))


@COPIES
@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_copies_of_every_kind_of_state(duplicate, tx):
    net = Net()
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    opt.step(gradients(net, 0))
    hand.step(gradients(net, 0))
    twin, other = duplicate((net, opt))
    other.step(gradients(twin, 1))
    hand.step(gradients(net, 1))
    assert_same(twin, other, hand)


@COPIES
@pytest.mark.parametrize("lazy", [False, True], ids=["no values", "no shapes"])
def test_a_copy_made_before_anything_is_known(duplicate, lazy):
    net, tx = Net(lazy), optax.adam(0.05)
    opt = lamina.Optimizer(net, tx)
    twin, other = duplicate((net, opt))
    for model, optimizer in ((twin, other), (net, opt)):
        model(X)
        for number in range(2):
            optimizer.step(gradients(model, number))
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(twin.state_dict()[name], value, err_msg=name)
    for name, value in opt.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], value, err_msg=name)


@COPIES
def test_a_copy_outlives_its_original(duplicate):
    net, tx = Net(), optax.adam(0.05)
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    other = duplicate(opt)
    del net, opt
    gc.collect()
    twin = other.net
    other.step(gradients(twin, 0))
    hand.step(gradients(twin, 0))
    assert_same(twin, other, hand)


@COPIES
def test_a_copy_made_while_frozen_keeps_the_moments(duplicate):
    net, tx = Net(), optax.adam(0.05)
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    opt.step(gradients(net, 0))
    hand.step(gradients(net, 0))
    net.a.requires_grad_(False)
    opt.state_dict()
    twin, other = duplicate((net, opt))
    assert not twin.a.weight.requires_grad
    twin.a.requires_grad_(True)
    other.step(gradients(twin, 1))
    hand.step(gradients(twin, 1))
    assert_same(twin, other, hand)


@COPIES
def test_freezing_one_copy_leaves_the_other(duplicate):
    net, tx = Net(), optax.adam(0.05)
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    twin, other = duplicate((net, opt))
    twin.z.requires_grad_(False)
    other.step(gradients(twin, 0))
    opt.step(gradients(net, 0))
    hand.step(gradients(net, 0))
    assert not any(".z." in name for name in other.state_dict())
    assert_same(net, opt, hand)


@COPIES
def test_copies_of_copies(duplicate):
    net, tx = Net(), optax.adam(0.05)
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    for number in range(3):
        net, opt = duplicate((net, opt))
        opt.step(gradients(net, number))
        hand.step(gradients(net, number))
    assert_same(net, opt, hand)


CHILD = """
import pickle, sys
import numpy as np

with open(sys.argv[1], "rb") as file:
    opt, grads = pickle.load(file)
opt.step(grads)
values = {f"net {name}": value for name, value in opt.net.state_dict().items()}
values |= {f"opt {name}": value for name, value in opt.state_dict().items()}
np.savez(sys.argv[2], **values)
"""


def test_training_goes_on_in_another_process(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))
    tx = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(1.0, 9))
    )
    opt = lamina.Optimizer(net, tx)
    net(X)
    opt.step(gradients(net, 0))
    grads = {name: np.asarray(value) for name, value in gradients(net, 1).items()}
    (tmp_path / "opt").write_bytes(pickle.dumps((opt, grads)))
    subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "opt", tmp_path / "values.npz"],
        check=True,
        timeout=120,
    )
    opt.step(grads)
    expected = {f"net {name}": value for name, value in net.state_dict().items()}
    expected |= {f"opt {name}": value for name, value in opt.state_dict().items()}
    with np.load(tmp_path / "values.npz") as found:
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


# Hyperparameters.

INJECTED = {
    "plain": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    "momentum": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
    "adamw": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.01),
}
IN_A_CHAIN = optax.chain(
    optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
)


@EAGER_AND_JIT
@pytest.mark.parametrize("tx", INJECTED.values(), ids=INJECTED)
def test_hyperparameters_are_set(tx, compiled):
    net = Net()
    opt = lamina.Optimizer(net, tx)
    step = lamina.jit(take_step) if compiled else take_step
    params = dict(net.state_dict())
    state = tx.init(params)
    assert float(opt.hyperparams["learning_rate"]) == pytest.approx(0.1)
    for number, rate in enumerate([0.1, 0.05, 0.0, 0.3]):
        opt.hyperparams["learning_rate"] = rate
        assert float(opt.hyperparams["learning_rate"]) == pytest.approx(rate)
        state.hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
        grads = gradients(net, number)
        step(net, opt, grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for name, value in net.state_dict().items():
        np.testing.assert_allclose(value, params[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert set(opt.hyperparams) == set(state.hyperparams)
    assert "learning_rate" in opt.hyperparams


@EAGER_AND_JIT
def test_hyperparameters_inside_a_chain(compiled):
    net = Net()
    opt = lamina.Optimizer(net, IN_A_CHAIN)
    step = lamina.jit(take_step) if compiled else take_step
    step(net, opt, gradients(net, 0))
    opt.hyperparams["learning_rate"] = 0.0
    before = net.state_dict()
    step(net, opt, gradients(net, 1))
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@EAGER_AND_JIT
def test_hyperparameters_change_inside_a_step(compiled):
    """A rate that halves at every step, in the step itself."""
    net = Net()
    opt = lamina.Optimizer(net, optax.inject_hyperparams(optax.sgd)(learning_rate=1.0))

    def step(net, opt, grads):
        opt.step(grads)
        opt.hyperparams["learning_rate"] *= 0.5

    step = lamina.jit(step) if compiled else step
    before = net.state_dict()
    for _ in range(3):
        step(net, opt, {name: jnp.ones(p.shape) for name, p in net.named_parameters()})
    assert float(opt.hyperparams["learning_rate"]) == pytest.approx(0.125)
    for name, value in net.state_dict().items():
        np.testing.assert_allclose(before[name] - value, 1.75, rtol=1e-5)


@pytest.mark.parity
def test_a_changing_rate_as_in_torch(torch):
    ours, theirs = nn.Linear(3, 1), torch.nn.Linear(3, 1)
    theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in ours.state_dict().items()})
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)
    opt = lamina.Optimizer(ours, tx)
    their_opt = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for rate, momentum in [(0.1, 0.9), (0.01, 0.9), (0.2, 0.5), (0.0, 0.5), (0.1, 0.9)]:
        opt.hyperparams["learning_rate"] = rate
        opt.hyperparams["momentum"] = momentum
        their_opt.param_groups[0].update(lr=rate, momentum=momentum)
        opt.step(lamina.grad(lambda net: (net(X) ** 2).sum())(ours))
        their_opt.zero_grad()
        (theirs(torch.tensor(X)) ** 2).sum().backward()
        their_opt.step()
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[name], value.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "value", [0.25, np.float64(0.25), np.float32(0.25), jnp.asarray(0.25), jnp.asarray([0.25])[0]],
    ids=["float", "float64", "float32", "array", "element"],
)  # fmt: skip
def test_kinds_of_numbers(value):
    net = nn.Linear(1, 1, bias=False)
    opt = lamina.Optimizer(net, INJECTED["plain"])
    opt.hyperparams["learning_rate"] = value
    before = float(net.weight.sum())
    opt.step({"weight": jnp.ones((1, 1))})
    assert before - float(net.weight.sum()) == pytest.approx(0.25, rel=1e-4)
    assert opt.hyperparams["learning_rate"].dtype == jnp.float32


def test_hyperparameters_outlive_freezing_copies_and_files():
    net = Net()
    opt = lamina.Optimizer(net, INJECTED["adamw"])
    opt.hyperparams["learning_rate"] = 0.3
    net.z.requires_grad_(False)
    opt.step(gradients(net, 0))
    assert float(opt.hyperparams["learning_rate"]) == pytest.approx(0.3)
    net.z.requires_grad_(True)
    twin = copy.deepcopy(opt)
    twin.hyperparams["learning_rate"] = 0.4
    assert float(opt.hyperparams["learning_rate"]) == pytest.approx(0.3)
    assert float(twin.hyperparams["learning_rate"]) == pytest.approx(0.4)
    fresh = lamina.Optimizer(Net(), INJECTED["adamw"])
    fresh.load_state_dict(opt.state_dict())
    assert float(fresh.hyperparams["learning_rate"]) == pytest.approx(0.3)


def test_unknown_hyperparameters_are_refused():
    opt = lamina.Optimizer(nn.Linear(1, 1), INJECTED["adamw"])
    with pytest.raises(KeyError, match="learning_rate"):
        opt.hyperparams["lr"] = 0.1
    with pytest.raises(KeyError, match="learning_rate"):
        opt.hyperparams["learning_rat"]
    with pytest.raises((LaminaError, TypeError, ValueError), match=r"learning_rate|shape"):
        opt.hyperparams["learning_rate"] = jnp.ones(3)
    assert float(opt.hyperparams["learning_rate"]) == pytest.approx(0.1)


def test_hyperparameters_that_are_not_injected():
    """What is a constant of the transformation can't be set; the error names the way."""
    opt = lamina.Optimizer(nn.Linear(1, 1), optax.adam(0.1))
    with pytest.raises(Exception, match="inject_hyperparams"):
        opt.hyperparams["learning_rate"] = 0.2


def test_writing_into_the_state_that_was_read_is_refused():
    """``opt.state`` is a copy: what is written there would be lost."""
    net = nn.Linear(1, 1)
    opt = lamina.Optimizer(net, INJECTED["plain"])
    with pytest.raises((LaminaError, TypeError), match=r"opt\.hyperparams"):
        opt.state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    state = opt.state
    with pytest.raises((LaminaError, TypeError)):
        state.hyperparams.update(learning_rate=jnp.asarray(0.0))
    assert float(opt.hyperparams["learning_rate"]) == pytest.approx(0.1)


def test_the_state_that_was_read_is_still_an_optax_state():
    tx = INJECTED["adamw"]
    net = Net()
    opt = lamina.Optimizer(net, tx)
    opt.step(gradients(net, 0))
    params, grads = dict(net.state_dict()), gradients(net, 1)
    updates, _ = tx.update(grads, opt.state, params)
    expected = optax.apply_updates(params, updates)
    opt.state = jax.tree.map(lambda leaf: leaf, opt.state)
    opt.step(grads)
    for name, value in net.state_dict().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


# What can't be changed, and several models.


def test_another_transformation_is_refused():
    net, tx = Net(), optax.adam(0.05)
    opt, hand = lamina.Optimizer(net, tx), ByHand(net, tx)
    opt.step(gradients(net, 0))
    hand.step(gradients(net, 0))
    with pytest.raises((LaminaError, AttributeError), match=r"fix:[\s\S]*Optimizer\("):
        opt.tx = optax.sgd(1.0)
    opt.step(gradients(net, 1))
    hand.step(gradients(net, 1))
    assert_same(net, opt, hand)


def test_another_model_is_refused_or_trained():
    net, other = Net(), Net()
    opt = lamina.Optimizer(net, optax.sgd(0.1))
    opt.step(gradients(net, 0))
    before, others = net.state_dict(), other.state_dict()
    try:
        opt.net = other
    except (LaminaError, AttributeError):
        return
    opt.step(gradients(other, 1))
    np.testing.assert_array_equal(net.z.weight.data, before["z.weight"])
    assert not np.array_equal(other.z.weight.data, others["z.weight"])


@pytest.mark.parametrize(("kind", "compiled"), [(list, False), (list, True), (tuple, False)])
def test_several_models(kind, compiled):
    g, f = nn.Linear(3, 3), nn.Linear(3, 3)
    tx = optax.adam(0.05)
    opt, hand = lamina.Optimizer(kind([g, f]), tx), ByHand(nn.ModuleList([g, f]), tx)
    step = lamina.jit(lambda opt, grads: opt.step(grads)) if compiled else lambda o, gr: o.step(gr)
    for number in range(3):
        grads = gradients(nn.ModuleList([g, f]), number)
        step(opt, grads)
        hand.step(grads)
    for index, net in enumerate((g, f)):
        for name, value in net.state_dict().items():
            np.testing.assert_allclose(value, hand.params[f"{index}.{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parity
def test_several_models_as_in_torch(torch):
    """One optimizer for two networks, in a loop written in PyTorch's way."""

    def run(m, wrap, backward, optimizer, x):
        nets = m.Linear(3, 4), m.Linear(4, 1)
        for seed, net in enumerate(nets):
            draw = np.random.default_rng(seed)
            net.load_state_dict({
                name: wrap(draw.normal(size=tuple(value.shape)).astype(np.float32))
                for name, value in net.state_dict().items()
            })  # fmt: skip
        opt = optimizer(nets)
        for _ in range(3):
            opt.zero_grad()
            backward(lambda: (nets[1](nets[0](x)) ** 2).mean())
            opt.step()
        return [np.asarray(v.detach()) for net in nets for _, v in net.named_parameters()]

    ours = run(
        nn, jnp.asarray, lamina.backward, lambda n: lamina.Optimizer(list(n), optax.sgd(0.1)), X
    )
    theirs = run(
        torch.nn, torch.tensor, lambda f: f().backward(),
        lambda n: torch.optim.SGD([p for net in n for p in net.parameters()], lr=0.1),
        torch.tensor(X),
    )  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_several_models_share_a_parameter():
    g, f = nn.Linear(3, 3), nn.Linear(3, 3)
    f.weight = g.weight
    opt = lamina.Optimizer([g, f], optax.adam(0.05))
    assert sorted(n for n in opt.state_dict() if ".mu." in n) == [
        "0.mu.0.bias", "0.mu.0.weight", "0.mu.1.bias",
    ]  # fmt: skip


def test_an_optimizer_of_several_models_changes_none_of_their_values():
    """Models that have no values yet are drawn under their own names, optimizer or not."""

    def values(with_optimizer):
        lamina.manual_seed(0)
        g, f = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))
        opt = lamina.Optimizer([g, f], optax.adam(0.05)) if with_optimizer else None
        result = [*g.state_dict().values(), *f.state_dict().values()]
        return result, opt

    for a, b in zip(values(False)[0], values(True)[0], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "models", [[], [nn.Linear(1, 1), 3], [nn.Parameter(jnp.ones(1))], {"a": 3}],
    ids=["none", "a number", "parameters", "dict"],
)  # fmt: skip
def test_lists_of_other_things(models):
    with pytest.raises((TypeError, ValueError), match="module"):
        lamina.Optimizer(models, optax.adam(0.05))
