"""Kill a process that saves again and again, at random instants, and look at what is there.

    python tests/io/kill_script.py --kills 100 [--method nameless|temporary|sharded|npz] DIRECTORY

After every kill the checkpoint must load, with all checksums right, and be one that was saved as a
whole (every tensor has the same value). Only the way with temporary files may leave such a file.
"""

import argparse
import importlib.util
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

if importlib.util.find_spec("lamina") is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

import numpy as np

import lamina.io

COUNT = 40


def forever(directory: str, method: str, started: int) -> None:
    """Save one generation after another over the last one; tell ``started`` after the first."""
    if method == "temporary":
        del os.O_TMPFILE
    path = os.path.join(directory, "model.safetensors")
    options = {"max_shard_size": "8MB"} if method == "sharded" else {}
    if method == "npz":
        options = {"format": "npz"}
    generation = 0
    while True:
        generation += 1
        tensors = {f"w{i}": np.full(200_000, generation, "f4") for i in range(COUNT)}
        lamina.io.save({**tensors, "generation": generation}, path, **options)
        if generation == 1:
            os.write(started, b"x")


def check(directory: str, method: str) -> int:
    """Return the generation that is there."""
    path = directory if method == "sharded" else os.path.join(directory, "model.safetensors")
    loaded = lamina.io.load(path, verify=True, numpy=True)
    generation = loaded["generation"]
    for i in range(COUNT):
        assert (loaded[f"w{i}"] == generation).all(), f"w{i} is of another save"
    if method in ("nameless", "npz"):
        # The file has a name of its own only between two system calls.
        left = [name for name in os.listdir(directory) if name.endswith(".tmp")]
        assert len(left) <= 1, left
    return generation


def main() -> None:
    # No backend of JAX runs in this process, so the threads it warns of do not exist.
    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--method", default="nameless")
    options = parser.parse_args()
    generations, left = [], 0
    for _ in range(options.kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            forever(options.directory, options.method, writer)
        assert os.read(reader, 1) == b"x"
        time.sleep(random.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
        generations.append(check(options.directory, options.method))
        for name in os.listdir(options.directory):
            if name.endswith(".tmp"):
                left += 1
                os.unlink(os.path.join(options.directory, name))
    print(
        f"{options.kills} kills ({options.method}): every checkpoint whole, "
        f"{max(generations)} generations at most, {left} temporary files left behind"
    )


if __name__ == "__main__":
    main()
