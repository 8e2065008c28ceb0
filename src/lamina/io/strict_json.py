"""JSON out of a file that nobody vouches for."""

from __future__ import annotations

import json
from typing import Any

from .._core.errors import FileError

__all__ = ["parse_json"]

_MAX_DIGITS = 20
_ALL_ZERO = bytes.maketrans(b"123456789", b"0" * 9)


def parse_json(path: str, text: bytes, what: str, *, inexact: bool = False) -> Any:
    """Parse JSON: no duplicate names, no huge numbers, no NaN, no nesting that exhausts the stack.

    Args:
        path: the file, for messages.
        text: UTF-8.
        what: what the text is, for messages (``"the header"``).
        inexact: accept floats, and strings that are not valid Unicode.

    Raises:
        FileError: naming ``path`` and the reason.

    Example:
        >>> parse_json("x", b'{"a": 1, "a": 2}', "the header")
        Traceback (most recent call last):
        lamina._core.errors.FileError: x: the header is not valid JSON: the name 'a' occurs twice
    """

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ValueError(f"a number has {len(digits)} digits")
        return int(digits)

    def refuse(word: str) -> None:
        raise ValueError(f"{word[:20]} is not an integer")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"the name {twice[:200]!r} occurs twice")
        return made

    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            # A function for every number takes time, so it is there only where one may be long.
            parse_int=integer if b"0" * _MAX_DIGITS in text.translate(_ALL_ZERO) else None,
            parse_float=float if inexact else refuse,
            parse_constant=refuse,
        )
        if b"\\u" in text and not inexact:
            # An escape can make half a character, which no file name or terminal can show.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise FileError(f"{path}: {what} is nested too deeply") from None
    except ValueError as error:
        raise FileError(f"{path}: {what} is not valid JSON: {error}") from None
