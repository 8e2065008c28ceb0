"""What a user sees when something goes wrong in forward, in hooks, and in very deep models."""

import copy
import pickle
import re
import subprocess
import sys
import traceback
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lamina
from lamina import nn
from lamina.errors import DataDependentError, DeferredError, LaminaError, ShapeError

X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)


def printed(error):
    """What Python prints for an exception that nobody catches, notes and causes included."""
    return "".join(traceback.format_exception(error))


def messages(error):
    """What an exception, its notes and its causes say, without the lines of code."""
    said = []
    while error is not None:
        said += [str(error), *getattr(error, "__notes__", ())]
        error = error.__cause__ or error.__context__
    return "\n".join(said)


def caught(action):
    try:
        action()
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


# Full backward hooks fire for the first layer, as in torch.


def shapes(grads):
    return [None if grad is None else tuple(grad.shape) for grad in grads]


def deep(m):
    return m.Sequential(m.Linear(3, 4), m.ReLU(), m.Linear(4, 1))


def nested(m):
    return m.Sequential(m.Sequential(m.Sequential(m.Linear(3, 4)), m.Tanh()), m.Linear(4, 1))


def lone(m):
    return m.Linear(3, 1)


def no_parameters_first(m):
    return m.Sequential(m.Tanh(), m.Linear(3, 1))


def frozen_first(m):
    net = m.Sequential(m.Linear(3, 4), m.ReLU(), m.Linear(4, 1))
    net[0].requires_grad_(False)
    return net


def norm_first(m):
    return m.Sequential(m.BatchNorm1d(3), m.Linear(3, 1))


MODELS = pytest.mark.parametrize(
    "make", [deep, nested, lone, no_parameters_first, frozen_first, norm_first],
    ids=lambda make: make.__name__,
)  # fmt: skip
WAYS = {
    "backward": lambda net, x: lamina.backward(lambda: net(x).sum()),
    "grad": lambda net, x: lamina.grad(lambda net: net(x).sum())(net),
    "closure": lambda net, x: lamina.grad(lambda _: net(x).sum(), wrt="*")(net),
    "argument": lambda net, x: lamina.value_and_grad(lambda net, x: net(x).sum())(net, x),
    "compiled": lambda net, x: lamina.jit(
        lambda net, x: lamina.grad(lambda net: net(x).sum())(net)
    )(net, x),
    "backward compiled": lambda net, x: lamina.jit(
        lambda net, x: lamina.backward(lambda: net(x).sum())
    )(net, x),
}


def note(log, entry, compiled):
    """Add to a log; in a compiled function when it runs, not while it is traced."""
    if compiled:
        jax.debug.callback(lambda: log.append(entry))
    else:
        log.append(entry)


def watch(net, log, compiled=False):
    for name, module in net.named_modules():
        module.register_full_backward_hook(
            lambda _, into, out, name=name: note(log, (name, shapes(into), shapes(out)), compiled)
        )


def torch_log(torch, net, x):
    log = []
    watch(net, log)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no input requires a gradient
        net(x).sum().backward()
    return sorted(log)


def in_order(log):
    """Each firing once: a function may be traced more than once."""
    jax.effects_barrier()
    return sorted({repr(entry): entry for entry in log}.values())


@pytest.mark.parity
@MODELS
@pytest.mark.parametrize("way", ["backward", "grad", "compiled"])
def test_backward_hooks_of_every_layer_as_in_torch(torch, make, way):
    expected = torch_log(torch, make(torch.nn), torch.tensor(X))
    ours, log = make(nn), []
    watch(ours, log, "compiled" in way)
    WAYS[way](ours, X)
    assert in_order(log) == in_order(expected)


@pytest.mark.parametrize("way", WAYS)
def test_the_first_layer_s_hook_fires_everywhere(way):
    net, log = deep(nn), []
    net[0].register_full_backward_hook(
        lambda _, into, out: note(log, (into, shapes(out)), "compiled" in way)
    )
    WAYS[way](net, X)
    assert in_order(log) == [((None,), [(2, 4)])]


@pytest.mark.parity
@MODELS
def test_backward_hooks_where_the_input_is_differentiated(torch, make):
    expected = torch_log(torch, make(torch.nn), torch.tensor(X, requires_grad=True))
    for differentiate in (
        lambda net: lamina.grad(lambda x: net(x).sum())(jnp.asarray(X)),
        lambda net: lamina.grad(lambda net, x: net(x).sum(), argnums=(0, 1))(net, jnp.asarray(X)),
    ):
        ours, log = make(nn), []
        watch(ours, log)
        differentiate(ours)
        assert in_order(log) == in_order(expected)


@pytest.mark.parity
def test_the_gradients_of_the_first_layer_s_outputs_as_in_torch(torch):
    ours, theirs = deep(nn), deep(torch.nn)
    theirs.load_state_dict({k: torch.tensor(np.array(v)) for k, v in ours.state_dict().items()})
    found, expected = [], []
    for net, log in ((ours, found), (theirs, expected)):
        net[0].register_full_backward_hook(
            lambda _, into, out, log=log: log.append(np.asarray(out[0]))
        )
        net[0].register_full_backward_pre_hook(
            lambda _, out, log=log: log.append(np.asarray(out[0]) * 10)
        )
    lamina.backward(lambda: ours(X).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs(torch.tensor(X)).sum().backward()
    assert len(found) == len(expected) == 2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("case", ["two", "integers", "number", "keyword"])
def test_one_entry_for_each_argument_as_in_torch(torch, case):
    def scenario(m, array):
        class Layer(m.Module):
            def __init__(self):
                super().__init__()
                self.w = m.Parameter(array(np.ones((2, 3), np.float32)))

            def forward(self, x, mask=None, scale=1.0):
                return x * self.w * mask * scale

        net, log = Layer(), []
        net.register_full_backward_hook(lambda _, into, out: log.append((into, shapes(out))))
        x, ones = array(X), array(np.ones((2, 3), np.float32))
        args, kwargs = {
            "two": ((x, ones), {}),
            "integers": ((x, array(np.ones((2, 3), np.int32))), {}),
            "number": ((x, ones, 2.0), {}),
            "keyword": ((x,), {"mask": ones}),
        }[case]
        if m is nn:
            lamina.backward(lambda: net(*args, **kwargs).sum())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                net(*args, **kwargs).sum().backward()
        return log

    assert scenario(nn, jnp.asarray) == scenario(torch.nn, torch.tensor)


def test_an_embedding_s_hook_fires():
    net, log = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 1)), []
    net[0].register_full_backward_hook(lambda _, into, out: log.append((into, shapes(out))))
    net.register_full_backward_hook(lambda _, into, out: log.append((into, shapes(out))))
    lamina.backward(lambda: net(jnp.asarray([1, 2])).sum())
    assert sorted(log) == [((None,), [(2, 1)]), ((None,), [(2, 3)])]


def test_a_layer_without_shape_fires_at_its_first_call():
    net, log = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(1)), []
    net[0].register_full_backward_hook(lambda _, into, out: log.append((into, shapes(out))))
    lamina.grad(lambda net: net(X).sum())(net)
    assert set(map(repr, log)) == {repr(((None,), [(2, 4)]))}


@pytest.mark.parametrize("result", [None, (None,)], ids=["nothing", "none"])
def test_hooks_of_the_first_layer_change_no_gradient(result):
    net = deep(nn)
    expected = lamina.grad(lambda net: net(X).sum())(net)
    net[0].register_full_backward_hook(lambda *_: result)
    found = lamina.grad(lambda net: net(X).sum())(net)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_a_gradient_for_an_input_that_has_none_is_refused():
    """PyTorch refuses it as well; the layer's own gradients can't be replaced in this way."""
    net = deep(nn)
    net[0].register_full_backward_hook(lambda *_: (jnp.ones((2, 3)),))
    with pytest.raises((LaminaError, RuntimeError, TypeError, ValueError), match="None"):
        lamina.backward(lambda: net(X).sum())


# Arrays that a hook keeps while a function is traced.

KEPT_IN_A_GLOBAL = []


class Collector:
    def __init__(self):
        self.last, self.all = None, []

    def remember(self, module, args, output):
        self.last = output

    def collect(self, module, args, output):
        self.all.append(output)


def keep_in_list():
    kept = []
    return (lambda module, args, output: kept.append(output)), lambda: kept[-1]


def keep_in_dict():
    kept = {}

    def hook(module, args, output):
        kept["name"] = jax.lax.stop_gradient(output)

    return hook, lambda: kept["name"]


def keep_inside():
    kept = {"outputs": [[]]}
    return (
        lambda module, args, output: kept["outputs"][0].append((output, args)),
        lambda: kept["outputs"][0][-1][0],
    )


def keep_in_namespace():
    kept = types.SimpleNamespace(output=None)
    return (
        lambda module, args, output: setattr(kept, "output", output),
        lambda: kept.output,
    )


def keep_in_object():
    kept = Collector()
    return kept.remember, lambda: kept.last


def keep_in_list_of_object():
    kept = Collector()
    return kept.collect, lambda: kept.all[-1]


def keep_in_global():
    KEPT_IN_A_GLOBAL.clear()
    return (
        lambda module, args, output: KEPT_IN_A_GLOBAL.append(output),
        lambda: KEPT_IN_A_GLOBAL[-1],
    )


KEEPERS = [
    keep_in_list, keep_in_dict, keep_inside, keep_in_namespace, keep_in_object,
    keep_in_list_of_object, keep_in_global,
]  # fmt: skip
KINDS = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "pre": lambda layer, hook: layer.register_forward_pre_hook(
        lambda module, args: hook(module, args, args[0])
    ),
    "backward": lambda layer, hook: layer.register_full_backward_hook(
        lambda module, into, out: hook(module, into, out[0])
    ),
}
TRACED = {
    "jit": lambda net: lamina.jit(net)(X),
    "closure": lambda net: lamina.jit(lambda x: net(x))(X),
    "vmap": lambda net: lamina.vmap(lambda net, x: net(x), in_axes=(None, 0))(net, X),
    "scan": lambda net: lamina.scan(lambda c, x: (c, net(x[None])), 0.0, jnp.asarray(X)),
    "infer": lambda net: lamina.infer(net, X),
    "compiled step": lambda net: lamina.jit(
        lambda net: lamina.grad(lambda net: net(X).sum())(net)
    )(net),
}  # fmt: skip


def assert_refused_in_our_words(net, run, read):
    """The call, or at the latest the use of what was kept, fails and says what to do."""
    with pytest.raises(LaminaError, match="fix:"):
        run(net)
        jnp.sum(read()) + 1


@pytest.mark.parametrize("keep", KEEPERS, ids=lambda keep: keep.__name__)
def test_what_a_hook_keeps_of_a_trace(keep):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    hook, read = keep()
    handle = net[0].register_forward_hook(hook)
    assert_refused_in_our_words(net, TRACED["jit"], read)
    handle.remove()
    np.testing.assert_allclose(lamina.jit(net)(X), net(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", TRACED.values(), ids=TRACED)
def test_what_a_hook_keeps_of_any_trace(run):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    hook, read = keep_in_dict()
    net[0].register_forward_hook(hook)
    assert_refused_in_our_words(net, run, read)
    assert not any(isinstance(p.data, jax.core.Tracer) for p in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_hooks_of_every_kind_keep(kind):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    hook, read = keep_in_list()
    KINDS[kind](net[1], hook)
    assert_refused_in_our_words(net, TRACED["compiled step"], read)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["grad", "backward"])
def test_what_a_hook_keeps_uncompiled_is_right_or_refused(kind, way):
    """PyTorch's way to look at activations and gradients while training."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    hidden = np.asarray(net[0](X))
    expected = {"forward": net(X), "pre": hidden, "backward": np.ones((2, 3))}[kind]
    hook, read = keep_in_list()
    KINDS[kind](net[1], hook)
    try:
        WAYS[way](net, X)
        found = np.asarray(read())
    except LaminaError as error:
        assert "fix:" in str(error)  # noqa: PT017
        return
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_a_hook_keeps_outside_of_traces_is_its_own():
    net, kept = nn.Linear(3, 3), []
    net.register_forward_hook(lambda module, args, output: kept.append(output))
    out = net(X)
    np.testing.assert_array_equal(kept[0], out)


def test_what_is_kept_and_used_up_within_one_call_is_fine():
    kept = []

    class Joined(nn.Module):
        def __init__(self):
            self.body = nn.Linear(3, 3)
            self.body.register_forward_hook(lambda module, args, output: kept.append(output))

        def forward(self, x):
            return self.body(x) + kept.pop()

    net = Joined()
    for _ in range(2):
        np.testing.assert_allclose(lamina.jit(net)(X), net(X), rtol=1e-5, atol=1e-6)


# Functions of jax.lax that meet a parameter.

P = np.random.default_rng(1).standard_normal((3, 3)).astype(np.float32)
LAX = {
    "exp": jax.lax.exp,
    "add": lambda p: jax.lax.add(p, P),
    "mul": lambda p: jax.lax.mul(P, p),
    "dot": lambda p: jax.lax.dot(P, p),
    "dot_general": lambda p: jax.lax.dot_general(P, p, (((1,), (0,)), ((), ()))),
    "reshape": lambda p: jax.lax.reshape(p, (9,)),
    "transpose": lambda p: jax.lax.transpose(p, (1, 0)),
    "dynamic_slice": lambda p: jax.lax.dynamic_slice(p, (0, 0), (1, 3)),
    "concatenate": lambda p: jax.lax.concatenate([p, P], 0),
    "broadcast_in_dim": lambda p: jax.lax.broadcast_in_dim(p, (2, 3, 3), (1, 2)),
    "select": lambda p: jax.lax.select(P > 0, p, P),
    "max": lambda p: jax.lax.max(p, 0.0),
    "top_k": lambda p: jax.lax.top_k(p, 1)[0],
    "rsqrt": lambda p: jax.lax.rsqrt(jax.lax.abs(p)),
    "clamp": lambda p: jax.lax.clamp(0.0, p, 1.0),
    "stop_gradient": jax.lax.stop_gradient,
}  # fmt: skip
LAX_CALLS = pytest.mark.parametrize("call", LAX.values(), ids=LAX)


class UsesLax(nn.Module):
    def __init__(self, call):
        self.call = call
        self.weight = nn.Parameter(P)

    def forward(self):
        return self.call(self.weight)


def assert_right_or_says_data(action, call):
    """``p.data`` is what such a function takes; a plain array from a box is right as well."""
    try:
        found = action()
    except Exception as error:
        said = messages(error)
        assert re.search(r"\.data\b", said), said
        return
    np.testing.assert_allclose(found, call(jnp.asarray(P)), rtol=1e-5, atol=1e-6)


@LAX_CALLS
def test_lax_functions_in_forward_say_data(call):
    net = UsesLax(call)
    assert_right_or_says_data(net, call)


@pytest.mark.parametrize("name", ["exp", "add", "dot", "top_k"])
def test_lax_functions_in_compiled_and_differentiated_functions_say_data(name):
    net = nn.Sequential(UsesLax(LAX[name]))
    assert_right_or_says_data(lamina.jit(lambda: net[0]()), LAX[name])
    assert_right_or_says_data(lambda: lamina.jit(lambda p: LAX[name](p[0].weight))(net), LAX[name])
    assert_right_or_says_data(
        lambda: lamina.value_and_grad(lambda n: (n[0]().sum(), n[0]()), has_aux=True)(net)[0][1],
        LAX[name],
    )


def test_convolutions_by_lax_say_data():
    class Convolution(nn.Module):
        def __init__(self):
            self.weight = nn.Parameter(np.ones((2, 1, 3, 3), np.float32))

        def forward(self, x):
            return jax.lax.conv_general_dilated(x, self.weight, (1, 1), "VALID")

    net, x = Convolution(), jnp.ones((1, 1, 3, 3))
    for call in (net, lamina.jit(net)):
        assert_right_or_says_data(lambda call=call: call(x).ravel(), lambda _: np.full(2, 9.0))


def test_lax_functions_and_buffers():
    """A buffer attribute is an array; its box is like a parameter."""
    net = nn.BatchNorm1d(3)
    np.testing.assert_array_equal(jax.lax.add(net.running_mean, net.running_var), np.ones(3))
    inside = UsesLax(jax.lax.exp)
    del inside.weight
    inside.register_buffer("weight", jnp.asarray(P))
    np.testing.assert_allclose(inside(), np.exp(P), rtol=1e-6)
    np.testing.assert_allclose(lamina.jit(inside)(), np.exp(P), rtol=1e-6)


# Control flow that depends on values.


def helper(x):
    if x.sum() > 0:  # line of helper
        return x
    return -x


class If(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # line of If
            return x
        return -x


class While(nn.Module):
    def forward(self, x):
        while jnp.abs(x).sum() > 1:  # line of While
            x = x / 2
        return x


class Int(nn.Module):
    def forward(self, x):
        return x[: int(x[0, 0])]  # line of Int


class Float(nn.Module):
    def forward(self, x):
        return x * float(x.sum())  # line of Float


class Range(nn.Module):
    def forward(self, x):
        for _ in range(x.astype(int)[0, 0]):  # line of Range
            x = x + 1
        return x


class Mask(nn.Module):
    def forward(self, x):
        return x[x > 0]  # line of Mask


class Numpy(nn.Module):
    def forward(self, x):
        return x + np.linalg.norm(np.asarray(x))  # line of Numpy


class Item(nn.Module):
    def forward(self, x):
        return x * x.sum().item()  # line of Item


class And(nn.Module):
    def forward(self, x):
        return x if x.any() and True else -x  # line of And


class Helper(nn.Module):
    def forward(self, x):
        return helper(x)  # line of Helper


class OfParameter(nn.Module):
    def __init__(self):
        self.gate = nn.Parameter(jnp.ones(()))

    def forward(self, x):
        return x if self.gate > 0 else -x  # line of OfParameter


class OfBuffer(nn.Module):
    def __init__(self):
        self.register_buffer("steps", jnp.zeros((), jnp.int32))

    def forward(self, x):
        self.steps += 1
        return x if self.steps > 3 else -x  # line of OfBuffer


FORMS = [
    If,
    While,
    Int,
    Float,
    Range,
    Mask,
    Numpy,
    Item,
    And,
    Helper,
    OfParameter,
    OfBuffer,
]
FLOW = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


class Inside(nn.Module):
    def __init__(self, inner):
        self.inner = inner

    def forward(self, x):
        return self.inner(x)  # line of Inside


@FLOW
def test_the_line_of_control_flow_is_shown(form):
    net = nn.Sequential(nn.Identity(), Inside(form()))
    error = caught(lambda: lamina.jit(net)(X))
    assert isinstance(error, DataDependentError)
    text = printed(error)
    assert f"# line of {form.__name__}" in text
    assert "# line of Inside" in text
    assert "1.inner" in str(error)
    if form is Helper:
        assert "# line of helper" in text


CONTROL_FLOW_TRANSFORMS = {
    "jit": lambda net: lamina.jit(net)(X),
    "closure": lambda net: lamina.jit(lambda x: net(x))(X),
    "vmap": lambda net: lamina.vmap(net)(jnp.asarray(X)[:, None]),
    "scan": lambda net: lamina.scan(lambda c, x: (c, net(x[None])), 0.0, jnp.asarray(X)),
    "remat": lambda net: lamina.remat(net)(X),
    "infer": lambda net: lamina.infer(net, X),
    "compiled module": lambda net: net.compile() or net(X),
    "grad in jit": lambda net: lamina.jit(
        lambda x: lamina.grad(lambda x: net(x).sum())(x)
    )(X),
}  # fmt: skip


@pytest.mark.parametrize("run", CONTROL_FLOW_TRANSFORMS.values(), ids=CONTROL_FLOW_TRANSFORMS)
def test_the_line_is_shown_under_every_transform(run):
    text = printed(caught(lambda: run(nn.Sequential(Inside(If())))))
    assert "# line of If" in text
    assert "# line of Inside" in text


def test_the_line_of_a_hook_is_shown():
    net = nn.Sequential(nn.Identity())

    def hook(module, args, output):
        return output if output.sum() > 0 else -output  # line of the hook

    net[0].register_forward_hook(hook)
    assert "# line of the hook" in printed(caught(lambda: lamina.jit(net)(X)))


def test_the_line_of_a_function_without_modules_is_shown():
    assert "# line of helper" in printed(caught(lambda: lamina.jit(helper)(X)))


def test_uncompiled_control_flow_works():
    for form in FORMS:
        assert Inside(form())(jnp.abs(jnp.asarray(X)) + 1) is not None, form


# Frames in tracebacks: one call and one forward for each module.


class Broken(nn.Module):
    def forward(self, x):
        raise ValueError("broken on purpose")


class Depth(nn.Module):
    """Tells how many frames lie below it on the stack."""

    def forward(self, x):
        frame, count = sys._getframe(), 0
        while frame is not None:
            frame, count = frame.f_back, count + 1
        return count


def by_class(inner, depth):
    for _ in range(depth):
        inner = Inside(inner)
    return inner


def by_sequential(inner, depth):
    for _ in range(depth):
        inner = nn.Sequential(inner)
    return inner


def with_kwargs(inner, depth):
    class Passing(nn.Module):
        def __init__(self, inner):
            self.inner = inner

        def forward(self, x=None):
            return self.inner(x=x) if not isinstance(self.inner, Broken | If) else self.inner(x)

    for _ in range(depth):
        inner = Passing(inner)
    return inner


NESTINGS = pytest.mark.parametrize(
    "nest", [by_class, by_sequential, with_kwargs], ids=lambda nest: nest.__name__
)
FAILURES = {
    "eager": (Broken, lambda net: net(X)),
    "jit": (Broken, lambda net: lamina.jit(net)(X)),
    "grad": (Broken, lambda net: lamina.grad(lambda x: net(x).sum())(jnp.asarray(X))),
    "control flow": (If, lambda net: lamina.jit(net)(X)),
}


@NESTINGS
@pytest.mark.parametrize(("bottom", "run"), FAILURES.values(), ids=FAILURES)
def test_two_frames_for_each_module_in_a_traceback(nest, bottom, run):
    frames, lines = [], []
    for depth in (10, 30):
        error = caught(lambda depth=depth: run(nest(bottom(), depth)))
        frames.append(len(traceback.extract_tb(error.__traceback__)))
        lines.append(printed(error).count('  File "'))
    assert frames[1] - frames[0] <= 2 * 20
    assert lines[1] - lines[0] <= 2 * 20


@NESTINGS
def test_two_frames_for_each_module_on_the_stack(nest):
    counts = [nest(Depth(), depth)(x=None) if nest is with_kwargs else nest(Depth(), depth)(None)
              for depth in (10, 30)]  # fmt: skip
    assert counts[1] - counts[0] <= 2 * 20


def test_an_error_is_explained_once_at_any_depth():
    error = caught(lambda: by_class(Broken(), 30)(X))
    assert isinstance(error, ValueError)
    assert str(error) == "broken on purpose"
    notes = [note for note in error.__notes__ if "in module" in note]
    assert len(notes) == 1
    assert "inner.inner" in notes[0]


# Models nested a thousand deep.

DEEP = 1000


CALLED = {"call", "jit", "grad", "backward", "step", "infer", "functional_call"}


def skip_calls_on_312():
    """Python 3.12 allows some hundred calls of objects inside one another, whatever its limit."""
    if sys.version_info[:2] == (3, 12):
        pytest.skip("Python 3.12 has a fixed limit on nested calls of objects")


def deep_model(nest, bottom=None):
    return nest(nn.Linear(3, 3) if bottom is None else bottom, DEEP)


def steps_of(net):
    opt = lamina.Optimizer(net, optax.sgd(0.1))
    opt.step(lamina.grad(lambda net: net(X).sum())(net))
    return opt


DEEP_USES = {
    "list": lambda net: [name for name, _ in net.named_parameters()],
    "modules": lambda net: sum(1 for _ in net.modules()),
    "state_dict": lambda net: net.state_dict(),
    "load": lambda net: net.load_state_dict(net.state_dict()),
    "call": lambda net: net(X),
    "jit": lambda net: lamina.jit(net)(X),
    "grad": lambda net: lamina.grad(lambda net: net(X).sum())(net),
    "backward": lambda net: lamina.backward(lambda: net(X).sum()),
    "step": steps_of,
    "infer": lambda net: lamina.infer(net, X),
    "materialize": lambda net: lamina.materialize(net),
    "functional_call": lambda net: lamina.functional_call(net, dict(net.state_dict()), X),
    "train": lambda net: net.eval().train(),
    "requires_grad_": lambda net: net.requires_grad_(False),
    "to": lambda net: net.to(jnp.bfloat16),
    "apply": lambda net: net.apply(lambda module: None),
    "reset": lambda net: net.reset_parameters(),
    "print": lambda net: repr(net),
    "summary": lambda net: str(lamina.summary(net)),
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "clone": lambda net: net.clone(),
}


@pytest.mark.parametrize("name", DEEP_USES)
def test_a_thousand_modules_inside_one_another(name):
    """With Python's own limit on recursion, which is the same afterwards."""
    if name in CALLED:
        skip_calls_on_312()
    limit = sys.getrecursionlimit()
    DEEP_USES[name](deep_model(by_class))
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize("name", ["list", "call", "jit", "step", "print", "deepcopy"])
def test_a_thousand_containers_inside_one_another(name):
    if name in CALLED:
        skip_calls_on_312()
    DEEP_USES[name](deep_model(by_sequential))


def test_a_deep_model_computes_what_its_bottom_computes():
    skip_calls_on_312()
    net = deep_model(by_class, nn.LazyLinear(3))
    out = lamina.jit(net)(X)
    bottom = net.get_submodule(".".join(["inner"] * DEEP))
    np.testing.assert_allclose(out, bottom(X), rtol=1e-5, atol=1e-6)
    name = ".".join(["inner"] * DEEP) + ".weight"
    assert [key for key in net.state_dict() if "weight" in key] == [name]
    np.testing.assert_array_equal(copy.deepcopy(net).get_parameter(name).data, bottom.weight.data)


@pytest.mark.parametrize(("bottom", "line"), [(Broken, "broken on purpose"), (If, "# line of If")])
def test_errors_in_a_deep_model_are_explained(bottom, line):
    skip_calls_on_312()
    error = caught(lambda: lamina.jit(deep_model(by_class, bottom()))(X))
    assert not isinstance(error, RecursionError)
    assert line in printed(error)


ENDLESS = """
import lamina
from lamina import nn

class Endless(nn.Module):
    def forward(self, x):
        return self(x)

for call in (Endless(), lamina.jit(Endless())):
    try:
        call(1.0)
    except RecursionError:
        print("recursion")
"""


def test_endless_recursion_is_still_an_error():
    """Room for deep models must not become a crash of the interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["recursion", "recursion"], done.stderr[-2000:]
    assert done.returncode == 0


# Wording.

LAZY = {
    "Linear": lambda: nn.LazyLinear(2),
    "inside": lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2)),
    "Conv2d": lambda: nn.LazyConv2d(2, 3),
    "several": lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2)),
}
UNKNOWN = {
    "materialize": lamina.materialize,
    "state_dict": lambda net: net.state_dict(),
    "optimizer": lambda net: lamina.Optimizer(net, optax.adam(0.1)).state_dict(),
}


@pytest.mark.parametrize("make", LAZY.values(), ids=LAZY)
@pytest.mark.parametrize("use", UNKNOWN.values(), ids=UNKNOWN)
def test_known_shapes_are_not_called_unknown(make, use):
    net = make()
    with pytest.raises(DeferredError) as info:
        use(net)
    text = str(info.value)
    assert "weight" in text
    assert not re.search(r"shape \(\d+(, \d+)*,?\) is not known", text), text
    for line in text.splitlines():
        if re.search(r"bias: (shape )?\(\d+,\)", line):
            assert re.search(r"fan|recipe|wait|weight", line), line


def test_a_bias_that_waits_says_for_what():
    net = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(DeferredError) as info:
        net[0].bias.data  # noqa: B018
    text = str(info.value)
    assert "0.bias" in text
    assert "fix:" in text
    assert not re.search(r"\(2,\) is not known", text)


class Asks(nn.Module):
    def __init__(self):
        self.hidden = nn.Linear(3, 3)

    def forward(self, x):
        return self.hiden(x)


MISSPELT = {
    "layer": (lambda: nn.Linear(1, 1).wieght, "weight"),
    "child": (lambda: nn.Sequential(Asks())[0].hiden, "hidden"),
    "in forward": (lambda: Asks()(X), "hidden"),
    "compiled": (lambda: lamina.jit(Asks())(X), "hidden"),
    "method": (lambda: nn.Linear(1, 1).state_dcit(), "state_dict"),
    "submodule": (lambda: nn.Sequential(Asks()).get_submodule("0.hiden"), "0.hidden"),
    "parameter": (lambda: Asks().get_parameter("hidden.wieght"), "hidden.weight"),
}


@pytest.mark.parametrize(("action", "meant"), MISSPELT.values(), ids=MISSPELT)
def test_a_suggestion_is_made_once(action, meant, capsys):
    """Python adds its own to an AttributeError that is printed."""
    error = caught(action)
    assert isinstance(error, AttributeError)
    sys.__excepthook__(type(error), error, error.__traceback__)
    for text in (capsys.readouterr().err, printed(error)):
        assert text.count("Did you mean") <= 1
        assert meant in text.split("Did you mean")[-1]
    assert f"Did you mean '{meant}'" in str(error)


class Kernel(nn.Module):
    def __init__(self):
        self.kernel = nn.Parameter(shape=(2, 3), init=nn.init.Ones())


class Holder(nn.Module):
    def __init__(self):
        self.block = nn.Sequential(nn.ReLU(), Kernel())
        self.layers = [Kernel()]


def assign(module):
    module.kernel = jnp.ones((3, 3))


def assign_inside(module):
    lamina.jit(lambda module: assign(module))(module)


WRONG = {
    "attribute": assign,
    "data": lambda module: setattr(module.kernel, "data", jnp.ones(3)),
    "compiled": assign_inside,
    "shape": lambda module: setattr(module.kernel, "shape", (3, 3)),
    "gradient": lambda module: setattr(module.kernel, "grad", jnp.ones(3)),
    "with a value": lambda module: (module.kernel.sum(), assign(module)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("path", ["block.1", "layers.0"])
def test_the_way_to_mend_a_shape_names_the_parameter(wrong, path):
    net = Holder()
    with pytest.raises(ShapeError) as info:
        wrong(net.get_submodule(path))
    text = str(info.value)
    assert f"{path}.kernel" in text
    assert "net.name" not in text
    assert "module.weight" not in text
    fix = text.split("fix:")[-1]
    assert "nn.Parameter(" not in fix or "kernel" in fix


def test_the_way_to_mend_a_shape_can_be_run():
    net = nn.Sequential(nn.Linear(2, 3), Kernel())
    with pytest.raises(ShapeError) as info:
        net[1].kernel = jnp.ones((5, 5))
    (line,) = re.findall(r"(net\S* = nn\.Parameter\(\w+\))", str(info.value))
    target, _, name = line.partition("(")
    value = jnp.ones((5, 5))
    exec(f"{target}(value)", {"net": net, "nn": nn, "value": value})
    assert name
    assert net[1].kernel.shape == (5, 5)
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.kernel"]
