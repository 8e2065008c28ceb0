"""What it costs to build a large decoder and find its shapes, without memory for its parameters.

Every contender builds the same Llama-shaped decoder abstractly and runs it abstractly on 16 tokens.
Each measurement has a fresh process, in which a tiny decoder was built first, so that no lazy
import and no first use is counted. lamina alone is given no input sizes: it infers them in the
second column.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from _timing import markdown, write_json

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from llama import CONFIGS, Config, Llama, rotary, rotate

LENGTH = 16


class Contender(NamedTuple):
    """How one library builds a decoder, finds its output's shape, and counts its parameters."""

    build: Callable[[Config], Any]
    infer: Callable[[Any], tuple[int, ...]]
    count: Callable[[Any], int]


def tokens() -> Any:
    import jax

    return jax.ShapeDtypeStruct((1, LENGTH), "int32")


def leaf_count(net: Any) -> int:
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(net) if hasattr(leaf, "shape"))


def lamina_contender() -> Contender:
    import lamina

    def infer(net):
        lamina.infer(net, tokens())
        return (1, LENGTH, net.lm_head.weight.shape[0])

    return Contender(Llama, infer, lambda net: sum(math.prod(p.shape) for p in net.parameters()))


def torch_contender() -> Contender:
    import torch
    from torch import nn
    from torch.nn import functional as F

    def rotate_torch(x, cos, sin):
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    class Block(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.size = config.width // config.heads
            narrow = config.kv_heads * self.size
            self.q_proj = nn.Linear(config.width, config.width, bias=False)
            self.k_proj = nn.Linear(config.width, narrow, bias=False)
            self.v_proj = nn.Linear(config.width, narrow, bias=False)
            self.o_proj = nn.Linear(config.width, config.width, bias=False)
            self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
            self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
            self.down_proj = nn.Linear(config.hidden, config.width, bias=False)
            self.norm1 = nn.RMSNorm(config.width, eps=1e-5)
            self.norm2 = nn.RMSNorm(config.width, eps=1e-5)

        def forward(self, x, cos, sin):
            heads = (*x.shape[:2], -1, self.size)
            y = self.norm1(x)
            q = rotate_torch(self.q_proj(y).view(heads), cos, sin).transpose(1, 2)
            k = rotate_torch(self.k_proj(y).view(heads), cos, sin).transpose(1, 2)
            v = self.v_proj(y).view(heads).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.o_proj(y.transpose(1, 2).flatten(2))
            y = self.norm2(x)
            return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))

    class Decoder(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.embed = nn.Embedding(config.vocabulary, config.width)
            self.layers = nn.ModuleList([Block(config) for _ in range(config.layers)])
            self.norm = nn.RMSNorm(config.width, eps=1e-5)
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)

        def forward(self, tokens):
            x = self.embed(tokens)
            size = self.config.width // self.config.heads
            rates = self.config.theta ** (-torch.arange(0, size, 2, device=x.device) / size)
            angles = torch.arange(x.shape[1], device=x.device)[:, None, None] * rates
            for layer in self.layers:
                x = layer(x, angles.cos(), angles.sin())
            return self.head(self.norm(x))

    torch.set_default_dtype(torch.bfloat16)

    def build(config):
        with torch.device("meta"):
            return Decoder(config)

    def infer(net):
        with torch.inference_mode():
            return tuple(net(torch.empty(1, LENGTH, dtype=torch.int32, device="meta")).shape)

    return Contender(build, infer, lambda net: sum(p.numel() for p in net.parameters()))


def nnx_contender() -> Contender:
    import functools

    import jax
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, config, rngs):
            types = {"dtype": config.dtype, "param_dtype": config.dtype, "rngs": rngs}
            linear = functools.partial(nnx.Linear, use_bias=False, **types)
            self.size = config.width // config.heads
            narrow = config.kv_heads * self.size
            self.q_proj = linear(config.width, config.width)
            self.k_proj = linear(config.width, narrow)
            self.v_proj = linear(config.width, narrow)
            self.o_proj = linear(config.width, config.width)
            self.gate_proj = linear(config.width, config.hidden)
            self.up_proj = linear(config.width, config.hidden)
            self.down_proj = linear(config.hidden, config.width)
            self.norm1 = nnx.RMSNorm(config.width, epsilon=1e-5, **types)
            self.norm2 = nnx.RMSNorm(config.width, epsilon=1e-5, **types)

        def __call__(self, x, angles):
            heads = (*x.shape[:2], -1, self.size)
            y = self.norm1(x)
            q = rotate(self.q_proj(y).reshape(heads), angles)
            k = rotate(self.k_proj(y).reshape(heads), angles)
            v = self.v_proj(y).reshape(heads)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o_proj(y.reshape(*x.shape[:2], -1))
            y = self.norm2(x)
            return x + self.down_proj(jax.nn.silu(self.gate_proj(y)) * self.up_proj(y))

    class Decoder(nnx.Module):
        def __init__(self, config, rngs):
            types = {"dtype": config.dtype, "param_dtype": config.dtype, "rngs": rngs}
            self.config = config
            self.embed = nnx.Embed(config.vocabulary, config.width, **types)
            self.layers = nnx.List([Block(config, rngs) for _ in range(config.layers)])
            self.norm = nnx.RMSNorm(config.width, epsilon=1e-5, **types)
            self.head = nnx.Linear(config.width, config.vocabulary, use_bias=False, **types)

        def __call__(self, tokens):
            config = self.config
            x = self.embed(tokens)
            angles = rotary(tokens.shape[1], config.width // config.heads, config.theta)
            for layer in self.layers:
                x = layer(x, angles)
            return self.head(self.norm(x))

    return Contender(
        lambda config: nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))),
        lambda net: nnx.eval_shape(lambda net, tokens: net(tokens), net, tokens()).shape,
        lambda net: leaf_count(nnx.state(net, nnx.Param)),
    )


def equinox_contender() -> Contender:
    import functools

    import equinox as eqx
    import jax

    def each(layer, x):
        return jax.vmap(jax.vmap(layer))(x)

    class Block(eqx.Module):
        size: int = eqx.field(static=True)
        linears: dict[str, eqx.nn.Linear]
        norm1: eqx.nn.RMSNorm
        norm2: eqx.nn.RMSNorm

        def __init__(self, config, key):
            self.size = config.width // config.heads
            narrow = config.kv_heads * self.size
            sizes = {
                "q": (config.width, config.width),
                "k": (config.width, narrow),
                "v": (config.width, narrow),
                "o": (config.width, config.width),
                "gate": (config.width, config.hidden),
                "up": (config.width, config.hidden),
                "down": (config.hidden, config.width),
            }
            linear = functools.partial(eqx.nn.Linear, use_bias=False, dtype=config.dtype)
            self.linears = {
                name: linear(*size, key=own)
                for own, (name, size) in zip(jax.random.split(key, 7), sizes.items(), strict=True)
            }
            norm = functools.partial(eqx.nn.RMSNorm, use_bias=False, dtype=config.dtype)
            self.norm1, self.norm2 = norm(config.width), norm(config.width)

        def __call__(self, x, angles):
            heads = (*x.shape[:2], -1, self.size)
            linears = self.linears
            y = each(self.norm1, x)
            q = rotate(each(linears["q"], y).reshape(heads), angles)
            k = rotate(each(linears["k"], y).reshape(heads), angles)
            v = each(linears["v"], y).reshape(heads)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + each(linears["o"], y.reshape(*x.shape[:2], -1))
            y = each(self.norm2, x)
            y = jax.nn.silu(each(linears["gate"], y)) * each(linears["up"], y)
            return x + each(linears["down"], y)

    class Decoder(eqx.Module):
        config: Config = eqx.field(static=True)
        embed: eqx.nn.Embedding
        layers: list[Block]
        norm: eqx.nn.RMSNorm
        head: eqx.nn.Linear

        def __init__(self, config, key):
            first, last, *keys = jax.random.split(key, config.layers + 2)
            self.config = config
            self.embed = eqx.nn.Embedding(
                config.vocabulary, config.width, dtype=config.dtype, key=first
            )
            self.layers = [Block(config, key) for key in keys]
            self.norm = eqx.nn.RMSNorm(config.width, use_bias=False, dtype=config.dtype)
            self.head = eqx.nn.Linear(
                config.width, config.vocabulary, use_bias=False, dtype=config.dtype, key=last
            )

        def __call__(self, tokens):
            config = self.config
            x = each(self.embed, tokens)
            angles = rotary(tokens.shape[1], config.width // config.heads, config.theta)
            for layer in self.layers:
                x = layer(x, angles)
            return each(self.head, each(self.norm, x))

    return Contender(
        lambda config: eqx.filter_eval_shape(Decoder, config, jax.random.key(0)),
        lambda net: eqx.filter_eval_shape(lambda net, tokens: net(tokens), net, tokens()).shape,
        leaf_count,
    )


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "lamina": lamina_contender,
    "torch meta": torch_contender,
    "nnx.eval_shape": nnx_contender,
    "eqx.filter_eval_shape": equinox_contender,
}


def memory(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (highest since the last reset) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def probe(name: str, config: Config, traced: bool) -> dict[str, Any]:
    """Measures one contender in this process; with ``traced``, Python's own allocations instead."""
    build, infer, count = CONTENDERS[name]()
    infer(build(CONFIGS["tiny"]))
    gc.collect()
    if traced:
        tracemalloc.start()
        net = build(config)
        infer(net)
        held, peak = tracemalloc.get_traced_memory()
        return {"python_held": held, "python_peak": peak}
    Path("/proc/self/clear_refs").write_text("5")  # makes the highest resident size the present one
    before = memory("VmRSS")
    start = time.perf_counter()
    net = build(config)
    built = time.perf_counter()
    shape = infer(net)
    inferred = time.perf_counter()
    assert shape == (1, LENGTH, config.vocabulary), shape
    return {
        "build": built - start,
        "infer": inferred - built,
        "rss_held": memory("VmRSS") - before,
        "rss_peak": memory("VmHWM") - before,
        "parameters": count(net),
    }


def fresh_probe(name: str, size: str, layers: int, traced: bool) -> dict[str, Any]:
    """Runs ``probe`` in a fresh process."""
    command = [sys.executable, __file__, "--probe", name, "--sizes", size, "--layers", str(layers)]
    output = subprocess.check_output([*command, "--traced"] if traced else command, text=True)
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ",".join(CONTENDERS)
    parser.add_argument("--sizes", default="8b,405b", help=f"out of {','.join(CONFIGS)}")
    parser.add_argument("--layers", type=int, default=0, help="this many layers instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=names, help=f"contenders out of {names}")
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    parser.add_argument("--traced", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.probe:
        config = CONFIGS[args.sizes]
        config = dataclasses.replace(config, layers=args.layers or config.layers)
        print(json.dumps(probe(args.probe, config, args.traced)))
        return

    selected = args.only.split(",")
    results = {}
    for size in args.sizes.split(","):
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in selected}
        for _ in range(args.rounds):
            for name, own in runs.items():
                own.append(fresh_probe(name, size, args.layers, traced=False))
        rows = []
        for name, own in runs.items():
            median = {key: statistics.median(run[key] for run in own) for key in own[0]}
            median |= fresh_probe(name, size, args.layers, traced=True)
            results[f"{size} {name}"] = median
            seconds = [median["build"], median["infer"], median["build"] + median["infer"]]
            bytes_ = [median[key] for key in ("rss_peak", "rss_held", "python_peak", "python_held")]
            rows.append(
                [
                    name,
                    *(f"{value:.3f}" for value in seconds),
                    *(f"{value / 2**20:.1f}" for value in bytes_),
                ]
            )
        counts = {int(results[f"{size} {name}"]["parameters"]) for name in selected}
        assert len(counts) == 1, f"the contenders built different decoders: {counts}"
        layers = args.layers or CONFIGS[size].layers
        print(f"\n{size}: {counts.pop():,} parameters, {layers} layers; seconds and MiB\n")
        head = ["contender", "build", "infer", "both", "RSS peak", "RSS held"]
        print(markdown([*head, "Python peak", "Python held"], rows), flush=True)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
