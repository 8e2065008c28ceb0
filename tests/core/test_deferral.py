"""Unknown sizes: listed, changed and used before they are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lamina
from lamina import nn
from lamina._core.errors import DeferredError, LaminaError, ShapeError

X = jnp.ones((2, 3))


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(None, 2))


def test_unknown_sizes_are_listed():
    net = lazy()
    shapes = {name: p.shape for name, p in net.named_parameters()}
    assert shapes == {
        "0.weight": (4, None),
        "0.bias": (4,),
        "1.weight": (None,),
        "1.bias": (None,),
        "3.weight": (2, None),
        "3.bias": (2,),
    }
    assert [name for name, _ in net.named_buffers()] == [
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]
    assert "LazyLinear" in repr(net)


def test_everything_can_be_set_before():
    net = lazy()
    opt = lamina.Optimizer(net, optax.sgd(0.1))
    nn.init.rules(net, {"*.weight": nn.init.Constant(0.5), "*.bias": nn.init.Zeros()})
    net[0].requires_grad_(False)
    net.add_module("tied", nn.LazyLinear(4))
    net.tied.weight = net[0].weight
    del net.tied
    net.to("bfloat16")
    net.apply(lambda m: None)
    net(X.astype("bfloat16"))
    assert net[0].weight.dtype == jnp.bfloat16
    assert float(net[0].weight.sum()) == 6
    assert list(lamina.grad(lambda n: n(X.astype("bfloat16")).sum())(net)) == [
        "1.weight", "1.bias", "3.weight", "3.bias",
    ]  # fmt: skip
    assert repr(opt)


@pytest.mark.parametrize(
    "call",
    [
        lambda net: net(X),
        lambda net: lamina.jit(net)(X),
        lambda net: lamina.infer(net, X),
        lambda net: lamina.infer(net, jax.ShapeDtypeStruct((2, 3), jnp.float32)),
        lambda net: lamina.materialize(net, X),
        lambda net: lamina.grad(lambda net: net(X).sum())(net),
        lambda net: lamina.backward(lambda: net(X).sum()),
        lambda net: lamina.vmap(net.eval())(X[None]),
        lambda net: lamina.remat(net)(X),
        lambda net: lamina.scan(lambda c, x: (c, net(x)), 0.0, X[None]),
        lambda net: jax.grad(lambda x: net.eval()(x).sum())(X),
        lambda net: lamina.jit(lambda x: lamina.grad(lambda net: net(x).sum())(net))(X),
    ],
    ids=["call", "jit", "infer", "spec", "materialize", "grad", "backward", "vmap", "remat", "scan",
         "jax.grad", "jit grad"],
)  # fmt: skip
def test_every_first_call_infers(call):
    net = lazy()
    call(net)
    assert net[0].weight.shape == (4, 3)
    assert net[3].weight.shape == (2, 4)
    assert [type(m).__name__ for m in net] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert net[3].in_features == 4
    assert not any(isinstance(b.data, jax.core.Tracer) for b in [*net.parameters(), *net.buffers()])
    assert np.isfinite(np.asarray(net.eval()(X))).all()


@pytest.mark.parity
def test_class_and_repr_change_as_in_torch(torch):
    ours, theirs = nn.LazyLinear(4, bias=False), torch.nn.LazyLinear(4, bias=False)
    assert repr(ours) == repr(theirs)
    ours(X)
    theirs(torch.ones(2, 3))
    assert repr(ours) == repr(theirs)
    assert type(ours) is nn.Linear


def test_part_of_a_model_may_stay_unknown():
    net = nn.ModuleList([nn.LazyLinear(2), nn.LazyLinear(2)])
    net[0](X)
    assert net[0].weight.shape == (2, 3)
    assert net[1].weight.shape == (2, None)
    with pytest.raises(DeferredError, match=r"1\.weight: \(2, \?\)"):
        net.state_dict()
    assert lamina.Optimizer(net, optax.sgd(0.1))


def test_wrong_second_input():
    net = nn.LazyLinear(2)
    net(X)
    with pytest.raises(ShapeError, match="in_features=3"):
        net(jnp.ones((2, 5)))


def test_tied_unknown_sizes_agree():
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(3))
    net[1].weight = net[0].weight
    net(X)
    assert net[1].weight is net[0].weight
    assert net[1].in_features == 3
    bad = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(4))
    bad[1].weight = bad[0].weight
    with pytest.raises(ShapeError, match=r"its shape is \(4, 3\) and can't become \(4, 4\)"):
        bad(X)


def test_loading_settles_sizes():
    net = nn.Sequential(nn.LazyLinear(4))
    net.load_state_dict(nn.Sequential(nn.Linear(7, 4)).state_dict())
    assert net[0].weight.shape == (4, 7)
    assert net(jnp.ones((1, 7))).shape == (1, 4)
    assert net[0].in_features == 7


def test_loading_another_size_than_the_input():
    net = nn.Sequential(nn.LazyLinear(4))
    net.load_state_dict(nn.Sequential(nn.Linear(7, 4)).state_dict())
    with pytest.raises(ShapeError):
        net(X)


# Custom layers.


class Scale(nn.Module):
    def __init__(self, size=None):
        self.weight = nn.Parameter(shape=(size,), init=nn.init.Ones())

    def infer_shapes(self, x):
        self.weight.shape = (x.shape[-1],)

    def forward(self, x):
        return x * self.weight.reshape(1, -1)


def test_custom_layer():
    net = nn.Sequential(Scale(), nn.LazyLinear(2), Scale())
    assert lamina.jit(net)(X).shape == (2, 2)
    assert net[2].weight.shape == (2,)


def test_custom_layer_that_looks_at_numbers_of_features():
    class Twice(Scale):
        def infer_shapes(self, x):
            self.features = x.shape[-1] * 2
            self.weight.shape = (x.shape[-1],)

    net = Twice()
    lamina.jit(net)(X)
    assert net.features == 6


def test_custom_layer_without_the_method():
    class Forgot(nn.Module):
        def __init__(self):
            self.weight = nn.Parameter(shape=(None,), init=nn.init.Ones())

        def forward(self, x):
            return x * self.weight.reshape(1, -1)

    net = nn.Sequential(Forgot())
    with pytest.raises(
        DeferredError, match=r"0: the sizes of weight are unknown and Forgot does not say"
    ):
        net(X)


def test_custom_layer_that_forgets_a_size():
    class Half(nn.Module):
        def __init__(self):
            self.a = nn.Parameter(shape=(None,), init=nn.init.Ones())
            self.b = nn.Parameter(shape=(None,), init=nn.init.Ones())

        def infer_shapes(self, x):
            self.a.shape = (x.shape[-1],)

        def forward(self, x):
            return x * self.a.reshape(1, -1) * self.b.reshape(1, -1)

    with pytest.raises(DeferredError, match="parameter 'b'"):
        Half()(X)


def test_parts_made_in_infer_shapes():
    """A layer may build its parts when it sees the input."""

    class Late(nn.Module):
        def __init__(self):
            self.weight = nn.Parameter(shape=(None,), init=nn.init.Ones())

        def infer_shapes(self, x):
            self.weight.shape = (x.shape[-1],)
            self.inner = nn.Linear(x.shape[-1], 2)

        def forward(self, x):
            return self.inner(x * self.weight.reshape(1, -1))

    for call in (
        lambda net: net(X),
        lambda net: lamina.infer(net, X),
        lambda net: lamina.jit(net)(X),
    ):
        net = Late()
        try:
            call(net)
        except LaminaError as error:
            assert "inside a compiled function" in str(error)  # noqa: PT017
        else:
            assert list(net.state_dict()) == ["weight", "inner.weight", "inner.bias"]


def test_pytorch_style_lazy_layer():
    class Fixed(nn.Module):
        def __init__(self, size):
            self.weight = nn.Parameter(shape=(size,), init=nn.init.Ones())

        def forward(self, x):
            return x * self.weight.reshape(1, -1)

    class Lazy(nn.LazyModuleMixin, Fixed):
        cls_to_become = Fixed

        def __init__(self):
            super().__init__(None)
            self.weight = nn.UninitializedParameter()

        def initialize_parameters(self, x):
            if self.has_uninitialized_params():
                self.weight.materialize((x.shape[-1],))
                nn.init.ones_(self.weight)

    net = Lazy()
    assert net.has_uninitialized_params()
    np.testing.assert_array_equal(net(X), X)
    assert type(net) is Fixed


def test_a_failed_call_leaves_the_layer_lazy():
    net = nn.LazyConv2d(4, 3)
    with pytest.raises(Exception, match="conv2d|expected|index"):
        net(jnp.ones((3,)))
    assert type(net) is nn.LazyConv2d
    assert net.weight.shape == (4, None, 3, 3)
    assert net(jnp.ones((1, 2, 5, 5))).shape == (1, 4, 3, 3)


def test_inference_is_abstract():
    """Big layers cost nothing to infer: no memory and no arithmetic."""
    net = nn.Sequential(nn.LazyLinear(100_000), nn.LazyLinear(100_000))
    lamina.infer(net, jax.ShapeDtypeStruct((1, 100_000), jnp.float32))
    assert net[1].weight.shape == (100_000, 100_000)
    assert not net[1].weight.is_material
