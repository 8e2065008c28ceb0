"""The lines that random programs are made of.

There is what programs may use, compiled functions, and what happens between their calls. ``$f`` is
the name of the function, ``$x`` and ``$y`` are a batch. ``$net`` is any model, another one at each
place; with a digit, as in ``$net1`` and ``$opt1``, the same one within a line; with a letter, as in
``$netA``, the same one in the function, its calls and its changes. ``$[[a|b]]`` is one of the
choices. ``fuzz_programs.py`` knows the other words.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Names and their source. All maps are from (rows, 3) to (rows, 3), so that any parts fit together.
LIBRARY = {
    "x4": """
x4, y4 = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32"))
""",
    "x5": """
x5, y5 = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 3)).astype("float32"))
""",
    "xs": """
xs = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 3)).astype("float32"))
""",
    "values": """
def values(name, shape, seed):
    noise = np.random.default_rng([seed, *name.encode()])
    return (0.5 * noise.normal(size=shape)).astype("float32")
""",
    "fill": """
def fill(net, seed):
    for name, p in net.named_parameters():
        p.data = values(name, p.shape, seed)
    return net
""",
    "halved": """
def halved(net):
    return {n: v * 0.5 if v.dtype == jnp.float32 else v for n, v in net.state_dict().items()}
""",
    "Scaled": """
class Scaled(nn.Module):  # a static number, a static string, a NumPy array and parameters
    def __init__(self):
        self.weight = nn.Parameter(jnp.ones(3))
        self.bias = nn.Parameter(jnp.zeros(3))
        self.gain = 1.0
        self.mode = "plus"
        self.shift = np.full(3, 0.5, "float32")

    def forward(self, x):
        y = self.gain * x * self.weight + self.shift
        return y + self.bias if self.mode == "plus" else y - self.bias.data
""",
    "Counted": """
class Counted(nn.Module):  # a buffer that is read before and after it is written
    def __init__(self, inner):
        self.inner = inner
        self.register_buffer("calls", jnp.zeros(()))
        self.register_buffer("mean", jnp.zeros(3))

    def forward(self, x):
        before = self.mean
        self.mean = 0.5 * before + 0.5 * x.mean(0)
        self.calls = self.calls + 1
        return self.inner(x) + self.mean - before
""",
    "Memory": """
class Memory(nn.Module):  # a buffer without a value at first, outside of the state dict
    def __init__(self, inner):
        self.inner = inner
        self.register_buffer("last", None, persistent=False)

    def forward(self, x):
        y = self.inner(x)
        previous, self.last = self.last, y.mean(0)
        return y if previous is None else y + previous
""",
    "Drifting": """
class Drifting(nn.Module):  # a plain array attribute that forward writes
    def __init__(self, inner):
        self.inner = inner
        self.offset = jnp.zeros(3)

    def forward(self, x):
        self.offset = 0.5 * self.offset + x.mean(0)
        return self.inner(x) + self.offset
""",
    "Twice": """
class Twice(nn.Module):  # one module called twice
    def __init__(self, inner):
        self.inner = inner

    def forward(self, x):
        return self.inner(jnp.tanh(self.inner(x)))
""",
    "Stubborn": """
class Stubborn(nn.Module):  # stays in evaluation mode
    def __init__(self, inner):
        self.inner = inner
        self.train()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        return self.inner(x)
""",
    "Checkpointed": """
class Checkpointed(nn.Module):
    def __init__(self, inner):
        self.inner = inner

    def forward(self, x):
        return x + lamina.remat(self.inner)(x)
""",
    "Loop": """
class Loop(nn.Module):  # a scan that writes state
    def __init__(self, inner):
        self.inner = inner
        self.register_buffer("rounds", jnp.zeros(()))

    def forward(self, x):
        def body(h, _):
            self.rounds = self.rounds + 1
            return jnp.tanh(self.inner(h)), h.mean()

        h, means = lamina.scan(body, x, length=2)
        return h + means.mean()
""",
    "Deep": """
class Deep(nn.Module):  # a scan over stacked blocks
    def __init__(self, block):
        self.blocks = lamina.stack([block, copy.deepcopy(block), copy.deepcopy(block)])

    def forward(self, x):
        return lamina.scan(lambda h, block: (jnp.tanh(block(h)), None), x, self.blocks)[0]
""",
    "Ensemble": """
class Ensemble(nn.Module):  # vmap over stacked members
    def __init__(self, member):
        self.members = lamina.stack([member, copy.deepcopy(member)])

    def forward(self, x):
        run = lamina.vmap(lambda member, x: member(x), in_axes=(0, None))
        return run(self.members, x).mean(0)
""",
    "apply_compiled": """
@lamina.jit
def apply_compiled(net, x):
    return net(x)
""",
    "Within": """
class Within(nn.Module):  # a compiled function inside forward
    def __init__(self, inner):
        self.inner = inner

    def forward(self, x):
        return apply_compiled(self.inner, x) - x
""",
    "Noisy": """
class Noisy(nn.Module):  # draws from a generator of its own
    def __init__(self):
        self.draws = lamina.Generator(5)

    def forward(self, x):
        return x + jax.random.normal(self.draws.next_key(), x.shape)
""",
    "Recorder": """
class Recorder(nn.Module):  # appends to a list, which a compiled function can't do at every call
    def __init__(self):
        self.inner = nn.Linear(3, 3)
        self.seen = []

    def forward(self, x):
        y = self.inner(x)
        self.seen.append(y.mean())
        return y
""",
    "Chain": """
class Chain(nn.Module):  # its parts are in a list
    def __init__(self, *parts):
        self.parts = list(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x
""",
    "Named": """
class Named(nn.Module):  # its parts are attributes
    def __init__(self, *parts):
        for i, part in enumerate(parts):
            setattr(self, f"part{i}", part)
        self.depth = len(parts)

    def forward(self, x):
        for i in range(self.depth):
            x = getattr(self, f"part{i}")(x)
        return x
""",
    "Scorer": """
class Scorer:  # a plain object that is called
    def __init__(self, net, rate):
        self.net, self.rate = net, rate

    def __call__(self, x):
        return self.rate * self.net(x)
""",
    "Trainer": """
class Trainer:  # a plain object with a compiled method
    def __init__(self, net, opt):
        self.net, self.opt, self.rate = net, opt, 1.0

    def loss(self, x, y):
        return self.rate * ((self.net(x) - y) ** 2).mean()

    def predict(self, x):
        return self.rate * self.net(x)

    @lamina.jit
    def step(self, x, y):
        loss, grads = lamina.value_and_grad(lambda net: self.loss(x, y))(self.net)
        self.opt.step(grads)
        return loss
""",
    "apply": """
def apply(net, x):
    return net(x)
""",
    "loss_of": """
def loss_of(net, x, y):
    return ((net(x) - y) ** 2).mean()
""",
    "in_thread": """
def in_thread(work):
    return side_by_side(work)[0]
""",
    "side_by_side": """
def side_by_side(*works):
    outs, errors = [None] * len(works), []

    def run(i, work):
        try:
            outs[i] = work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for error in errors:
        raise error
    return outs
""",
    "while_reading": """
def while_reading(net, work):  # other threads read the values over and over
    done, bad = threading.Event(), []

    def read():
        while not done.wait(0.001) and not bad:
            for name, value in net.state_dict().items():
                if isinstance(value, jax.core.Tracer) or value.is_deleted():
                    bad.append(name)
                elif not np.isfinite(np.array(value)).all():
                    bad.append(f"{name} is not finite")

    threads = [threading.Thread(target=read) for _ in range(2)]
    [thread.start() for thread in threads]
    try:
        return work(), bad
    finally:
        done.set()
        [thread.join() for thread in threads]
""",
    "short_lived": """
def short_lived(call):  # a model that is dropped after use: is it freed?
    net = fill(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), 99)
    out, gone = call(net), weakref.ref(net)
    del net
    gc.collect()
    return out, gone() is None
""",
}


@dataclass(frozen=True)
class Part:
    """A piece of a model: its source, what of it can be changed, and how it behaves."""

    source: str
    linears: tuple[str, ...] = ()  # where a linear layer can be reached and replaced
    attributes: tuple[tuple[str, str], ...] = ()  # what may be assigned, to what
    writes: bool = False  # forward writes state
    random: bool = False  # draws, or has initial values of its own: the mirror can't follow
    steady: bool = True  # keeps its structure, so that it may stand inside scan and vmap


LINEAR = Part("nn.Linear(3, 3)", ("",))
LEAVES = [
    LINEAR,
    LINEAR,
    Part("nn.Linear(3, 3, bias=False)"),
    Part("nn.Tanh()"),
    Part("nn.LayerNorm(3)"),
    Part("nn.BatchNorm1d(3)", attributes=((".running_mean", "jnp.full(3, 0.25)"),), writes=True),
    Part(
        "Scaled()",
        attributes=(
            (".gain", "2.0"), (".gain", "0.5"), (".mode", "'minus'"), (".mode", "'plus'"),
            (".shift", "np.zeros(3, 'float32')"), (".shift", "jnp.full(3, -1.0)"),
            (".shift[0]", "2.0"), (".weight[1]", "0.5"), (".bias", "jnp.full(3, 0.5)"),
        ),
    ),
    Part("nn.Dropout(0.5)", attributes=((".p", "0.25"), (".p", "0.5")), random=True),
    Part("Noisy()", random=True),
    Part("nn.LazyLinear(3)", random=True, steady=False),
]  # fmt: skip
WRAPPERS = ["Counted", "Memory", "Drifting", "Twice", "Stubborn", "Checkpointed", "Loop", "Within"]
WRITING = {"Counted", "Memory", "Drifting", "Loop"}
STACKED = [
    "nn.Linear(3, 3)",
    "Counted(nn.Linear(3, 3))",
    "nn.Sequential(nn.Linear(3, 3), nn.Tanh())",
]
# How models hold their parts, and how a part is reached.
STYLES = {
    "nn.Sequential": "{net}[{i}]",
    "Chain": "{net}.parts[{i}]",
    "Named": "{net}.part{i}",
}


@dataclass(frozen=True)
class Kind:
    """One kind of line.

    Args:
        name: what it is called in the table of refusals.
        text: statements; for a function its definition and what that needs.
        call: how the function is called.
        changes: what else may happen later, by name.
        foreign: plain JAX stands around it.
        nests: whether the result is one array, so that another function can use it.
        mirrored: whether the mirror can run it; None where it makes no difference.
    """

    name: str
    text: str
    call: str = ""
    changes: dict[str, str] = field(default_factory=dict)
    foreign: bool = False
    nests: bool = True
    mirrored: bool | None = None


# Compiled functions that compute.
FORWARD = [
    Kind("argument", """
@lamina.jit
def $f(net, x):
    return net(x)
""", "$f($net, $x)"),
    Kind("global name", """
current_$f = $netA
@lamina.jit
def $f(x):
    return current_$f(x)
""", "$f($x)", {"rebind a global": "current_$f = $net"}),
    Kind("closure", """
def make_$f(net):
    def swap(new):
        nonlocal net
        net = new
    return lamina.jit(lambda x: net(x)), swap
$f, swap_$f = make_$f($netA)
""", "$f($x)", {"rebind a cell": "swap_$f($net)"}),
    Kind("helper", """
inner_$f = $netA
def helper_$f(x):
    return inner_$f(x)
$f = lamina.jit(lambda net, x: net(x) + helper_$f(x))
""", "$f($net, $x)", {"rebind a helper's global": "inner_$f = $net"}),
    Kind("partial", """
$f = lamina.jit(functools.partial(apply, $netA))
""", "$f($x)"),
    Kind("partial as a helper", """
helper_$f = functools.partial(apply, $netA)
$f = lamina.jit(lambda net, x: net(x) - helper_$f(x))
""", "$f($net, $x)", {"rebind a partial": "helper_$f = functools.partial(apply, $net)"}),
    Kind("default value", """
@lamina.jit
def $f(net, x, other=$netA):
    return net(x) + other(x)
""", "$f($net, $x)"),
    Kind("default value of a helper", """
def helper_$f(x, other=$netA):
    return other(x)
$f = lamina.jit(lambda net, x: net(x) - helper_$f(x))
""", "$f($net, $x)"),
    Kind("method", """
trainer_$f = Trainer($netA, $optA)
$f = lamina.jit(trainer_$f.predict)
""", "$f($x)", {
        "replace behind a method": "trainer_$f.net = $net",
        "number behind a method": "trainer_$f.rate = $[[0.5|1.0]]",
    }),
    Kind("callable object", """
scorer_$f = Scorer($netA, 2.0)
$f = lamina.jit(lambda net, x: net(x) + scorer_$f(x))
""", "$f($net, $x)", {
        "replace behind an object": "scorer_$f.net = $net",
        "number of an object": "scorer_$f.rate = $[[1.0|3.0]]",
    }),
    Kind("module", """
$f = lamina.jit($netA)
""", "$f($x)"),
    Kind("nested", """
$f = lamina.jit(lambda net, x, y: net(x) + 0 * y + $forwardA)
""", "$f($net, $x, $y)"),
    Kind("dict in a dict", """
tools_$f = {"nets": {"main": $netA}, "scale": 2.0}
$f = lamina.jit(lambda x: tools_$f["scale"] * tools_$f["nets"]["main"](x))
""", "$f($x)", {
        "replace in a dict": 'tools_$f["nets"]["main"] = $net',
        "number in a dict": 'tools_$f["scale"] = $[[1.0|3.0]]',
    }),
    Kind("list", """
list_$f = [$net, $net]
$f = lamina.jit(lambda x: sum(net(x) for net in list_$f))
""", "$f($x)", {
        "replace in a list": "list_$f[$[[0|1]]] = $net",
        "append to a list": "list_$f.append($net)",
    }),
    Kind("namespace as an argument", """
holder_$f = types.SimpleNamespace(net=$netA, scale=2.0)
$f = lamina.jit(lambda holder, x: holder.scale * holder.net(x))
""", "$f(holder_$f, $x)", {
        "replace in a namespace": "holder_$f.net = $net",
        "number in a namespace": "holder_$f.scale = $[[1.0|3.0]]",
    }),
    Kind("namespace in a closure", """
holder_$f = types.SimpleNamespace(net=$netA, scale=2.0)
$f = lamina.jit(lambda x: holder_$f.scale * holder_$f.net(x))
""", "$f($x)", {
        "replace in a closed namespace": "holder_$f.net = $net",
        "number in a closed namespace": "holder_$f.scale = $[[1.0|3.0]]",
    }),
    Kind("name that is None", """
extra_$f = None
$f = lamina.jit(lambda x: x if extra_$f is None else extra_$f(x))
""", "$f($x)", {"rebind None": "extra_$f = $[[$net|$net|None]]"}),
    Kind("containers of arguments", """
$f = lamina.jit(lambda nets, x: nets["a"](x) - nets["b"][0](x) * nets["c"])
""", '$f({"a": $net, "b": [$net], "c": $[[0.5|2.0]]}, $x)'),
    Kind("flag of another", """
$f = lamina.jit(lambda x: $netA(x) * (2 if $netB.training else 3))
""", "$f($x)", {"flag": "$netB.train($[[True|False]])"}),
    Kind("static argument", """
@functools.partial(lamina.jit, static_argnames="power")
def $f(net, x, power):
    return sum(net(x) for _ in range(power))
""", "$f($net, $x, power=$[[1|2]])"),
    Kind("class named inside", """
@lamina.jit
def $f(net, x):
    count = sum(isinstance(part, nn.Linear) for part in net.modules())
    return (1 + count) * net(x)
""", "$f($net, $x)"),
    Kind("learner inside", """
@lamina.jit
def $f(net, x):
    twin = copy.deepcopy(net)
    grads = lamina.grad(lambda twin: (twin(x) ** 2).mean())(twin)
    for name, p in twin.named_parameters():
        if name in grads:
            p.data = p.data - 0.1 * grads[name]
    return twin(x)
""", "$f($net, $x)"),
    Kind("functional_call", """
@lamina.jit
def $f(net, params, x):
    return lamina.functional_call(net, params, x, return_state=True)
""", "$f($known1, $[[$known1.state_dict()|halved($known1)|{}]], $x)", nests=False),
    Kind("handed out", """
@lamina.jit
def $f(net, x):
    before = dict(net.state_dict())
    return before, net(x), net.state_dict(), [p.data for p in net.parameters()], x
""", "$f($known, $x)", nests=False),
    Kind("stacked", """
models_$f = lamina.stack([fill($stacked1, 1), fill($stacked1, 2), fill($stacked1, 3)])
$f = lamina.jit(
    lambda models, x: lamina.vmap(lambda net, x: net(x), in_axes=(0, None))(models, x).sum(0)
)
""", "$[[$f(models_$f, $x)|$f(models_$f, $x)|lamina.unstack(models_$f)[1]($x)]]"),
    Kind("lanes", """
inner_$f = lamina.jit(lambda net, x: net(x))
$f = lamina.jit(lambda net, xs: lamina.vmap(lambda x: inner_$f(net, x))(xs).sum((0, 1)))
""", "$f($pure, xs)"),
    Kind("loop over time", """
$f = lamina.jit(
    lambda net, xs: lamina.scan(lambda h, x: (jnp.tanh(net(h) + x), h.mean()), xs[0], xs)
)
""", "$f($steady, xs)", nests=False),
    Kind("decay", """
@lamina.jit
def $f(net, x):
    for p in net.parameters():
        p.data = p.data * 0.9
    return net(x)
""", "$f($net, $x)"),
    Kind("load inside", """
@lamina.jit
def $f(net, x):
    net.load_state_dict(halved(net))
    return net(x)
""", "$f($known, $x)"),
    Kind("rng inside", """
@lamina.jit
def $f(net, x, seed):
    with lamina.rng(seed):
        return net(x)
""", "$f($net, $x, $[[1|2]])", mirrored=False),
    Kind("recorder", """
recorder_$f = fill(Recorder(), $number)
$f = lamina.jit(lambda x: recorder_$f(x))
""", "$[[$f|recorder_$f]]($x)"),
]  # fmt: skip

# Compiled functions that compute gradients.
TRAINING = [
    Kind("step", """
@lamina.jit
def $f(net, opt, x, y):
    loss, grads = lamina.value_and_grad(lambda net: loss_of(net, x, y))(net)
    opt.step(grads)
    return loss
""", "$f($net1, $opt1, $x, $y)"),
    Kind("step with backward", """
@lamina.jit
def $f(x, y):
    $optA.zero_grad()
    loss = lamina.backward(lambda: loss_of($netA, x, y))
    $optA.step()
    return loss
""", "$f($x, $y)"),
    Kind("gradients that add up", """
@lamina.jit
def $f(net, x, y):
    return lamina.backward(lambda: loss_of(net, x, y))
""", "$f($net, $x, $y)"),
    Kind("step with other results", """
@lamina.jit
def $f(net, opt, x, y):
    def loss(net):
        h = net(x)
        return ((h - y) ** 2).mean(), {"h": h, "state": net.state_dict()}
    (loss, aux), grads = lamina.value_and_grad(loss, has_aux=True)(net)
    opt.step(grads)
    return loss, aux, grads
""", "$f($known1, $opt1, $x, $y)", nests=False),
    Kind("step by hand", """
@lamina.jit
def $f(net, x, y):
    grads = lamina.grad(lambda net: loss_of(net, x, y))(net)
    for name, p in net.named_parameters():
        if name in grads:
            p.data = p.data - 0.05 * grads[name]
    return grads
""", "$f($net, $x, $y)", nests=False),
    Kind("compiled method", """
trainer_$f = Trainer($netA, $optA)
""", "trainer_$f.step($x, $y)", {
        "replace behind a trainer": "trainer_$f.net, trainer_$f.opt = $net1, $opt1",
        "number of a trainer": "trainer_$f.rate = $[[0.5|1.0]]",
    }),
    Kind("gradients of two models", """
@lamina.jit
def $f(one, two, x, y):
    return lamina.value_and_grad(
        lambda one, two: ((one(x) * two(x) - y) ** 2).mean(), argnums=(0, 1)
    )(one, two)
""", "$f($net, $net, $x, $y)", nests=False),
    Kind("moving average", """
average_$f = copy.deepcopy($netA)
@lamina.jit
def $f(average, net, opt, x, y):
    loss, grads = lamina.value_and_grad(lambda net: loss_of(net, x, y))(net)
    opt.step(grads)
    old = dict(net.named_parameters())
    for name, p in average.named_parameters():
        if name in old:
            p.data = 0.9 * p.data + 0.1 * old[name].data
    return average(x)
""", "$f(average_$f, $netA, $optA, $x, $y)"),
    Kind("step with a compiled loss", """
loss_$f = lamina.jit(loss_of)
@lamina.jit
def $f(net, opt, x, y):
    loss, grads = lamina.value_and_grad(loss_$f)(net, x, y)
    opt.step(grads)
    return loss
""", "$f($net1, $opt1, $x, $y)"),
    Kind("gradient of the input", """
square_$f = lamina.value_and_grad(lambda net, x: (net(x) ** 2).mean(), argnums=(0, 1))
$f = lamina.jit(lambda net, x: square_$f(net, x))
""", "$f($net, $x)", nests=False),
    Kind("short-lived model", """
$f = lamina.jit(lambda net, x, y: lamina.value_and_grad(loss_of)(net, x, y))
""", "short_lived(lambda net: $f(net, $x, $y))", nests=False),
]  # fmt: skip

# What happens between calls.
CHANGES = [
    Kind("freeze", "$linearA.weight.requires_grad = False",
         changes={"freeze": "$linearA.weight.requires_grad = $[[True|True|False]]"}),
    Kind("freeze all", "$netA.requires_grad_(False)",
         changes={"freeze all": "$netA.requires_grad_()"}),
    Kind("train or eval", "$[[$net|$part]].$[[train|eval]]()"),
    Kind("replace a module", "$replacement"),
    Kind("replace a linear layer", "$linear = fill(nn.Linear(3, 3), $number)"),
    Kind("tie", "$linear.weight = $linear.weight"),
    Kind("replace a parameter",
         "$linear.weight = nn.Parameter(jnp.asarray(values('new', (3, 3), $number)))"),
    Kind("share a module", "$linear = $linear"),
    Kind("load", "$known1.load_state_dict(halved($known1))"),
    Kind("load a copy", """
$known1.load_state_dict({n: np.array(v) for n, v in copy.deepcopy($known1).state_dict().items()})
"""),
    Kind("load the state before a step", """
saved$number1 = out = dict($known1.state_dict())
out = $training
$known1.load_state_dict(saved$number1)
"""),
    Kind("write an element", "$linear.weight[0, 1] = $[[0.5|-1.0]]"),
    Kind("write a value", "$linear.weight.data = values('w', (3, 3), $number)"),
    Kind("assign a value", "$linear.weight = jnp.asarray(values('w', (3, 3), $number))"),
    Kind("assign an attribute", "$attribute"),
    Kind("new attribute", "$net.note$[[0|1]] = $[[1.0|2.0]]"),
    Kind("read the state", "out = dict($known.state_dict())"),
    Kind("read parameters", "out = [p.data for p in $known.parameters()]"),
    Kind("read the optimizer", "out = $optA.state_dict()", mirrored=False),
    Kind("read gradients", "out = [p.grad for p in $known.parameters()]"),
    Kind("drop gradients", "$net.zero_grad()"),
    Kind("copy", "$copy"),
    Kind("uncompiled call", "out = $net($x)"),
    Kind("uncompiled gradient", "out = lamina.backward(lambda net: (net($x) ** 2).mean(), $net)"),
    Kind("uncompiled step", """
loss$number1, grads$number1 = lamina.value_and_grad(loss_of)($net1, $x, $y)
$opt1.step(grads$number1)
out = loss$number1
"""),
    Kind("clone", "out = $known.clone()($x)", mirrored=False),
    Kind("seed", "lamina.manual_seed($[[0|1|2]])", mirrored=False),
    Kind("rng around a call", """
with lamina.rng($[[0|1]]):
    out = $forward
""", mirrored=False),
    Kind("hook", """
handle$numberA = $linear.register_forward_hook(lambda net, args, out: 2 * out)
""", changes={"remove a hook": "handle$numberA.remove()"}, mirrored=False),
    Kind("side by side", """
one$number1 = lamina.jit(lambda net, x: 2 * net(x))
two$number1 = lamina.jit(lambda net, x: 3 * net(x))
out = side_by_side(lambda: one$number1($still, $x), lambda: two$number1($still, $x))
""", mirrored=True),
    Kind("eval_shape around", "out = jax.eval_shape(lambda x: $inner, x4) is None", foreign=True),
    Kind("make_jaxpr around", "out = jax.make_jaxpr(lambda x: $inner)(x4) is None", foreign=True),
    Kind("jax.vmap around", "out = jax.vmap(lambda x: $inner)(xs)", foreign=True),
    Kind("jax scan around", """
out = jax.lax.scan(lambda h, x: (h, $inner), 0.0, xs)[1]
""", foreign=True),
    Kind("jax.jit around", """
foreign$numberA = jax.jit(lambda x: $inner)
out = foreign$numberA(x4)
""", changes={"jax.jit around": "out = foreign$numberA($x)"}, foreign=True),
    Kind("jax.grad around", """
out = jax.grad(lambda x: sum(v.sum() for v in jax.tree.leaves($inner)))(x4)
""", foreign=True),
    Kind("jax.jit around functional_call", """
out = jax.jit(lambda params: lamina.functional_call($known1, params, $x, return_state=True))(
    dict($known1.state_dict())
)
"""),
    Kind("jax.grad around functional_call", """
def loss$number1(params):
    return (lamina.functional_call($known1, params, $x, return_state=True)[0] ** 2).mean()
grads$number1 = jax.grad(loss$number1, allow_int=True)(dict($known1.state_dict()))
out = {n: g for n, g in grads$number1.items() if g.dtype == jnp.float32}
"""),
]  # fmt: skip
