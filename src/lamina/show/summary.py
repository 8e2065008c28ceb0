"""``summary``: what a model consists of, as a table."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from .._core.errors import TypeMismatchError, format_shape
from .._core.module import Module
from .html import html_table
from .record import BoxRow, ModuleRow, Record, record
from .table import lay_out

__all__ = ["Summary", "summary"]

HEADINGS = ("name", "layer, recipe", "output, shape", "elements", "memory", "FLOPs")
_NUMBERS = (3, 4, 5)
_YIELDING = (1, 0, 2)  # where the terminal is narrow, recipes give way first


def summary(
    net: Module, *specs: Any, depth: int | None = None, flops: bool = True, **kwargs: Any
) -> Summary:
    """Return a table of a model's modules, parameters and buffers; no value is computed.

    With inputs, the model is run abstractly: shapes that are unknown are inferred and stay so, as
    after a call; output shapes and operations are added. Nothing else about the model changes,
    and nothing is materialised.

    Args:
        net: the model; unknown shapes, no memory or values, all is well.
        *specs: what ``net`` would be called with: arrays or ``jax.ShapeDtypeStruct``.
        depth: show modules down to this level only (default: all); totals include what is below.
        flops: count floating-point operations (default True), see below.
        **kwargs: keyword arguments of the call.

    Returns:
        A :class:`Summary`: ``print`` it, leave it at the end of a notebook cell, or take its
        ``to_dict()``.

    FLOPs are what XLA counts for the forward pass as written, in the model's present mode (training
    or evaluation), all calls and children included: a multiplication and an addition are two, an
    element of an elementwise operation is one, transcendental functions and copies are none, the
    body of a loop counts once.

    Raises:
        TypeError: if ``net`` is no module.
        Exception: whatever ``forward`` raises; the model is then as it was.

    Example:
        >>> import jax, jax.numpy as jnp, lamina.show
        >>> from lamina import nn
        >>> net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
        >>> table = lamina.show.summary(net, jax.ShapeDtypeStruct((4, 3), jnp.float32))
        >>> table.parameters, table.flops
        (50, 392.0)
        >>> [(row.name, row.output) for row in table.rows]
        [('', '(4, 2)'), ('0', '(4, 8)'), ('1', '(4, 8)'), ('2', '(4, 2)')]
    """
    if not isinstance(net, Module):
        raise TypeMismatchError(
            f"summary: expected a module, got {type(net).__name__}; write lamina.summary(net, x)"
        )
    return Summary(record(net, specs, kwargs, flops), depth)


class Summary:
    """What :func:`summary` found; made to be printed.

    Attributes:
        record: the rows as recorded, with everything that is below ``depth``.
        depth: the deepest level to show, or ``None``.

    Example:
        >>> import lamina
        >>> from lamina import nn
        >>> print(lamina.summary(nn.LazyLinear(4)))
        name     layer, recipe                   output, shape  elements    memory
        (model)  LazyLinear                                        4 + ?  16 B + ?
        weight   KaimingUniform(a=sqrt(5))       (4, ?)                ?         ?
        bias     FanInUniform(of weight (4, ?))  (4,)                  4      16 B
        <BLANKLINE>
        parameters  4 (16 B)
        unknown     the sizes of one array (?), not counted above
    """

    def __init__(self, record: Record, depth: int | None = None) -> None:
        self.record = record
        self.depth = depth

    @property
    def rows(self) -> tuple[ModuleRow, ...]:
        """The modules that are shown."""
        rows = self.record.modules
        return rows if self.depth is None else tuple(r for r in rows if r.depth <= self.depth)

    @property
    def parameters(self) -> int:
        """The number of elements of all parameters whose shapes are known, ties counted once."""
        return self.record.total.size.parameters

    @property
    def trainable(self) -> int:
        """Of these, the number that require a gradient."""
        return self.record.total.size.trainable

    @property
    def nbytes(self) -> int:
        """The memory of parameters and buffers when they have values."""
        return self.record.total.size.nbytes + self.record.total.size.state_nbytes

    @property
    def flops(self) -> float | None:
        """The floating-point operations of one call, if it was given an input."""
        return self.record.total.flops

    @property
    def ties(self) -> dict[str, str]:
        """Further name -> canonical name of each tied parameter and buffer."""
        return dict(self.record.ties)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for ``json.dumps``."""
        return {
            "inputs": self.record.inputs,
            "modules": [_plain(row) for row in self.rows],
            "ties": self.ties,
            "total": _plain(self.record.total)["size"] | {"flops": self.flops},
        }

    # Text.

    def cells(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield ``(kind, cells)`` for each line: a module, parameter, buffer or heading."""
        buffers = []
        for row in self.rows:
            yield "module", self._module_cells(row)
            if row.shared_with is None:
                for box in row.boxes:
                    if box.kind == "parameter":
                        yield "parameter", _box_cells(box)
                    else:
                        buffers.append(box)
        if buffers:
            yield "heading", ("", "", "", "", "", "")
            yield "heading", ("buffers", "", "", "", "", "")
            for box in buffers:
                yield "buffer", _box_cells(box)

    def _module_cells(self, row: ModuleRow) -> tuple[str, ...]:
        name = row.name or "(model)"
        if row.shared_with is not None:
            return name, f"= module {row.shared_with or '(model)'}", "", "", "", ""
        size = row.size
        if row.flops is not None:
            flops = format_count(row.flops)
            flops += "" if flops[-1].isalpha() else "  "  # digits below digits
        else:
            flops = "?" if self._lacks(row) else ""
        return (
            name,
            f"{row.kind}, called {row.calls} times" if row.calls > 1 else row.kind,
            row.output or "",
            _at_least(f"{size.parameters:,}", size.parameters, size.unknown),
            _at_least(format_bytes(size.nbytes), size.nbytes, size.unknown),
            flops,
        )

    def _lacks(self, row: ModuleRow) -> bool:
        """Tell whether operations were to be counted for this row and could not be."""
        return bool(row.calls) and any(other.flops is not None for other in self.record.modules)

    def totals(self) -> list[str]:
        """Return the lines below the table."""
        size = self.record.total.size
        line = f"parameters  {size.parameters:,} ({format_bytes(size.nbytes)})"
        if size.frozen:
            line += f", {size.trainable:,} trainable, {size.frozen:,} frozen"
        lines = [line]
        if size.state:
            lines.append(f"buffers     {size.state:,} ({format_bytes(size.state_nbytes)})")
        unknown = size.unknown + size.state_unknown
        if unknown:
            what = "one array" if unknown == 1 else f"{unknown} arrays"
            lines.append(f"unknown     the sizes of {what} (?), not counted above")
        if self.record.ties:
            lines.append(f"ties        {len(self.record.ties)}, counted once")
        if self.record.inputs is not None:
            lines.append(f"input       {self.record.inputs}, {self.record.mode} mode")
        if self.flops is not None:
            lines.append(f"FLOPs       {format_count(self.flops)} forward")
        return lines

    def _lines(self, width: int | None) -> Iterator[tuple[str, list[str]]]:
        """Yield ``(kind, padded cells)`` for each line of the table."""
        lines = [("heading", HEADINGS), *self.cells()]
        laid_out = lay_out([cells for _, cells in lines], width, _NUMBERS, _YIELDING)
        for (kind, _), cells in zip(lines, laid_out, strict=True):
            yield kind, cells

    def __str__(self) -> str:
        """Return the table as plain text: cut to the terminal's width, or whole when piped."""
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        table = ["".join(cells).rstrip() for _, cells in self._lines(width)]
        return "\n".join([*table, "", *self.totals()])

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Draw the table with rich, in colour where the console has any."""
        for kind, cells in self._lines(options.max_width if console.is_terminal else None):
            line = console.render_str("", markup=False, highlight=False)
            for column, cell in enumerate(cells):
                line.append(cell, style=_style(kind, column))
            line.rstrip()
            line.no_wrap, line.overflow = True, "ignore"
            yield line
        for note in ("", *self.totals()):
            yield console.render_str(note, style="dim", markup=False, highlight=False)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_table(HEADINGS, list(self.cells()), self.totals())


def _box_cells(row: BoxRow) -> tuple[str, ...]:
    shape = "(?)" if row.shape is None else format_shape(row.shape)
    if row.dtype != "float32":
        shape += f" {row.dtype}"
    if row.state == "empty":
        return row.name, "(empty)", "", "", "", ""
    if row.tied_to is not None:
        return row.name, f"= {row.tied_to}", shape, "", "", ""
    # A recipe may say after a tilde what distribution it stands for; the table has no room for it.
    recipe = row.recipe.split(" ~ ")[0]
    note = recipe or ("(value given)" if row.state == "material" else "(no recipe)")
    return (
        row.name,
        f"{note}, frozen" if row.kind == "parameter" and not row.trainable else note,
        shape,
        "?" if row.elements is None else f"{row.elements:,}",
        "?" if row.nbytes is None else format_bytes(row.nbytes),
        "",
    )


def _style(kind: str, column: int) -> str:
    if kind == "heading":
        return "bold"
    if kind == "module":
        return {0: "bold", 1: "cyan"}.get(column, "")
    return "green" if column == 1 else "dim"


def _at_least(text: str, known: int, unknown: int) -> str:
    if not unknown:
        return text if known else ""
    return f"{text} + ?" if known else "?"


def format_bytes(count: float) -> str:
    """Write a number of bytes: ``1.50 KiB``."""
    return f"{count} B" if count < 1024 else _scaled(count, 1024, ("KiB", "MiB", "GiB", "TiB"))


def format_count(count: float) -> str:
    """Write a large number with a prefix: ``1.23 M``."""
    return f"{count:.0f}" if count < 1000 else _scaled(count, 1000, ("k", "M", "G", "T", "P", "E"))


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    power = 1
    while power < len(units) and count >= base ** (power + 1):
        power += 1
    return f"{_three_digits(count / base**power)} {units[power - 1]}"


def _three_digits(number: float) -> str:
    return f"{number:.{max(0, 3 - len(str(int(number))))}f}"


def _plain(row: ModuleRow) -> dict[str, Any]:
    return dataclasses.asdict(row)
