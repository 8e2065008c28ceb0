"""lamina: PyTorch's module semantics on JAX's engine."""

from . import nn
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
from .optim import Optimizer

__version__ = "0.1.0"

__all__ = [
    "Generator",
    "Optimizer",
    "backward",
    "functional_call",
    "grad",
    "infer",
    "jit",
    "manual_seed",
    "materialize",
    "next_key",
    "nn",
    "remat",
    "rng",
    "scan",
    "stack",
    "unstack",
    "value_and_grad",
    "vmap",
]
