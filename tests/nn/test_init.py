"""Recipes, PyTorch's init functions and rules: laws against PyTorch's samples, and behaviour."""

import functools
import inspect
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina._core import random as lamina_random
from lamina._core.errors import DeferredError, RuleError, ShapeError, TypeMismatchError
from lamina._core.module import Module
from lamina._core.parameter import Buffer, Parameter
from lamina.nn import init


@functools.partial(jax.jit, static_argnums=(2, 3))
def compiled(recipe, key, shape, dtype):
    return recipe(key, shape, dtype)


def draw(recipe, shape, dtype="float32", seed=0):
    return compiled(recipe, jax.random.key(seed), shape, jnp.dtype(dtype))


class Affine(Module):
    """A layer with a weight and a bias, without the defaults of a real one."""

    def __init__(self, inputs, outputs):
        self.weight = Parameter(shape=(outputs, inputs), init=init.Normal())
        self.bias = Parameter(shape=(outputs,), init=init.Ones())


class Wide(Affine):
    pass


class Net(Module):
    def __init__(self):
        self.first = Affine(None, 4)
        self.second = Wide(4, 3)
        self.head = Affine(4, 3)
        self.head.weight = self.second.weight


SCIPY = "scipy.stats"
SHAPE = (100, 40, 5)
LAWS = [
    (init.Uniform(-1, 3), "uniform_", (-1, 3), {}),
    (init.Normal(2.0, 0.5), "normal_", (2.0, 0.5), {}),
    (init.TruncatedNormal(), "trunc_normal_", (), {}),
    (init.TruncatedNormal(0.5, 2.0, -1.0, 0.7), "trunc_normal_", (0.5, 2.0, -1.0, 0.7), {}),
    (init.TruncatedNormal(0.0, 1.0, 4.0, 5.0), "trunc_normal_", (0.0, 1.0, 4.0, 5.0), {}),
    (init.TruncatedNormal(1.0, 1.0, -6.0, -3.0), "trunc_normal_", (1.0, 1.0, -6.0, -3.0), {}),
    (init.XavierUniform(), "xavier_uniform_", (), {}),
    (init.XavierUniform(2.5), "xavier_uniform_", (2.5,), {}),
    (init.XavierNormal(1.5), "xavier_normal_", (1.5,), {}),
    (init.KaimingUniform(), "kaiming_uniform_", (), {}),
    (init.KaimingUniform(a=math.sqrt(5)), "kaiming_uniform_", (math.sqrt(5),), {}),
    (
        init.KaimingUniform(0.3, "fan_out", "tanh"),
        "kaiming_uniform_",
        (),
        {"a": 0.3, "mode": "fan_out", "nonlinearity": "tanh"},
    ),
    (init.KaimingNormal(), "kaiming_normal_", (), {}),
    (
        init.KaimingNormal(mode="fan_out", nonlinearity="relu"),
        "kaiming_normal_",
        (),
        {"mode": "fan_out", "nonlinearity": "relu"},
    ),
]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
@pytest.mark.parametrize(
    ("recipe", "name", "args", "options"), LAWS, ids=[f"{row[1]}-{row[0]}" for row in LAWS]
)
def test_law_is_torchs(torch, recipe, name, args, options):
    stats = pytest.importorskip(SCIPY)
    torch.manual_seed(0)
    theirs = getattr(torch.nn.init, name)(torch.empty(SHAPE), *args, **options).numpy().ravel()
    ours = np.asarray(draw(recipe, SHAPE)).ravel()
    assert stats.ks_2samp(ours, theirs, method="asymp").pvalue > 0.01
    scale = theirs.std() / math.sqrt(theirs.size)
    assert abs(ours.mean() - theirs.mean()) < 6 * scale
    assert abs(ours.std() / theirs.std() - 1) < 0.03
    # Where the law has bounds, samples of this size come close to them and don't pass them.
    if "normal" not in name:
        bound = np.abs(theirs).max()
        assert abs(np.abs(ours).max() / bound - 1) < 0.01


def test_truncated_normal_stays_within_its_bounds():
    values = draw(init.TruncatedNormal(0.0, 0.02, -0.01, 0.03), (100_000,))
    assert -0.01 <= float(values.min()) < -0.0099
    assert 0.0299 < float(values.max()) <= 0.03


@pytest.mark.parametrize("recipe", [init.Normal(1.0, 2.0), init.KaimingUniform(a=0.3)])
def test_compiled_equals_eager(recipe):
    eager = recipe(jax.random.key(0), (6, 4), jnp.float32)
    np.testing.assert_allclose(draw(recipe, (6, 4)), eager, rtol=1e-5, atol=1e-6)


def test_one_program_serves_all_numbers():
    traces = []

    @jax.jit
    def program(recipe, key):
        traces.append(recipe)
        return recipe(key, (3, 4), jnp.float32)

    key = jax.random.key(0)
    for std in (0.1, 0.2, 0.3):
        program(init.Normal(std=std), key)
        program(init.KaimingNormal(a=std), key)
        program(init.Mixture([(std, init.Zeros()), (1 - std, init.Uniform(0, std))]), key)
    assert len(traces) == 3
    program(init.KaimingNormal(mode="fan_out"), key)
    assert len(traces) == 4


ALL = [
    init.Zeros(),
    init.Ones(),
    init.Constant(0.5),
    init.Value(np.arange(24.0).reshape(6, 4)),
    init.Uniform(),
    init.Normal(),
    init.TruncatedNormal(),
    init.XavierUniform(),
    init.XavierNormal(),
    init.KaimingUniform(),
    init.KaimingNormal(),
    init.Orthogonal(),
    init.Sparse(0.5),
    init.Eye(),
    init.FanInUniform(3),
    init.Mixture([(0.25, init.Zeros()), (0.75, init.Normal())]),
]


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: type(recipe).__name__)
def test_narrow_floats_are_float32_draws_cast(recipe):
    narrow = draw(recipe, (6, 4), "bfloat16")
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, draw(recipe, (6, 4)).astype(jnp.bfloat16))


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: type(recipe).__name__)
def test_recipes_are_pytrees_and_data(recipe):
    leaves, treedef = jax.tree.flatten(recipe)
    hash(treedef)
    again = jax.tree.unflatten(treedef, leaves)
    assert repr(again) == repr(recipe)
    assert repr(pickle.loads(pickle.dumps(recipe))) == repr(recipe)
    jax.tree.unflatten(treedef, [object() for _ in leaves])  # placeholders are not validated
    shape = jax.eval_shape(lambda law: law(jax.random.key(0), (6, 4), jnp.float32), recipe)
    assert shape.shape == (6, 4)
    np.testing.assert_array_equal(draw(recipe, (6, 4)), draw(again, (6, 4)))


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: type(recipe).__name__)
def test_values_do_not_depend_on_the_devices(recipe):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))

    def program(law, key):
        return law(key, (6, 4), jnp.float32)

    one = draw(recipe, (6, 4), seed=3)
    many = jax.jit(program, out_shardings=sharding)(recipe, jax.random.key(3))
    assert len(many.devices()) == 2
    np.testing.assert_array_equal(one, many)


def test_reprs_are_readable():
    assert repr(init.Normal(std=0.01)) == "Normal(mean=0.0, std=0.01)"
    assert repr(init.Zeros()) == "Zeros()"
    assert repr(init.KaimingUniform(a=math.sqrt(5))) == (
        "KaimingUniform(a=sqrt(5)) ~ U(±1/sqrt(fan_in))"
    )
    assert repr(init.KaimingNormal(0.1, "fan_out")) == (
        "KaimingNormal(a=0.1, mode='fan_out') ~ N(0, std=1.407/sqrt(fan_out))"
    )
    assert repr(init.Value(np.zeros((3, 4), np.float32))) == "Value(float32[3, 4])"
    law = init.Mixture([(0.5, init.Zeros()), (0.5, jax.random.normal)])
    assert repr(law) == "Mixture([(0.5, Zeros()), (0.5, normal)])"


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (5, 2, 3)], ids=str)
def test_orthogonal(shape):
    q = np.asarray(draw(init.Orthogonal(2.0), shape)).reshape(shape[0], -1) / 2
    product = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
    np.testing.assert_allclose(product, np.eye(len(product)), atol=1e-5)


def test_orthogonal_is_uniform():
    """Haar measure: the elements of many 3 x 3 draws have mean 0 and variance 1/3."""
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.vmap(lambda key: init.Orthogonal()(key, (3, 3), jnp.float32))(keys)
    assert float(jnp.abs(draws.mean(0)).max()) < 0.04
    np.testing.assert_allclose(draws.var(0), 1 / 3, atol=0.03)
    assert abs(float((jnp.linalg.det(draws) > 0).mean()) - 0.5) < 0.05


def test_sparse():
    values = np.asarray(draw(init.Sparse(0.31, std=2.0), (100, 50)))
    assert ((values == 0).sum(0) == 31).all()
    assert abs(values[values != 0].std() - 2) < 0.1
    assert len({tuple(column) for column in (values == 0).T}) == 50


def test_fan_in_uniform():
    values = draw(init.FanInUniform(16), (10_000,))
    assert 0.249 < float(jnp.abs(values).max()) <= 0.25
    assert not draw(init.FanInUniform(0), (3,)).any()
    with pytest.raises(DeferredError, match=r"fan_in is not known yet.*FanInUniform\(fan_in="):
        draw(init.FanInUniform(), (3,))


def test_mixture_fractions():
    law = init.Mixture(
        [(0.25, init.Uniform(5, 10)), (0.5, init.Zeros()), (0.25, init.Uniform(-10, -5))]
    )
    values = np.asarray(draw(law, (100_000,)))
    assert abs((values == 0).mean() - 0.5) < 0.01
    assert abs((values >= 5).mean() - 0.25) < 0.01
    assert abs((values <= -5).mean() - 0.25) < 0.01
    assert np.all((values == 0) | ((np.abs(values) >= 5) & (np.abs(values) <= 10)))
    assert abs(values[values > 0].mean() - 7.5) < 0.1


def test_mixture_takes_functions():
    def halves(key, shape, dtype):
        return jnp.full(shape, 0.5, dtype)

    law = init.Mixture([(0.5, halves), (0.5, init.Zeros())])
    values = jax.jit(lambda law, key: law(key, (1000,), jnp.float32))(law, jax.random.key(0))
    assert set(np.unique(values)) == {0, 0.5}


def test_value_takes_lists_and_checks_the_shape():
    assert draw(init.Value([1, 2, 3]), (3,)).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ShapeError, match=r"expected an array of shape \(4,\), got \(3,\)"):
        draw(init.Value([1, 2, 3]), (4,))
    init.Value(np.zeros((2, 3))).check((2, None))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: init.Uniform(1, 0), r"expected a <= b, got a=1 and b=0"),
        (lambda: init.Normal(std=-1), r"Normal: expected std >= 0, got -1"),
        (lambda: init.TruncatedNormal(std=0), r"expected std > 0, got 0"),
        (lambda: init.TruncatedNormal(a=1, b=1), r"expected a < b, got a=1 and b=1"),
        (lambda: init.KaimingUniform(mode="fan"), r"'fan_in' or 'fan_out', got 'fan'"),
        (lambda: init.KaimingNormal(nonlinearity="rellu"), r"Did you mean 'relu'\?"),
        (lambda: init.Sparse(1.5), r"expected sparsity in \[0, 1\], got 1\.5"),
        (lambda: init.Dirac(0), r"expected groups >= 1, got 0"),
        (lambda: init.FanInUniform(-1), r"expected fan_in >= 0, got -1"),
        (lambda: init.Mixture([]), r"expected at least one"),
        (lambda: init.Mixture([(0.5, init.Zeros())]), r"sum to 1, got \[0\.5\]"),
        (lambda: draw(init.XavierUniform(), (3,)), r"can not be computed for shape \(3,\)"),
        (lambda: draw(init.KaimingNormal(), (3,)), r"KaimingNormal: fan in and fan out can not"),
        (lambda: draw(init.Orthogonal(), (3,)), r"expected two or more dimensions"),
        (lambda: draw(init.Eye(), (3,)), r"Eye: expected two dimensions, got shape \(3,\)"),
        (lambda: draw(init.Sparse(0.1), (3, 4, 5)), r"Sparse: expected two dimensions"),
        (lambda: draw(init.Dirac(), (3, 4)), r"a kernel of 3, 4 or 5 dimensions, got \(3, 4\)"),
        (lambda: draw(init.Dirac(2), (3, 4, 5)), r"a multiple of groups=2, got 3"),
    ],
)
def test_recipe_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# PyTorch's functions


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "shape", "args"),
    [
        ("ones_", (3, 4), ()),
        ("zeros_", (3, 4), ()),
        ("constant_", (3, 4), (0.3,)),
        ("eye_", (3, 4), ()),
        ("eye_", (4, 3), ()),
        ("dirac_", (4, 3, 5), ()),
        ("dirac_", (4, 3, 5, 4), (2,)),
        ("dirac_", (6, 2, 3, 3, 2), (3,)),
    ],
)
def test_fixed_values_are_torchs(torch, name, shape, args):
    expected = getattr(torch.nn.init, name)(torch.empty(shape), *args)
    parameter = Parameter(np.full(shape, 7, np.float32))
    assert getattr(init, name)(parameter, *args) is parameter
    np.testing.assert_array_equal(parameter.data, expected)


RANDOM = [
    ("uniform_", ()),
    ("normal_", ()),
    ("trunc_normal_", ()),
    ("xavier_uniform_", ()),
    ("xavier_normal_", ()),
    ("kaiming_uniform_", ()),
    ("kaiming_normal_", ()),
    ("orthogonal_", ()),
    ("sparse_", (0.5,)),
]


@pytest.mark.parametrize(("name", "args"), RANDOM, ids=[row[0] for row in RANDOM])
def test_functions_work_on_material_abstract_and_unshaped_boxes(name, args):
    def filled(parameter, seed):
        lamina_random.manual_seed(0)
        key = jax.random.key(seed)
        assert getattr(init, name)(parameter, *args, generator=key) is parameter
        if parameter.is_unshaped:
            assert parameter.shape == (6, None)
            parameter.shape = (6, 4)
        return np.asarray(parameter.data)

    material = filled(Parameter(np.zeros((6, 4), np.float32)), 5)
    assert material.any()
    np.testing.assert_array_equal(filled(Parameter(shape=(6, 4)), 5), material)
    np.testing.assert_array_equal(filled(Parameter(shape=(6, None)), 5), material)
    assert (filled(Parameter(shape=(6, 4)), 6) != material).any()


def test_nothing_is_drawn_before_it_is_needed():
    assert not init.normal_(Parameter(shape=(6, 4))).is_material


def test_generator_objects():
    def drawn(seed):
        lamina_random.manual_seed(0)
        generator = lamina_random.Generator(seed)
        return init.normal_(Parameter(shape=(5,)), generator=generator).data

    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert (drawn(1) != drawn(2)).any()


def test_functions_take_buffers_and_refuse_arrays():
    assert init.ones_(Buffer(shape=(3,))).data.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(
        TypeMismatchError, match=r"got ndarray, which can't change.*nn\.init\.Normal"
    ):
        init.normal_(np.zeros(3))


def test_functions_check_the_rank_before_shapes_are_known():
    with pytest.raises(ShapeError, match=r"can not be computed for shape \(4,\)"):
        init.xavier_uniform_(Parameter(shape=(4,)))
    with pytest.raises(ShapeError, match=r"Eye: expected two dimensions, got shape \(4, \?, 3\)"):
        init.eye_(Parameter(shape=(4, None, 3)))
    with pytest.raises(ValueError, match="mode expected 'fan_in' or 'fan_out', got 'fan'"):
        init.kaiming_uniform_(Parameter(shape=(4, 3)), mode="fan")
    assert "fan_out" in repr(init.kaiming_uniform_(Parameter(shape=(4, 3)), mode="FAN_OUT").init)


def test_warnings_of_functions():
    with pytest.warns(UserWarning, match="zero-element tensors is a no-op"):
        assert init.kaiming_uniform_(Parameter(shape=(0, 3))).data.shape == (0, 3)
    with pytest.warns(UserWarning, match=r"mean=9\.0 is more than 2 std from \[-2\.0, 2\.0\]"):
        init.trunc_normal_(Parameter(shape=(3,)), mean=9.0)


@pytest.mark.parity
def test_signatures_and_gains_are_torchs(torch):
    theirs = torch.nn.init
    for name in [*RANDOM_AND_FIXED, "_calculate_fan_in_and_fan_out", "_calculate_correct_fan"]:
        expected = inspect.signature(getattr(theirs, name)).parameters
        got = inspect.signature(getattr(init, name)).parameters
        assert list(got) == list(expected), name
        assert [p.default for p in got.values()] == [p.default for p in expected.values()], name
    for name in ("linear", "conv2d", "conv_transpose3d", "sigmoid", "tanh", "relu", "selu"):
        assert init.calculate_gain(name) == theirs.calculate_gain(name)
    for slope in (None, 0, 0.2):
        assert init.calculate_gain("leaky_relu", slope) == theirs.calculate_gain(
            "leaky_relu", slope
        )
    for shape in [(4, 3), (6, 3, 5), (6, 3, 5, 2)]:
        tensor = torch.empty(shape)
        expected = theirs._calculate_fan_in_and_fan_out(tensor)
        assert init._calculate_fan_in_and_fan_out(tensor) == expected
        assert init._calculate_correct_fan(tensor, "FAN_OUT") == expected[1]


RANDOM_AND_FIXED = [*sorted(name for name in init.__all__ if name.endswith("_")), "calculate_gain"]


def test_gain_and_fan_errors():
    with pytest.raises(
        ValueError, match=r"Unsupported nonlinearity 'gelu': expected one of linear"
    ):
        init.calculate_gain("gelu")
    with pytest.raises(ValueError, match="negative_slope True not a valid number"):
        init.calculate_gain("leaky_relu", True)
    with pytest.raises(ShapeError, match=r"can not be computed for shape \(3,\)"):
        init._calculate_fan_in_and_fan_out(np.zeros(3))
    with pytest.raises(DeferredError, match=r"of shape \(3, \?\) are not known yet"):
        init._calculate_fan_in_and_fan_out(Parameter(shape=(3, None)))
    with pytest.raises(ValueError, match="Mode fan not supported"):
        init._calculate_correct_fan(np.zeros((3, 3)), "fan")


# Rules


def test_rules_by_name_before_shapes_are_known():
    net = Net()
    report = init.rules(net, {"*.weight": init.Normal(std=0.01), "first.bias": init.Zeros()})
    assert report.assigned == {
        "first.weight": "'*.weight'",
        "first.bias": "'first.bias'",
        "second.weight": "'*.weight'",
    }
    assert report.defaults == ("second.bias", "head.bias")
    assert report.unmatched == ()
    assert net.first.weight.shape == (4, None)
    assert net.first.weight.init == init.Normal(std=0.01)
    assert net.head.bias.init == init.Ones()


def test_rules_redraw_values():
    net = Affine(3, 2)
    assert net.bias.data.tolist() == [1, 1]
    init.rules(net, {"bias": init.Constant(2.0)})
    assert net.bias.data.tolist() == [2, 2]


def test_later_rules_win_and_the_report_says_so():
    net = Net()
    report = init.rules(net, {"*": init.Zeros(), "*.bias": init.Ones(), "head.*": init.Constant(2)})
    assert net.second.bias.init == init.Ones()
    assert net.head.bias.init == init.Constant(2)
    # a tied parameter is matched by any of its names
    assert net.second.weight.init == init.Constant(2)
    assert report.matched["'*'"] == (
        "first.weight",
        "first.bias",
        "second.weight",
        "second.bias",
        "head.bias",
    )
    assert report.assigned["second.weight"] == "'head.*'"


def test_rules_by_type():
    net = Net()
    report = init.rules(net, {Affine: init.Zeros(), Wide: {"bias": init.Constant(3)}})
    assert net.first.weight.init == init.Zeros()
    assert net.first.bias.init == init.Ones()  # one recipe for a type is for its weights
    assert net.second.bias.init == init.Constant(3)
    assert report.matched == {
        "Affine": ("first.weight", "second.weight"),
        "Wide": ("second.bias",),
    }


def test_rules_by_predicate():
    net = Net()

    def is_vector(name, parameter):
        return len(parameter.shape) == 1

    report = init.rules(
        net, {is_vector: init.Zeros(), lambda name, p: name == "head.bias": init.Constant(5)}
    )
    assert report.assigned["first.bias"] == "is_vector"
    assert report.assigned["head.bias"] == "<lambda>"
    assert net.head.bias.init == init.Constant(5)


def test_rules_take_any_function():
    def tens(key, shape, dtype):
        return jnp.full(shape, 10, dtype)

    net = Affine(3, 2)
    report = init.rules(net, {"bias": tens})
    assert net.bias.data.tolist() == [10, 10]
    assert "tens" in str(report)


def test_the_report_prints_as_a_table():
    report = init.rules(
        Net(), {"*.weight": init.Normal(std=0.01), "x": init.Zeros()}, allow_unmatched=True
    )
    assert str(report).splitlines() == [
        "parameter      shape   rule        recipe",
        "first.weight   (4, ?)  '*.weight'  Normal(mean=0.0, std=0.01)",
        "first.bias     (4,)    (default)   Ones()",
        "second.weight  (3, 4)  '*.weight'  Normal(mean=0.0, std=0.01)",
        "second.bias    (3,)    (default)   Ones()",
        "head.bias      (3,)    (default)   Ones()",
        "matched nothing: 'x'",
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"*.weigth": init.Zeros()},
            r"'\*\.weigth' matched no parameter\. Did you mean '\*\.weight'",
        ),
        ({"frist.bias": init.Zeros()}, r"Did you mean 'first\.bias'\?"),
        ({Buffer: init.Zeros()}, r"a rule is a name glob, a module type or a predicate"),
        ({3: init.Zeros()}, r"a rule is a name glob, .* got 3"),
        ({Affine: {"wieght": init.Zeros()}}, r"no Affine has a parameter 'wieght'.*'weight'"),
        ({"*": {"weight": init.Zeros()}}, r"a dict of recipes goes with a module type"),
        ({"*": 0.5}, r"got 0\.5; use nn\.init\.Constant\(value\)"),
        ({"*": init.Zeros}, r"use Zeros\(\)"),
        ({"*": init.XavierUniform()}, r"'\*' does not fit 'first\.bias': XavierUniform: fan in"),
        ({lambda name, p: False: init.Zeros()}, r"<lambda> matched no parameter"),
    ],
)
def test_rule_errors_change_nothing(rules, message):
    net = Net()
    with pytest.raises(RuleError, match=message) as info:
        init.rules(net, {"first.weight": init.Ones(), **rules})
    assert str(info.value).startswith("nn.init.rules changed nothing:")
    assert net.first.weight.init == init.Normal()


def test_all_problems_are_reported_at_once():
    with pytest.raises(RuleError, match=r"(?s)'a' matched no.*'b' matched no.*'\*' does not fit"):
        init.rules(Net(), {"a": init.Zeros(), "b": init.Zeros(), "*": init.Orthogonal()})


def test_a_type_without_weights_is_told_to_choose_by_name():
    class Scale(Module):
        def __init__(self):
            self.scale = Parameter(shape=(3,))

    with pytest.raises(RuleError, match=r"Scale has no parameter of two dimensions or more"):
        init.rules(Scale(), {Scale: init.Ones()})
