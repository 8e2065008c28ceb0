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
import subprocess
import sys
import time
from pathlib import Path

if importlib.util.find_spec("lamina") is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

import numpy as np

import lamina.io

COUNT = 40


def forever(directory: str, method: str) -> None:
    """Save one generation after another over the last one."""
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
            print("saving", flush=True)


def check(directory: str, method: str) -> int:
    """Return the generation that is there."""
    loaded = lamina.io.load(directory if method == "sharded" else _path(directory), verify=True)
    generation = loaded["generation"]
    for i in range(COUNT):
        assert (np.asarray(loaded[f"w{i}"]) == generation).all(), f"w{i} is of another save"
    if method in ("nameless", "npz"):
        # The file has a name of its own only between two system calls.
        left = [name for name in os.listdir(directory) if name.endswith(".tmp")]
        assert len(left) <= 1, left
    return generation


def _path(directory: str) -> str:
    return os.path.join(directory, "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--method", default="nameless")
    parser.add_argument("--forever", action="store_true")
    options = parser.parse_args()
    if options.forever:
        forever(options.directory, options.method)
    generations, left = [], 0
    for _ in range(options.kills):
        command = [sys.executable, __file__, options.directory, "--forever"]
        process = subprocess.Popen([*command, "--method", options.method], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"saving\n"
        time.sleep(random.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
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
