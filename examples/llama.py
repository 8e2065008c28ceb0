"""A Llama decoder written from basic layers: no input size is given anywhere, no memory is used.

The parameters have the names of the published checkpoints (``model.norm.weight``).

    python examples/llama.py                  # a tiny one: infer, materialise, run
    python examples/llama.py --size 405b      # shapes only, on any machine
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

import lamina
from lamina import nn


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a decoder."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    tied: bool = False
    theta: float = 500_000.0
    dtype: Any = jnp.bfloat16


CONFIGS = {
    "tiny": Config(vocabulary=256, width=64, layers=2, heads=4, kv_heads=2, hidden=172),
    "8b": Config(128_256, width=4096, layers=32, heads=32, kv_heads=8, hidden=14_336),
    "405b": Config(128_256, width=16_384, layers=126, heads=128, kv_heads=8, hidden=53_248),
}


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis; its size is inferred from the input."""

    def __init__(self, eps: float = 1e-5, dtype: Any = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(shape=(None,), init=nn.init.Ones(), dtype=dtype)

    def infer_shapes(self, x: jax.Array) -> None:
        self.weight.shape = (x.shape[-1],)

    def forward(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * self.weight


def rotary(length: int, size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding, each ``(length, 1, size / 2)``."""
    rates = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * rates
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs of ``x`` ``(batch, length, heads, size)`` by ``angles``."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Causal attention in which several query heads share one key and value head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.size = config.width // config.heads
        narrow = config.kv_heads * self.size
        self.q_proj = nn.Linear(None, config.width, bias=False, dtype=config.dtype)
        self.k_proj = nn.Linear(None, narrow, bias=False, dtype=config.dtype)
        self.v_proj = nn.Linear(None, narrow, bias=False, dtype=config.dtype)
        self.o_proj = nn.Linear(None, config.width, bias=False, dtype=config.dtype)

    def forward(self, x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
        heads = (*x.shape[:2], -1, self.size)
        query = rotate(self.q_proj(x).reshape(heads), angles)
        key = rotate(self.k_proj(x).reshape(heads), angles)
        value = self.v_proj(x).reshape(heads)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1))


class SwiGLU(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(None, config.hidden, bias=False, dtype=config.dtype)
        self.up_proj = nn.Linear(None, config.hidden, bias=False, dtype=config.dtype)
        self.down_proj = nn.Linear(None, config.width, bias=False, dtype=config.dtype)

    def forward(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(dtype=config.dtype)
        self.post_attention_layernorm = RMSNorm(dtype=config.dtype)

    def forward(self, x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids ``(batch, length)`` to hidden states ``(batch, length, width)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width, dtype=config.dtype)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = RMSNorm(dtype=config.dtype)

    def forward(self, tokens: jax.Array) -> jax.Array:
        config = self.config
        x = self.embed_tokens(tokens)
        angles = rotary(tokens.shape[1], config.width // config.heads, config.theta)
        for layer in self.layers:
            x = layer(x, angles)
        return self.norm(x)


class Llama(nn.Module):
    """Token ids ``(batch, length)`` to logits ``(batch, length, vocabulary)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(None, config.vocabulary, bias=False, dtype=config.dtype)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: jax.Array) -> jax.Array:
        return self.lm_head(self.model(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=CONFIGS, default="tiny")
    parser.add_argument("--tied", action="store_true", help="share the embedding with the head")
    args = parser.parse_args()

    net = Llama(dataclasses.replace(CONFIGS[args.size], tied=args.tied))
    lamina.infer(net, jax.ShapeDtypeStruct((1, 16), jnp.int32))
    count = sum(math.prod(p.shape) for p in net.parameters())
    print(f"{args.size}: {count:,} parameters in {len(list(net.parameters()))} arrays")
    if args.size == "tiny":
        logits = lamina.jit(net)(jnp.arange(16)[None])
        print("logits", logits.shape, logits.dtype)


if __name__ == "__main__":
    main()
