"""Kill a training that saves checkpoints at random instants, and look at what is there.

    python tests/io/kill_checkpoints.py --kills 100 [--no-background] DIRECTORY

The victims save steps 1, 2, 3 ... and now and then one step again. After every kill the next
process must find a whole newest step, not older than what the victim was told is on disk, restore
all of it, and clean up what is left. The processes are forked, which saves the time of imports.
"""

import argparse
import importlib.util
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

if importlib.util.find_spec("lamina") is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

import numpy as np
import optax

import lamina
from lamina import nn
from lamina.io.checkpoints import Checkpoints

WIDTH = 128


def training():
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
    return net, lamina.Optimizer(net, optax.adam(1e-3))


def fill(net, opt, value: int) -> None:
    net.load_state_dict(
        {name: np.full(old.shape, value, old.dtype) for name, old in net.state_dict().items()}
    )
    opt.load_state_dict(
        {name: np.full(old.shape, value, old.dtype) for name, old in opt.state_dict().items()}
    )


def victim(directory: str, background: bool, told) -> None:
    """Save for ever; write to ``told`` what is on disk."""
    net, opt = training()
    checkpoints = Checkpoints(directory, keep=2, background=background)
    step = checkpoints.latest() or 0
    while True:
        again = step > 1 and random.random() < 0.3
        step += not again
        fill(net, opt, step)
        checkpoints.save(step, net, opt, data={"part": np.full(9, step)}, metrics={"loss": step})
        if random.random() < 0.5:
            checkpoints.wait()
            os.write(told, b"%d\n" % step)


def heir(directory: str, least: int) -> None:
    """Restore what is there; it is all of one step, and no leftovers remain."""
    checkpoints = Checkpoints(directory, keep=2)
    left = [n for n in os.listdir(directory) if n != ".lock" and not n.startswith("step_")]
    assert not left and not any(n.endswith(".new") for n in os.listdir(directory)), left
    step = checkpoints.latest()
    assert step is not None and step >= least, (step, least)
    net, opt = training()
    found = checkpoints.restore(net, opt)
    assert found.step == step and found.metrics == {"loss": step}
    values = {**net.state_dict(), **opt.state_dict(), **found.data}
    for name, value in values.items():
        assert (np.asarray(value) == step).all(), f"{name} is of another step"
    assert len(checkpoints.steps()) <= 3  # the kill may have come before the oldest was removed


def forked(function, *args) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        random.seed()
        function(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--no-background", dest="background", action="store_false")
    options = parser.parse_args()
    least, leftovers = 0, 0
    for _ in range(options.kills):
        read, write = os.pipe()
        pid = forked(victim, options.directory, options.background, write)
        os.close(write)
        told = os.read(read, 100)  # it has begun
        time.sleep(random.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while more := os.read(read, 65536):
            told += more
        os.close(read)
        least = int(told.split()[-1])
        leftovers += any(
            n.startswith(".step") or n.endswith(".new") for n in os.listdir(options.directory)
        )
        _, status = os.waitpid(forked(heir, options.directory, least), 0)
        assert status == 0, f"after a kill, at step {least}: see above"
    print(
        f"{options.kills} kills: a whole newest step each time, nothing lost that was on disk, "
        f"step {least} reached; {leftovers} kills left something, all cleaned up"
    )


if __name__ == "__main__":
    main()
