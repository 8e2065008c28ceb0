"""A table as HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["html_table"]

_STYLE = """<style>
.lamina-table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.lamina-table th, .lamina-table td { padding: .15em .8em; text-align: left; white-space: nowrap }
.lamina-table thead th { border-bottom: 1px solid currentColor }
.lamina-table .number { text-align: right }
.lamina-table .module td { border-top: 1px solid #8884; font-weight: 600 }
.lamina-table .parameter td, .lamina-table .buffer td { opacity: .8 }
.lamina-table .heading td { padding-top: .8em; font-weight: 600 }
</style>"""


def html_table(
    headings: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]], notes: Iterable[str]
) -> str:
    """Return a table, one ``(class, cells)`` a row; columns 3 to 5 hold numbers.

    Example:
        >>> page = html_table(("name",), [("module", ("a<b",))], ["all"])
        >>> "a&lt;b" in page
        True
    """
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "\n".join(
        f'<tr class="{kind}">{"".join(map(_cell, range(len(cells)), cells))}</tr>'
        for kind, cells in lines
    )
    foot = "<br>\n".join(html.escape(note) for note in notes)
    return (
        f'{_STYLE}\n<table class="lamina-table">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n<p>{foot}</p>"
    )


def _cell(column: int, text: str) -> str:
    kind = ' class="number"' if 3 <= column <= 5 else ""
    return f"<td{kind}>{html.escape(text)}</td>"
