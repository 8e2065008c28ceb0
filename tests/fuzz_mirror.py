"""What lamina's programs mean, in the plainest Python: the oracle of ``fuzz_programs.py``.

A parameter is a cell that holds an array, a buffer is a Python attribute, a loop is a Python loop
and a lane of ``vmap`` is one round of it. Nothing is compiled, traced twice or cached, and the only
transform taken from JAX is ``jax.value_and_grad``. Optimizers are written out, by name.

``namespace()`` has the names of ``lamina``, ``nn`` and ``optax``, as far as programs use them.
"""

import contextlib
import copy
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np

# Every module that is alive: gradients collect what a function writes into any of them.
ALIVE = weakref.WeakSet()
# The cells read since ``backward`` began, one set for each that is open.
READS = []


class Cell:
    """A parameter: a value, whether it is trained, and its gradient."""

    def __init__(self, data):
        self.value = jnp.asarray(data)
        self.requires_grad = True
        self.grad = None

    @property
    def data(self):
        for reads in READS:
            reads.add(self)
        return self.value

    @data.setter
    def data(self, data):
        self.value = jnp.asarray(data)

    @property
    def shape(self):
        return self.value.shape

    def __mul__(self, other):
        return self.data * other

    def __add__(self, other):
        return self.data + other

    def __setitem__(self, index, value):
        self.data = self.data.at[index].set(value)

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = Cell(self.value)
        twin.requires_grad, twin.grad = self.requires_grad, self.grad
        return twin

    __rmul__, __radd__ = __mul__, __add__


class Module:
    """Attributes in order of definition; arrays among them are state, cells are parameters."""

    def __new__(cls, *args, **kwargs):
        self = object.__new__(cls)
        vars(self).update(training=True, buffers=(), persistent=())
        ALIVE.add(self)
        return self

    def __init__(self):
        pass

    def __setattr__(self, name, value):
        own = vars(self).get(name)
        if isinstance(own, Cell) and not isinstance(value, Cell):
            own.data = value
        else:
            object.__setattr__(self, name, value)

    def __call__(self, *args):
        return self.forward(*args)

    def register_buffer(self, name, value, persistent=True):
        object.__setattr__(self, name, value)
        self.buffers = (*self.buffers, name)
        if persistent:
            self.persistent = (*self.persistent, name)

    def named_children(self):
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list) and value and isinstance(value[0], Module):
                yield from ((f"{name}.{i}", part) for i, part in enumerate(value))

    def children(self):
        return [child for _, child in self.named_children()]

    def named_modules(self, prefix=""):
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def modules(self):
        return list(dict.fromkeys(module for _, module in self.named_modules()))

    def named_parameters(self, remove_duplicate=True):
        seen = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Cell) and not (remove_duplicate and value in seen):
                    seen.add(value)
                    yield (f"{path}.{name}" if path else name), value

    def parameters(self):
        return [cell for _, cell in self.named_parameters()]

    def state_dict(self):
        state = {name: cell.data for name, cell in self.named_parameters(remove_duplicate=False)}
        for path, module in self.named_modules():
            for name in module.persistent:
                state[f"{path}.{name}" if path else name] = getattr(module, name)
        return state

    def load_state_dict(self, state):
        for path, module in self.named_modules():
            for name in vars(module):
                if (full := f"{path}.{name}" if path else name) in state:
                    setattr(module, name, jnp.asarray(state[full]))

    def get_submodule(self, path):
        return dict(self.named_modules())[path]

    def get_parameter(self, path):
        return dict(self.named_parameters(remove_duplicate=False))[path]

    def train(self, mode=True):
        vars(self)["training"] = mode
        for child in self.children():
            child.train(mode)
        return self

    def eval(self):
        return self.train(False)

    def requires_grad_(self, flag=True):
        for cell in self.parameters():
            cell.requires_grad = flag
        return self

    def zero_grad(self):
        for cell in self.parameters():
            cell.grad = None


class Linear(Module):
    def __init__(self, size_in, size_out, bias=True):
        self.weight = Cell(jnp.zeros((size_out, size_in)))
        self.bias = Cell(jnp.zeros(size_out)) if bias else None

    def forward(self, x):
        y = x @ self.weight.data.T
        return y if self.bias is None else y + self.bias.data


class Tanh(Module):
    def forward(self, x):
        return jnp.tanh(x)


class LayerNorm(Module):
    def __init__(self, size):
        self.weight, self.bias = Cell(jnp.ones(size)), Cell(jnp.zeros(size))

    def forward(self, x):
        centred = x - x.mean(-1, keepdims=True)
        scale = jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / scale * self.weight.data + self.bias.data


class BatchNorm1d(Module):
    def __init__(self, size):
        self.weight, self.bias = Cell(jnp.ones(size)), Cell(jnp.zeros(size))
        self.register_buffer("running_mean", jnp.zeros(size))
        self.register_buffer("running_var", jnp.ones(size))
        self.register_buffer("num_batches_tracked", jnp.zeros((), jnp.int32))

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0)
            seen = jax.lax.stop_gradient((mean, var * len(x) / (len(x) - 1)))
            self.running_mean = 0.9 * self.running_mean + 0.1 * seen[0]
            self.running_var = 0.9 * self.running_var + 0.1 * seen[1]
            self.num_batches_tracked = self.num_batches_tracked + 1
        return (x - mean) / jnp.sqrt(var + 1e-5) * self.weight.data + self.bias.data


class Sequential(Module):
    def __init__(self, *parts):
        for i, part in enumerate(parts):
            setattr(self, str(i), part)

    def __getitem__(self, index):
        return getattr(self, str(index))

    def __setitem__(self, index, part):
        setattr(self, str(index), part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


def is_array(value):
    return isinstance(value, (jax.Array, np.ndarray))


def is_number(value):
    return is_array(value) or isinstance(value, float)


def state_of(modules):
    """``{(module, attribute): array}`` of all state that is not a parameter."""
    return {
        (module, name): value
        for module in modules
        for name, value in vars(module).items()
        if is_array(value)
    }


def put(state):
    for (module, name), value in state.items():
        vars(module)[name] = value


@contextlib.contextmanager
def bound(cells, values):
    """Put other values into cells for a while."""
    former = [cell.value for cell in cells]
    for cell, value in zip(cells, values, strict=True):
        cell.value = value
    try:
        yield
    finally:
        for cell, value in zip(cells, former, strict=True):
            cell.value = value


def differentiate(fn, cells, arrays, has_aux):
    """The loss, the other results, and the gradients of ``fn(arrays)``; keeps what it writes."""
    slots = []

    def pure(values):
        before = state_of(list(ALIVE))
        with bound(cells, values[0]):
            out = fn(values[1])
        after = state_of(list(ALIVE))
        put(before)
        changed = {slot: v for slot, v in after.items() if v is not before.get(slot)}
        slots[:] = changed
        loss, aux = out if has_aux else (out, None)
        return loss, (aux, list(changed.values()))

    values = ([cell.value for cell in cells], arrays)
    (loss, (aux, written)), grads = jax.value_and_grad(pure, has_aux=True)(values)
    put(dict(zip(slots, written, strict=True)))
    return loss, aux, grads


def value_and_grad(fn, argnums=0, has_aux=False):
    numbers = (argnums,) if isinstance(argnums, int) else argnums

    def differentiated(*args):
        names, cells, arrays = {}, {}, {}
        for number in numbers:
            if isinstance(args[number], Module):
                trained = {n: c for n, c in args[number].named_parameters() if c.requires_grad}
                names[number] = trained
                cells.update((cell, None) for cell in trained.values())
            else:
                arrays[number] = args[number]

        def call(values):
            return fn(*(values.get(i, arg) for i, arg in enumerate(args)))

        loss, aux, (by_cell, by_array) = differentiate(call, list(cells), arrays, has_aux)
        found = dict(zip(cells, by_cell, strict=True))
        grads = [
            {name: found[cell] for name, cell in names[n].items()} if n in names else by_array[n]
            for n in numbers
        ]
        out = (loss, aux) if has_aux else loss
        return out, grads[0] if isinstance(argnums, int) else tuple(grads)

    return differentiated


def grad(fn, argnums=0, has_aux=False):
    def differentiated(*args):
        out, grads = value_and_grad(fn, argnums, has_aux)(*args)
        return (grads, out[1]) if has_aux else grads

    return differentiated


def backward(fn, *args, has_aux=False):
    cells = {c: None for m in list(ALIVE) for c in m.parameters() if c.requires_grad}
    READS.append(set())
    try:
        loss, aux, (grads, _) = differentiate(lambda _: fn(*args), list(cells), {}, has_aux)
    finally:
        read = READS.pop()
    for cell, gradient in zip(cells, grads, strict=True):
        if cell in read:
            cell.grad = gradient if cell.grad is None else cell.grad + gradient
    return (loss, aux) if has_aux else loss


def functional_call(net, params, *args, return_state=False):
    """Buffers get their values back; a plain array that forward assigns stays assigned."""
    buffers = {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in net.named_modules()
        for name in module.buffers
    }
    before = {slot: getattr(*slot) for slot in buffers.values()}
    by_name = dict(net.named_parameters(remove_duplicate=False))
    given = {by_name[name]: value for name, value in params.items() if name in by_name}
    put({slot: params[name] for name, slot in buffers.items() if name in params})
    inside = {slot: getattr(*slot) for slot in buffers.values()}
    with bound(given, given.values()):
        out = net(*args)
    state = {
        name: getattr(*slot) for name, slot in buffers.items() if getattr(*slot) is not inside[slot]
    }
    put(before)
    return (out, state) if return_state else out


class Lanes:
    """Runs a stacked module one slice at a time and stacks what was written again."""

    def __init__(self, modules):
        self.modules = modules
        self.cells = [cell for module in modules for cell in module.parameters()]
        self.inner = list(dict.fromkeys(m for module in modules for m in module.modules()))
        self.state = state_of(self.inner)
        self.rows = []

    @contextlib.contextmanager
    def lane(self, i):
        put({slot: value[i] for slot, value in self.state.items()})
        with bound(self.cells, [cell.value[i] for cell in self.cells]):
            yield
        self.rows.append(state_of(self.inner))
        put(self.state)

    def finish(self, order):
        for slot in self.state:
            put({slot: jnp.stack([self.rows[i][slot] for i in order])})


def first_axis(leaves):
    for leaf in leaves:
        if isinstance(leaf, Module):
            return leaf.parameters()[0].shape[0]
        if is_array(leaf):
            return len(leaf)
    return None


def stacked(rows):
    return jax.tree.map(lambda *values: jnp.stack(values), *rows)


def vmap(fn, in_axes=0):
    def mapped(*args):
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        mapped_args = [arg for arg, axis in zip(args, axes, strict=True) if axis is not None]
        size = first_axis(mapped_args)
        lanes = Lanes([arg for arg in mapped_args if isinstance(arg, Module)])
        rows = []
        for i in range(size):
            with lanes.lane(i):
                lane_args = [
                    arg if axis is None or isinstance(arg, Module) else arg[i]
                    for arg, axis in zip(args, axes, strict=True)
                ]
                rows.append(fn(*lane_args))
        lanes.finish(range(size))
        return stacked(rows)

    return mapped


def scan(fn, init, xs=None, length=None):
    leaves = jax.tree.leaves(xs)
    size = length if length is not None else first_axis(leaves)
    lanes = Lanes([leaf for leaf in leaves if isinstance(leaf, Module)])
    carry, rows = init, []
    for i in range(size):
        with lanes.lane(i):
            x = jax.tree.map(lambda leaf, i=i: leaf if isinstance(leaf, Module) else leaf[i], xs)
            carry, y = fn(carry, x)
            rows.append(y)
    lanes.finish(range(size))
    return carry, stacked(rows)


def stack(models):
    twin = copy.deepcopy(models[0])
    for cell, *others in zip(*(m.parameters() for m in [twin, *models]), strict=True):
        cell.data = jnp.stack([other.data for other in others])
    for mine, *others in zip(*(m.modules() for m in [twin, *models]), strict=True):
        for name, value in vars(mine).items():
            if is_array(value):
                vars(mine)[name] = jnp.stack([vars(other)[name] for other in others])
    return twin


def unstack(model):
    twins = []
    for i in range(first_axis([model])):
        twin = copy.deepcopy(model)
        for cell in twin.parameters():
            cell.data = cell.data[i]
        put({slot: value[i] for slot, value in state_of(twin.modules()).items()})
        twins.append(twin)
    return twins


class Sgd:
    def __init__(self, rate):
        self.rate = rate

    def update(self, name, gradient, count):
        return -self.rate * gradient


class Adam:
    """Kingma and Ba, algorithm 1; moments are kept under the parameter's name."""

    def __init__(self, rate, eps=1e-8):
        self.rate, self.eps = rate, eps
        self.first, self.second = {}, {}

    def update(self, name, gradient, count):
        first = self.first[name] = 0.9 * self.first.get(name, 0) + 0.1 * gradient
        second = self.second[name] = 0.999 * self.second.get(name, 0) + 0.001 * gradient**2
        corrected = first / (1 - 0.9**count)
        scale = jnp.sqrt(second / (1 - 0.999**count)) + self.eps
        return -self.rate * corrected / scale


class Optimizer:
    def __init__(self, net, tx):
        self.net, self.tx, self.count = net, tx, 0

    def step(self, grads=None):
        names = {name: cell for name, cell in self.net.named_parameters() if cell.requires_grad}
        if grads is None:
            grads = {name: cell.grad for name, cell in names.items() if cell.grad is not None}
        self.count += 1
        for name, gradient in grads.items():
            names[name].data = names[name].data + self.tx.update(name, gradient, self.count)

    def zero_grad(self):
        self.net.zero_grad()


def namespace():
    """The names under which programs find this module instead of lamina, nn and optax."""
    ALIVE.clear()
    F = types.SimpleNamespace(linear=lambda x, weight: x @ weight.data.T)
    nn = types.SimpleNamespace(
        Module=Module, Linear=Linear, Tanh=Tanh, LayerNorm=LayerNorm, BatchNorm1d=BatchNorm1d,
        Sequential=Sequential, Parameter=Cell, functional=F,
    )  # fmt: skip
    lamina = types.SimpleNamespace(
        jit=lambda fn, **options: fn, remat=lambda fn: fn, value_and_grad=value_and_grad,
        grad=grad, backward=backward, functional_call=functional_call, vmap=vmap, scan=scan,
        stack=stack, unstack=unstack, Optimizer=Optimizer,
    )  # fmt: skip
    # A compiled function of JAX would keep the values that cells have when it is traced.
    uncompiled = types.SimpleNamespace(**{**vars(jax), "jit": lambda fn: fn})
    optax = types.SimpleNamespace(sgd=Sgd, adam=Adam)
    return {"nn": nn, "F": F, "lamina": lamina, "optax": optax, "jax": uncompiled}
