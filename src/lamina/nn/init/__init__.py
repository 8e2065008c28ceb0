"""Initialisation: what values parameters begin with.

Three ways, all of which work before and after shapes are known:

- A *recipe* on a parameter: ``nn.Parameter(shape=(3, None), init=nn.init.Normal(std=0.02))``. A
  recipe is any function ``(key, shape, dtype) -> Array``; those here are listed below.
- *Rules* over a model, by name, layer type or predicate, with a report of what they did:
  ``nn.init.rules(net, {"*.weight": nn.init.XavierUniform(), "*.bias": nn.init.Zeros()})``.
- PyTorch's functions, in place: ``nn.init.normal_(net.fc.weight, std=0.02)``.

A value depends on the seed and the parameter's name only. ``p.init`` shows a parameter's recipe.

Example:
    >>> from lamina import nn
    >>> net = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    >>> print(nn.init.rules(net, {"*.weight": nn.init.Normal(std=0.01), "*.bias": nn.init.Zeros()}))
    parameter  shape   rule        recipe
    0.weight   (4, ?)  '*.weight'  Normal(mean=0.0, std=0.01)
    0.bias     (4,)    '*.bias'    Zeros()
    2.weight   (2, ?)  '*.weight'  Normal(mean=0.0, std=0.01)
    2.bias     (2,)    '*.bias'    Zeros()
"""

from ..._core.recipe import Normal, Uniform
from .distributions import Mixture, Orthogonal, Sparse, TruncatedNormal
from .fixed import Constant, Dirac, Eye, Ones, Value, Zeros
from .functions import (
    constant_,
    dirac_,
    eye_,
    kaiming_normal_,
    kaiming_uniform_,
    normal_,
    ones_,
    orthogonal_,
    sparse_,
    trunc_normal_,
    uniform_,
    xavier_normal_,
    xavier_uniform_,
    zeros_,
)
from .gains import _calculate_correct_fan as _calculate_correct_fan
from .gains import _calculate_fan_in_and_fan_out as _calculate_fan_in_and_fan_out
from .gains import calculate_gain
from .rules import RulesReport, rules
from .scaled import FanInUniform, KaimingNormal, KaimingUniform, XavierNormal, XavierUniform

__all__ = [
    "Constant",
    "Dirac",
    "Eye",
    "FanInUniform",
    "KaimingNormal",
    "KaimingUniform",
    "Mixture",
    "Normal",
    "Ones",
    "Orthogonal",
    "RulesReport",
    "Sparse",
    "TruncatedNormal",
    "Uniform",
    "Value",
    "XavierNormal",
    "XavierUniform",
    "Zeros",
    "calculate_gain",
    "constant_",
    "dirac_",
    "eye_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "normal_",
    "ones_",
    "orthogonal_",
    "rules",
    "sparse_",
    "trunc_normal_",
    "uniform_",
    "xavier_normal_",
    "xavier_uniform_",
    "zeros_",
]
