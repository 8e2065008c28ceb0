"""Laying out a table in columns of text, within a width if need be."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["lay_out"]

_GAP = 2
_LEAST = 12


def lay_out(
    lines: Sequence[Sequence[str]],
    width: int | None,
    numbers: Sequence[int] = (),
    yielding: Sequence[int] = (),
) -> list[list[str]]:
    """Pad the cells of each line to equal columns; columns that are empty throughout are ``""``.

    Args:
        lines: rows of equally many cells; the first has the headings.
        width: characters in a line, or ``None`` for as many as it takes.
        numbers: columns aligned at the right.
        yielding: columns that are cut where the width does not suffice, the first of them first.

    Returns:
        The cells with their gaps, to be joined without anything between them.

    Example:
        >>> for cells in lay_out([("name", "n", "x"), ("weight", "12", "")], 12, [1], [0]):
        ...     print("".join(cells).rstrip() + "|")
        name     n|
        weight  12|
    """
    used = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in used}
    if width is not None:
        excess = sum(widths.values()) + _GAP * (len(used) - 1) - width
        for i in yielding:
            if i in widths and excess > 0:
                cut = min(excess, max(0, widths[i] - _LEAST))
                widths[i] -= cut
                excess -= cut
    result = []
    for line in lines:
        cells = [""] * len(line)
        for i in used:
            text = line[i] if len(line[i]) <= widths[i] else line[i][: widths[i] - 1] + "…"
            text = text.rjust(widths[i]) if i in numbers else text.ljust(widths[i])
            cells[i] = text if i == used[-1] else text + " " * _GAP
        result.append(cells)
    return result
