"""Rename rules: from the names of one library to those of another, and back.

A rule is a glob with captures and what to make of it: ``"encoder.*.q.weight"`` and
``"enc.{0}.q_proj.weight"``. ``{0}`` is what the first wildcard stood for. The first rule that
matches a name decides; names that no rule matches stay as they are.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .._core.errors import RuleError, did_you_mean

__all__ = ["Renaming", "Rules", "renamed"]

_WILDCARD = re.compile(r"(\*|\?|\[!?\]?[^\]]*\])")
_CAPTURE = re.compile(r"\{(\d+)\}")

# Also a ``Renaming``, which is a function of names itself.
Rules = (
    Mapping[str, str | None] | Sequence[str | tuple[str, str | None]] | Callable[[str], str | None]
)


class Renaming:
    """Checked rename rules, usable in both directions.

    Args:
        rules: a dict ``{pattern: target}``, a list of ``(pattern, target)`` pairs or of
            ``"pattern=target"`` strings, a function ``name -> new name``, or a ``Renaming``. A
            pattern is a glob (``*`` any characters, dots included, ``?`` one, ``[ab]`` one of
            several); the target has ``{0}``, ``{1}``, ... for what the wildcards matched, in
            order. The target ``None`` leaves the name out.
        allow_unused: let rules pass that match no name at all (default: an error).

    Raises:
        RuleError: if a rule is malformed.

    Example:
        >>> rules = Renaming({"encoder.*.q.weight": "enc.{0}.q_proj.weight"})
        >>> rules("encoder.3.q.weight"), rules("head.bias")
        ('enc.3.q_proj.weight', 'head.bias')
        >>> rules.invert()("enc.3.q_proj.weight")
        'encoder.3.q.weight'
    """

    def __init__(self, rules: Rules, *, allow_unused: bool = False) -> None:
        self.allow_unused = allow_unused
        self._function: Callable[[str], str | None] | None = None
        self._rules: list[_Rule] = []
        if isinstance(rules, Renaming):
            self.allow_unused = allow_unused or rules.allow_unused
            self._function, self._rules = rules._function, rules._rules
        elif isinstance(rules, Mapping):
            self._rules = [_Rule.parse(*pair) for pair in rules.items()]
        elif isinstance(rules, Sequence) and not isinstance(rules, str):
            self._rules = [_Rule.parse(*_pair(rule)) for rule in rules]
        elif callable(rules):
            self._function = rules
        else:
            raise RuleError(
                f"rename rules are a dict, a list of pairs or a function, got {rules!r:.100}; "
                f'fix: {{"old.*.weight": "new.{{0}}.weight"}}'
            )

    def __call__(self, name: str) -> str | None:
        """Return the new name, or ``None`` if the name is to be left out."""
        if self._function is not None:
            new = self._function(name)
            if new is not None and not isinstance(new, str):
                raise RuleError(
                    f"the rename function must return a str or None, got {type(new).__name__} "
                    f"for {name!r}"
                )
            return new
        for rule in self._rules:
            found = rule.regex.fullmatch(name)
            if found is not None:
                return rule.make(found)
        return name

    def apply(self, names: Iterable[str]) -> dict[str, str]:
        """Rename many names at once.

        Args:
            names: the old names.

        Returns:
            ``{old: new}`` in order, without the names that are left out.

        Raises:
            RuleError: if two names become one, or a rule matches nothing.
        """
        old = list(names)
        made = {name: new for name in old if (new := self(name)) is not None}
        came_from: dict[str, str] = {}
        clashes = []
        for name, new in made.items():
            first = came_from.setdefault(new, name)
            if first != name:
                clashes.append(f"  {first!r} and {name!r} would both become {new!r}")
        if clashes:
            raise RuleError("two names would become one:\n" + "\n".join(clashes))
        self.check_used(old)
        return made

    def check_used(self, names: Iterable[str]) -> None:
        """Raise ``RuleError`` if some rule decides about none of ``names``."""
        if self.allow_unused or not self._rules:
            return
        old = list(names)
        left = set(range(len(self._rules)))
        for name in old:
            for i, rule in enumerate(self._rules):
                if rule.regex.fullmatch(name):
                    left.discard(i)
                    break
            if not left:
                return
        lines = []
        for i in sorted(left):
            rule = self._rules[i]
            if any(rule.regex.fullmatch(name) for name in old):
                lines.append(f"  {rule}: earlier rules match all of its names; put it before them")
            else:
                lines.append(f"  {rule}: matches nothing.{did_you_mean(rule.pattern, old)}")
        raise RuleError(
            "these rename rules have no effect:\n"
            + "\n".join(lines)
            + "\n  fix: correct them, or Renaming(rules, allow_unused=True)"
        )

    def invert(self) -> Renaming:
        """Return the rules for the way back; rules that leave names out have none.

        Raises:
            RuleError: if a rule forgets a part of the name, or the rules are a function.
        """
        if self._function is not None:
            raise RuleError("a rename function has no inverse; write the rules as a dict")
        back = Renaming([], allow_unused=self.allow_unused)
        back._rules = [rule.invert() for rule in self._rules if rule.target is not None]
        return back

    def __repr__(self) -> str:
        if self._function is not None:
            return f"Renaming({self._function!r})"
        return f"Renaming([{', '.join(map(str, self._rules))}])"


def renamed(tensors: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """Return a state dict under other names; the values are the same objects, so ties stay.

    Args:
        tensors: ``{name: value}``.
        rules: as for ``Renaming``.

    Raises:
        RuleError: if two names become one, or a rule matches nothing.

    Example:
        >>> renamed({"fc.weight": 1, "fc.bias": 2}, {"fc.*": "head.{0}"})
        {'head.weight': 1, 'head.bias': 2}
    """
    return {new: tensors[old] for old, new in Renaming(rules).apply(tensors).items()}


class _Rule(NamedTuple):
    """One rule: both sides as literal text and numbers of captures, and each capture's glob."""

    source: tuple[str | int, ...]
    target: tuple[str | int, ...] | None
    globs: tuple[str, ...]

    @staticmethod
    def parse(pattern: str, target: str | None) -> _Rule:
        if not isinstance(pattern, str) or not isinstance(target, str | None):
            raise RuleError(
                f"a rename rule is a pair of strings, got {pattern!r:.100}: {target!r:.100}"
            )
        source: list[str | int] = []
        globs: list[str] = []
        for i, part in enumerate(_WILDCARD.split(pattern)):
            if i % 2:
                source.append(len(globs))
                globs.append(part)
            elif part:
                source.append(part)
        if target is None:
            return _Rule(tuple(source), None, tuple(globs))
        if "*" in target:
            raise RuleError(
                f"the rename rule {pattern!r} -> {target!r} has a wildcard in its target; write "
                f"{{0}}, {{1}}, ... for what the wildcards of the pattern matched"
            )
        made: list[str | int] = []
        for i, part in enumerate(_CAPTURE.split(target)):
            if i % 2 and int(part) >= len(globs):
                raise RuleError(
                    f"the rename rule {pattern!r} -> {target!r} uses {{{part}}}, but the pattern "
                    f"has {len(globs)} wildcards, numbered from 0"
                )
            if part:
                made.append(int(part) if i % 2 else part)
        return _Rule(tuple(source), tuple(made), tuple(globs))

    @property
    def regex(self) -> re.Pattern[str]:
        return _regex(self.source, self.globs)

    @property
    def pattern(self) -> str:
        return "".join(self.globs[p] if isinstance(p, int) else _escape(p) for p in self.source)

    def make(self, found: re.Match[str]) -> str | None:
        if self.target is None:
            return None
        return "".join(found[f"c{p}"] if isinstance(p, int) else p for p in self.target)

    def invert(self) -> _Rule:
        assert self.target is not None
        order: list[int] = []
        for part in self.target:
            if isinstance(part, int) and part not in order:
                order.append(part)
        lost = [i for i in range(len(self.globs)) if i not in order]
        if lost:
            raise RuleError(
                f"the rename rule {self} has no inverse: its target does not use {{{lost[0]}}}"
            )

        def renumber(side: tuple[str | int, ...]) -> tuple[str | int, ...]:
            return tuple(order.index(part) if isinstance(part, int) else part for part in side)

        globs = tuple(self.globs[i] for i in order)
        return _Rule(renumber(self.target), renumber(self.source), globs)

    def __str__(self) -> str:
        if self.target is None:
            return f"{self.pattern!r} -> left out"
        target = "".join(f"{{{p}}}" if isinstance(p, int) else p for p in self.target)
        return f"{self.pattern!r} -> {target!r}"


def _pair(rule: Any) -> tuple[Any, Any]:
    if isinstance(rule, str):
        pattern, equals, target = rule.partition("=")
        if not (pattern and equals):
            raise RuleError(f"the rename rule {rule!r} is not of the form PATTERN=TARGET")
        return pattern, target or None
    if isinstance(rule, tuple | list) and len(rule) == 2:
        return rule[0], rule[1]
    raise RuleError(f"a rename rule is a pair (pattern, target), got {rule!r:.100}")


@functools.lru_cache(maxsize=4096)
def _regex(source: tuple[str | int, ...], globs: tuple[str, ...]) -> re.Pattern[str]:
    parts: list[str] = []
    seen: set[int] = set()
    for part in source:
        if isinstance(part, str):
            parts.append(re.escape(part))
        elif part in seen:
            parts.append(f"(?P=c{part})")
        else:
            seen.add(part)
            parts.append(f"(?P<c{part}>{_one_glob(globs[part])})")
    try:
        return re.compile("".join(parts), re.DOTALL)
    except re.error as error:
        raise RuleError(f"the rename pattern {''.join(globs)!r} is malformed: {error}") from None


def _one_glob(glob: str) -> str:
    if glob == "*":
        return ".*?"
    if glob == "?":
        return "."
    inside = glob[1:-1].replace("\\", "\\\\")
    inside = f"^{inside[1:]}" if inside.startswith("!") else inside
    return "[" + inside.replace("[", "\\[").replace("]", "\\]") + "]"


def _escape(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)
