"""The commands for files: ``lamina ls``, ``stat``, ``diff``, ``check`` and ``convert``.

Results go to standard output as plain text or JSON, progress and remarks to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.errors import FileError
from .convert import Count, convert, format_of
from .diff import FileDiff, file_diff
from .native import select
from .rename import Renaming
from .render import (
    as_json,
    diff_lines,
    human_bytes,
    objects_beside,
    stat_lines,
    tensor_rows,
    tree_lines,
)
from .sharded import parse_size
from .sniff import open_any
from .stats import Stats, tensor_stats
from .tensorfile import TensorFile
from .tolerance import within
from .torch_values import printable

__all__ = ["add_commands"]

_PIPE_CLOSED = 141  # as the shell reports a process that SIGPIPE ended
_LONG = 256 << 20
_MOST_SHOWN = 30
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "fp16": "float16", "half": "float16",
           "f32": "float32", "fp32": "float32", "f64": "float64", "fp64": "float64",
           "f8_e4m3": "float8_e4m3fn", "f8_e5m2": "float8_e5m2"}  # fmt: skip

Run = Callable[[argparse.Namespace], int]


def add_commands(subparsers: Any) -> None:
    """Add the commands to a parser; each sets ``run``, a function from its options to a status.

    Args:
        subparsers: what ``argparse.ArgumentParser.add_subparsers`` returned.

    Example:
        >>> import argparse
        >>> parser = argparse.ArgumentParser()
        >>> add_commands(parser.add_subparsers())
        >>> parser.parse_args(["ls", "model.safetensors", "--json", "*.bias"]).file
        ['model.safetensors', '*.bias']
    """
    ls = _command(subparsers, "ls", _ls, "list the tensors of a file")
    stat = _command(subparsers, "stat", _stat, "statistics of the tensors of a file")
    for parser in (ls, stat):
        parser.usage = "%(prog)s [-h] [--json] FILE [GLOB ...]"
        parser.add_argument(
            "file", metavar="FILE [GLOB ...]", nargs="*", action="extend", default=[],
            help="a file, an index or a directory; and which names (default: all)",
        )  # fmt: skip
        parser.add_argument("--json", nargs="*", action=_Json, default=False, help="write JSON")

    diff = _command(subparsers, "diff", _diff, "compare two files: names, shapes, dtypes, values")
    diff.add_argument("first", metavar="A")
    diff.add_argument("second", metavar="B")
    diff.add_argument("--rtol", type=_tolerance, default=0.0, help="relative tolerance (default 0)")
    diff.add_argument("--atol", type=_tolerance, default=0.0, help="absolute tolerance (default 0)")
    diff.add_argument("--json", action="store_true", help="write JSON")
    diff.epilog = "Exit status: 0 if equal, 1 if different, 2 in trouble."

    check = _command(subparsers, "check", _check, "check structure, ranges and checksums")
    check.add_argument("file", metavar="FILE")

    conv = _command(subparsers, "convert", _convert, "write a file in another format or dtype")
    conv.add_argument("source", metavar="A")
    conv.add_argument("target", metavar="B")
    conv.add_argument("--dtype", type=_dtype, help="cast floating-point tensors: bf16, f32, ...")
    conv.add_argument("--shard", type=_size, metavar="SIZE", help="split into shards: 2GB")
    conv.add_argument("--rename", action="append", metavar="RULE", default=[],
                      help="'encoder.*=enc.{0}'; several are tried in order")  # fmt: skip
    conv.add_argument("--only", action="append", metavar="GLOB", default=[], help="these names")
    conv.add_argument("--format", choices=("safetensors", "npz", "torch"),
                      help="default: by the ending of B, else safetensors")  # fmt: skip
    conv.add_argument("--force", action="store_true", help="replace B if it exists")


class _Json(argparse.Action):
    """A switch after which further words still count as positional, which argparse forgets."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.json = True
        namespace.file = [*(namespace.file or []), *values]


def _command(subparsers: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=text, description=text.capitalize())
    parser.set_defaults(run=_quiet_on_closed_pipe(run))
    return parser


def _quiet_on_closed_pipe(run: Run) -> Run:
    """Let ``lamina ls FILE | head`` end without a word."""

    @functools.wraps(run)
    def wrapped(options: argparse.Namespace) -> int:
        try:
            status = run(options)
            sys.stdout.flush()
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _PIPE_CLOSED
        return status

    return wrapped


def _ls(options: argparse.Namespace) -> int:
    path, globs = _file_and_globs(options.file)
    with open_any(path) as file:
        names = _names(file, globs)
        rows = tensor_rows(file, names)
        objects = {} if globs else objects_beside(file)
        distinct = {handle.key: handle for handle in (file[name] for name in names)}.values()
        total = sum(handle.nbytes for handle in distinct)
        elements = sum(math.prod(handle.shape) for handle in distinct)
        if options.json:
            print(as_json({
                "path": file.path, "kind": file.kind, "tensors": rows, "objects": objects,
                "metadata": _own_metadata(file),
                "total": {"tensors": len(rows), "elements": elements, "bytes": total},
            }))  # fmt: skip
            return 0
        for line in tree_lines(rows):
            print(line)
        if objects:
            print("beside the tensors:")
            for path, value in list(objects.items())[:_MOST_SHOWN]:
                print(f"  {printable(path)}: {printable(str(value))}")
            if len(objects) > _MOST_SHOWN:
                print(f"  ... and {len(objects) - _MOST_SHOWN} more (--json shows them)")
        ties = sum("tied_to" in row for row in rows)
        tied = f" ({ties} tied)" if ties else ""
        print(f"{len(rows)} tensors{tied}, {elements:,} elements, {human_bytes(total)}, "
              f"{file.kind}")  # fmt: skip
    return 0


def _stat(options: argparse.Namespace) -> int:
    path, globs = _file_and_globs(options.file)
    with open_any(path) as file:
        names = [name for name in _names(file, globs) if name not in file.ties]
        with _progress("reading", sum(file[name].nbytes for name in names)) as advance:
            stats = _all_stats(file, names, advance)
            if options.json:
                made = {
                    name: {"refused": found} if isinstance(found, str) else found._asdict()
                    for name, found in stats
                }
                print(as_json({"path": file.path, "kind": file.kind, "tensors": made}))
            else:
                for line in stat_lines(stats):
                    print(line)
    return 0


def _all_stats(
    file: TensorFile, names: Sequence[str], advance: Callable[[int], Any]
) -> Iterator[tuple[str, Stats | str]]:
    for name in names:
        handle = file[name]
        yield name, handle.refused or tensor_stats(handle, advance)


def _diff(options: argparse.Namespace) -> int:
    with open_any(options.first) as first, open_any(options.second) as second:
        common = sum(first[name].nbytes for name in first if name in second)
        with _progress("comparing", common) as advance:
            diff = file_diff(first, second, advance)
        if options.rtol or options.atol:
            diff = _tolerate(first, second, diff, options.rtol, options.atol)
        if options.json:
            made = diff._asdict() | {"different": [d._asdict() for d in diff.different]}
            print(as_json({"same": diff.same, **made}))
        elif not diff.same:
            for line in diff_lines(first, second, diff):
                print(line)
        else:
            print(f"equal: {diff.equal} tensors")
        return 0 if diff.same else 1


def _tolerate(
    first: TensorFile, second: TensorFile, diff: FileDiff, rtol: float, atol: float
) -> FileDiff:
    different = [
        item
        for item in diff.different
        if item.dtypes[0] != item.dtypes[1]
        or not item.values
        or not within(first[item.name], second[item.name], rtol, atol)
    ]
    equal = diff.equal + len(diff.different) - len(different)
    return diff._replace(different=different, equal=equal)


def _check(options: argparse.Namespace) -> int:
    with open_any(options.file) as file:
        unread = [name for name in file if name not in file.checksums and name not in file.ties]
        refused = [name for name in unread if file[name].refused]
        with _progress("checking", file.nbytes) as advance:
            count = file.verify(advance)
            for name in unread if not count else ():
                if not file[name].refused:
                    for chunk in file[name].chunks():
                        advance(chunk.nbytes)
        sums = f"{count} checksums agree" if count else "no checksums recorded, every byte read"
        print(f"{printable(file.path)}: ok ({file.kind}, {len(file)} tensors, "
              f"{human_bytes(file.nbytes)}, {sums})")  # fmt: skip
        for name in refused:
            print(f"  {printable(name)} {printable(file[name].refused)}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    target = options.target
    for path in (target, f"{target}.index.json"):
        if not options.force and os.path.lexists(path):
            raise FileError(f"{path}: exists already; pass --force to replace it")
    format = options.format or format_of(target)
    if options.shard and format != "safetensors":
        raise FileError(f"{target}: --shard needs --format safetensors, got {format}")
    rules = Renaming(options.rename) if options.rename else None
    with open_any(options.source) as file:
        with _bar("converting", file.nbytes) as show:
            report = convert(
                file, target, format=format, dtype=options.dtype, rename=rules,
                only=options.only or None, max_shard_size=options.shard, progress=show,
            )  # fmt: skip
        for text in report.remarks:
            print(f"lamina convert: {printable(text, 2000)}", file=sys.stderr)
        print(f"{printable(target)}: {report.tensors} tensors, {human_bytes(report.nbytes)}, "
              f"{format}")  # fmt: skip
    return 0


def _file_and_globs(words: list[str]) -> tuple[str, list[str]]:
    if not words:
        raise FileError("expected FILE [GLOB ...], got no file")
    return words[0], words[1:]


def _names(file: TensorFile, globs: list[str]) -> list[str]:
    return list(select(file, globs)) if globs else list(file)


def _own_metadata(file: TensorFile) -> dict[str, str]:
    hidden = {"lamina", "lamina.crc32", *file.ties}
    return {key: value for key, value in file.metadata.items() if key not in hidden}


@contextlib.contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], Any]]:
    """Show a bar on a terminal while much is read; yields what to call with numbers of bytes."""
    with _bar(label, total) as show:
        yield Count(show, total)


@contextlib.contextmanager
def _bar(label: str, size: int) -> Iterator[Callable[[int, int], Any]]:
    """The same for work whose total is known as it goes: yields ``show(done, total)``."""
    if size < _LONG or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=size)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tolerance(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(text)
    return value


def _dtype(text: str) -> np.dtype:
    try:
        dtype = jnp.dtype(_DTYPES.get(text.lower(), text))
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise argparse.ArgumentTypeError(f"{text!r} is no floating-point dtype; try bf16 or f32")
    return dtype


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
