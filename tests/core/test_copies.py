"""Copies keep values, also those that do not exist yet; clones draw their own."""

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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lamina
from lamina import nn

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)), jnp.float32)
SPEC = jax.ShapeDtypeStruct((2, 3), jnp.float32)


def by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


COPIES = pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"]
)


def bits(net):
    return {name: np.asarray(value).tobytes() for name, value in net.state_dict().items()}


def own_recipe(key, shape, dtype):
    return jax.random.gumbel(key, shape, dtype)


def linear():
    return nn.Linear(3, 2)


def nested():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 2)))


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(2))


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


def by_rules():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    nn.init.rules(net, {"*.weight": nn.init.Normal(std=0.5), "0.bias": own_recipe})
    return net


def by_key():
    net = nn.Linear(3, 2)
    net.weight.initialize(nn.init.Normal(), jax.random.key(4))
    return net


def partly_material():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].bias.sum()
    net[1].weight.data = jnp.ones((2, 4))
    return net


BUILDERS = [linear, nested, lazy, tied, by_rules, by_key, partly_material]
PARTS = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)


class Pair(nn.Module):
    """A network and its copy in one module, as DQN, EMA, BYOL and MoCo have them."""

    def __init__(self, online, duplicate=copy.deepcopy):
        self.online = online
        self.target = duplicate(self.online).requires_grad_(False)

    def forward(self, x):
        return self.online(x), self.target(x)


def assert_equal_halves(pair):
    assert bits(pair.target) == bits(pair.online)
    assert pair.target is not pair.online
    assert not pair.ties() or set(pair.ties()) == {"online.1.weight", "target.1.weight"}


# A copy beside its original, by itself.


@COPIES
@PARTS
def test_a_copy_has_the_values_to_come(duplicate, build):
    """Whichever is used first; running statistics are updated in the same way in both."""
    for order in (slice(None), slice(None, None, -1)):
        net = build()
        twin = duplicate(net)
        for module in (net, twin)[order]:
            module(X)
        assert bits(twin) == bits(net)


def test_values_may_come_one_by_one_in_any_order():
    net = nested()
    twin = copy.deepcopy(net)
    values = {}
    for one, other, name in [
        (net, twin, "0.weight"),
        (twin, net, "0.bias"),
        (twin, net, "2.0.weight"),
        (net, twin, "2.0.bias"),
    ]:
        values[name] = np.asarray(one.get_parameter(name).data).tobytes()
        assert np.asarray(other.get_parameter(name).data).tobytes() == values[name]
    assert bits(net) == bits(twin) == values


@COPIES
def test_copying_makes_no_values(duplicate):
    """A model far larger than memory is copied as it is."""
    net = nn.Sequential(nn.Linear(1_000_000, 1_000_000), nn.LazyLinear(1_000_000))
    twin = duplicate(net)
    assert not any(p.is_material for p in [*net.parameters(), *twin.parameters()])


def test_copying_changes_nothing_of_the_original():
    lamina.manual_seed(0)
    alone = bits(nested())
    lamina.manual_seed(0)
    net = nested()
    copy.deepcopy(net), pickle.dumps(net), net.clone(), copy.deepcopy(net[0])
    assert bits(net) == alone


def test_a_seed_set_after_copying_changes_nothing():
    net = Pair(lazy())
    lamina.manual_seed(1234)
    net(X)
    assert_equal_halves(net)


@COPIES
def test_a_copy_made_before_another_seed_is_used(duplicate):
    lamina.manual_seed(1)
    net = linear()
    twin = duplicate(net)
    lamina.manual_seed(2)
    expected = bits(net)
    with lamina.rng(3):
        assert bits(nn.Sequential(twin)[0]) == expected


# A network and its copy in one module.


@COPIES
@PARTS
def test_both_halves_start_equal(duplicate, build):
    pair = Pair(build(), duplicate)
    pair(X)
    assert_equal_halves(pair)


FIRST_USES = {
    "online": lambda pair: (pair.online(X), pair.target(X)),
    "target": lambda pair: (pair.target(X), pair.online(X)),
    "infer": lambda pair: lamina.infer(pair, SPEC),
    "materialize": lambda pair: lamina.materialize(pair, SPEC),
    "materialize by key": lambda pair: lamina.materialize(pair, SPEC, key=jax.random.key(7)),
    "jit": lambda pair: lamina.jit(pair)(X),
    "closure": lambda pair: lamina.jit(lambda x: pair(x))(X),
    "grad": lambda pair: lamina.grad(lambda pair: pair(X)[0].sum())(pair),
    "backward": lambda pair: lamina.backward(lambda: pair(X)[0].sum()),
    "backward compiled": lambda pair: lamina.jit(
        lambda pair: lamina.backward(lambda: sum(y.sum() for y in pair(X)))
    )(pair),
    "vmap": lambda pair: lamina.vmap(pair.eval())(X[None]),
    "remat": lambda pair: lamina.remat(pair)(X),
    "scan": lambda pair: lamina.scan(lambda c, x: (c, pair(x)), 0.0, X[None]),
}


@pytest.mark.parametrize("use", FIRST_USES.values(), ids=FIRST_USES)
def test_both_halves_start_equal_whatever_comes_first(use):
    pair = Pair(lazy())
    use(pair)
    assert_equal_halves(pair)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_first_outputs_are_equal(compiled):
    """DQN: the first targets come from the network itself."""
    pair = Pair(nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2)))
    online, target = (lamina.jit(pair) if compiled else pair)(X)
    np.testing.assert_array_equal(online, target)


def test_adding_a_copy_changes_no_other_value():
    class Alone(nn.Module):
        def __init__(self):
            self.online = nested()
            self.head = nn.Linear(2, 2)

    class Beside(nn.Module):
        def __init__(self):
            self.online = nested()
            self.target = copy.deepcopy(self.online)
            self.head = nn.Linear(2, 2)

    lamina.manual_seed(0)
    alone = bits(Alone())
    lamina.manual_seed(0)
    beside = bits(Beside())
    assert {name: beside[name] for name in alone} == alone


def test_byol():
    """Encoder and projector are copied; the predictor is the online network's own."""

    class Byol(nn.Module):
        def __init__(self):
            self.encoder = lazy()
            self.projector = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(4))
            self.predictor = copy.deepcopy(self.projector)
            self.target = nn.Sequential(copy.deepcopy(self.encoder), copy.deepcopy(self.projector))
            nn.init.rules(self, {"predictor.*.weight": nn.init.Normal(std=0.1)})

        def forward(self, x):
            return self.predictor(self.projector(self.encoder(x))), self.target(x)

    net = Byol()
    lamina.jit(net)(X)
    assert bits(net.target[0]) == bits(net.encoder)
    assert bits(net.target[1]) == bits(net.projector)
    assert bits(net.predictor)["0.weight"] != bits(net.projector)["0.weight"]


def test_moco():
    """The usual way to write it: a copy, then parameter by parameter in the training step."""

    class Moco(nn.Module):
        def __init__(self, dim=2):
            self.query = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(dim))
            self.key = copy.deepcopy(self.query)
            self.key.requires_grad_(False)
            self.register_buffer("queue", jnp.zeros((dim, 4)))

        def forward(self, x):
            return (self.query(x) * self.key(x)).sum()

        def update(self):
            for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
                k.data = 0.5 * k.data + 0.5 * q.data

    net = Moco()
    opt = lamina.Optimizer(net, optax.sgd(0.1))

    @lamina.jit
    def step(net, opt, x):
        net.update()
        opt.step(lamina.grad(lambda net: net(x))(net))

    lamina.infer(net, SPEC)
    start = {name: np.asarray(v.data) for name, v in copy.deepcopy(net).named_parameters()}
    step(net, opt, X)
    for name, value in net.key.state_dict().items():
        # At the first step both were equal, so the average is what it was.
        np.testing.assert_allclose(value, start[f"key.{name}"], rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(start[f"key.{name}"], start[f"query.{name}"])
    assert bits(net.key) != bits(net.query)


def test_moving_average_of_a_model_without_shapes():
    net = lazy()
    average = copy.deepcopy(net).requires_grad_(False)
    opt = lamina.Optimizer(net, optax.sgd(0.1))
    net(X), average(X)
    start = bits(net)
    assert bits(average) == start
    opt.step(lamina.grad(lambda net: net(X).sum())(net))
    assert bits(average) == start
    assert bits(net) != start


# Copies of copies, of parts and of several things at once.


@PARTS
def test_copies_of_copies(build):
    class Generations(nn.Module):
        def __init__(self):
            self.first = build()
            self.second = copy.deepcopy(self.first)
            self.third = by_pickle(self.second)

    net = Generations()
    last = copy.deepcopy(net.third)
    for part in (last, net.third, net.first, net.second):
        part(X)
    assert bits(net.first) == bits(net.second) == bits(net.third) == bits(last)


@COPIES
def test_a_whole_that_holds_copies_is_copied(duplicate):
    pair = Pair(lazy())
    twin = duplicate(pair)
    twin(X), pair(X)
    assert_equal_halves(twin)
    assert bits(twin) == bits(pair)


def test_layers_copied_in_a_loop_start_equal_as_in_torch():
    block = nn.LazyLinear(3)
    net = nn.Sequential(*[copy.deepcopy(block) for _ in range(3)])
    net(X)
    assert len({layer["weight"] for layer in map(bits, net)}) == 1


def test_copies_are_stacked_equal():
    block = nn.Linear(3, 3)
    stacked = lamina.stack([copy.deepcopy(block) for _ in range(3)])
    for row in stacked.weight.data:
        np.testing.assert_array_equal(row, block.weight.data)


@COPIES
def test_a_part_is_copied_with_the_values_it_has_in_its_place(duplicate):
    net = nested()
    part = duplicate(net[2])
    expected = bits(net[2])
    del net
    gc.collect()
    assert bits(part) == expected


@COPIES
def test_a_part_copied_out_of_a_model_that_is_dropped(duplicate):
    lamina.manual_seed(0)
    expected = bits(nested()[0])
    lamina.manual_seed(0)
    part = duplicate(nested()[0])
    gc.collect()
    assert bits(part) == expected


@COPIES
def test_several_modules_in_one_copy_stay_tied(duplicate):
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    first, second, again = duplicate((one, two, one))
    assert first is again
    assert first.weight is second.weight
    assert bits(first) == bits(one)
    assert bits(second) == bits(two)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, by_pickle], ids=["copy", "deepcopy", "pickle"]
)
@pytest.mark.parametrize("where", ["alone", "in a module", "without shape"])
def test_parameters_by_themselves(duplicate, where):
    holder = nn.Module()
    p = nn.Parameter(
        shape=(None if where == "without shape" else 2, 3), init=nn.init.Normal(std=3.0)
    )
    if where != "alone":
        holder.weight = p
    twin = duplicate(p)
    other = nn.Module()
    other.elsewhere = twin
    if where == "without shape":
        p.shape, twin.shape = (2, 3), (2, 3)
    np.testing.assert_array_equal(twin.data, p.data)


@COPIES
def test_a_buffer_drawn_at_random(duplicate):
    net = nn.Module()
    net.one = nn.Module()
    net.one.noise = nn.Buffer(shape=(3,), init=nn.init.Normal())
    net.two = duplicate(net.one)
    values = net.state_dict()
    np.testing.assert_array_equal(values["one.noise"], values["two.noise"])


def test_a_bias_that_waits_for_its_weight():
    """In each copy the bound of the bias follows the copy's own weight."""
    net = nn.LazyLinear(4)
    twin, wide = copy.deepcopy(net), copy.deepcopy(net)
    twin(X)
    wide(jnp.ones((1, 10_000)))
    assert net.weight.shape == (4, None)
    assert float(jnp.abs(wide.bias.data).max()) <= 0.01 < float(jnp.abs(twin.bias.data).max())
    net(X)
    assert bits(net) == bits(twin)


# What happens to one copy happens to that one only.


@COPIES
def test_a_written_original_leaves_the_copy_its_values(duplicate):
    lamina.manual_seed(0)
    expected = bits(linear())
    lamina.manual_seed(0)
    net = linear()
    twin = duplicate(net)
    net.load_state_dict({"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(2)})
    assert bits(twin) == expected


RESETS = {
    "function": lambda box: nn.init.normal_(box, std=0.5),
    "recipe": lambda box: box.initialize(nn.init.Normal(std=0.5)),
    "assigned": lambda box: setattr(box, "init", nn.init.Normal(std=0.5)),
    "key": lambda box: box.initialize(nn.init.Normal(), jax.random.key(3)),
}


@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS)
@pytest.mark.parametrize("which", ["online", "target"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_one_half_is_initialised_anew(reset, which, when):
    pair = Pair(nested())
    if when == "after":
        pair(X)
    reset(pair.get_parameter(f"{which}.0.weight"))
    online, target = bits(pair.online), bits(pair.target)
    assert [name for name in online if online[name] != target[name]] == ["0.weight"]


def test_both_halves_initialised_anew_have_their_own_values():
    pair = Pair(nested())
    nn.init.rules(pair, {"*.weight": nn.init.XavierUniform()})
    online, target = bits(pair.online), bits(pair.target)
    assert [name for name in online if online[name] != target[name]] == ["0.weight", "2.0.weight"]


def test_the_same_recipe_again_is_drawn_under_the_copy_s_own_name():
    pair = Pair(nested())
    pair.target[0].weight.initialize(pair.target[0].weight.init)
    online, target = bits(pair.online), bits(pair.target)
    assert [name for name in online if online[name] != target[name]] == ["0.weight"]


def test_a_cast_copy_rounds_the_same_values():
    net = nested()
    narrow = copy.deepcopy(net).bfloat16()
    assert not narrow[0].weight.is_material
    holder = nn.Sequential(narrow)
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(
            holder[0].get_parameter(name).data, value.astype(jnp.bfloat16), err_msg=name
        )


def test_a_copy_on_other_devices_has_the_same_values():
    places = NamedSharding(Mesh(np.array(jax.devices()), ("a",)), PartitionSpec("a"))
    net = nn.Sequential(nn.Linear(3, 8))
    pair = Pair(net)
    pair.target[0].weight.sharding = places
    pair.target[0].bias.sharding = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    assert_equal_halves(pair)
    assert pair.target[0].weight.data.sharding.is_equivalent_to(places, 2)
    assert pair.target[0].bias.data.devices() == {jax.devices()[5]}


# Copies that move into other models, or to another process.


@PARTS
@pytest.mark.parametrize("moved", ["original", "copies", "all"])
def test_what_was_copied_keeps_its_values_in_a_larger_model(build, moved):
    lamina.manual_seed(0)
    original = build()
    original.eval()(X)
    expected = bits(original)
    lamina.manual_seed(0)
    net = build()
    twin, other = copy.deepcopy(net), by_pickle(net)
    larger = nn.ModuleList([nn.Linear(1, 1)])
    if moved != "copies":
        larger.append(net)
    if moved != "original":
        larger.extend([nn.Sequential(twin), other])
    net.eval()(X), twin.eval()(X), other.eval()(X)
    assert bits(net) == bits(twin) == bits(other) == expected


def test_copies_in_containers_of_every_kind():
    class Many(nn.Module):
        def __init__(self):
            self.one = linear()
            self.listed = [copy.deepcopy(self.one), nn.ReLU()]
            self.by_name = {"a": copy.deepcopy(self.one)}
            self.weights = [copy.deepcopy(self.one.weight)]
            self.deeper = nn.ModuleDict({"x": nn.Sequential(copy.deepcopy(self.one))})

    values = Many().state_dict()
    names = ["listed.0.weight", "by_name.a.weight", "weights.0", "deeper.x.0.weight"]
    for name in names:
        np.testing.assert_array_equal(values[name], values["one.weight"], err_msg=name)


@pytest.mark.parametrize("early", ["copied", "read"])
def test_a_drawn_number_is_not_given_to_the_next_model(early):
    """Two models under one seed differ, also if the first has moved into another one."""
    lamina.manual_seed(0)
    home = nn.Sequential(nn.Linear(1, 1))
    net = linear()
    kept = copy.deepcopy(net) if early == "copied" else net
    if early == "read":
        net.weight.sum()
    home.append(net)
    assert bits(linear())["weight"] != bits(kept)["weight"]


CHILD = """
import pickle, sys
import jax, numpy as np
import lamina

lamina.manual_seed(99)
with open(sys.argv[1], "rb") as file:
    nets, generators, x = pickle.load(file)
values = {}
for number, net in enumerate(nets):
    net(x)
    values |= {f"{number}.{name}": np.asarray(v) for name, v in net.state_dict().items()}
for number, generator in enumerate(generators):
    values[f"key {number}"] = np.asarray(jax.random.key_data(generator.next_key()))
np.savez(sys.argv[2], **values)
"""


def test_another_process_sees_the_same_values(tmp_path):
    lamina.manual_seed(5)
    layer = nn.Linear(3, 3)
    home = nn.Sequential(nn.Sequential(lazy()), nn.Linear(2, 2))
    nets = [nested(), nn.Sequential(layer, copy.deepcopy(layer)), home, copy.deepcopy(home[0])]
    generators = [lamina.Generator(7), lamina.Generator(8)]
    generators[1].next_key()
    (tmp_path / "things").write_bytes(pickle.dumps((nets, generators, np.asarray(X))))
    subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "things", tmp_path / "values.npz"],
        check=True,
        timeout=120,
    )
    expected = {}
    for number, net in enumerate(nets):
        net(X)
        expected |= {f"{number}.{name}": value for name, value in net.state_dict().items()}
    for number, generator in enumerate(generators):
        expected[f"key {number}"] = jax.random.key_data(generator.next_key())
    with np.load(tmp_path / "values.npz") as found:
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert bits(nets[1][0]) == bits(nets[1][1])
    assert expected["2.0.0.0.weight"].any()
    np.testing.assert_array_equal(expected["2.0.0.0.weight"], expected["3.0.0.weight"])


# Clones.


@PARTS
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_clone_draws_its_own(build, when):
    net = build()
    if when == "after":
        net(X)
    clones = [net.clone(), net.clone(), net.clone().clone()]
    for module in (net, *clones):
        module(X)
    for name, p in net.named_parameters():
        if p.init is not None and not isinstance(p.init, (nn.init.Ones, nn.init.Zeros)):
            values = [np.asarray(m.get_parameter(name).data).tobytes() for m in (net, *clones)]
            assert len(set(values)) == 4, name
    assert all(clone.ties() == net.ties() for clone in clones)


def test_a_clone_of_a_copy_draws_its_own():
    pair = Pair(nested())
    clone = pair.target.clone()
    holder = nn.Sequential(pair.online.clone())
    values = [bits(net)["0.weight"] for net in (pair.online, pair.target, clone, holder[0])]
    assert values[0] == values[1]
    assert len(set(values)) == 3


def test_cloning_a_pair_leaves_it_a_pair():
    pair = Pair(nested())
    clone = pair.clone()
    assert bits(clone.online)["0.weight"] != bits(pair.online)["0.weight"]
    assert bits(clone.target)["0.weight"] != bits(pair.target)["0.weight"]
    assert_equal_halves(pair)


def test_layers_cloned_in_a_loop_differ():
    block = nn.LazyLinear(3)
    net = nn.Sequential(*[block.clone() for _ in range(3)])
    net(X)
    assert len({layer["weight"] for layer in map(bits, net)}) == 3


def test_a_copy_of_a_clone_is_a_copy():
    clone = nested().clone()
    home = nn.Sequential(nn.Sequential(copy.deepcopy(clone)))
    assert bits(home[0][0]) == bits(clone)


# Generators.


def words(key):
    return jax.random.key_data(key).tolist()


def keys(generator, count=3):
    return [words(generator.next_key()) for _ in range(count)]


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, by_pickle], ids=["copy", "deepcopy", "pickle"]
)
@pytest.mark.parametrize("draws", [0, 2])
@pytest.mark.parametrize("seed", [7, 2**40 + 3, jax.random.key(5)], ids=["int", "wide", "key"])
def test_copied_generators_go_on_alike_and_apart(duplicate, draws, seed):
    expected = keys(lamina.Generator(seed), draws + 6)[draws:]
    own = lamina.Generator(seed)
    keys(own, draws)
    twin = duplicate(own)
    assert keys(twin) == expected[:3]
    assert keys(own, 6) == expected
    assert keys(twin) == expected[3:]
    twin.manual_seed(1)
    assert keys(twin) == keys(lamina.Generator(1))


@pytest.mark.parity
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, by_pickle], ids=["copy", "deepcopy", "pickle"]
)
def test_generators_are_copied_as_in_torch(torch, duplicate):
    theirs, ours = torch.Generator().manual_seed(3), lamina.Generator(3)
    logs = []
    for own, draw in [
        (theirs, lambda g: torch.rand(2, generator=g).tolist()),
        (ours, lambda g: jax.random.uniform(g.next_key(), (2,)).tolist()),
    ]:
        draw(own)
        twin = duplicate(own)
        a, b, c, d = draw(own), draw(twin), draw(twin), draw(own)
        logs.append([a == b, c == d, b == c])
    assert logs == [[True, True, False]] * 2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@COPIES
def test_a_copied_generator_in_functions(duplicate, compiled):
    own = lamina.Generator(7)
    keys(own, 1)
    twin = duplicate(own)
    draw = lambda: jax.random.key_data(twin.next_key())  # noqa: E731
    if compiled:
        draw = lamina.jit(draw)
    assert [draw().tolist() for _ in range(3)] == keys(own)


class Noise(nn.Module):
    """A layer with a generator of its own."""

    def __init__(self, seed):
        self.generator = lamina.Generator(seed)
        self.scale = nn.Parameter(shape=(3,), init=nn.init.Normal())

    def forward(self, x):
        noise = jax.random.normal(self.generator.next_key(), x.shape)
        return x + noise * self.scale.reshape(1, -1)


@COPIES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("draws", [0, 2])
def test_a_module_with_a_generator(duplicate, compiled, draws):
    net = Noise(3)
    for _ in range(draws):
        net(X)
    twin = duplicate(net)
    call = lamina.jit(lambda net, x: net(x)) if compiled else lambda net, x: net(x)
    first = [np.asarray(call(net, X)) for _ in range(2)]
    second = [np.asarray(call(twin, X)) for _ in range(2)]
    np.testing.assert_allclose(first, second, rtol=1e-6)
    assert not np.array_equal(first[0], first[1])


def test_the_default_generator_is_copied_to_look_ahead():
    default = lamina.manual_seed(4)
    ahead = copy.deepcopy(default)
    assert keys(ahead, 2) == [words(lamina.next_key()) for _ in range(2)]


# Names that a parameter has when its value is first asked for.


def test_what_is_read_before_it_has_its_place():
    """It is drawn under the name it has then, and keeps its value in its place."""
    lamina.manual_seed(0)
    alone = bits(linear())
    lamina.manual_seed(0)
    placed = bits(nn.Sequential(linear()))
    lamina.manual_seed(0)
    layer = linear()
    layer.weight.sum()
    net = nn.Sequential(layer)
    assert bits(net)["0.weight"] == alone["weight"] != placed["0.weight"]
    assert bits(net)["0.bias"] == placed["0.bias"]


def test_what_is_read_after_its_model_was_dropped():
    def rest():
        lamina.manual_seed(0)
        layer = nn.Sequential(linear())[0]
        gc.collect()
        return bits(layer)

    lamina.manual_seed(0)
    placed = bits(nn.Sequential(linear()))
    assert rest() == rest()
    assert rest()["weight"] != placed["0.weight"]


def test_two_layers_read_before_they_have_their_places_differ():
    lamina.manual_seed(0)
    layers = [linear() for _ in range(3)]
    values = [bits(layer)["weight"] for layer in layers]
    net = nn.Sequential(*layers)
    assert [bits(layer)["weight"] for layer in net] == values
    assert bits(linear())["weight"] not in values
    assert len(set(values)) == 3


def test_moving_to_another_place_after_reading_changes_nothing():
    one = nn.Sequential(linear())
    value = bits(one)["0.weight"]
    other = nn.ModuleDict({"there": one[0]})
    del one
    gc.collect()
    assert bits(other)["there.weight"] == value
