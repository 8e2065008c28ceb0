"""Initial values depend on the seed and the parameter's name only; infer and materialize."""

import copy
import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lamina
from lamina import nn
from lamina._core.errors import DeferredError, ShapeError

SPEC = jax.ShapeDtypeStruct((2, 3), jnp.float32)


class Net(nn.Module):
    """Two layers with one unknown size."""

    def __init__(self, lazy=False):
        self.first = nn.LazyLinear(4) if lazy else nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x):
        return self.second(jnp.tanh(self.first(x)))


def bits(net):
    return {name: np.asarray(value).tobytes() for name, value in net.state_dict().items()}


def built(make, seed=0):
    lamina.manual_seed(seed)
    return make()


def reference():
    return bits(built(Net))


# What values do not depend on.


def test_same_seed_gives_same_values():
    assert bits(built(Net)) == bits(built(Net))


def test_another_seed_gives_other_values():
    assert bits(built(Net))["first.weight"] != bits(built(Net, seed=1))["first.weight"]


def test_seeds_beyond_32_bits_differ():
    low = bits(built(Net, seed=5))
    high = bits(built(Net, seed=5 + 2**32))
    assert low["first.weight"] != high["first.weight"]


def test_two_models_under_one_seed_differ():
    lamina.manual_seed(0)
    one, two = Net(), Net()
    assert bits(one)["first.weight"] != bits(two)["first.weight"]


def test_the_second_model_is_reproducible():
    lamina.manual_seed(0)
    first = [bits(Net()), bits(Net())]
    lamina.manual_seed(0)
    assert [bits(Net()), bits(Net())] == first


def test_the_second_model_does_not_depend_on_when_the_first_is_read():
    lamina.manual_seed(0)
    one, two = Net(), Net()
    late = bits(two)
    lamina.manual_seed(0)
    one = Net()
    bits(one)
    two = Net()
    assert bits(two) == late


def test_the_second_model_does_not_depend_on_the_size_of_the_first():
    lamina.manual_seed(0)
    Net()
    second = bits(Net())
    lamina.manual_seed(0)
    nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)])
    assert bits(Net()) == second


def test_order_of_creation():
    lamina.manual_seed(0)
    b = nn.Linear(4, 2)
    a = nn.Linear(3, 4)
    backwards = nn.Sequential(a, b)
    lamina.manual_seed(0)
    forwards = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert bits(backwards) == bits(forwards)


def test_order_of_creation_inside_a_module():
    class Backwards(Net):
        def __init__(self):
            second = nn.Linear(4, 2)
            self.first = nn.Linear(3, 4)
            self.second = second

    assert bits(built(Backwards)) == reference()


def test_order_of_definition():
    class Reordered(Net):
        def __init__(self):
            self.second = nn.Linear(4, 2)
            self.first = nn.Linear(3, 4)

    assert bits(built(Reordered)) == reference()


def test_adding_a_layer():
    class Larger(Net):
        def __init__(self):
            self.before = nn.Linear(7, 7)
            super().__init__()
            self.after = nn.Linear(5, 5)

    larger = bits(built(Larger))
    assert {name: larger[name] for name in reference()} == reference()


def test_adding_a_layer_later():
    net = built(Net)
    net.after = nn.Linear(5, 5)
    values = bits(net)
    assert {name: values[name] for name in reference()} == reference()


def test_removing_a_layer():
    net = built(Net)
    del net.first
    assert bits(net) == {k: v for k, v in reference().items() if k.startswith("second")}


def test_replacing_a_layer():
    net = built(Net)
    net.first = nn.Linear(3, 4)
    assert bits(net) == reference()


def test_a_layer_made_and_thrown_away_inside_a_model():
    class Wasteful(Net):
        def __init__(self):
            self.first = nn.Linear(9, 9)
            super().__init__()

    lamina.manual_seed(0)
    Wasteful()
    second = bits(Net())
    lamina.manual_seed(0)
    Net()
    assert bits(Net()) == second


def test_printing_draws_nothing(capsys):
    net = built(Net)
    print(net, net.first.weight, list(net.named_parameters()), net.first.bias.init)
    assert capsys.readouterr().out
    assert not any(p.is_material for p in net.parameters())
    assert bits(net) == reference()


@pytest.mark.parametrize("name", ["first.weight", "second.bias"])
def test_reading_one_value_early(name):
    net = built(Net)
    net.get_parameter(name).sum()
    assert [n for n, p in net.named_parameters() if p.is_material] == [name]
    assert bits(net) == reference()


def test_drawing_random_numbers_in_between():
    net = built(Net)
    net.first.bias.sum()
    lamina.next_key()
    nn.functional.dropout(jnp.ones(8))
    assert bits(net) == reference()


def test_seeding_after_building_changes_nothing():
    net = built(Net)
    lamina.manual_seed(99)
    assert bits(net) == reference()


@pytest.mark.parametrize("how", ["call", "infer", "materialize", "jit", "grad"])
def test_lazy_equals_eager(how):
    net = built(lambda: Net(lazy=True))
    x = jnp.ones((2, 3))
    if how == "call":
        net(x)
    elif how == "infer":
        lamina.infer(net, SPEC)
    elif how == "materialize":
        lamina.materialize(net, SPEC)
    elif how == "jit":
        lamina.jit(net)(x)
    else:
        lamina.grad(lambda net: net(x).sum())(net)
    assert bits(net) == reference()


def test_none_equals_lazy():
    class Open(Net):
        def __init__(self):
            self.first = nn.Linear(None, 4)
            self.second = nn.Linear(None, 2)

    net = built(Open)
    net(jnp.ones((2, 3)))
    assert bits(net) == reference()


def test_materialize_equals_reading():
    assert bits(lamina.materialize(built(Net))) == reference()


def test_deepcopy_before_values_keeps_the_values_to_come():
    net = built(Net)
    twin = copy.deepcopy(net)
    assert bits(twin) == bits(net) == reference()


def test_deepcopy_after_values_keeps_the_values():
    net = built(Net)
    net.first.weight.data = net.first.weight.data + 1
    assert bits(copy.deepcopy(net)) == bits(net)


def test_deepcopy_does_not_shift_the_next_model():
    lamina.manual_seed(0)
    copy.deepcopy(Net())
    second = bits(Net())
    lamina.manual_seed(0)
    Net()
    assert bits(Net()) == second


def test_clone_draws_its_own_values():
    net = built(Net)
    net.first.weight.sum()
    twin = net.clone()
    assert not twin.first.weight.is_material
    assert bits(twin)["first.weight"] != bits(net)["first.weight"]
    assert bits(net) == reference()


def test_a_model_inside_a_model_is_named_from_the_root():
    lamina.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 4))
    outer = nn.Sequential(inner)
    name = "0.0.weight"
    lamina.manual_seed(0)
    direct = nn.Sequential(nn.Sequential(nn.Linear(3, 4)))
    assert bits(outer)[name] == bits(direct)[name]


def test_tied_parameter_takes_the_value_of_its_first_name():
    class Tied(nn.Module):
        def __init__(self):
            self.first = nn.Linear(3, 4)
            self.second = nn.Linear(3, 4)
            self.second.weight = self.first.weight

    assert bits(built(Tied))["second.weight"] == reference()["first.weight"]


@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize("recipe", [None, nn.init.XavierNormal()])
def test_dtype_before_equals_dtype_after(dtype, recipe):
    def make():
        net = Net()
        if recipe is not None:
            nn.init.rules(net, {"*.weight": recipe})
        return net

    after = built(make)
    bits(after)
    after.to(dtype)
    before = built(make).to(dtype)
    assert not before.first.weight.is_material
    asked = lamina.materialize(built(make), dtype=dtype)
    assert bits(before) == bits(after) == bits(asked)
    assert before.first.weight.dtype == jnp.dtype(dtype)


RECIPES = [
    nn.init.TruncatedNormal(std=0.1),
    nn.init.KaimingUniform(),
    lambda key, shape, dtype: jax.random.gumbel(key, shape, dtype),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: type(r).__name__)
def test_devices_and_mesh(recipe):
    assert len(jax.devices()) == 8
    places = [
        jax.devices()[3],
        NamedSharding(Mesh(np.array(jax.devices()), ("a",)), PartitionSpec("a")),
        NamedSharding(
            Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b")), PartitionSpec("b", "a")
        ),
    ]

    def make():
        net = nn.Module()
        net.weight = nn.Parameter(shape=(8, 16), init=recipe)
        return net

    expected = bits(built(make))
    for place in places:
        net = lamina.materialize(built(make), shardings=place)
        assert bits(net) == expected
        if isinstance(place, NamedSharding):
            assert net.weight.data.sharding.is_equivalent_to(place, 2)
        else:
            assert net.weight.data.devices() == {place}


def test_sharding_set_before_shapes_takes_effect_later():
    mesh = Mesh(np.array(jax.devices()), ("a",))
    place = NamedSharding(mesh, PartitionSpec("a"))
    net = built(lambda: nn.LazyLinear(8))
    net.weight.sharding = place
    net(jnp.ones((2, 3)))
    assert net.weight.data.sharding.is_equivalent_to(place, 2)
    plain = built(lambda: nn.Linear(3, 8))
    assert bits(net) == bits(plain)


def test_explicit_key_depends_on_nothing_else():
    key = jax.random.key(3)
    lamina.manual_seed(0)
    one = bits(lamina.materialize(Net(), key=key))
    lamina.manual_seed(7)
    Net()
    two = bits(lamina.materialize(Net(lazy=True), SPEC, key=key))
    assert one == two
    assert one != bits(lamina.materialize(Net(), key=jax.random.key(4)))


def test_explicit_key_takes_old_style_keys():
    old = lamina.materialize(Net(), key=jax.random.PRNGKey(3))
    new = lamina.materialize(Net(), key=jax.random.key(3))
    assert bits(old) == bits(new)


def test_names_that_collide_in_32_bits_differ():
    """No two of many equal layers get the same values."""
    net = nn.Sequential(*[nn.Linear(1, 2, bias=False) for _ in range(300)])
    values = {np.asarray(p.data).tobytes() for p in net.parameters()}
    assert len(values) == 300


# manual_seed and the default stream.


def test_manual_seed_restarts_both_streams():
    lamina.manual_seed(4)
    first = (bits(Net()), nn.functional.dropout(jnp.ones(32)))
    lamina.manual_seed(4)
    second = (bits(Net()), nn.functional.dropout(jnp.ones(32)))
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])


def test_initialize_draws_anew_under_the_seed_in_force():
    net = built(Net)
    before = net.first.weight.data
    lamina.manual_seed(1)
    net.first.weight.initialize(net.first.weight.init)
    assert not np.array_equal(before, net.first.weight.data)
    lamina.manual_seed(0)
    net.first.weight.initialize(net.first.weight.init)
    np.testing.assert_array_equal(before, net.first.weight.data)


# infer.


def test_infer_makes_no_arrays():
    net = Net(lazy=True)
    gc.collect()
    before = len(jax.live_arrays())
    lamina.infer(net, SPEC)
    assert net.first.weight.shape == (4, 3)
    assert not any(p.is_material for p in net.parameters())
    assert len(jax.live_arrays()) <= before


def test_infer_takes_arrays_keywords_and_nested_specs():
    class Two(nn.Module):
        def __init__(self):
            self.a = nn.LazyLinear(2)
            self.b = nn.LazyLinear(2)

        def forward(self, pair, *, scale, name="b"):
            return self.a(pair[0]) + getattr(self, name)(pair[1]) * scale

    net = Two()
    lamina.infer(net, [SPEC, np.ones((2, 5), np.float32)], scale=jnp.ones(()))
    assert (net.a.weight.shape, net.b.weight.shape) == ((2, 3), (2, 5))


def test_infer_failing_leaves_the_model_as_it_was():
    class Broken(Net):
        def forward(self, x):
            y = self.first(x)
            raise ValueError(f"no {y.shape}")

    net = Broken(lazy=True)
    text = repr(net)
    with pytest.raises(ValueError, match="no"):
        lamina.infer(net, SPEC)
    assert net.first.weight.shape == (4, None)
    assert repr(net) == text
    lamina.infer(net.first, jax.ShapeDtypeStruct((2, 5), jnp.float32))
    assert net.first.weight.shape == (4, 5)


def test_infer_keeps_state_as_it_was():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Dropout())
    lamina.manual_seed(0)
    expected = lamina.next_key()
    lamina.manual_seed(0)
    lamina.infer(net, SPEC)
    assert (lamina.next_key() == expected).all()
    assert int(net[1].num_batches_tracked) == 0


def test_infer_undoes_plain_attributes():
    class Counts(nn.Module):
        def __init__(self):
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            self.last = x
            return x

    net = Counts()
    lamina.infer(net, SPEC)
    assert net.calls == 0
    assert not hasattr(net, "last")


# materialize.


def test_materialize_lists_every_unknown_name():
    with pytest.raises(
        DeferredError, match=r"first\.weight: shape \(4, \?\)[\s\S]*lamina\.materialize\(net,"
    ):
        lamina.materialize(Net(lazy=True))


def test_materialize_lists_boxes_without_recipe():
    net = nn.Module()
    net.table = nn.Parameter(shape=(2, 2))
    with pytest.raises(DeferredError, match="table: has no value and no recipe to make one"):
        lamina.materialize(net)


def test_materialize_keeps_values_unless_told():
    net = built(Net)
    net.first.weight.data = jnp.zeros((4, 3))
    lamina.materialize(net)
    assert not net.first.weight.any()
    lamina.materialize(net, overwrite=True)
    assert bits(net) == reference()


def test_materialize_takes_rules_for_shardings():
    place = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("a",)), PartitionSpec("a"))
    net = lamina.materialize(built(Net), shardings={"*.weight": place})
    assert net.first.weight.data.sharding.is_equivalent_to(place, 2)
    assert net.first.bias.data.devices() == {jax.devices()[0]}
    called = lamina.materialize(
        built(Net), shardings=lambda name, box: place if name == "second.bias" else None
    )
    assert called.second.bias.data.sharding.is_equivalent_to(place, 1)
    assert bits(net) == bits(called) == reference()


def test_a_recipe_of_the_wrong_shape_is_named():
    net = nn.Module()
    net.table = nn.Parameter(shape=(2, 2), init=lambda key, shape, dtype: jnp.ones((3, 2), dtype))
    with pytest.raises(
        ShapeError, match=re.escape("parameter 'table': its recipe") + r"[\s\S]*\[3, 2\], expected"
    ):
        net.table.sum()


def test_a_numpy_recipe_is_no_problem():
    net = nn.Module()
    net.table = nn.Parameter(
        shape=(2, 2),
        init=lambda key, shape, dtype: (
            np.random.default_rng(np.asarray(jax.random.key_data(key)))
            .normal(size=shape)
            .astype(dtype)
        ),
    )
    assert net.table.data.shape == (2, 2)


def test_value_drawn_inside_a_compiled_function_is_the_same():
    net = built(Net)
    lamina.jit(lambda net, x: net(x))(net, jnp.ones((2, 3)))
    assert all(p.is_material for p in net.parameters())
    assert bits(net) == reference()


def test_nothing_is_allocated_by_building():
    gc.collect()
    before = len(jax.live_arrays())
    net = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Conv2d(3, 4, 3))
    assert len(list(net.named_buffers())) == 3
    assert len(jax.live_arrays()) <= before
