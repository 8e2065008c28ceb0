"""What ``import lamina`` adds to the import of JAX and optax, which it cannot do without.

Both are imported in fresh interpreters, in turn; the difference is taken pair by pair. The
interpreter's own start is not counted. CPU seconds are the steadier ones on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys

from _timing import markdown, quartiles, write_json

BASE, WHOLE = "jax, optax", "jax, optax, lamina"
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def import_seconds(names: str) -> tuple[float, float]:
    """Seconds by the clock and seconds of CPU to import ``names`` in a fresh interpreter."""
    code = (
        "import time; clock, cpu = time.perf_counter(), time.process_time(); "
        f"import {names}; print(time.perf_counter() - clock, time.process_time() - cpu)"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True, env=ENV)
    clock, cpu = map(float, output.split())
    return clock, cpu


def costliest(count: int) -> list[tuple[str, int, int]]:
    """The modules that lamina loads beyond JAX and optax: name, own and cumulative us."""
    code = f"import {BASE}; import sys; print('ours', file=sys.stderr); import lamina"
    command = [sys.executable, "-X", "importtime", "-c", code]
    report = subprocess.run(command, capture_output=True, text=True, check=True, env=ENV).stderr
    ours = report.partition("\nours\n")[2]
    found = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)", ours)
    rows = [(name, int(own), int(whole)) for own, whole, name in found]
    return sorted(rows, key=lambda row: -row[1])[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--detail", type=int, default=0, help="also list this many costly modules")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()

    seconds: dict[str, list[tuple[float, float]]] = {BASE: [], WHOLE: []}
    for names in seconds:
        import_seconds(names)  # writes the bytecode, fills the file cache
    for turn in range(args.rounds):
        for names in (BASE, WHOLE) if turn % 2 else (WHOLE, BASE):
            seconds[names].append(import_seconds(names))
    rows, differences = [], {}
    for place, kind in enumerate(("clock", "CPU")):
        base, whole = ([run[place] for run in seconds[names]] for names in (BASE, WHOLE))
        differences[kind] = [b - a for a, b in zip(base, whole, strict=True)]
        low, median, high = quartiles(differences[kind])
        middle = [f"{value:.3f}" for value in map(statistics.median, (base, whole))]
        rows.append([kind, *middle, f"{median:.3f}", f"{low:.3f}-{high:.3f}"])
    head = ["seconds", f"import {BASE}", f"import {WHOLE}", "difference", "interquartile"]
    print(markdown(head, rows))
    if args.detail:
        print()
        print(markdown(["module", "own us", "with its imports us"], costliest(args.detail)))
    write_json(args.json, {"seconds": seconds, "differences": differences})


if __name__ == "__main__":
    main()
