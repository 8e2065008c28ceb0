"""lamina: PyTorch's module semantics on JAX's engine.

Example:
    >>> import jax.numpy as jnp, lamina
    >>> from lamina import nn
    >>> net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
    >>> lamina.jit(net)(jnp.ones((4, 3))).shape
    (4, 2)
"""

from . import errors, io, nn, show
from ._core.materialize import infer, materialize
from ._core.random import Generator, manual_seed, next_key, rng
from ._replaced import __getattr__ as __getattr__
from ._version import __version__ as __version__
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
from .interchange import export, export_onnx, load_exported
from .io import Checkpoints, load, load_into, open, save
from .optim import Optimizer
from .show import summary

__all__ = [
    "Checkpoints",
    "Generator",
    "Optimizer",
    "backward",
    "errors",
    "export",
    "export_onnx",
    "functional_call",
    "grad",
    "infer",
    "io",
    "jit",
    "load",
    "load_exported",
    "load_into",
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
