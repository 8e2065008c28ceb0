"""What a compiled call costs: training steps and forward calls of narrow deep MLPs.

The network is so narrow (width 64, batch 32) that Python and dispatch are a large part of every
step; a ratio near one says that a library adds nothing to hand-written JAX. Each part is one
question:

    steady   a training step and a forward call, when everything is compiled
    first    from the weights to the first loss, in a fresh process
    second   the first step of another model of the same structure
    flip     a training step and an evaluation in turn, with the flag that says which it is
    beside   a training step while an unrelated module changes a number before each
    lazy     from unknown sizes to the first loss, in a fresh process
    eager    a forward call that is not compiled, per layer
    memory   resident memory and live arrays over 10,000 steps, in a fresh process
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _timing import (
    Contender,
    as_dicts,
    environment,
    interleave,
    markdown,
    quartiles,
    ratio_table,
    ratios,
    write_json,
)

WIDTH, BATCH, RATE = 64, 32, 1e-3
CHECKED_STEPS = 4
REFERENCE = "jax.jit"


class Problem(NamedTuple):
    """Weights in PyTorch's ``(out, in)`` layout, biases, and one batch."""

    layers: list[tuple[np.ndarray, np.ndarray]]
    x: np.ndarray
    y: np.ndarray


def keep_mode(training: bool) -> None:
    """For libraries where training and evaluation are two functions, or two models."""


class Program(NamedTuple):
    """One library's model, with its compiled training step and forward call.

    ``eager`` is the forward call without compilation. ``flip`` says whether training or evaluation
    follows. ``another`` makes a second model for the same compiled functions.
    """

    train: Callable[[], Any]
    forward: Callable[[], Any]
    wait: Callable[[Any], Any]
    eager: Callable[[], Any]
    flip: Callable[[bool], object] = keep_mode
    another: Callable[[], Program] | None = None


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
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
    tx = optax.adam(RATE)

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

    def instance() -> Program:
        params = [
            {"weight": jnp.asarray(weight if out_in else weight.T), "bias": jnp.asarray(bias)}
            for weight, bias in problem.layers
        ]
        state = tx.init(params)

        def train():
            nonlocal params, state
            params, state, loss = step(params, state, x, y)
            return loss

        return Program(
            train,
            lambda: forward(params, x),
            wait_jax,
            lambda: apply(params, x),
            another=instance,
        )

    return instance()


def lamina_program(problem: Problem, *, lazy: bool | None = None, beside: bool = False) -> Program:
    """As its guide says.

    ``lazy`` says whether input sizes are left open, and gives initial values instead of the
    problem's; ``beside`` changes a module that has nothing to do with the step before each step.
    """
    import lamina
    from lamina import nn

    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)

    @lamina.jit
    def step(net, opt, x, y):
        loss, grads = lamina.value_and_grad(lambda net: nn.functional.mse_loss(net(x), y))(net)
        opt.step(grads)
        return loss

    @lamina.jit
    def forward(net, x):
        return net(x)

    def instance() -> Program:
        modules = []
        for weight, bias in problem.layers:
            linear = nn.LazyLinear(WIDTH) if lazy else nn.Linear(WIDTH, WIDTH)
            if lazy is None:
                linear.weight.data, linear.bias.data = jnp.asarray(weight), jnp.asarray(bias)
            modules += [linear, nn.ReLU()]
        net = nn.Sequential(*modules[:-1])
        opt = lamina.Optimizer(net, optax.adam(RATE))
        unrelated = nn.Linear(WIDTH, WIDTH)
        unrelated.temperature = 1.0

        def train_beside():
            unrelated.temperature *= 0.999
            return step(net, opt, x, y)

        return Program(
            train_beside if beside else lambda: step(net, opt, x, y),
            lambda: forward(net, x),
            wait_jax,
            lambda: net(x),
            net.train,
            instance,
        )

    return instance()


def equinox_program(problem: Problem) -> Program:
    import equinox as eqx

    tx = optax.adam(RATE)
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

    def instance() -> Program:
        modules = []
        for weight, bias in problem.layers:
            linear = eqx.nn.Linear(WIDTH, WIDTH, key=jax.random.key(0))
            values = jnp.asarray(weight), jnp.asarray(bias)
            linear = eqx.tree_at(lambda module: (module.weight, module.bias), linear, values)
            modules += [linear, eqx.nn.Lambda(jax.nn.relu)]
        net = eqx.nn.Sequential(modules[:-1])
        state = tx.init(eqx.filter(net, eqx.is_array))

        def train():
            nonlocal net, state
            net, state, loss = step(batch, net, state)
            return loss

        def flip(training):
            nonlocal net
            net = eqx.nn.inference_mode(net, value=not training)

        return Program(
            train,
            lambda: forward(net, batch[0]),
            wait_jax,
            lambda: jax.vmap(net)(batch[0]),
            flip,
            instance,
        )

    return instance()


def nnx_program(problem: Problem, *, cached: bool = False) -> Program:
    from flax import nnx

    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)

    @functools.partial(nnx.jit, donate_argnums=(0, 1), graph=True, graph_updates=True)
    def step(net, opt, x, y):
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean((net(x) - y) ** 2))(net)
        opt.update(net, grads)
        return loss

    @functools.partial(nnx.jit, graph=True, graph_updates=True)
    def forward(net, x):
        return net(x)

    def instance() -> Program:
        modules = []
        for weight, bias in problem.layers:
            linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
            linear.kernel[...], linear.bias[...] = jnp.asarray(weight.T), jnp.asarray(bias)
            modules += [linear, nnx.relu]
        net = nnx.Sequential(*modules[:-1])
        opt = nnx.Optimizer(net, optax.adam(RATE), wrt=nnx.Param)
        train, infer = lambda: step(net, opt, x, y), lambda: forward(net, x)
        if cached:
            with nnx.set_graph_mode(True), nnx.set_graph_updates(True):
                bound_step = nnx.cached_partial(step, net, opt)
                bound_forward = nnx.cached_partial(forward, net)
            train, infer = lambda: bound_step(x, y), lambda: bound_forward(x)

        def flip(training):
            net.train() if training else net.eval()

        return Program(
            train,
            infer,
            wait_jax,
            lambda: net(x),
            keep_mode if cached else flip,
            None if cached else instance,
        )

    return instance()


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

    def eager():
        with torch.inference_mode():
            return net(x)

    return Program(train, forward, wait_torch, eager, net.train)


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


# Parts that compare contenders in this process, which take turns.


class Settings(NamedTuple):
    """What the command line chose."""

    names: list[str]
    modes: list[str]
    rounds: int
    starts: int
    budget: float
    block_every: list[int]
    steps: int


def make_programs(names: Sequence[str], problem: Problem) -> dict[str, Program]:
    """The contenders' programs, compiled, after a few steps that must have equal losses."""
    programs: dict[str, Program] = {}
    expected = None
    for name in names:
        programs[name] = PROGRAMS[name](problem)
        losses = check_losses(name, programs[name], expected)
        expected = expected or losses
    return programs


def measure_steady(depth: int, settings: Settings) -> list[dict[str, Any]]:
    programs, results = make_programs(settings.names, make_problem(depth)), []
    for mode in settings.modes:
        contenders = [
            Contender(name, getattr(program, mode), program.wait)
            for name, program in programs.items()
        ]
        for block_every in settings.block_every:
            rows = interleave(
                contenders,
                rounds=settings.rounds,
                budget=settings.budget,
                block_every=block_every,
            )
            print(f"\n{mode}, depth {depth}, waiting every {block_every} step(s)\n")
            print(ratio_table(rows), flush=True)
            results.append({"mode": mode, "block_every": block_every, "rows": as_dicts(rows)})
    return results


def measure_flip(depth: int, settings: Settings) -> list[dict[str, Any]]:
    def pair(program: Program, flips: bool) -> Callable[[], Any]:
        flip = program.flip if flips else keep_mode

        def both():
            flip(True)
            program.train()
            flip(False)
            return program.forward()

        return both

    programs = make_programs(settings.names, make_problem(depth))
    contenders = [Contender(n, pair(p, True), p.wait) for n, p in programs.items()]
    if "lamina" in programs:
        own = programs["lamina"]
        contenders.append(Contender("lamina, no flips", pair(own, False), own.wait))
    rows = interleave(contenders, rounds=settings.rounds, budget=settings.budget)
    print(f"\na training step and an evaluation in turn, depth {depth}\n")
    print(ratio_table(rows, unit="us/pair"), flush=True)
    return [{"rows": as_dicts(rows)}]


def measure_beside(depth: int, settings: Settings) -> list[dict[str, Any]]:
    problem = make_problem(depth)
    makers = {
        "lamina": lamina_program,
        "lamina again": lamina_program,
        "lamina, beside": functools.partial(lamina_program, beside=True),
    }
    programs = {name: make(problem) for name, make in makers.items()}
    contenders = [Contender(name, p.train, p.wait) for name, p in programs.items()]
    rows = interleave(contenders, rounds=settings.rounds, budget=settings.budget)
    print(f"\na training step beside a module that changes, depth {depth}\n")
    print(ratio_table(rows), flush=True)
    return [{"rows": as_dicts(rows)}]


def measure_eager(depth: int, settings: Settings) -> list[dict[str, Any]]:
    programs = make_programs(settings.names, make_problem(depth))
    contenders = [
        Contender(name.replace(".jit", ""), program.eager, program.wait)
        for name, program in programs.items()
        if name not in SAME_EAGER
    ]
    rows = interleave(contenders, rounds=settings.rounds, budget=max(settings.budget, 0.05))
    rows = [replace(row, seconds=row.seconds / depth) for row in rows]
    print(f"\na forward call without compilation, depth {depth}\n")
    print(ratio_table(rows, unit="us/layer"), flush=True)
    return [{"rows": as_dicts(rows)}]


def measure_second(depth: int, settings: Settings) -> list[dict[str, Any]]:
    compilations = 0

    def count(event: str, seconds: float, **_: Any) -> None:
        nonlocal compilations
        compilations += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(count)
    programs = make_programs(settings.names, make_problem(depth))
    chosen = {name: p.another for name, p in programs.items() if p.another is not None}
    firsts: dict[str, list[float]] = {name: [] for name in chosen}
    thirds: dict[str, list[float]] = {name: [] for name in chosen}
    compiled = dict.fromkeys(chosen, 0)
    order = random.Random(0)
    rounds = 1 + settings.rounds // 3
    for _ in range(rounds):
        for name in order.sample(list(chosen), len(chosen)):
            program = chosen[name]()
            gc.collect()
            before = compilations
            for seconds in (firsts[name], [], thirds[name]):
                start = time.perf_counter()
                program.wait(program.train())
                seconds.append(time.perf_counter() - start)
            compiled[name] += compilations - before
    rows = []
    for name in chosen:
        low, middle, high = quartiles(ratios(firsts[name], firsts[REFERENCE]))
        first, third = (statistics.median(seconds[name]) for seconds in (firsts, thirds))
        rows.append(
            [
                name,
                f"{first * 1e6:.0f}",
                f"{middle:.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{third * 1e6:.0f}",
                f"{compiled[name] / rounds:.2f}",
            ]
        )
    print(f"\nthe first step of another model of the same structure, depth {depth}\n")
    head = [
        "contender",
        "us, first step",
        "ratio",
        "interquartile",
        "us, third step",
        "compilations",
    ]
    print(markdown(head, rows), flush=True)
    return [{"first": firsts, "third": thirds, "compilations": compiled}]


# Parts that need a fresh process for every number. Each runs `child` there.


def child_first(name: str, depth: int, steps: int) -> dict[str, Any]:
    """Seconds from the problem's arrays to the first loss, by the clock and of CPU."""
    makers = {
        **PROGRAMS,
        "lamina, sizes given": functools.partial(lamina_program, lazy=False),
        "lamina, lazy": functools.partial(lamina_program, lazy=True),
    }
    problem = make_problem(depth)
    jnp.zeros(()).block_until_ready()  # starting the backend is not counted, nor are imports
    if name in ("lamina", "equinox") or name.startswith("lamina,"):
        importlib.import_module(name.partition(",")[0])
    clock, cpu = time.perf_counter(), time.process_time()
    program = makers[name](problem)
    built = time.perf_counter()
    program.wait(program.train())
    return {
        "build": built - clock,
        "clock": time.perf_counter() - clock,
        "cpu": time.process_time() - cpu,
    }


def child_memory(name: str, depth: int, steps: int) -> dict[str, Any]:
    """Resident memory in MiB and the number of live arrays, ten times over the steps."""
    program = PROGRAMS[name](make_problem(depth))
    record = []
    for done in range(steps + 1):
        if done % (steps // 10) == 0 and done:
            gc.collect()
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[1])
            mebibytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            record.append((done, mebibytes, len(jax.live_arrays())))
        program.wait(program.train())
        if done % 100 == 0:
            program.wait(program.forward())
    return {"record": record}


def fresh(child: str, name: str, depth: int, settings: Settings) -> dict[str, Any]:
    """Run a child in a fresh process, without the compilation cache on disk."""
    command = [sys.executable, __file__, "--child", child, name, str(depth), str(settings.steps)]
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def compare_starts(
    title: str, names: Sequence[str], depth: int, settings: Settings
) -> list[dict[str, Any]]:
    """Start every contender in turn, several times; the first is the reference."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(settings.starts):
        for name in order.sample(list(names), len(names)):
            runs[name].append(fresh("first", name, depth, settings))
    rows = []
    for name, own in runs.items():
        cells = [name]
        for kind in ("build", "clock", "cpu"):
            cells.append(f"{statistics.median(run[kind] for run in own):.2f}")
        for kind in ("clock", "cpu"):
            found = ratios((r[kind] for r in own), (r[kind] for r in runs[names[0]]))
            low, middle, high = quartiles(found)
            cells += [f"{middle:.2f}", f"{low:.2f}-{high:.2f}"]
        rows.append(cells)
    print(f"\n{title}, depth {depth}, {settings.starts} fresh processes each\n")
    head = ["contender", "s, build", "s, whole", "s of CPU"]
    head += ["ratio", "interquartile", "ratio of CPU", "interquartile"]
    print(markdown(head, rows), flush=True)
    return [{"runs": runs}]


def measure_first(depth: int, settings: Settings) -> list[dict[str, Any]]:
    names = [name for name in settings.names if name in FIRST]
    return compare_starts("from the weights to the first loss", names, depth, settings)


def measure_lazy(depth: int, settings: Settings) -> list[dict[str, Any]]:
    names = ["lamina, sizes given", "lamina, lazy"]
    return compare_starts("from a new model to the first loss", names, depth, settings)


def measure_memory(depth: int, settings: Settings) -> list[dict[str, Any]]:
    records, rows = {}, []
    for name in settings.names:
        if name not in FIRST:
            continue
        records[name] = fresh("memory", name, depth, settings)["record"]
        (_, early, arrays), (_, late, arrays_late) = records[name][0], records[name][-1]
        rows.append([name, f"{early:.1f}", f"{late - early:+.1f}", arrays, arrays_late - arrays])
    print(f"\n{settings.steps} steps, depth {depth}: after a tenth of them, and what came after\n")
    head = ["contender", "RSS, MiB", "growth, MiB", "live arrays", "more arrays"]
    print(markdown(head, rows), flush=True)
    return [{"records": records}]


FIRST = (REFERENCE, "jax.jit again", "lamina", "equinox")  # those that start fresh processes
SAME_EAGER = ("jax.jit again", "nnx.cached_partial", "torch.compile")
PARTS: dict[str, Callable[[int, Settings], list[dict[str, Any]]]] = {
    "steady": measure_steady,
    "first": measure_first,
    "second": measure_second,
    "flip": measure_flip,
    "beside": measure_beside,
    "lazy": measure_lazy,
    "eager": measure_eager,
    "memory": measure_memory,
}
CHILDREN = {"first": child_first, "memory": child_memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(PROGRAMS)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["steady"], metavar="PART", help="see above"
    )
    parser.add_argument("--depths", default="4,50,200", help="numbers of linear layers")
    parser.add_argument("--modes", default="train,forward", help="train, forward, or both")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--starts", type=int, default=7, help="fresh processes per contender")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of the part memory")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds a slice")
    parser.add_argument("--block-every", default="1,10", help="steps between two waits")
    parser.add_argument("--only", default=names, help=f"contenders out of {names}")
    parser.add_argument("--skip", default="", help="contenders to leave out")
    parser.add_argument("--torch-threads", type=int, default=1)
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, name, depth, steps = args.child
        print(json.dumps(CHILDREN[kind](name, int(depth), int(steps))))
        return

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

    settings = Settings(
        names=selected,
        modes=args.modes.split(","),
        rounds=args.rounds,
        starts=args.starts,
        budget=args.budget,
        block_every=[int(n) for n in args.block_every.split(",")],
        steps=args.steps,
    )
    results = [
        {"part": part, "depth": depth, **result}
        for part in args.parts
        for depth in map(int, args.depths.split(","))
        for result in PARTS[part](depth, settings)
    ]
    versions = environment("jax", "lamina", "equinox", "flax", "optax", "torch")
    print("\n" + ", ".join(f"{name} {version}" for name, version in versions.items()))
    write_json(args.json, {"versions": versions, "results": results})


if __name__ == "__main__":
    main()
