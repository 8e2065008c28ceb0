"""The functional forms against PyTorch: values, gradients, half precision, errors."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina._core.errors import DataDependentError, ShapeError, TypeMismatchError
from lamina._core.parameter import Buffer, Parameter
from lamina._core.random import manual_seed
from lamina.nn import functional as F


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ties(*shape, seed=0):
    """Small integers: every pooling window has its maximum several times."""
    return np.random.default_rng(seed).integers(0, 3, shape).astype(np.float32)


def integers(high, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.int32)


def probabilities(*shape, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)


def case(name, *inputs, **options):
    def text(value):
        return str(list(np.shape(value)) if isinstance(value, np.ndarray) else value)

    arguments = [text(np.asarray(x)) for x in inputs]
    arguments += [f"{key}={text(value)}" for key, value in options.items()]
    return pytest.param(name, inputs, options, id=f"{name}({', '.join(arguments)})")


IMAGES = normal(2, 4, 9, 8)
KERNEL = normal(6, 4, 3, 2, seed=1)
CHANNELS = (normal(4, seed=2), normal(4, seed=3))
WITH_ZERO = np.array([-2.0, -0.5, 0.0, 0.5, 3.0], np.float32)
TABLE = normal(7, 3)

CASES = [
    case("linear", normal(5, 3), normal(4, 3, seed=1), normal(4, seed=2)),
    case("linear", normal(2, 5, 3), normal(4, 3, seed=1)),
    case("linear", normal(3), normal(4, 3, seed=1), normal(4, seed=2)),
    case("linear", normal(5, 3), normal(3, seed=1)),
    case("relu", WITH_ZERO),
    case("sigmoid", WITH_ZERO * 20),
    case("tanh", WITH_ZERO),
    case("gelu", WITH_ZERO * 3),
    case("gelu", WITH_ZERO * 3, approximate="tanh"),
    case("softmax", normal(2, 3, 4) * 10, dim=1),
    case("softmax", normal(3) * 100, dim=-1),
    case("softmax", np.float32(3), dim=0),
    case("log_softmax", normal(2, 3, 4) * 100, dim=-1),
    case("log_softmax", np.float32(3), dim=-1),
    case("conv2d", IMAGES, KERNEL, normal(6, seed=2)),
    case("conv2d", IMAGES[0], KERNEL, normal(6, seed=2), padding=1),
    case("conv2d", IMAGES, KERNEL, stride=2, padding=(2, 1)),
    case("conv2d", IMAGES, KERNEL, stride=(3, 1), dilation=(1, 2)),
    case("conv2d", IMAGES, KERNEL, padding="same"),
    case("conv2d", IMAGES, KERNEL, padding="same", dilation=3),
    case("conv2d", IMAGES, KERNEL, padding="valid"),
    case("conv2d", IMAGES, KERNEL[:, :2], padding=1, groups=2),
    case("conv2d", IMAGES, KERNEL[:4, :1], groups=4),
    case("max_pool2d", ties(2, 3, 8, 8), kernel_size=2),
    case("max_pool2d", ties(3, 8, 7), kernel_size=(3, 2)),
    case("max_pool2d", ties(2, 3, 9, 8), kernel_size=3, stride=2, padding=1),
    case("max_pool2d", ties(2, 3, 9, 8), kernel_size=3, stride=2, padding=1, ceil_mode=True),
    case("max_pool2d", ties(2, 3, 10, 9), kernel_size=(2, 3), stride=(1, 2), dilation=(3, 2)),
    case("max_pool2d", ties(2, 3, 5, 5), kernel_size=2, stride=3, ceil_mode=True),
    case("avg_pool2d", IMAGES, kernel_size=2),
    case("avg_pool2d", IMAGES[0], kernel_size=(3, 2), stride=1),
    case("avg_pool2d", IMAGES, kernel_size=3, stride=2, padding=1),
    case("avg_pool2d", IMAGES, kernel_size=3, stride=2, padding=1, count_include_pad=False),
    case("avg_pool2d", IMAGES, kernel_size=3, stride=2, padding=1, ceil_mode=True),
    case("avg_pool2d", IMAGES, kernel_size=3, padding=1, ceil_mode=True, count_include_pad=False),
    case("avg_pool2d", IMAGES, kernel_size=2, divisor_override=3),
    case("layer_norm", normal(2, 3, 4) + 5, normalized_shape=(4,)),
    case(
        "layer_norm",
        normal(2, 3, 4),
        normalized_shape=(3, 4),
        weight=normal(3, 4, seed=1),
        bias=normal(3, 4, seed=2),
    ),
    case("mse_loss", normal(3, 4), normal(3, 4, seed=1)),
    case("mse_loss", normal(3, 4), normal(3, 4, seed=1), reduction="sum"),
    case("mse_loss", normal(3, 4), normal(3, 4, seed=1), reduction="none"),
    case("mse_loss", normal(3, 4), normal(3, 4, seed=1), weight=abs(normal(3, 4, seed=2))),
    case("flatten", normal(2, 3, 4), start_dim=1),
    case("flatten", normal(2, 3, 4), end_dim=-2),
    case("flatten", np.float32(1)),
]
WEIGHTED = {"weight": abs(normal(5, seed=3))}
for options in (
    {},
    {"ignore_index": 2},
    WEIGHTED,
    {**WEIGHTED, "ignore_index": 2},
    {**WEIGHTED, "ignore_index": 2, "reduction": "sum"},
    {**WEIGHTED, "ignore_index": 2, "reduction": "none"},
):
    CASES += [
        case("nll_loss", normal(8, 5), integers(5, 8), **options),
        case("cross_entropy", normal(8, 5), integers(5, 8), **options),
        case("cross_entropy", normal(8, 5), integers(5, 8), label_smoothing=0.2, **options),
    ]
for options in (
    {},
    {"label_smoothing": 0.1},
    {**WEIGHTED, "label_smoothing": 0.1},
    {**WEIGHTED, "reduction": "sum"},
    {**WEIGHTED, "reduction": "none"},
):
    CASES.append(case("cross_entropy", normal(8, 5), probabilities(8, 5), **options))
CASES += [
    case("cross_entropy", normal(5), integers(5)),
    case("cross_entropy", normal(5), probabilities(5)),
    case("cross_entropy", normal(2, 5, 3, 4), integers(5, 2, 3, 4), label_smoothing=0.1),
    case("cross_entropy", normal(2, 5, 3), abs(normal(2, 5, 3, seed=1))),
    case("cross_entropy", normal(2, 5) * 1000, integers(5, 2)),
    case("cross_entropy", normal(3, 5), np.full(3, -100, np.int32), reduction="sum"),
    case("nll_loss", normal(5), integers(5)),
    case("nll_loss", normal(2, 5, 3, 4), integers(5, 2, 3, 4), weight=abs(normal(5, seed=3))),
]


def torch_value(torch, value):
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    tensor = torch.tensor(np.asarray(value))
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def against_torch(torch, ours, theirs, inputs, rtol=2e-5, atol=2e-5):
    """Compare values, and gradients of a random projection, with respect to every float input."""
    tensors = [torch_value(torch, x) for x in inputs]
    is_float = [tensor.is_floating_point() for tensor in tensors]
    for tensor, flag in zip(tensors, is_float, strict=True):
        tensor.requires_grad_(flag)
    expected = theirs(*tensors)
    got = ours(*inputs)
    assert got.shape == tuple(expected.shape)
    assert got.dtype == expected.detach().numpy().dtype
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=rtol, atol=atol)

    projection = normal(*expected.shape, seed=9)
    (expected * torch.tensor(projection)).sum().backward()
    where = [i for i, flag in enumerate(is_float) if flag]

    def projected(*values):
        arguments = list(inputs)
        for i, value in zip(where, values, strict=True):
            arguments[i] = value
        return (ours(*arguments) * projection).sum()

    floats = [jnp.asarray(inputs[i]) for i in where]
    gradients = jax.jit(jax.grad(projected, argnums=tuple(range(len(where)))))(*floats)
    for i, gradient in zip(where, gradients, strict=True):
        np.testing.assert_allclose(gradient, tensors[i].grad.numpy(), rtol=rtol, atol=atol)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "inputs", "options"), CASES)
def test_values_and_gradients_are_torchs(torch, name, inputs, options):
    theirs = torch.flatten if name == "flatten" else getattr(torch.nn.functional, name)
    tensors = {key: torch_value(torch, value) for key, value in options.items()}

    def reference(*x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of costs of its own
            return theirs(*x, **tensors)

    against_torch(torch, lambda *x: getattr(F, name)(*x, **options), reference, inputs)


@pytest.mark.parametrize(("name", "inputs", "options"), CASES)
def test_compiled_equals_eager(name, inputs, options):
    function = getattr(F, name)
    eager = function(*inputs, **options)
    compiled = jax.jit(lambda *x: function(*x, **options))(*inputs)
    np.testing.assert_allclose(eager, compiled, rtol=2e-6, atol=2e-6)


HALF = [
    ("linear", (normal(5, 3), normal(4, 3, seed=1), normal(4, seed=2)), {}),
    ("gelu", (WITH_ZERO,), {}),
    ("sigmoid", (WITH_ZERO,), {}),
    ("softmax", (normal(4, 300),), {"dim": 1}),
    ("log_softmax", (normal(4, 300),), {"dim": 1}),
    ("conv2d", (IMAGES, KERNEL, normal(6, seed=2)), {}),
    ("max_pool2d", (IMAGES,), {"kernel_size": 2}),
    ("avg_pool2d", (normal(1, 1, 40, 40) + 10,), {"kernel_size": 20}),
    ("layer_norm", (normal(4, 600) + 30,), {"normalized_shape": (600,)}),
    ("mse_loss", (normal(40, 40), normal(40, 40, seed=1)), {}),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "inputs", "options"), HALF, ids=[row[0] for row in HALF])
def test_half_precision_comes_out_and_is_accurate(name, inputs, options, dtype):
    half = [jnp.asarray(x, dtype) for x in inputs]
    got = getattr(F, name)(*half, **options)
    assert got.dtype == jnp.dtype(dtype)
    exact = getattr(F, name)(*(x.astype(jnp.float32) for x in half), **options)
    # One rounding at the end is allowed for, and a few in sums of products.
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2 * epsilon, atol=4 * epsilon)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_cross_entropy(dtype):
    logits = jnp.asarray(normal(64, 1000), dtype)
    loss = F.cross_entropy(logits, integers(1000, 64))
    exact = F.cross_entropy(logits.astype(jnp.float32), integers(1000, 64))
    assert loss.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(float(loss), float(exact), rtol=float(jnp.finfo(dtype).eps))


def test_boxes_and_lists_are_tensors():
    weight, bias = Parameter(normal(4, 3)), Parameter(normal(4))
    got = F.linear([1.0, 2.0, 3.0], weight, bias)
    np.testing.assert_allclose(got, weight.data @ jnp.array([1.0, 2.0, 3.0]) + bias.data, 1e-6)


def test_integers_become_floats():
    assert F.sigmoid(jnp.arange(3)).dtype == jnp.float32
    assert F.softmax(jnp.arange(3), dim=0).dtype == jnp.float32
    assert F.linear(jnp.ones((2, 3), jnp.int32), normal(4, 3)).dtype == jnp.float32


def test_softmax_without_dim_warns():
    with pytest.warns(UserWarning, match="implicit choice of dim=1 is deprecated"):
        F.softmax(normal(2, 3))
    with pytest.warns(UserWarning, match="implicit choice of dim=0"):
        F.log_softmax(normal(3))
    assert F.softmax(jnp.arange(3), dim=0, dtype=jnp.float16).dtype == jnp.float16


# Pooling


def test_max_pool_propagates_nan_and_handles_integers():
    x = np.array([[[1.0, np.nan], [3.0, 4.0]]], np.float32)
    assert np.isnan(F.max_pool2d(x, 2)).all()
    assert F.max_pool2d(jnp.arange(16).reshape(1, 4, 4), 2).tolist() == [[[5, 7], [13, 15]]]


@pytest.mark.parity
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        {"kernel_size": (2, 3), "stride": 1, "dilation": (3, 2)},
    ],
    ids=str,
)
def test_max_pool_indices_are_torchs(torch, options):
    x = ties(2, 3, 9, 8)
    values, indices = F.max_pool2d(x, return_indices=True, **options)
    expected = torch.nn.functional.max_pool2d(torch.tensor(x), return_indices=True, **options)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(indices, expected[1])
    hopeless, where = F.max_pool2d(
        jnp.full((1, 4, 4), -jnp.inf), 3, 2, padding=1, return_indices=True
    )
    assert np.isneginf(hopeless).all()
    assert 0 <= int(where.min()) <= int(where.max()) < 16


# Batch normalisation


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 3), (2, 4, 5, 3)], ids=str)
def test_batch_norm_training_is_torchs(torch, shape):
    x = normal(*shape) * 3 + 2
    mean, var = Buffer(CHANNELS[0]), Buffer(abs(CHANNELS[1]))
    t_mean, t_var = torch.tensor(CHANNELS[0]), torch.tensor(abs(CHANNELS[1]))
    weight, bias = normal(4, seed=5), normal(4, seed=6)
    options = {"training": True, "momentum": 0.3, "eps": 1e-3}
    got = F.batch_norm(x, mean, var, weight, bias, **options)
    expected = torch.nn.functional.batch_norm(
        torch.tensor(x), t_mean, t_var, torch.tensor(weight), torch.tensor(bias), **options
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mean.data, t_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var.data, t_var, rtol=1e-5, atol=1e-6)

    def theirs(x, weight, bias):
        return torch.nn.functional.batch_norm(x, None, None, weight, bias, **options)

    def ours(x, weight, bias):
        return F.batch_norm(x, None, None, weight, bias, **options)

    against_torch(torch, ours, theirs, (x, weight, bias))


@pytest.mark.parity
def test_batch_norm_evaluation_is_torchs(torch):
    running = (CHANNELS[0], abs(CHANNELS[1]))
    tensors = [torch.tensor(x) for x in running]
    against_torch(
        torch,
        lambda x: F.batch_norm(x, *running),
        lambda x: torch.nn.functional.batch_norm(x, *tensors),
        (IMAGES,),
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batch_norm_takes_statistics_in_float32(dtype):
    x = jnp.asarray(normal(512, 2) + 100, dtype)
    mean, var = Buffer(jnp.zeros(2)), Buffer(jnp.ones(2))
    got = F.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert got.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(mean.data, x.astype(jnp.float32).mean(0), rtol=1e-6)
    np.testing.assert_allclose(var.data, x.astype(jnp.float32).var(0, ddof=1), rtol=1e-4)


def test_batch_norm_errors():
    x = normal(4, 3)
    with pytest.raises(ShapeError, match=r"expected input \(batch, channels, ...\), got \(3,\)"):
        F.batch_norm(x[0], None, None, training=True)
    with pytest.raises(ShapeError, match=r"weight expected shape \(3,\).*num_features=3"):
        F.batch_norm(x, None, None, np.ones(4, np.float32), training=True)
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*net\.eval\(\)"):
        F.batch_norm(x[:1], None, None, training=True)
    with pytest.raises(ValueError, match="expected running_mean and running_var when"):
        F.batch_norm(x, None, None)
    with pytest.raises(
        TypeMismatchError, match=r"expected an nn.Buffer when training.*nn.Buffer\("
    ):
        F.batch_norm(x, jnp.zeros(3), jnp.ones(3), training=True)


# Embedding and one-hot


@pytest.mark.parity
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 2},
        {"padding_idx": -1},
        {"scale_grad_by_freq": True},
        {"max_norm": 1.0},
        {"max_norm": 1.0, "norm_type": 1.0, "padding_idx": 0},
    ],
    ids=str,
)
def test_embedding_is_torchs(torch, options):
    index = integers(7, 4, 3)
    table = torch.tensor(TABLE.copy(), requires_grad=True)
    # With max_norm PyTorch overwrites the table, and lamina does not.
    expected = torch.nn.functional.embedding(torch.tensor(index), table, **options)
    projection = normal(4, 3, 3, seed=9)
    (expected * torch.tensor(projection)).sum().backward()

    def ours(table):
        return F.embedding(jnp.asarray(index), table, **options)

    np.testing.assert_allclose(ours(TABLE), expected.detach(), rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda table: (ours(table) * projection).sum())(jnp.asarray(TABLE))
    np.testing.assert_allclose(gradient, table.grad, rtol=1e-5, atol=1e-6)


def test_embedding_outside_the_table():
    with pytest.raises(IndexError, match=r"indices expected in \[0, 7\), got 9.*num_embeddings=10"):
        F.embedding(np.array([1, 9]), TABLE)
    with pytest.raises(IndexError, match=r"got -1"):
        F.embedding([-1], TABLE)
    with pytest.raises(IndexError, match=r"padding_idx expected in \[-7, 7\), got 7"):
        F.embedding([1], TABLE, padding_idx=7)
    rows = jax.jit(F.embedding)(jnp.array([1, 9, -1]), jnp.asarray(TABLE))
    assert np.isnan(rows).all(1).tolist() == [False, True, True]
    with pytest.raises(TypeMismatchError, match=r"expected to be integers, got float32"):
        F.embedding(np.ones(2, np.float32), TABLE)
    with pytest.raises(ShapeError, match=r"weight expected shape \(num_embeddings"):
        F.embedding([0], TABLE[0])


def test_one_hot():
    assert F.one_hot(jnp.array([0, 2])).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert F.one_hot(jnp.zeros((2, 3), jnp.int32), 4).shape == (2, 3, 4)
    with pytest.raises(DataDependentError, match="pass it: one_hot"):
        jax.jit(F.one_hot)(jnp.array([0, 2]))
    with pytest.raises(TypeMismatchError, match="got float32"):
        F.one_hot(jnp.ones(2))
    with pytest.raises(ShapeError, match="num_classes"):
        F.one_hot(jnp.zeros(0, jnp.int32))


# Dropout


def test_dropout():
    manual_seed(3)
    x = jnp.ones((200, 200))
    first, second = F.dropout(x, 0.3), F.dropout(x, 0.3)
    assert abs(float((first == 0).mean()) - 0.3) < 0.02
    np.testing.assert_allclose(first[first != 0], 1 / 0.7, rtol=1e-6)
    assert bool((first != second).any())
    manual_seed(3)
    np.testing.assert_array_equal(F.dropout(x, 0.3), first)
    assert F.dropout(x, 0.3, training=False) is x
    assert F.dropout(x, 0.0) is x
    assert not F.dropout(x, 1.0).any()
    assert F.dropout(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"has to be between 0 and 1, but got 1\.5"):
        F.dropout(x, 1.5)


# Errors


def test_linear_errors():
    with pytest.raises(ShapeError, match=r"expected in_features=3 .* got 4 \(input \(5, 4\)\)"):
        F.linear(normal(5, 4), normal(2, 3))
    with pytest.raises(ShapeError, match=r"expected in_features=3 .* got a scalar"):
        F.linear(1.0, normal(2, 3))
    with pytest.raises(ShapeError, match=r"weight expected shape \(out_features, in_features\)"):
        F.linear(normal(5, 3), normal(1, 2, 3))
    with pytest.raises(ShapeError, match=r"bias expected shape \(2,\), got \(3,\)"):
        F.linear(normal(5, 3), normal(2, 3), normal(3))


def test_conv_errors():
    with pytest.raises(ShapeError, match=r"expected in_channels=4, got 3 .*in_channels=3"):
        F.conv2d(normal(1, 3, 9, 9), KERNEL)
    with pytest.raises(
        ShapeError, match=r"expected in_channels=4, got 9 .*x\.transpose\(0, 3, 1, 2\)"
    ):
        F.conv2d(normal(1, 9, 9, 4), KERNEL)
    with pytest.raises(ShapeError, match=r"expected input \(batch, channels, height, width\)"):
        F.conv2d(normal(9, 9), KERNEL)
    with pytest.raises(ShapeError, match=r"weight expected shape"):
        F.conv2d(IMAGES, KERNEL[0])
    with pytest.raises(ShapeError, match=r"multiple of groups, got out_channels=6 and groups=4"):
        F.conv2d(IMAGES, KERNEL, groups=4)
    with pytest.raises(ShapeError, match=r"the kernel, \(3, 2\).* got \(2, 8\)"):
        F.conv2d(IMAGES[:, :, :2], KERNEL)
    with pytest.raises(ShapeError, match=r"bias expected shape \(6,\), got \(4,\)"):
        F.conv2d(IMAGES, KERNEL, CHANNELS[0])
    with pytest.raises(ShapeError, match=r"stride expected an int or 2 ints"):
        F.conv2d(IMAGES, KERNEL, stride=(1, 2, 3))
    with pytest.raises(ValueError, match=r"padding='same' is not supported for strided"):
        F.conv2d(IMAGES, KERNEL, padding="same", stride=2)
    with pytest.raises(ValueError, match=r"padding expected 'same', 'valid' or ints, got 'full'"):
        F.conv2d(IMAGES, KERNEL, padding="full")
    with pytest.raises(ValueError, match=r"negative padding"):
        F.conv2d(IMAGES, KERNEL, padding=-1)
    with pytest.raises(ValueError, match=r"stride and dilation expected to be positive"):
        F.conv2d(IMAGES, KERNEL, stride=0)


@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d])
def test_pooling_errors(pool):
    with pytest.raises(ShapeError, match=r"expected input \(batch, channels, height, width\).*got"):
        pool(normal(9, 9), 2)
    with pytest.raises(ShapeError, match=r"padding expected to be at most half of the window"):
        pool(IMAGES, 2, padding=2)
    with pytest.raises(ShapeError, match=r"the window expected to fit .*kernel_size=20"):
        pool(IMAGES, 20)
    with pytest.raises(ValueError, match=r"kernel_size, stride and dilation expected"):
        pool(IMAGES, 0)
    with pytest.raises(ValueError, match=r"kernel_size, stride and dilation expected"):
        pool(IMAGES, 2, stride=0)


def test_other_errors():
    with pytest.raises(ValueError, match="divisor_override expected not to be 0"):
        F.avg_pool2d(IMAGES, 2, divisor_override=0)
    with pytest.raises(ValueError, match="expected 'none' or 'tanh', got 'erf'"):
        F.gelu(1.0, approximate="erf")
    with pytest.raises(IndexError, match=r"softmax: dim expected to be in \[-2, 1\]"):
        F.softmax(normal(2, 3), dim=2)
    with pytest.raises(ShapeError, match=r"start_dim=2 comes after end_dim=1"):
        F.flatten(normal(2, 3, 4), 2, 1)
    with pytest.raises(ShapeError, match=r"layer_norm: expected input \(\*, 5\), got \(2, 3\)"):
        F.layer_norm(normal(2, 3), 5)
    with pytest.raises(ShapeError, match=r"layer_norm: bias expected shape \(3,\), got \(2,\)"):
        F.layer_norm(normal(2, 3), (3,), bias=normal(2))


def test_loss_errors():
    logits = normal(4, 5)
    with pytest.raises(ShapeError, match=r"expected target \(4,\) of class indices .*got \(3,\)"):
        F.cross_entropy(logits, integers(5, 3))
    with pytest.raises(ShapeError, match=r"weight expected one value per class, shape \(5,\)"):
        F.cross_entropy(logits, integers(5, 4), weight=normal(4))
    with pytest.raises(ShapeError, match="got a scalar"):
        F.nll_loss(1.0, 0)
    with pytest.raises(TypeMismatchError, match="class probabilities, expected floating point"):
        F.cross_entropy(logits, integers(2, 4, 5))
    with pytest.raises(TypeMismatchError, match="expected to be integers, got float32"):
        F.cross_entropy(logits, normal(4))
    with pytest.raises(ValueError, match=r"label_smoothing expected in \[0, 1\], got 2"):
        F.cross_entropy(logits, integers(5, 4), label_smoothing=2.0)
    with pytest.raises(ValueError, match="ignore_index is for class indices"):
        F.cross_entropy(logits, probabilities(4, 5), ignore_index=1)
    with pytest.raises(ValueError, match="'avg' is not a valid value for reduction"):
        F.mse_loss(logits, logits, reduction="avg")
    with pytest.raises(ShapeError, match=r"mse_loss: weight expected shape \(4, 5\)"):
        F.mse_loss(logits, logits, weight=normal(5))
    with (
        pytest.raises(ShapeError, match=r"expected target \(4, 5\).*got \(3,\)"),
        pytest.warns(UserWarning, match="different shapes"),
    ):
        F.mse_loss(logits, normal(3))


def test_mse_loss_warns_of_broadcasting():
    with pytest.warns(UserWarning, match=r"target \(3,\) and input \(3, 1\) have different shapes"):
        loss = F.mse_loss(np.ones((3, 1), np.float32), np.zeros(3, np.float32), reduction="none")
    assert loss.shape == (3, 3)


def test_deprecated_reduction_flags():
    x, y = normal(3), normal(3, seed=1)
    with pytest.warns(DeprecationWarning, match="use reduction='sum'"):
        assert F.mse_loss(x, y, size_average=False) == F.mse_loss(x, y, reduction="sum")
    with pytest.warns(DeprecationWarning, match="use reduction='none'"):
        assert F.mse_loss(x, y, reduce=False).shape == (3,)
    with pytest.warns(DeprecationWarning, match="use reduction='mean'"):
        assert F.mse_loss(x, y, reduce=True) == F.mse_loss(x, y)


@pytest.mark.parametrize("bad", [5, -1])
def test_a_class_out_of_range_gives_nan_and_not_a_wrong_loss(bad):
    assert np.isnan(F.cross_entropy(normal(2, 5), np.array([0, bad])))
    assert np.isnan(F.nll_loss(normal(2, 5), np.array([0, bad])))


@pytest.mark.parity
def test_signatures_are_torchs(torch):
    for name in F.__all__:
        theirs = torch.flatten if name == "flatten" else getattr(torch.nn.functional, name)
        try:
            expected = inspect.signature(theirs)
        except ValueError:
            continue  # implemented in C
        if "args" in expected.parameters:
            continue  # dispatched by an argument
        ours = inspect.signature(getattr(F, name))
        assert list(ours.parameters) == list(expected.parameters), name
        for key, parameter in expected.parameters.items():
            assert ours.parameters[key].default == parameter.default, (name, key)
