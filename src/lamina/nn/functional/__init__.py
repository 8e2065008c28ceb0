"""The functions behind the layers, with PyTorch's names, signatures and results.

Tensor arguments are arrays, parameters, buffers, NumPy arrays or lists; results are ``jax.Array``.
Half precision comes out as half precision; sums, exponentials and statistics are float32 inside.

Example:
    >>> import lamina.nn.functional as F
    >>> F.relu(F.linear([[1.0, -1.0]], [[1.0, 0.0], [0.0, 1.0]])).tolist()
    [[1.0, 0.0]]
"""

from .activation import gelu, log_softmax, relu, sigmoid, softmax, tanh
from .conv import conv2d
from .dropout import dropout
from .linear import embedding, flatten, linear, one_hot
from .loss import cross_entropy, mse_loss, nll_loss
from .normalization import batch_norm, layer_norm
from .pooling import avg_pool2d, max_pool2d

__all__ = [
    "avg_pool2d",
    "batch_norm",
    "conv2d",
    "cross_entropy",
    "dropout",
    "embedding",
    "flatten",
    "gelu",
    "layer_norm",
    "linear",
    "log_softmax",
    "max_pool2d",
    "mse_loss",
    "nll_loss",
    "one_hot",
    "relu",
    "sigmoid",
    "softmax",
    "tanh",
]
