"""Random programs, run three ways: compiled, uncompiled, and by ``fuzz_mirror.py``.

    python tests/fuzz_programs.py --seconds 600 --seed 0      # seeds 0, 1, 2 ... for ten minutes
    python tests/fuzz_programs.py --seed 17 --show            # the source of one program
    python tests/fuzz_programs.py --seed 17 --programs 1      # run it again

A program is a list of lines of ordinary source. Each line is run by a copy of ``lamina`` whose
``jit`` returns the function itself, and by ``lamina`` as it is; programs without random draws also
run on the mirror, which has neither a trace nor a cache. After each line the results must agree.
The state of all models and optimizers must agree at the lines that are watched: reading a value
changes what a compiled step may donate, so some programs are watched at every line, some at the end
only. Nothing may be a tracer or deleted, and an array that was once handed out keeps its value.

A line may be refused with a ``LaminaError`` that ends with its fix; the others then leave it out,
so that whatever it changed is found. Where plain JAX stands around a line and the mirror keeps a
tracer, nothing can be right, and the compiled program has to refuse the line. A program that fails
is cut down to the lines it needs, and printed.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import copy
import functools
import gc
import importlib.util
import pathlib
import random
import re
import sys
import textwrap
import threading
import time
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lamina


def beside(name: str) -> Any:
    """Import a file that stands beside this one, which is no package."""
    path = pathlib.Path(__file__).parent / f"{name}.py"
    loader = importlib.util.spec_from_file_location(f"lamina_{name}", path)
    assert loader is not None
    assert loader.loader is not None
    module = sys.modules[loader.name] = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return module


mirror, lines = beside("fuzz_mirror"), beside("fuzz_lines")
Kind, Part = lines.Kind, lines.Part

RELATIVE, ABSOLUTE = 2e-3, 2e-4
# Attributes that are compared, beside what is in the state dict.
SHOWN = {
    "Scaled": ("gain", "mode", "shift"),
    "Drifting": ("offset",),
    "Memory": ("last",),
    "Recorder": ("seen",),
}
WAYS = ("compiled", "uncompiled", "mirror")

HEADER = """\
import copy, functools, gc, sys, threading, types, weakref
import jax, jax.numpy as jnp, numpy as np, optax
import lamina
from lamina import nn
from lamina.nn import functional as F

if "--uncompiled" in sys.argv:
    lamina.jit = lambda fn, **options: fn
lamina.manual_seed(0)
"""
_LIBRARY = compile("\n".join(lines.LIBRARY.values()), "library", "exec")


# Programs.


@dataclass(frozen=True, eq=False)
class Line:
    """A statement, what it is called in the table, and whether plain JAX stands around it."""

    text: str
    kind: str
    foreign: bool = False


@dataclass(frozen=True)
class Program:
    """Lines, the lines after which all state is compared, and whether the mirror can run it."""

    lines: tuple[Line, ...]
    watched: frozenset[Line]
    mirrored: bool

    def source(self, mark: Line | None = None) -> str:
        """Return a script; ``mark`` is the line that failed."""
        body = ""
        for line in self.lines:
            body += line.text + ("  # <-- here\n" if line is mark else "\n")
            body += "print(out)\n" if re.match(r"out\b", line.text) else ""
        wanted, text = set(), body
        for name in reversed(lines.LIBRARY):
            if re.search(rf"\b({name}|{name.replace('x', 'y')})\b", text):
                wanted.add(name)
                text += lines.LIBRARY[name]
        used = [lines.LIBRARY[name] for name in lines.LIBRARY if name in wanted]
        return HEADER + "".join(used) + "\n" + body


class Unsuitable(Exception):
    """A line needs what this program does not have."""


@dataclass
class Net:
    """What the writer knows about a model."""

    style: str
    parts: list[Part]

    @property
    def writes(self) -> bool:
        return any(part.writes for part in self.parts)

    @property
    def random(self) -> bool:
        return any(part.random for part in self.parts)

    @property
    def known(self) -> bool:
        return not any("Lazy" in part.source for part in self.parts)

    @property
    def steady(self) -> bool:
        return all(part.steady for part in self.parts)


# Which models a word may stand for.
NETS: dict[str, Callable[[Net], bool]] = {
    "net": lambda net: True,
    "known": lambda net: net.known,
    "pure": lambda net: not net.writes,
    "still": lambda net: not net.writes and not net.random,
    "steady": lambda net: net.steady,
}
_CHOICE = re.compile(r"\$\[\[(.*?)\]\]")
_WORD = re.compile(r"\$([a-z]+)([A-Z0-9]?)")
Scope = dict[str, str]


class Writer:
    """Writes one program: knows which names there are, and what can be done with them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.mirrored = seed % 5 not in (3, 4)
        self.nets: dict[str, Net] = {}
        self.optimizers: dict[str, str] = {}
        self.functions: list[tuple[Kind, Scope]] = []
        self.later: list[tuple[Kind, str, str, Scope]] = []
        self.lines: list[Line] = []
        self.numbers = 0
        self.pinned: set[str] = set()  # parts that later lines count on
        self.loops = 0  # an uncompiled loop is compiled at each call: one is enough
        # Each program has only a few kinds of lines, so that these meet often.
        self.kinds = [
            [kind for kind in self.random.sample(kinds, count) if self.fits(kind)]
            for kinds, count in ((lines.FORWARD, 6), (lines.TRAINING, 3), (lines.CHANGES, 10))
        ]

    def fits(self, kind: Kind) -> bool:
        return kind.mirrored in (None, self.mirrored) and (self.mirrored or not kind.foreign)

    def one(self, choices: Iterable[Any]) -> Any:
        found = list(choices)
        if not found:
            raise Unsuitable
        return self.random.choice(found)

    # Words.

    def expand(self, text: str, scope: Scope) -> str:
        """Replace the words of a template; ``scope`` has those that are bound already."""
        here = dict(scope)

        def word(match: re.Match[str]) -> str:
            name, tag = match.groups()
            key = ("net" if name in NETS else name) + tag
            bound = scope if tag.isalpha() else here
            if key not in bound:
                value = self.word(name, tag, bound)
                if not tag and name not in "fxy":
                    return value
                bound[key] = value
                if name == "linear" and tag.isalpha():
                    self.pinned.add(value)
            return bound[key]

        text = _CHOICE.sub(lambda match: self.one(match[1].split("|")), text)
        return _WORD.sub(word, text)

    def word(self, name: str, tag: str, scope: Scope) -> str:
        if name in NETS:
            return self.one(key for key, net in self.nets.items() if NETS[name](net))
        if name == "y":
            return "y" + scope["x"][1:]
        if name == "opt":
            return self.opt(scope.setdefault(f"net{tag}", self.one(self.nets)))
        return getattr(self, f"a_{name}")()

    def a_f(self) -> str:
        return f"f{self.a_number()}"

    def a_x(self) -> str:
        return self.one(["x4", "x4", "x5"])

    def a_number(self) -> str:
        self.numbers += 1
        return str(self.numbers)

    def a_stacked(self) -> str:
        return self.one(lines.STACKED)

    def a_linear(self) -> str:
        return self.one(
            self.path(name, i) + path
            for name, net in self.nets.items()
            for i, part in enumerate(net.parts)
            for path in part.linears
        )

    def a_part(self) -> str:
        name = self.one(self.nets)
        return self.path(name, self.random.randrange(len(self.nets[name].parts)))

    def a_attribute(self) -> str:
        return self.one(
            f"{self.path(name, i)}{path} = {value}"
            for name, net in self.nets.items()
            for i, part in enumerate(net.parts)
            for path, value in part.attributes
        )

    def a_replacement(self) -> str:
        name, i = self.one(
            (name, i)
            for name, net in self.nets.items()
            for i in range(len(net.parts))
            if not any(pinned.startswith(self.path(name, i)) for pinned in self.pinned)
        )
        parts = self.nets[name].parts
        parts[i] = self.part()
        if not any(part.linears for part in parts):
            parts[i] = lines.LINEAR
        return f"{self.path(name, i)} = {self.filled(parts[i].source)}"

    def a_copy(self) -> str:
        name = self.one(key for key, net in self.nets.items() if net.known)
        if len(self.nets) > 3:
            raise Unsuitable
        twin = f"net{len(self.nets)}"
        self.nets[twin] = Net(self.nets[name].style, list(self.nets[name].parts))
        return f"{twin} = copy.deepcopy({name})"

    def a_forward(self, x: str | None = None, y: str | None = None) -> str:
        return self.call_of(self.one(f for f in self.functions if f[0].nests), x, y)

    def a_training(self) -> str:
        return self.call_of(self.one(f for f in self.functions if f[0] in lines.TRAINING))

    def a_inner(self) -> str:
        text = self.call_of(self.one(self.functions), "x", "x")
        if "xs" in text or "short_lived" in text:
            raise Unsuitable
        return text

    # Models.

    def path(self, net: str, i: int) -> str:
        return lines.STYLES[self.nets[net].style].format(net=net, i=i)

    def filled(self, source: str) -> str:
        return source if "Lazy" in source else f"fill({source}, {self.random.randint(0, 99)})"

    def part(self, depth: int = 0, steady: bool = False) -> Part:
        """Draw a piece of a model."""
        roll = self.random.random()
        if depth < 2 and roll < 0.4:
            name = self.one(lines.WRAPPERS)
            if (name == "Loop" and self.loops) or (name == "Memory" and steady):
                name = "Counted"
            self.loops += name == "Loop"
            inner = self.part(depth + 1, steady or name == "Loop")
            moved = [(f".inner{path}", value) for path, value in inner.attributes]
            if name == "Counted":
                moved += [(".calls", "jnp.asarray(10.0)"), (".mean", "jnp.ones(3)")]
            return replace(
                inner,
                source=f"{name}({inner.source})",
                linears=tuple(f".inner{path}" for path in inner.linears),
                attributes=tuple(moved),
                writes=inner.writes or name in lines.WRITING,
                steady=inner.steady and name != "Memory",
            )
        if depth == 0 and roll < 0.47:
            inner = self.one(lines.STACKED)
            name = "Ensemble" if self.loops else self.one(["Deep", "Ensemble"])
            self.loops += name == "Deep"
            return Part(f"{name}({inner})", writes="Counted" in inner)
        return self.one(
            leaf
            for leaf in lines.LEAVES
            if not (leaf.random and self.mirrored) and (leaf.steady or not steady)
        )

    def build(self) -> None:
        """Write the line that builds a model."""
        parts = [self.part() for _ in range(self.random.randint(1, 3))]
        if not any(part.linears for part in parts):
            parts[self.random.randrange(len(parts))] = lines.LINEAR
        name, style = f"net{len(self.nets)}", self.one(lines.STYLES)
        self.nets[name] = Net(style, parts)
        made = f"{style}({', '.join(part.source for part in parts)})"
        self.lines.append(Line(f"{name} = {self.filled(made)}", "build"))

    def opt(self, net: str) -> str:
        """Return the optimizer of a model; writes the line that makes it where there is none."""
        if net not in self.optimizers:
            name = self.optimizers[net] = f"opt{net.removeprefix('net')}"
            # A large eps: Adam must not turn a gradient that is zero but for rounding into a step.
            tx = self.one(["optax.sgd(0.05)", "optax.adam(0.05, eps=0.1)"])
            self.lines.append(Line(f"{name} = lamina.Optimizer({net}, {tx})", "build"))
        return self.optimizers[net]

    # Lines.

    def write(self, kind: Kind, text: str, name: str, scope: Scope) -> None:
        """Write the statements of a template, each as a line of its own."""
        text = self.expand(text.strip("\n"), scope)
        rows = text.split("\n")
        for node in ast.parse(text).body:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            statement = "\n".join(rows[first - 1 : node.end_lineno])
            self.lines.append(Line(statement, name, kind.foreign))

    def define(self) -> None:
        """Write a compiled function."""
        kind = self.one(self.kinds[self.random.randrange(2)])
        scope: Scope = {}
        if "$forwardA" in kind.text:
            scope["forwardA"] = self.a_forward("x", "y")
        scope["f"] = self.a_f()
        self.write(kind, kind.text, "define", scope)
        self.functions.append((kind, scope))
        self.later += [(kind, name, text, scope) for name, text in kind.changes.items()]

    def call_of(
        self, function: tuple[Kind, Scope], x: str | None = None, y: str | None = None
    ) -> str:
        kind, scope = function
        if x is None:
            return self.expand(kind.call, scope)
        inner = {**scope, "x": x, "y": y or x}
        return self.expand(kind.call, inner)

    def call(self) -> None:
        """Write a call of a compiled function."""
        function = self.one(self.functions)
        text, name, roll = self.call_of(function), function[0].name, self.random.random()
        if roll < 0.25:
            text = f"[{text} for _ in range(3)]"
        elif roll < 0.32:
            name, text = f"{name}, in a thread", f"in_thread(lambda: {text})"
        elif roll < 0.4:
            net = self.one(key for key, net in self.nets.items() if net.known)
            name, text = f"{name}, read by threads", f"while_reading({net}, lambda: {text})"
        self.lines.append(Line(f"out = {text}", name))

    def change(self) -> None:
        """Write something that happens between calls."""
        if self.later and self.random.random() < 0.4:
            kind, name, text, scope = self.one(self.later)
            self.write(kind, text, name, scope)
            return
        kind = self.one(self.kinds[2])
        scope: Scope = {}
        self.write(kind, kind.text, kind.name, scope)
        self.later += [(kind, name, text, scope) for name, text in kind.changes.items()]


def write_program(seed: int) -> Program:
    """Return the program of a seed."""
    w = Writer(seed)
    for _ in range(w.random.randint(1, 3)):
        w.build()
    length = w.random.randint(10, 18)
    defined = 0
    while len(w.lines) < length or not defined:
        roll = w.random.random()
        wants_definition = defined < 2 or (roll < 0.08 and defined < 4)
        with contextlib.suppress(Unsuitable):
            if wants_definition:
                w.define()
                defined += 1
            elif roll < 0.55:
                w.call()
            else:
                w.change()
    while w.lines[-1].kind in ("build", "define"):
        with contextlib.suppress(Unsuitable):
            w.call()
    often = w.one([0.0, 0.4, 1.0])
    watched = {line for line in w.lines if line.kind != "define" and w.random.random() < often}
    return Program(tuple(w.lines), frozenset({*watched, w.lines[-1]}), w.mirrored)


# Running a program.


class Problem(Exception):
    """Something that must not be: its kind and what was seen."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass
class Step:
    """What a line did: its results, the state after it where that is watched, or its refusal."""

    out: dict[str, Any]
    state: dict[str, Any] | None
    refusal: str | None = None


def readable(name: str, value: Any) -> Any:
    """Return a host copy of a value, which must be an array that exists."""
    if isinstance(value, jax.core.Tracer):
        raise Problem("tracer", f"{name} is a tracer: {value}")
    if isinstance(value, jax.Array):
        if value.is_deleted():
            raise Problem("deleted", f"{name} is an array that was deleted")
        return np.array(value)
    return np.array(value) if isinstance(value, (np.ndarray, np.generic)) else value


def leaves(value: Any, name: str = "out") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts, lists and tuples."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}[{i}]")
    else:
        yield name, value


# What lines call their models, and the plain objects and containers that hold them.
_ROOT = re.compile(
    r"(net|opt|average_|current_|inner_|extra_|models_|recorder_|trainer_|scorer_|holder_|tools_"
    r"|list_)f?\d+$"
)


def roots(scope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the models and optimizers of a program, also those that plain objects hold."""
    modules = (lamina.nn.Module, mirror.Module)

    def visit(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, (*modules, lamina.Optimizer)):
            yield name, value
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from visit(f"{name}[{key!r}]", item)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from visit(f"{name}[{i}]", item)
        elif type(value).__name__ in ("Trainer", "Scorer", "SimpleNamespace"):
            for key, item in vars(value).items():
                yield from visit(f"{name}.{key}", item)

    for name in scope:
        if _ROOT.match(name):
            yield from visit(name, scope[name])


def observe(scope: dict[str, Any]) -> dict[str, Any]:
    """Return everything that a user can see of all models: values, gradients, flags, attributes."""
    seen: dict[str, Any] = {}
    for root, owner in roots(scope):
        net = owner.net if isinstance(owner, lamina.Optimizer) else owner
        if not any(_is_unshaped(p) for p in net.parameters()):
            seen.update((f"{root}: {name}", v) for name, v in owner.state_dict().items())
        if net is not owner:
            continue
        for name, p in owner.named_parameters(remove_duplicate=False):
            seen[f"{root}: {name}.requires_grad"] = p.requires_grad
            seen[f"{root}: {name}.grad"] = p.grad
        for name, part in owner.named_modules():
            seen[f"{root}: {name}.training"] = part.training
            for attribute in SHOWN.get(type(part).__name__, ()):
                seen.update(leaves(getattr(part, attribute), f"{root}: {name}.{attribute}"))
    return seen


def _is_unshaped(p: Any) -> bool:
    return bool(getattr(p, "is_unshaped", False))


def names_for(way: str) -> dict[str, Any]:
    """Return the globals with which a program starts."""
    scope: dict[str, Any] = {
        "jax": jax, "jnp": jnp, "np": np, "optax": optax, "copy": copy, "functools": functools,
        "gc": gc, "threading": threading, "types": types, "weakref": weakref,
        "lamina": lamina, "nn": lamina.nn, "F": lamina.nn.functional, "__name__": "program",
    }  # fmt: skip
    if way == "uncompiled":
        scope["lamina"] = types.SimpleNamespace(**vars(lamina))
        scope["lamina"].jit = lambda fn, **options: fn
    elif way == "mirror":
        scope.update(mirror.namespace())
    exec(_LIBRARY, scope)
    if way == "mirror":  # its values are not safe from other threads
        scope["side_by_side"] = lambda *works: [work() for work in works]
        scope["while_reading"] = lambda net, work: (work(), [])
    return scope


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """JAX's settings for programs, in all threads: most of the time goes into compiling."""
    wanted = {
        "jax_numpy_rank_promotion": "allow",
        "jax_default_matmul_precision": "highest",
        "jax_disable_most_optimizations": True,
    }
    former = {name: jax.config.values[name] for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in former.items():
            jax.config.update(name, value)


def is_refusal(error: BaseException) -> bool:
    """Tell whether an error is lamina's and names its fix."""
    if not isinstance(error, lamina.errors.LaminaError):
        return False
    if not (str(error).splitlines() or [""])[-1].startswith("    fix:"):
        raise Problem("refusal without a fix", f"{type(error).__name__}: {error}") from error
    return True


def run(program: Program, way: str, left_out: frozenset[Line] = frozenset()) -> dict[Line, Step]:
    """Run a program one way.

    Raises:
        Failure: at the first line that raises what is no refusal, or leaves something unusable.
    """
    lamina.manual_seed(0)
    scope = names_for(way)
    steps: dict[Line, Step] = {}
    kept: list[tuple[str, Any, np.ndarray]] = []
    gc.freeze()  # what is there already can be left aside when garbage is collected
    try:
        with warnings.catch_warnings(), settings():
            warnings.simplefilter("error")
            for line in program.lines:
                try:
                    steps[line] = _run_line(program, line, scope, kept, line in left_out)
                except Problem as problem:
                    raise Failure(program, line, way, problem.kind, str(problem)) from problem
        models = [weakref.ref(root) for _, root in roots(scope)]
    finally:
        kept.clear()
        scope.clear()
        gc.collect()
        gc.unfreeze()
    if way != "mirror" and any(model() is not None for model in models):
        text = "models are alive after the program was dropped"
        raise Failure(program, program.lines[-1], way, "leak", text)
    return steps


def _run_line(
    program: Program, line: Line, scope: dict[str, Any], kept: list[Any], leave_out: bool
) -> Step:
    scope["out"] = refusal = None
    if not leave_out:
        try:
            exec(compile(line.text, f"<{line.kind}>", "exec"), scope)
        except Exception as error:
            scope["out"] = None
            if not is_refusal(error):
                where = traceback.format_exception(error)[-4:]
                raise Problem(f"raised {type(error).__name__}", "".join(where)) from error
            refusal = str(error)
    handed = list(leaves(scope["out"]))
    state = None
    if line in program.watched or refusal or leave_out:
        seen = observe(scope)
        state = {name: readable(name, value) for name, value in seen.items()}
        handed += seen.items()
    out = {name: readable(name, value) for name, value in leaves(scope["out"])}
    for name, value, copied in kept:
        if not np.array_equal(
            readable(f"{name}, handed out earlier,", value), copied, equal_nan=True
        ):
            raise Problem("changed", f"{name}, handed out earlier, has another value now")
    kept += [(n, v, np.array(v)) for n, v in handed if isinstance(v, jax.Array)]
    return Step(out, state, refusal)


# Comparing.


class Failure(Exception):
    """A program that is wrong, the line where that shows, and how."""

    def __init__(self, program: Program, line: Line, way: str, kind: str, text: str) -> None:
        super().__init__(f"{way}, at the line `{line.text}`:\n{text}")
        self.program, self.line, self.way, self.kind, self.text = program, line, way, kind, text

    def report(self) -> str:
        return f"{self}\n\n{self.program.source(self.line)}"


def difference(mine: dict[str, Any], other: dict[str, Any], *, loose: bool) -> str | None:
    """Say where two dicts of values differ; ``loose`` leaves dtypes and what is unique aside."""
    names = mine.keys() & other.keys() if loose else mine.keys() | other.keys()
    for name in sorted(names):
        if name not in mine or name not in other:
            return f"{name} is only on one side"
        a, b = mine[name], other[name]
        if (a is None) != (b is None):
            return f"{name}: {a} and {b}"
        if a is None or isinstance(a, str):
            same = a == b
        else:
            a, b = np.asarray(a), np.asarray(b)
            same = a.shape == b.shape and np.allclose(
                a, b, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True
            )
            if not loose and same and a.dtype != b.dtype:
                return f"{name}: {a.dtype} and {b.dtype}"
        if not same:
            return f"{name}:\n{a}\nand\n{b}"
    return None


class Tally:
    """How many lines ran and how many were refused, by kind, with one of the reasons."""

    def __init__(self) -> None:
        self.run: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self.reasons: dict[str, str] = {}

    def add(self, program: Program, steps: dict[Line, Step]) -> None:
        for line in program.lines:
            self.run[line.kind] += 1
            if reason := steps[line].refusal:
                self.refused[line.kind] += 1
                self.reasons.setdefault(line.kind, f"`{line.text}`: {reason.strip()}")

    @property
    def share(self) -> float:
        return self.refused.total() / max(1, self.run.total())

    def headline(self) -> str:
        return f"{self.refused.total()} of {self.run.total()} lines were refused ({self.share:.1%})"

    def table(self, *, reasons: bool = False) -> str:
        rows = [self.headline()]
        for kind in sorted(self.refused):
            rows.append(f"  {self.refused[kind]:5} of {self.run[kind]:5}  {kind}")
            if reasons:
                rows.append(textwrap.indent(self.reasons[kind], " " * 18))
        return "\n".join(rows)


def check(program: Program, tally: Tally | None = None) -> None:
    """Run a program in all ways and compare.

    Args:
        program: what to run.
        tally: the lines that ran and those that were refused are counted here.

    Raises:
        Failure: for the first line that goes wrong.
    """
    compiled = run(program, "compiled")
    refused = frozenset(line for line, step in compiled.items() if step.refusal)
    if tally is not None:
        tally.add(program, compiled)
    for way in WAYS[1:] if program.mirrored else WAYS[1:2]:
        other = run(program, way, refused)
        for line in program.lines:
            mine, theirs = compiled[line], other[line]
            pairs = [("result", mine.out, theirs.out), ("state", mine.state, theirs.state)]
            if theirs.refusal and not mine.refusal:
                if not line.foreign:
                    text = f"refused, while the compiled one is not:\n{theirs.refusal}"
                    raise Failure(program, line, way, "refused", text)
                # A compiled call may be right where an uncompiled one is refused: ask the mirror.
                pairs = pairs[1:]
            for what, a, b in pairs:
                found = a is not None and b is not None and difference(a, b, loose=way == "mirror")
                if found:
                    kind = f"{what} after a refusal" if mine.refusal else what
                    text = f"{kind} differs from the {way} one: {found}\n{mine.refusal or ''}"
                    raise Failure(program, line, way, kind, text)


def failure_of(program: Program) -> Failure | None:
    """Return how a program fails, if it does."""
    try:
        check(program)
    except Failure as failure:
        return failure
    return None


# Cutting down.

_WRAPPER = "|".join([*lines.WRAPPERS, "Deep", "Ensemble"])
_UNWRAP = re.compile(rf"(?:{_WRAPPER})\((?=[A-Za-z])")
_PLAIN = [("nn.BatchNorm1d(3)", "nn.Tanh()"), ("nn.LayerNorm(3)", "nn.Tanh()"),
          ("Scaled()", "nn.Tanh()"), ("nn.Linear(3, 3, bias=False)", "nn.Tanh()"),
          ("nn.Linear(3, 3)", "nn.Tanh()"), ("Chain(", "nn.Sequential("), ("x5", "x4"),
          ("y5", "y4"), (", nn.Tanh()", ""), ("optax.adam(0.05, eps=0.1)", "optax.sgd(0.05)"),
          ("nn.Dropout(0.5)", "nn.Tanh()"), ("Noisy()", "nn.Tanh()")]  # fmt: skip


def simpler_texts(text: str) -> Iterator[str]:
    """Yield simpler forms of a line."""
    for match in _UNWRAP.finditer(text):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        yield text[: match.start()] + text[match.end() : end - 1] + text[end:]
    for long, short in _PLAIN:
        for match in re.finditer(re.escape(long), text):
            yield text[: match.start()] + short + text[match.end() :]
    for pattern in (
        r"out = \[(.*) for _ in range\(3\)\]$",
        r"out = in_thread\(lambda: (.*)\)$",
        r"out = while_reading\(\w+, lambda: (.*)\)$",
    ):
        if match := re.match(pattern, text):
            yield f"out = {match.group(1)}"


def minimal(failure: Failure, seconds: float = 60) -> Failure:
    """Return a failure of the same kind with as few and as simple lines as were found in time."""
    end = time.monotonic() + seconds

    def attempt(lines: list[Line], watched: frozenset[Line]) -> bool:
        nonlocal failure
        if time.monotonic() > end or not lines:
            return False
        found = failure_of(Program(tuple(lines), watched, failure.program.mirrored))
        if found is None or (found.kind, found.way) != (failure.kind, failure.way):
            return False
        if "NameError" in found.kind or "AttributeError" in found.kind:
            if found.text != failure.text:
                return False  # a definition was left out
        failure = found
        return True

    def without_chunks() -> bool:
        shorter = False
        size = max(1, len(failure.program.lines) // 2)
        while size:
            start = 0
            while start < len(failure.program.lines):
                lines = list(failure.program.lines)
                del lines[start : start + size]
                if attempt(lines, failure.program.watched):
                    shorter = True
                else:
                    start += size
            size //= 2
        return shorter

    def simplified() -> bool:
        for i, line in enumerate(failure.program.lines):
            for text in simpler_texts(line.text):
                lines = list(failure.program.lines)
                lines[i] = replace(line, text=text)
                watched = failure.program.watched
                if line in watched:
                    watched = (watched - {line}) | {lines[i]}
                if attempt(lines, watched):
                    return True
        return False

    # What comes after the line that failed is not needed.
    lines = list(failure.program.lines)
    attempt(lines[: lines.index(failure.line) + 1], failure.program.watched)
    while time.monotonic() < end and (without_chunks() or simplified()):
        pass
    return failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="when to stop")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--programs", type=int, default=10**9, help="how many seeds at most")
    parser.add_argument("--failures", type=int, default=1, help="stop after as many")
    parser.add_argument("--reasons", action="store_true", help="also print why lines were refused")
    parser.add_argument("--show", action="store_true", help="print the program, run nothing")
    args = parser.parse_args()
    if args.show:
        print(write_program(args.seed).source())
        return 0
    end, tally, failures, done = time.monotonic() + args.seconds, Tally(), 0, 0
    for number in range(args.seed, args.seed + args.programs):
        if time.monotonic() > end or failures >= args.failures:
            break
        try:
            check(write_program(number), tally)
        except Failure as failure:
            failures += 1
            print(f"\n# seed {number}: {minimal(failure).report()}", flush=True)
        done += 1
        if done % 50 == 0:
            print(f"{done} programs, {failures} failures; {tally.headline()}", flush=True)
    print(f"\n{done} programs from seed {args.seed}, {failures} failures")
    print(tally.table(reasons=args.reasons))
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
