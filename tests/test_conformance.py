"""Every property, for every row of ``descriptors.py``."""

import copy
import importlib.util
import inspect
import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import nn

_PATH = pathlib.Path(__file__).parent / "descriptors.py"
_LOADER = importlib.util.spec_from_file_location("lamina_descriptors", _PATH)
descriptors = importlib.util.module_from_spec(_LOADER)
sys.modules["lamina_descriptors"] = descriptors
_LOADER.loader.exec_module(descriptors)

ROWS = descriptors.ROWS
CLASSES = {row.name: row for row in reversed(ROWS)}

every_row = pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
every_class = pytest.mark.parametrize("row", CLASSES.values(), ids=list(CLASSES))


def chosen(condition):
    found = [row for row in ROWS if condition(row)]
    return pytest.mark.parametrize("row", found, ids=[row.id for row in found])


def drawn(row, seed=0):
    return [spec.draw(seed + i) for i, spec in enumerate(row.inputs)]


def tensors(torch, arrays):
    return [
        torch.tensor(a).long() if a.dtype == np.int32 else torch.tensor(a, requires_grad=True)
        for a in arrays
    ]


def same_pair(torch, row):
    """Return the module and torch's, with the same values."""
    ours, theirs = row.build(nn), row.build(torch.nn)
    values = {}
    for i, (name, value) in enumerate(theirs.state_dict().items()):
        if value.is_floating_point():
            noise = np.random.default_rng(i).random(value.shape).astype(np.float32)
            values[name] = torch.tensor(noise + 0.1)
        else:
            values[name] = value
    theirs.load_state_dict(values)
    ours.load_state_dict({name: value.numpy() for name, value in values.items()})
    return ours, theirs


def weights(shape):
    """Factors that make every element of an output count differently in the loss."""
    return np.cos(np.arange(np.prod(shape, dtype=int), dtype=np.float32)).reshape(shape)


def close(found, expected, name="", scale=1.0):
    np.testing.assert_allclose(
        np.asarray(found), np.asarray(expected), rtol=1e-4 * scale, atol=1e-5 * scale, err_msg=name
    )


def floats(row):
    return [i for i, spec in enumerate(row.inputs) if spec.high is None]


# The table.


def test_every_class_has_a_row():
    classes = {
        name
        for name in nn.__all__
        if isinstance(getattr(nn, name), type) and issubclass(getattr(nn, name), nn.Module)
    }
    lazy = {row.lazy[0] for row in ROWS if row.lazy}
    assert classes - set(CLASSES) - lazy == descriptors.WITHOUT_ROW


def test_every_row_is_there_once():
    assert len({row.id for row in ROWS}) == len(ROWS)


@pytest.mark.parity
def test_every_lazy_class_of_torch_has_its_form(torch):
    for name in CLASSES:
        lazy = f"Lazy{name}"
        if hasattr(torch.nn, lazy):
            assert any(row.lazy and row.lazy[0] == lazy for row in ROWS), lazy


# What it looks like.


@every_row
def test_names(row):
    net = row.build(nn)
    assert tuple(net.state_dict(keep_vars=True)) == row.state
    assert tuple(net.state_dict()) == row.state


@pytest.mark.parity
@every_row
def test_names_as_in_torch(torch, row):
    ours, theirs = row.build(nn), row.build(torch.nn)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for method in ("named_parameters", "named_buffers", "named_modules"):
        expected = [name for name, _ in getattr(theirs, method)()]
        assert [name for name, _ in getattr(ours, method)()] == expected, method
    for name, value in theirs.state_dict().items():
        assert ours.state_dict()[name].shape == tuple(value.shape)


@pytest.mark.parity
@every_row
def test_repr(torch, row):
    ours, theirs = row.build(nn), row.build(torch.nn)
    assert repr(ours) == repr(theirs)
    nested = [
        m.Sequential(m.ReLU(), m.ModuleList([layer, m.Tanh()]))
        for m, layer in ((nn, ours), (torch.nn, theirs))
    ]
    assert repr(nested[0]) == repr(nested[1])


def signature(cls):
    return [
        (name, p.kind, p.default)
        for name, p in inspect.signature(cls.__init__).parameters.items()
        if name != "self"
    ]


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", [*CLASSES, *dict.fromkeys(row.lazy[0] for row in ROWS if row.lazy)]
)
def test_signature(torch, name):
    expected = signature(getattr(torch.nn, name))
    if expected and expected[0][0] == "args" and name not in ("Identity",):
        pytest.skip("torch's own signature says nothing")
    found = signature(getattr(nn, name))
    if [p[1] for p in expected] == [
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    ]:
        assert [p[1] for p in found] == [p[1] for p in expected]
    else:
        assert found == expected


@every_class
def test_unknown_arguments_are_refused(row):
    if row.name == "Identity":
        return
    with pytest.raises(TypeError, match="argument"):
        getattr(nn, row.name)(*row.args, no_such_option=1)


@pytest.mark.parity
@every_row
def test_public_attributes(torch, row):
    """Plain attributes that torch's module shows are there, with equal values."""
    ours, theirs = row.build(nn), row.build(torch.nn)
    for name, expected in vars(theirs).items():
        if name.startswith("_") or name in ("output_padding", "transposed"):
            continue
        assert getattr(ours, name) == expected, name


# First values.


@pytest.mark.parity
@chosen(lambda row: row.large)
def test_distributions(torch, row):
    lamina.manual_seed(0)
    torch.manual_seed(0)
    ours = getattr(nn, row.name)(*row.large, **row.options)
    theirs = getattr(torch.nn, row.name)(*row.large, **row.options)
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        a, b = np.asarray(p.data), q.detach().numpy()
        if len(np.unique(b)) == 1:
            np.testing.assert_array_equal(np.unique(a), np.unique(b), err_msg=name)
        assert abs(a.mean() - b.mean()) < 6 * (b.std() + 1e-12) / np.sqrt(a.size), name
        tolerance = 6 / np.sqrt(a.size)
        assert abs(a.std() - b.std()) <= tolerance * b.std() + 1e-12, name
        assert abs(a.max() - b.max()) <= 0.3 * abs(b.max()) + 1e-12, name
        assert abs(a.min() - b.min()) <= 0.3 * abs(b.min()) + 1e-12, name
    for (name, p), (_, q) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        np.testing.assert_array_equal(p.data, q.numpy(), err_msg=name)


@pytest.mark.parametrize("row", [CLASSES["Linear"], CLASSES["Conv2d"]], ids=["Linear", "Conv2d"])
def test_bounds_of_the_uniform_distribution(row):
    net = getattr(nn, row.name)(*row.large)
    bound = 1 / np.sqrt(np.prod(net.weight.shape[1:]))
    for p in (net.weight, net.bias):
        assert float(jnp.abs(p.data).max()) <= bound
    assert float(jnp.abs(net.weight.data).max()) > 0.99 * bound


@chosen(lambda row: row.options.get("padding_idx"))
def test_padding_row_is_zero(row):
    net = row.build(nn)
    assert not net.weight[net.padding_idx].any()
    assert net.weight.any()


# Numbers.


@pytest.mark.parity
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_row
def test_numbers_as_in_torch(torch, row, training):
    """Outputs, gradients by parameters and inputs, and buffers, over three steps."""
    if row.random and training:
        pytest.skip("random; see test_dropout_as_a_distribution")
    ours, theirs = same_pair(torch, row)
    ours.train(training)
    theirs.train(training)
    where = floats(row)

    @lamina.jit
    def run(net, arrays, factors):
        def loss(net, moving):
            full = list(arrays)
            for i, x in zip(where, moving, strict=True):
                full[i] = x
            out = net(*full)
            return (out * factors).sum(), out

        return lamina.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            net, [arrays[i] for i in where]
        )

    for step in range(3):
        arrays = drawn(row, 10 * step)
        given = tensors(torch, arrays)
        theirs.zero_grad()
        expected = theirs(*[x.clone() if x.is_floating_point() else x for x in given])
        factors = weights(tuple(expected.shape))
        needs_grad = expected.requires_grad
        if needs_grad:
            (expected * torch.tensor(factors)).sum().backward()
        (_, out), (by_parameter, by_input) = run(ours, arrays, factors)
        close(out, expected.detach().numpy(), "output")
        for name, p in theirs.named_parameters():
            close(by_parameter[name], p.grad.numpy(), f"gradient of {name}", 10)
        assert by_parameter.keys() == dict(theirs.named_parameters()).keys()
        for i, gradient in zip(where, by_input, strict=True):
            expected_gradient = given[i].grad
            if expected_gradient is not None:
                close(gradient, expected_gradient.numpy(), f"gradient of input {i}", 10)
        for name, value in theirs.named_buffers():
            close(ours.get_buffer(name).data, value.numpy(), f"buffer {name}")


def test_dropout_as_a_distribution():
    x = jnp.ones(20_000)
    for p in (0.2, 0.5):
        out = np.asarray(nn.Dropout(p)(x))
        values = np.unique(out)
        np.testing.assert_allclose(values, [0, 1 / (1 - p)], rtol=1e-6)
        assert abs((out == 0).mean() - p) < 0.02
        grads = lamina.grad(lambda x, p=p: nn.Dropout(p)(x).sum())(x)
        np.testing.assert_allclose(np.unique(grads), [0, 1 / (1 - p)], rtol=1e-6)


@every_row
def test_jit_equals_eager_and_numpy_equals_jax(row):
    """As an argument and as a closure, in training and in evaluation mode."""
    net = row.build(nn)
    twin = copy.deepcopy(net)
    arrays = drawn(row)
    by_argument = lamina.jit(lambda net, *xs: net(*xs))
    for training in (True, False):
        net.train(training)
        twin.train(training)
        lamina.manual_seed(0)
        expected = net(*arrays)
        assert isinstance(expected, jax.Array) or row.name == "Identity"
        lamina.manual_seed(0)
        found = by_argument(twin, *map(jnp.asarray, arrays))
        close(found, expected)
        for name, value in net.state_dict().items():
            close(twin.state_dict()[name], value, name)
    # In evaluation mode, so that the buffers of the two stay the same.
    close(lamina.jit(lambda *xs: twin(*xs))(*arrays), net(*map(jnp.asarray, arrays)))


@chosen(lambda row: row.lazy)
@pytest.mark.parity
def test_lazy_form(torch, row):
    ours, theirs = row.build_lazy(nn), row.build_lazy(torch.nn)
    assert repr(ours) == repr(theirs)
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    lamina.infer(ours, *(spec.abstract() for spec in row.inputs))
    theirs(*tensors(torch, drawn(row)))
    assert repr(ours) == repr(theirs) == repr(row.build(nn))
    assert type(ours) is getattr(nn, row.name)
    for name, value in theirs.named_parameters():
        assert ours.get_parameter(name).shape == tuple(value.shape)


@chosen(lambda row: row.lazy)
def test_lazy_equals_eager(row):
    lamina.manual_seed(0)
    eager = row.build(nn)
    lamina.manual_seed(0)
    lazy = row.build_lazy(nn)
    lazy(*drawn(row))
    eager(*drawn(row))
    for name, value in eager.state_dict().items():
        np.testing.assert_array_equal(lazy.state_dict()[name], value, err_msg=name)


@chosen(lambda row: row.open)
def test_none_for_sizes(row):
    lamina.manual_seed(0)
    eager = row.build(nn)
    lamina.manual_seed(0)
    net = getattr(nn, row.name)(*row.open, **row.options)
    assert any(None in p.shape for p in net.parameters())
    assert repr(net)
    lamina.infer(net, *(spec.abstract() for spec in row.inputs))
    assert repr(net) == repr(eager)
    for name, value in eager.state_dict().items():
        np.testing.assert_array_equal(net.state_dict()[name], value, err_msg=name)


@every_row
def test_building_and_inferring_make_no_arrays(row):
    before = {id(a) for a in jax.live_arrays()}
    nets = [row.build(nn)]
    if row.lazy:
        nets.append(row.build_lazy(nn))
    for net in nets:
        lamina.infer(net, *(spec.abstract() for spec in row.inputs))
        boxes = [*net.parameters(), *net.buffers()]
        assert not any(box.is_material or box.is_unshaped for box in boxes)
    assert {id(a) for a in jax.live_arrays()} <= before


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["deepcopy", "pickle"],
)
@every_row
def test_copies(row, duplicate):
    net = row.build(nn)
    abstract = duplicate(net)
    arrays = drawn(row)
    net.eval()
    abstract.eval()
    close(abstract(*arrays), net(*arrays))
    twin = duplicate(net)
    assert repr(twin) == repr(net)
    assert twin.training is False
    close(twin(*arrays), net(*arrays))
    assert not set(map(id, twin.parameters())) & set(map(id, net.parameters()))


@pytest.mark.parity
@chosen(lambda row: row.state)
def test_state_goes_to_torch_and_back(torch, row):
    ours, theirs = row.build(nn), row.build(torch.nn)
    state = ours.state_dict()
    theirs.load_state_dict(
        {
            name: torch.tensor(np.asarray(value, state.wide.get(name)))
            for name, value in state.items()
        }
    )
    twin = row.build(nn)
    twin.load_state_dict(theirs.state_dict())
    for name, value in state.items():
        np.testing.assert_array_equal(twin.state_dict()[name], value)
        assert twin.state_dict()[name].dtype == value.dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_row
def test_half_in_half_out(row, dtype):
    net = row.build(nn).to(dtype)
    arrays = [jnp.asarray(a).astype(dtype) if a.dtype == np.float32 else a for a in drawn(row)]
    out = net(*arrays)
    assert out.dtype == jnp.dtype(dtype)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    for name, p in net.named_parameters():
        assert p.dtype == jnp.dtype(dtype), name
    full = row.build(nn)
    full.load_state_dict(net.eval().state_dict(), cast=True)
    np.testing.assert_allclose(
        np.asarray(net(*arrays), np.float32), full.eval()(*drawn(row)), rtol=0.1, atol=0.1
    )


@chosen(lambda row: "weight" in row.state)
def test_ties(row):
    """Two layers share a weight: one box, gradients add up, both names in the state dict."""
    arrays = drawn(row)
    net = nn.ModuleList([row.build(nn), row.build(nn)])
    net[1].weight = net[0].weight
    assert net.ties() == {"1.weight": "0.weight"}
    net.eval()

    def loss(net):
        return sum((m(*arrays) ** 2).sum() for m in net)

    one = lamina.grad(lambda m: (m(*arrays) ** 2).sum())
    grads = lamina.grad(loss)(net)
    assert "1.weight" not in grads
    close(grads["0.weight"], one(net[0])["weight"] + one(net[1])["weight"], scale=10)
    assert net.state_dict()["0.weight"] is net.state_dict()["1.weight"]
    twin = copy.deepcopy(net)
    assert twin[0].weight is twin[1].weight


@every_class
def test_under_vmap_and_remat(row):
    net = row.build(nn).eval()
    arrays = drawn(row)
    expected = net(*arrays)
    close(lamina.remat(net)(*arrays), expected)
    mapped = lamina.vmap(net)(*[np.stack([a, a]) for a in arrays])
    close(mapped[1], expected)


@every_row
def test_errors_name_the_path(row):
    net = nn.Sequential(nn.Sequential(row.build(nn)))
    if row.name == "Identity":
        return
    with pytest.raises(Exception) as caught:  # noqa: PT011
        net(object())
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "in module '0.0': " + repr(net[0][0]).splitlines()[0] in text
