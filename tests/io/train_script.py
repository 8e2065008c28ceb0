"""Train a small model with everything that has state, and print what its state is, byte for byte.

    python tests/io/train_script.py DIRECTORY first last

Trains steps ``first`` to ``last``. Continues from the latest checkpoint if ``first`` is not 0, and
saves one at the end. Run by ``test_checkpoints.py`` in processes of its own.
"""

import hashlib
import sys

import jax.numpy as jnp
import numpy as np
import optax

import lamina
from lamina import nn
from lamina.io.checkpoints import Checkpoints


def main() -> None:
    directory, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    lamina.manual_seed(5)
    net = nn.Sequential(
        nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Dropout(0.5), nn.LazyLinear(2)
    )
    opt = lamina.Optimizer(net, optax.adam(1e-2))
    order = np.random.default_rng(1)
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("f4")

    @lamina.jit
    def train_step(net, opt, batch):
        loss, grads = lamina.value_and_grad(lambda net: (net(batch) ** 2).mean())(net)
        opt.step(grads)
        return loss

    with Checkpoints(directory) as checkpoints:
        if first:
            lamina.infer(net, jnp.ones((8, 4)))
            lamina.manual_seed(99)  # what follows is to come from the file
            found = checkpoints.restore(net, opt)
            assert found.step == first, found
            order.bit_generator.state = found.data["order"]
            shuffled = found.data["shuffled"]
        else:
            shuffled = order.permutation(32)
        for step in range(first, last):
            if step % 4 == 0:
                shuffled = order.permutation(32)
            part = shuffled[step % 4 * 8 : step % 4 * 8 + 8]
            loss = train_step(net, opt, x[part])
        data = {"order": order.bit_generator.state, "shuffled": shuffled}
        checkpoints.save(last, net, opt, data=data, metrics={"loss": loss})
    for name, array in {**net.state_dict(), **opt.state_dict()}.items():
        print(name, hashlib.sha256(np.asarray(array).tobytes()).hexdigest())
    print("order", order.integers(1 << 30))
    print("dropout", np.asarray(nn.functional.dropout(jnp.ones(16))).tolist())
    print("loss", float(loss).hex())


if __name__ == "__main__":
    main()
