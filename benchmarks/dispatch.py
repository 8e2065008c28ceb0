"""What a compiled call costs: one training step, and one forward call, of narrow deep MLPs.

The network is so narrow (width 64, batch 32) that Python and dispatch are a large part of every
step; a ratio near one says that a library adds nothing to hand-written JAX.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _timing import Contender, as_dicts, environment, interleave, ratio_table, write_json

WIDTH, BATCH, RATE = 64, 32, 1e-3
CHECKED_STEPS = 4
REFERENCE = "jax.jit"


class Problem(NamedTuple):
    """Weights in PyTorch's ``(out, in)`` layout, biases, and one batch."""

    layers: list[tuple[np.ndarray, np.ndarray]]
    x: np.ndarray
    y: np.ndarray


class Program(NamedTuple):
    """One library's compiled training step and forward call, each without arguments."""

    train: Callable[[], Any]
    forward: Callable[[], Any]
    wait: Callable[[Any], Any]


def make_problem(depth: int) -> Problem:
    """A network that keeps its activations at unit scale, so that no contender meets denormals."""
    random = np.random.default_rng(0)
    shape = (WIDTH, WIDTH)
    layers = [
        (np.linalg.qr(random.normal(size=shape))[0].astype("f4") * 2**0.5, np.zeros(WIDTH, "f4"))
        for _ in range(depth)
    ]
    x, y = random.normal(size=(2, BATCH, WIDTH)).astype("f4")
    return Problem(layers, x, y)


def wait_jax(result: jax.Array) -> jax.Array:
    return result.block_until_ready()


def wait_torch(result: Any) -> Any:
    return result.detach()  # computed already


def jax_program(problem: Problem, *, out_in: bool = False) -> Program:
    """As an expert writes it by hand: plain pytrees, donation, the loop rebinds the state.

    ``out_in`` keeps PyTorch's weight layout: what it costs is the layout's, not a library's.
    """
    params = [
        {"weight": jnp.asarray(weight if out_in else weight.T), "bias": jnp.asarray(bias)}
        for weight, bias in problem.layers
    ]
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
    tx = optax.adam(RATE)
    state = tx.init(params)

    def linear(layer, x):
        return x @ (layer["weight"].T if out_in else layer["weight"]) + layer["bias"]

    def apply(params, x):
        *hidden, last = params
        for layer in hidden:
            x = jax.nn.relu(linear(layer, x))
        return linear(last, x)

    def loss_of(params, x, y):
        return jnp.mean((apply(params, x) - y) ** 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    forward = jax.jit(apply)

    def train():
        nonlocal params, state
        params, state, loss = step(params, state, x, y)
        return loss

    return Program(train, lambda: forward(params, x), wait_jax)


def lamina_program(problem: Problem) -> Program:
    import lamina
    from lamina import nn

    modules = []
    for weight, bias in problem.layers:
        linear = nn.Linear(WIDTH, WIDTH)
        linear.weight.data, linear.bias.data = jnp.asarray(weight), jnp.asarray(bias)
        modules += [linear, nn.ReLU()]
    net = nn.Sequential(*modules[:-1])
    opt = lamina.Optimizer(net, optax.adam(RATE))
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)

    @lamina.jit
    def step(net, opt, x, y):
        loss, grads = lamina.value_and_grad(lambda net: nn.functional.mse_loss(net(x), y))(net)
        opt.step(grads)
        return loss

    @lamina.jit
    def forward(net, x):
        return net(x)

    return Program(lambda: step(net, opt, x, y), lambda: forward(net, x), wait_jax)


def equinox_program(problem: Problem) -> Program:
    import equinox as eqx

    modules = []
    for weight, bias in problem.layers:
        linear = eqx.nn.Linear(WIDTH, WIDTH, key=jax.random.key(0))
        values = jnp.asarray(weight), jnp.asarray(bias)
        linear = eqx.tree_at(lambda module: (module.weight, module.bias), linear, values)
        modules += [linear, eqx.nn.Lambda(jax.nn.relu)]
    net = eqx.nn.Sequential(modules[:-1])
    tx = optax.adam(RATE)
    state = tx.init(eqx.filter(net, eqx.is_array))
    batch = jnp.asarray(problem.x), jnp.asarray(problem.y)

    def loss_of(net, x, y):
        return jnp.mean((jax.vmap(net)(x) - y) ** 2)

    @eqx.filter_jit(donate="all-except-first")  # the batch is used again, all else is rebound
    def step(batch, net, state):
        loss, grads = eqx.filter_value_and_grad(loss_of)(net, *batch)
        updates, state = tx.update(grads, state, net)
        return eqx.apply_updates(net, updates), state, loss

    @eqx.filter_jit
    def forward(net, x):
        return jax.vmap(net)(x)

    def train():
        nonlocal net, state
        net, state, loss = step(batch, net, state)
        return loss

    return Program(train, lambda: forward(net, batch[0]), wait_jax)


def nnx_program(problem: Problem, *, cached: bool = False) -> Program:
    from flax import nnx

    modules = []
    for weight, bias in problem.layers:
        linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
        linear.kernel[...], linear.bias[...] = jnp.asarray(weight.T), jnp.asarray(bias)
        modules += [linear, nnx.relu]
    net = nnx.Sequential(*modules[:-1])
    opt = nnx.Optimizer(net, optax.adam(RATE), wrt=nnx.Param)
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)

    @functools.partial(nnx.jit, donate_argnums=(0, 1), graph=True, graph_updates=True)
    def step(net, opt, x, y):
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean((net(x) - y) ** 2))(net)
        opt.update(net, grads)
        return loss

    @functools.partial(nnx.jit, graph=True, graph_updates=True)
    def forward(net, x):
        return net(x)

    if cached:
        with nnx.set_graph_mode(True), nnx.set_graph_updates(True):
            step = nnx.cached_partial(step, net, opt)
            forward = nnx.cached_partial(forward, net)
        return Program(lambda: step(x, y), lambda: forward(x), wait_jax)
    return Program(lambda: step(net, opt, x, y), lambda: forward(net, x), wait_jax)


def torch_program(problem: Problem, *, compiled: bool = False) -> Program:
    import torch

    modules = []
    for weight, bias in problem.layers:
        linear = torch.nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight))
            linear.bias.copy_(torch.from_numpy(bias))
        modules += [linear, torch.nn.ReLU()]
    net = torch.nn.Sequential(*modules[:-1])
    opt = torch.optim.Adam(net.parameters(), lr=RATE)
    x, y = torch.from_numpy(problem.x), torch.from_numpy(problem.y)

    def loss_of(x, y):
        return torch.nn.functional.mse_loss(net(x), y)

    infer, update = net, opt.step
    if compiled:
        loss_of, infer, update = map(torch.compile, (loss_of, net, opt.step))

    def train():
        opt.zero_grad()
        loss = loss_of(x, y)
        loss.backward()
        update()
        return loss

    def forward():
        with torch.inference_mode():
            return infer(x)

    return Program(train, forward, wait_torch)


PROGRAMS: dict[str, Callable[[Problem], Program]] = {
    REFERENCE: jax_program,
    "jax.jit again": jax_program,
    "jax.jit out-in": functools.partial(jax_program, out_in=True),
    "lamina": lamina_program,
    "equinox": equinox_program,
    "nnx.cached_partial": functools.partial(nnx_program, cached=True),
    "nnx.jit": nnx_program,
    "torch": torch_program,
    "torch.compile": functools.partial(torch_program, compiled=True),
}


def check_losses(name: str, program: Program, expected: Sequence[float] | None) -> list[float]:
    """The first losses of ``program``, which must be those of the reference."""
    losses = [float(program.wait(program.train())) for _ in range(CHECKED_STEPS)]
    if expected is not None:
        np.testing.assert_allclose(losses, expected, rtol=1e-3, err_msg=f"{name}: other losses")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ",".join(PROGRAMS)
    parser.add_argument("--depths", default="4,50,200", help="numbers of linear layers")
    parser.add_argument("--modes", default="train,forward", help="train, forward, or both")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--budget", type=float, default=0.02, help="seconds a slice")
    parser.add_argument("--block-every", default="1,10", help="steps between two waits")
    parser.add_argument("--only", default=names, help=f"contenders out of {names}")
    parser.add_argument("--skip", default="", help="contenders to leave out")
    parser.add_argument("--torch-threads", type=int, default=1)
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()

    chosen, skipped = args.only.split(","), args.skip.split(",")
    if unknown := set(chosen) - set(PROGRAMS):
        parser.error(f"unknown contenders {sorted(unknown)}; there are {names}")
    selected = [
        name for name in PROGRAMS if name == REFERENCE or (name in chosen and name not in skipped)
    ]
    if any(name.startswith("torch") for name in selected):
        import torch

        torch.set_num_threads(args.torch_threads)
        print(f"PyTorch uses {args.torch_threads} thread(s)")

    results = []
    for depth in map(int, args.depths.split(",")):
        problem = make_problem(depth)
        programs: dict[str, Program] = {}
        expected = None
        for name in selected:
            programs[name] = PROGRAMS[name](problem)
            losses = check_losses(name, programs[name], expected)
            expected = expected or losses
        for mode in args.modes.split(","):
            contenders = [
                Contender(name, getattr(program, mode), program.wait)
                for name, program in programs.items()
            ]
            for block_every in map(int, args.block_every.split(",")):
                rows = interleave(
                    contenders, rounds=args.rounds, budget=args.budget, block_every=block_every
                )
                print(f"\n{mode}, depth {depth}, waiting every {block_every} step(s)\n")
                print(ratio_table(rows), flush=True)
                results.append(
                    {
                        "mode": mode,
                        "depth": depth,
                        "block_every": block_every,
                        "rows": as_dicts(rows),
                    }
                )
    versions = environment("jax", "lamina", "equinox", "flax", "optax", "torch")
    print("\n" + ", ".join(f"{name} {version}" for name, version in versions.items()))
    write_json(args.json, {"versions": versions, "results": results})


if __name__ == "__main__":
    main()
