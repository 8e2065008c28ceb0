"""Paired timing: every contender is timed in every round; only times of one round are compared.

A shared machine drifts by tens of percent within a minute. Times of one round drift together, so
their ratio does not; the median over many short rounds is what the tables report.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A name, one step, and a way to wait until the step's result exists."""

    name: str
    step: Callable[[], Any]
    wait: Callable[[Any], object]


@dataclass(frozen=True)
class Row:
    """Seconds per step, the quartiles of the per-round ratio to the reference, and the ratio of
    the two fastest rounds."""

    name: str
    seconds: float
    low: float
    ratio: float
    high: float
    at_best: float


def slice_seconds(contender: Contender, steps: int, block_every: int) -> float:
    """Seconds per step over ``steps`` steps, waiting for a result every ``block_every`` steps."""
    step, wait = contender.step, contender.wait
    wait(step())  # refills the caches that the previous contender emptied
    start = time.perf_counter()
    for _ in range(steps // block_every):
        for _ in range(block_every - 1):
            step()
        wait(step())
    return (time.perf_counter() - start) / steps


def interleave(
    contenders: Sequence[Contender],
    *,
    rounds: int = 40,
    budget: float = 0.02,
    block_every: int = 1,
) -> list[Row]:
    """Times ``contenders`` round-robin; the first is the reference.

    Each round runs every contender for about ``budget`` seconds, in an order drawn anew, so that
    none has a fixed predecessor. The garbage collector runs between rounds only.
    """
    counts = []
    for contender in contenders:
        slice_seconds(contender, 2 * block_every, block_every)  # compile, fill caches
        guess = slice_seconds(contender, 2 * block_every, block_every)
        counts.append(max(1, round(budget / guess / block_every)) * block_every)
    seconds: list[list[float]] = [[] for _ in contenders]
    order = random.Random(0)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for _ in range(rounds):
            for index in order.sample(range(len(contenders)), len(contenders)):
                seconds[index].append(slice_seconds(contenders[index], counts[index], block_every))
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return [
        Row(
            contender.name,
            statistics.median(own),
            *quartiles(ratios(own, seconds[0])),
            min(own) / min(seconds[0]),
        )
        for contender, own in zip(contenders, seconds, strict=True)
    ]


def ratios(own: Iterable[float], reference: Iterable[float]) -> list[float]:
    """The ratio of each round to the same round of the reference."""
    return [a / b for a, b in zip(own, reference, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratio_table(rows: Sequence[Row], unit: str = "us/step") -> str:
    """The rows of ``interleave`` as a markdown table."""
    return markdown(
        ["contender", unit, "ratio", "interquartile", "at best"],
        [
            [
                r.name,
                f"{r.seconds * 1e6:.0f}",
                f"{r.ratio:.2f}",
                f"{r.low:.2f}-{r.high:.2f}",
                f"{r.at_best:.2f}",
            ]
            for r in rows
        ],
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An aligned markdown table: first column to the left, the others to the right."""
    table = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    table.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in table
    )


def environment(*packages: str) -> dict[str, str]:
    """Versions of Python and of ``packages`` that are already imported."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        if name in sys.modules:
            found[name] = getattr(sys.modules[name], "__version__", "?")
    return found


def write_json(path: str | None, record: dict[str, Any]) -> None:
    """Writes ``record`` to ``path`` where one was given."""
    if path is not None:
        Path(path).write_text(json.dumps(record, indent=1) + "\n")


def as_dicts(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as plain dictionaries, for ``write_json``."""
    return [asdict(row) for row in rows]
