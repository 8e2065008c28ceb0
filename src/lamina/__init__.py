"""lamina: PyTorch's module semantics on JAX's engine.

Example:
    >>> import jax.numpy as jnp, lamina
    >>> from lamina import nn
    >>> net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
    >>> lamina.jit(net)(jnp.ones((4, 3))).shape
    (4, 2)
"""

from . import io, nn, show
from ._core import errors
from ._core.materialize import infer, materialize
from ._core.random import Generator, manual_seed, next_key, rng
from .func import (
    backward,
    functional_call,
    grad,
    jit,
    remat,
    scan,
    stack,
    unstack,
    value_and_grad,
    vmap,
)
from .io import load, open, save
from .optim import Optimizer
from .show import summary

__version__ = "0.1.0"

__all__ = [
    "Generator",
    "Optimizer",
    "backward",
    "errors",
    "functional_call",
    "grad",
    "infer",
    "io",
    "jit",
    "load",
    "manual_seed",
    "materialize",
    "next_key",
    "nn",
    "open",
    "remat",
    "rng",
    "save",
    "scan",
    "show",
    "stack",
    "summary",
    "unstack",
    "value_and_grad",
    "vmap",
]
