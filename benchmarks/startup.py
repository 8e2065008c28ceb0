"""What ``import lamina`` adds to the import of JAX and optax, which it cannot do without.

Both are imported in fresh interpreters, in turn; the difference is taken pair by pair. The
interpreter's own start is not counted.
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


def import_seconds(names: str) -> float:
    """Seconds to import ``names`` in a fresh interpreter."""
    code = (
        "import time; start = time.perf_counter(); "
        f"import {names}; print(time.perf_counter() - start)"
    )
    return float(subprocess.check_output([sys.executable, "-c", code], text=True, env=ENV))


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

    seconds: dict[str, list[float]] = {BASE: [], WHOLE: []}
    for names in seconds:
        import_seconds(names)  # writes the bytecode, fills the file cache
    for turn in range(args.rounds):
        for names in (BASE, WHOLE) if turn % 2 else (WHOLE, BASE):
            seconds[names].append(import_seconds(names))
    differences = [b - a for a, b in zip(seconds[BASE], seconds[WHOLE], strict=True)]
    low, median, high = quartiles(differences)
    rows = [
        [f"import {names}", f"{statistics.median(own):.3f}", ""] for names, own in seconds.items()
    ]
    rows.append(["difference", f"{median:.3f}", f"{low:.3f}-{high:.3f}"])
    print(markdown(["", "median s", "interquartile"], rows))
    if args.detail:
        print()
        print(markdown(["module", "own us", "with its imports us"], costliest(args.detail)))
    write_json(args.json, {"seconds": seconds, "differences": differences})


if __name__ == "__main__":
    main()
