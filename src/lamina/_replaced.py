"""Names of PyTorch's that have another one here: asking for them says which."""

from __future__ import annotations

from typing import Any

_REPLACED = {
    "no_grad": "nothing is needed: gradients are taken by lamina.grad, value_and_grad and backward",
    "enable_grad": "nothing is needed: gradients are taken by lamina.grad and its like",
    "inference_mode": "nothing is needed: gradients are taken by lamina.grad and its like",
    "autocast": "net.bfloat16(), or cast inputs and parameters: net(x.astype(jnp.bfloat16))",
    "compile": "lamina.jit(f), or net.compile()",
    "tensor": "jnp.asarray(value)",
    "Tensor": "jax.Array",
    "device": "jax.devices()[0], or net.to('cpu')",
    "cuda": "jax.devices('gpu'), or net.to('gpu')",
    "optim": "lamina.Optimizer(net, optax.adam(1e-3))",
    "utils": "lamina.nn.utils",
}


def __getattr__(name: str) -> Any:
    message = f"module 'lamina' has no attribute {name!r}"
    if name in _REPLACED:
        message += f"\n    fix: {_REPLACED[name]}"
    raise AttributeError(message)
