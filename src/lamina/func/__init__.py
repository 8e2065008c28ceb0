"""Transforms of functions that use modules; each is thin, on ``_core.bind``."""

from .functional_call import functional_call
from .grad import backward, grad, value_and_grad
from .jit import jit
from .scan import remat, scan
from .vmap import stack, unstack, vmap

__all__ = [
    "backward",
    "functional_call",
    "grad",
    "jit",
    "remat",
    "scan",
    "stack",
    "unstack",
    "value_and_grad",
    "vmap",
]
