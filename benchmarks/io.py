"""Reading and writing files: paired ratios to a plain read or write of the same bytes.

    python benchmarks/io.py            # 1 GiB in 256 tensors, 200 MB in 4,000, a tied model
    python benchmarks/io.py --quick    # a tenth of it
    python benchmarks/io.py --only tied

Every round runs all contestants one after another, in an order drawn anew, beside the plain read
or write; the table has the median over the rounds of (contestant / plain) of the same round. Files
that are read are in the page cache, files that are written did not exist, and memory is backed by
the host. "First" is the first call in a fresh process. Peak memory is what the first call adds to
the process, relative to the data. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np

import lamina.io

HAVE = {
    name: importlib.util.find_spec(name) is not None for name in ("safetensors", "torch", "orbax")
}
Job = Callable[[], object]


def cases(scale: float) -> dict[str, dict[str, np.ndarray]]:
    """The three models: few large tensors, many small ones, and a tied one."""
    random = np.random.default_rng(0)

    def fill(shape: tuple[int, ...]) -> np.ndarray:
        return random.random(shape, dtype=np.float32)

    large = {f"layer{i}.weight": fill((1024, int(1024 * scale))) for i in range(256)}
    small = {f"layer{i}.bias": fill((125, 100)) for i in range(int(4000 * scale))}
    tied = {f"layer{i}.weight": fill((1024, int(1024 * scale))) for i in range(16)}
    tied["embed.weight"] = tied["head.weight"] = fill((8 * 1024, int(1024 * scale)))
    return {
        f"{_bytes(large)} in {len(large)}": large,
        f"{_bytes(small)} in {len(small)}": small,
        f"tied, {_bytes(tied)} in {len(tied)}": tied,
    }


def _bytes(tensors: dict[str, np.ndarray]) -> str:
    size = sum({id(t): t.nbytes for t in tensors.values()}.values())
    return f"{size / 1e6:.0f} MB"


def plain_read(path: str) -> np.ndarray:
    return np.fromfile(path, np.uint8)


def plain_write(data: np.ndarray, path: str, sync: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.write(fd, view[done:])
    if sync:
        os.fsync(fd)
    os.close(fd)


def load_jobs(folder: str) -> dict[str, Job]:
    """Loaders by label; their files were made by ``prepare``."""
    own = os.path.join(folder, "own.safetensors")
    jobs: dict[str, Job] = {
        "plain read": lambda: plain_read(own),
        "lamina": lambda: _ready(lamina.io.load(own)),
        "lamina, copy=True": lambda: _ready(lamina.io.load(own, copy=True)),
        "lamina.open": lambda: lamina.io.open(own).close(),
    }
    if HAVE["safetensors"]:
        from safetensors import flax

        other = os.path.join(folder, "other.safetensors")
        jobs["lamina, file of safetensors"] = lambda: _ready(lamina.io.load(other))
        jobs["safetensors.flax"] = lambda: _ready(flax.load_file(other))
    if HAVE["torch"]:
        import torch

        path = os.path.join(folder, "torch.pt")
        jobs["lamina, file of torch"] = lambda: _ready(lamina.io.load(path))
        jobs["torch.load"] = lambda: torch.load(path, weights_only=True)
        jobs["torch.load(mmap=True)"] = lambda: torch.load(path, weights_only=True, mmap=True)
    if HAVE["orbax"]:
        import orbax.checkpoint

        reader = orbax.checkpoint.PyTreeCheckpointer()
        jobs["orbax"] = lambda: _ready(reader.restore(os.path.join(folder, "orbax")))
    return jobs


def look_jobs(folder: str, tensors: dict[str, np.ndarray]) -> dict[str, Job]:
    """What reads every value and keeps none; a diff reads two files of this size."""
    own, same, other = (os.path.join(folder, name) for name in ("own.safetensors", "same", "other"))
    lamina.io.save(tensors, same)
    lamina.io.save({name: tensor + 1 for name, tensor in tensors.items()}, other)

    def statistics_of_all() -> None:
        with lamina.io.open(own) as file:
            for handle in file.values():
                lamina.io.tensor_stats(handle)

    def verify() -> None:
        with lamina.io.open(own) as file:
            file.verify()

    def diff(path: str) -> None:
        with lamina.io.open(own) as first, lamina.io.open(path) as second:
            lamina.io.file_diff(first, second)

    return {
        "plain read": lambda: plain_read(own),
        "lamina.io.tensor_stats": statistics_of_all,
        "lamina.io.file_diff, equal": lambda: diff(same),
        "lamina.io.file_diff, every value differs": lambda: diff(other),
        "verify checksums": verify,
    }


def save_jobs(target: str, tensors: dict[str, np.ndarray]) -> dict[str, Job]:
    """Writers by label, each with and without waiting for the disk where it can."""
    arrays = _shared(jax.device_put, tensors)
    whole = np.concatenate([t.reshape(-1).view(np.uint8) for t in _distinct(tensors).values()])
    jobs: dict[str, Job] = {
        "plain write": lambda: plain_write(whole, target, False),
        "plain write, sync": lambda: plain_write(whole, target, True),
        "lamina": lambda: lamina.io.save(arrays, target, sync=False),
        "lamina, no checksums": lambda: lamina.io.save(arrays, target, sync=False, checksums=False),
        "lamina, sync": lambda: lamina.io.save(arrays, target),
    }
    if HAVE["safetensors"]:
        from safetensors import flax

        jobs["safetensors.flax"] = lambda: flax.save_file(arrays, target)
    if HAVE["torch"]:
        import torch

        held = _shared(torch.from_numpy, tensors)
        jobs["torch.save"] = lambda: torch.save(held, target)
    if HAVE["orbax"]:
        import orbax.checkpoint

        writer = orbax.checkpoint.PyTreeCheckpointer()
        jobs["orbax"] = lambda: writer.save(target, arrays)
    return jobs


def _shared(make: Callable[[np.ndarray], object], tensors: dict[str, np.ndarray]) -> dict:
    made = {id(t): make(t) for t in tensors.values()}
    return {name: made[id(t)] for name, t in tensors.items()}


def _distinct(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {id(t): name for name, t in reversed(tensors.items())}
    return {name: t for name, t in tensors.items() if names[id(t)] == name}


def _ready(arrays: object) -> object:
    return jax.block_until_ready(arrays)


def prepare(folder: str, tensors: dict[str, np.ndarray]) -> None:
    """Write the same tensors with every library."""
    lamina.io.save(tensors, os.path.join(folder, "own.safetensors"))
    if HAVE["safetensors"]:
        from safetensors import numpy as writer

        writer.save_file(_distinct(tensors), os.path.join(folder, "other.safetensors"))
    if HAVE["torch"]:
        import torch

        torch.save(_shared(torch.from_numpy, tensors), os.path.join(folder, "torch.pt"))
    if HAVE["orbax"]:
        import orbax.checkpoint

        arrays = _shared(jax.device_put, tensors)
        orbax.checkpoint.PyTreeCheckpointer().save(os.path.join(folder, "orbax"), arrays)


def back_memory(size: int) -> None:
    """Touch and free memory, for the page cache or the arrays of the job to come.

    A virtual machine gives idle memory back to its host, and getting it again takes 1 to 3 seconds
    per GiB: more than any job here, and paid by whichever comes first.
    """
    np.ones(size, np.uint8)


def rounds(jobs: dict[str, Job], count: int, size: int, target: str = "") -> dict[str, list[float]]:
    """Time all jobs in every round, in an order drawn anew, with an empty ``target``."""
    order = random.Random(0)
    times: dict[str, list[float]] = {label: [] for label in jobs}
    for turn in range(count + 1):
        for label in order.sample(list(jobs), len(jobs)):
            if target:
                remove(target)
                os.sync()
            back_memory(size + size // 4)
            gc.collect()  # else some call pays for what all have left
            start = time.perf_counter()
            result = jobs[label]()
            elapsed = time.perf_counter() - start
            del result
            if turn:
                times[label].append(elapsed)
    return times


def remove(path: str) -> None:
    """Remove a file or a directory, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.unlink(path)


def first_call(folder: str, label: str) -> tuple[float, float]:
    """Seconds and peak memory (bytes) of one load in a fresh process."""
    command = [sys.executable, __file__, "--child", label, "--folder", folder]
    back_memory(3 * os.path.getsize(os.path.join(folder, "own.safetensors")))
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, memory = json.loads(out.splitlines()[-1])
    return seconds, memory


def child(folder: str, label: str) -> None:
    """One load, timed, in this process."""
    job = load_jobs(folder)[label]
    jax.block_until_ready(jax.device_put(np.zeros(8)))
    before = _memory("VmRSS")
    start = time.perf_counter()
    result = job()
    elapsed = time.perf_counter() - start
    print(json.dumps([elapsed, _memory("VmHWM") - before]))
    del result


def _memory(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def table(
    title: str, times: dict[str, list[float]], plain: Callable[[str], str], more: dict[str, str]
) -> None:
    """Print one markdown table of medians and paired ratios."""
    head, rule = ("| first | peak memory ", "|---|---") if more else ("", "")
    print(f"\n### {title}\n\n| | median | ratio {head}|\n|---|---|---{rule}|")
    for label, found in times.items():
        pairs = zip(found, times[plain(label)], strict=True)
        ratio = statistics.median(own / base for own, base in pairs)
        median = statistics.median(found) * 1e3
        print(f"| {label} | {median:.1f} ms | {ratio:.2f} {more.get(label, '')}|")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, fewer rounds")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--only", default="", help="only models whose title has this word: tied")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.folder, options.child)
        return
    warnings.simplefilter("ignore")
    count = options.rounds or (5 if options.quick else 9)
    for title, tensors in cases(0.1 if options.quick else 1.0).items():
        if options.only not in title:
            continue
        folder = tempfile.mkdtemp(prefix="lamina-io-")
        try:
            prepare(folder, tensors)
            size = os.path.getsize(os.path.join(folder, "own.safetensors"))
            back_memory(size + size // 4)
            jobs = load_jobs(folder)
            first = {label: first_call(folder, label) for label in jobs}
            base = first["plain read"][0]
            more = {k: f"| {t / base:.2f} | {m / size:.2f} " for k, (t, m) in first.items()}
            table(f"load {title}", rounds(jobs, count, size), _plain_read, more)
            table(f"look {title}", rounds(look_jobs(folder, tensors), count, size), _plain_read, {})
            target = os.path.join(folder, "saved")
            times = rounds(save_jobs(target, tensors), count, size, target)
            table(f"save {title}", times, _plain_write, {})
        finally:
            shutil.rmtree(folder)


def _plain_read(_: str) -> str:
    return "plain read"


def _plain_write(label: str) -> str:
    return "plain write, sync" if label.endswith("sync") else "plain write"


if __name__ == "__main__":
    main()
