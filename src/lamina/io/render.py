"""What the file commands print: plain text, one line for each tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from .diff import Difference, FileDiff
from .stats import Stats
from .tensorfile import TensorFile, TensorHandle
from .torch_values import describe, printable

__all__ = [
    "as_json",
    "diff_lines",
    "human_bytes",
    "objects_beside",
    "stat_lines",
    "tensor_rows",
    "tree_lines",
]

_WIDEST = 60
_MOST_OBJECTS = 10_000


def human_bytes(size: int) -> str:
    """Write a number of bytes in powers of a thousand.

    >>> human_bytes(512), human_bytes(1_536_000)
    ('512 B', '1.5 MB')
    """
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            break
    return f"{value:.1f} {unit}"


def as_json(value: Any) -> str:
    """Write strict JSON: NaN becomes ``null``, infinities become text."""
    return json.dumps(_strict(value), indent=2, ensure_ascii=True)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def tensor_rows(file: TensorFile, names: Iterable[str]) -> list[dict[str, Any]]:
    """Say of each tensor what is known without reading it."""
    rows = []
    for name in names:
        handle = file[name]
        row: dict[str, Any] = {
            "name": name,
            "shape": list(handle.shape),
            "dtype": handle.kind if handle.refused else handle.dtype.name,
            "bytes": handle.nbytes,
        }
        if name in file.ties:
            row["tied_to"] = file.ties[name]
        if handle.refused:
            row["refused"] = handle.refused
        if handle.prng:
            row["random_key"] = handle.prng
        rows.append(row)
    return rows


def objects_beside(file: TensorFile) -> dict[str, Any]:
    """Return what is in the file beside its tensors, by dotted name; objects as a few words."""
    found: dict[str, Any] = {}
    _collect_objects(file.tree, "", found, 0)
    return found


def _collect_objects(tree: Any, path: str, found: dict[str, Any], depth: int) -> None:
    if isinstance(tree, TensorHandle) or len(found) >= _MOST_OBJECTS:
        return
    if isinstance(tree, dict | list | tuple) and tree and depth < 20:
        for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            _collect_objects(child, f"{path}.{key}" if path else str(key), found, depth + 1)
    elif path:
        plain = tree is None or type(tree) in (bool, int, float, str)
        found[path] = tree if plain or tree in ({}, [], ()) else describe(tree)


class _Node:
    """A module in the tree of names."""

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.row: dict[str, Any] | None = None
        self.nbytes = 0


def tree_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Draw the names as an indented tree; modules show the bytes of all below them."""
    root = _Node()
    for row in rows:
        node, own = root, 0 if "tied_to" in row else row["bytes"]
        node.nbytes += own
        for part in row["name"].split("."):
            node = node.children.setdefault(part, _Node())
            node.nbytes += own
        node.row = row
    lines = list(_draw(root, 0))
    texts = [("  " * depth + label, node) for depth, label, node in lines]
    width = min(max((len(text) for text, _ in texts), default=0), _WIDEST)
    shape_width = max((len(_shape(row["shape"])) for row in rows), default=0)
    dtype_width = max((len(row["dtype"]) for row in rows), default=0)
    for text, node in texts:
        row, size = node.row, human_bytes(node.nbytes)
        if row is None:
            yield f"{text:<{width}}  {'':<{shape_width}}  {'':<{dtype_width}}  {size:>9}"
            continue
        cells = f"{text:<{width}}  {_shape(row['shape']):<{shape_width}}  "
        cells += f"{printable(row['dtype']):<{dtype_width}}"
        if "tied_to" in row:
            yield f"{cells}  = {printable(row['tied_to'])}"
            continue
        note = f"  {printable(row['refused'])}" if "refused" in row else ""
        note += f"  random key ({printable(row['random_key'])})" if "random_key" in row else ""
        yield f"{cells}  {human_bytes(row['bytes']):>9}{note}"


def _draw(root: _Node, depth: int) -> Iterator[tuple[int, str, _Node]]:
    # Without recursion: a name may have thousands of dots.
    stack = [(depth, label, node) for label, node in reversed(root.children.items())]
    while stack:
        depth, label, node = stack.pop()
        while node.row is None and len(node.children) == 1:
            ((part, child),) = node.children.items()
            if not child.children:
                break
            label, node = f"{label}.{part}", child
        yield depth, printable(label), node
        stack += [(depth + 1, part, child) for part, child in reversed(node.children.items())]


def _shape(shape: Iterable[int]) -> str:
    return str(tuple(shape))


def stat_lines(stats: Iterable[tuple[str, Stats | str]]) -> Iterator[str]:
    """One line for each tensor, as soon as it is there; text stands for what can't be read."""
    columns = ("min", "max", "mean", "std", "norm", "zeros", "nan", "inf")
    head = "".join(f"{column:>12}" for column in columns[:5])
    head += "".join(f"{column:>10}" for column in columns[5:])
    yield f"{head}  name"
    for name, found in stats:
        if isinstance(found, str):
            yield f"{'':>90}  {printable(name)}: {printable(found)}"
            continue
        numbers = (found.min, found.max, found.mean, found.std, found.norm)
        line = "".join(f"{number:>12.5g}" for number in numbers)
        line += "".join(f"{count:>10}" for count in (found.zeros, found.nan, found.inf))
        yield f"{line}  {printable(name)}"


def diff_lines(first: TensorFile, second: TensorFile, diff: FileDiff) -> Iterator[str]:
    """Say what differs: ``-`` is in the first file only, ``+`` in the second, ``~`` in both."""
    yield f"--- {printable(first.path)}"
    yield f"+++ {printable(second.path)}"
    for sign, file, names in (("-", first, diff.only_first), ("+", second, diff.only_second)):
        for name in names:
            handle = file[name]
            kind = handle.kind if handle.refused else handle.dtype.name
            yield f"{sign} {printable(name)}: {_shape(handle.shape)} {kind}"
    for item in diff.different:
        yield f"~ {printable(item.name)}: {_difference(item)}"
    count = len(diff.only_first) + len(diff.only_second) + len(diff.different)
    yield f"{diff.equal} equal, {count} different"


def _difference(item: Difference) -> str:
    parts = []
    if item.shapes[0] != item.shapes[1]:
        parts.append(f"shape {_shape(item.shapes[0])} and {_shape(item.shapes[1])}")
    if item.dtypes[0] != item.dtypes[1]:
        parts.append(f"dtype {item.dtypes[0]} and {item.dtypes[1]}")
    if item.values:
        where = "" if item.first is None else f", first at {_shape(item.first)}"
        parts.append(
            f"{item.values} of {math.prod(item.shapes[0])} values, largest difference "
            f"{item.max_abs:.3g} (relative {item.max_rel:.3g}){where}"
        )
    return "; ".join(parts) or "other bytes"
