"""One row for every module class; ``test_conformance.py`` holds every property for every row.

A new layer is one row here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Spec:
    """One input: normal floats, or integers below ``high``."""

    shape: tuple[int, ...]
    high: int | None = None

    def draw(self, seed: int = 0) -> np.ndarray:
        generator = np.random.default_rng(seed)
        if self.high is not None:
            return generator.integers(0, self.high, self.shape).astype(np.int32)
        return generator.standard_normal(self.shape).astype(np.float32)

    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.int32 if self.high is not None else jnp.float32)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to build a module.

    Attributes:
        name: the class, in ``lamina.nn`` and in ``torch.nn``.
        inputs: what ``forward`` takes.
        args, options: what the constructor takes.
        state: the keys of the state dict, in order.
        lazy: class name and positional arguments of the lazy form, with the same options.
        open: positional arguments of the class itself with ``None`` for sizes to be inferred.
        large: positional arguments of an instance big enough to see the distributions.
        random: training mode draws random numbers.
    """

    name: str
    inputs: tuple[Spec, ...]
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: tuple[str, ...] = ()
    lazy: tuple[str, tuple[Any, ...]] | None = None
    open: tuple[Any, ...] | None = None
    large: tuple[Any, ...] | None = None
    random: bool = False

    def build(self, library: Any) -> Any:
        return getattr(library, self.name)(*self.args, **self.options)

    def build_lazy(self, library: Any) -> Any:
        name, args = self.lazy  # type: ignore[misc]
        return getattr(library, name)(*args, **self.options)

    @property
    def id(self) -> str:
        parts = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.options.items())]
        shapes = " ".join("x".join(map(str, spec.shape)) for spec in self.inputs)
        return f"{self.name}({', '.join(parts)})[{shapes}]"


VECTORS, IMAGES = Spec((4, 3)), Spec((2, 4, 6, 5))
WEIGHT, BOTH = ("weight",), ("weight", "bias")
NORM = (*BOTH, "running_mean", "running_var", "num_batches_tracked")


def rows(name: str, *cases: dict[str, Any]) -> list[Row]:
    return [Row(name, **case) for case in cases]


ROWS = [
    *rows(
        "Linear",
        {
            "inputs": (VECTORS,),
            "args": (3, 5),
            "state": BOTH,
            "lazy": ("LazyLinear", (5,)),
            "open": (None, 5),
            "large": (300, 200),
        },
        {
            "inputs": (Spec((2, 3, 4)),),
            "args": (4, 2),
            "options": {"bias": False},
            "state": WEIGHT,
            "lazy": ("LazyLinear", (2,)),
            "open": (None, 2),
        },
        {"inputs": (Spec((3,)),), "args": (3, 2), "state": BOTH, "lazy": ("LazyLinear", (2,))},
    ),
    *rows("Identity", {"inputs": (VECTORS,), "args": (54,), "options": {"unused": 1}}),
    *rows(
        "Flatten",
        {"inputs": (IMAGES,)},
        {"inputs": (IMAGES,), "args": (0, 2)},
    ),
    *rows(
        "Embedding",
        {"inputs": (Spec((2, 3), 7),), "args": (7, 4), "state": WEIGHT, "large": (300, 200)},
        {
            "inputs": (Spec((5,), 7),),
            "args": (7, 4),
            "options": {"padding_idx": -2},
            "state": WEIGHT,
        },
        {
            "inputs": (Spec((5,), 7),),
            "args": (7, 4),
            "options": {"scale_grad_by_freq": True},
            "state": WEIGHT,
        },
    ),
    *rows(
        "Dropout",
        {"inputs": (VECTORS,), "random": True},
        {"inputs": (VECTORS,), "args": (0.2,), "options": {"inplace": False}, "random": True},
        {"inputs": (VECTORS,), "args": (0.0,)},
    ),
    *rows("ReLU", {"inputs": (VECTORS,)}, {"inputs": (VECTORS,), "options": {"inplace": True}}),
    *rows("Sigmoid", {"inputs": (VECTORS,)}),
    *rows("Tanh", {"inputs": (VECTORS,)}),
    *rows("GELU", {"inputs": (VECTORS,)}, {"inputs": (VECTORS,), "args": ("tanh",)}),
    *rows(
        "Softmax",
        {"inputs": (VECTORS,), "args": (1,)},
        {"inputs": (IMAGES,), "options": {"dim": -3}},
    ),
    *rows(
        "Conv2d",
        {
            "inputs": (IMAGES,),
            "args": (4, 6, 3),
            "state": BOTH,
            "lazy": ("LazyConv2d", (6, 3)),
            "open": (None, 6, 3),
            "large": (40, 50, 5),
        },
        {
            "inputs": (IMAGES,),
            "args": (4, 6, (3, 2)),
            "state": WEIGHT,
            "options": {
                "stride": (2, 1),
                "padding": (1, 2),
                "dilation": (1, 2),
                "groups": 2,
                "bias": False,
            },
            "lazy": ("LazyConv2d", (6, (3, 2))),
            "open": (None, 6, (3, 2)),
        },
        {"inputs": (IMAGES,), "args": (4, 2, 3), "options": {"padding": "same"}, "state": BOTH},
        {
            "inputs": (IMAGES,),
            "args": (4, 2, 3),
            "state": BOTH,
            "options": {"padding": 1, "padding_mode": "circular"},
        },
        {
            "inputs": (IMAGES,),
            "args": (4, 2, 3),
            "state": BOTH,
            "options": {"padding": 2, "padding_mode": "reflect"},
        },
        {
            "inputs": (Spec((4, 6, 5)),),
            "args": (4, 2, 3),
            "state": BOTH,
            "lazy": ("LazyConv2d", (2, 3)),
        },
    ),
    *rows(
        "MaxPool2d",
        {"inputs": (IMAGES,), "args": (2,)},
        {
            "inputs": (IMAGES,),
            "args": ((3, 2),),
            "options": {"stride": 2, "padding": 1, "dilation": (1, 2), "ceil_mode": True},
        },
    ),
    *rows(
        "AvgPool2d",
        {"inputs": (IMAGES,), "args": (2,)},
        {
            "inputs": (IMAGES,),
            "args": (3,),
            "options": {"stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False},
        },
        {"inputs": (IMAGES,), "args": (2,), "options": {"divisor_override": 3}},
    ),
    *rows(
        "BatchNorm1d",
        {
            "inputs": (VECTORS,),
            "args": (3,),
            "state": NORM,
            "lazy": ("LazyBatchNorm1d", ()),
            "open": (None,),
            "large": (5,),
        },
        {
            "inputs": (Spec((2, 3, 4)),),
            "args": (3,),
            "options": {"momentum": None},
            "state": NORM,
            "lazy": ("LazyBatchNorm1d", ()),
        },
        {
            "inputs": (VECTORS,),
            "args": (3,),
            "state": NORM[2:],
            "lazy": ("LazyBatchNorm1d", ()),
            "options": {"affine": False, "eps": 0.1},
        },
        {
            "inputs": (VECTORS,),
            "args": (3,),
            "options": {"track_running_stats": False},
            "state": BOTH,
            "lazy": ("LazyBatchNorm1d", ()),
        },
    ),
    *rows(
        "BatchNorm2d",
        {
            "inputs": (IMAGES,),
            "args": (4,),
            "options": {"momentum": 0.3},
            "state": NORM,
            "lazy": ("LazyBatchNorm2d", ()),
            "open": (None,),
        },
    ),
    *rows(
        "LayerNorm",
        {"inputs": (VECTORS,), "args": (3,), "state": BOTH, "open": (None,), "large": (5,)},
        {
            "inputs": (IMAGES,),
            "args": ((6, 5),),
            "options": {"eps": 0.1},
            "state": BOTH,
            "open": ((None, None),),
        },
        {"inputs": (VECTORS,), "args": (3,), "options": {"bias": False}, "state": WEIGHT},
        {"inputs": (VECTORS,), "args": (3,), "options": {"elementwise_affine": False}},
    ),
    *rows(
        "MSELoss",
        {"inputs": (VECTORS, VECTORS)},
        {"inputs": (VECTORS, Spec((4, 3))), "options": {"reduction": "none"}},
        {"inputs": (VECTORS, VECTORS), "options": {"reduction": "sum"}},
    ),
    *rows(
        "CrossEntropyLoss",
        {"inputs": (VECTORS, Spec((4,), 3))},
        {
            "inputs": (IMAGES, Spec((2, 6, 5), 4)),
            "options": {"reduction": "none", "ignore_index": 1},
        },
        {
            "inputs": (VECTORS, Spec((4,), 3)),
            "options": {"label_smoothing": 0.2, "reduction": "sum"},
        },
    ),
]

# Classes that have tests of their own instead of a row.
WITHOUT_ROW = {
    "Module",
    "Sequential",
    "ModuleList",
    "ModuleDict",
    "ParameterList",
    "ParameterDict",
    "LazyModuleMixin",
}
