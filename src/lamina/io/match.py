"""Which name in a file is which name in a model.

Names are compared as they are, then after the rename rules, without what wrappers put into them
(``module.``, ``_orig_mod.``), and in the other spellings of the same thing that PyTorch has had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from .._core.errors import LoadError, did_you_mean
from .rename import Renaming

__all__ = ["Match", "match_names", "suggest_part", "suggest_prefix"]

# Attributes in which DataParallel, torch.compile, FSDP and activation checkpointing keep a model.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Two ways of torch to name the same parameter; the first pair is that of weight_norm.
_SPELLINGS = [
    (("{}_g", "{}_v"), ("parametrizations.{}.original0", "parametrizations.{}.original1")),
    (("gamma", "beta"), ("weight", "bias")),
]
_DEEPEST = 6


class Match(NamedTuple):
    """The outcome.

    Attributes:
        found: ``{name in the model: names in the source}``, in the order of the source.
        strangers: names in the source that the model has not; ``{name in the source: as renamed}``.
        beside: how many names lie outside of the prefix or were left out by the rules.
        prefix: what was taken off the front of every name.
        wrappers: what wrappers had put into the names, taken off too.
    """

    found: dict[str, list[str]]
    strangers: dict[str, str]
    beside: int
    prefix: str
    wrappers: tuple[str, ...]


def match_names(
    names: Sequence[str],
    known: Collection[str],
    *,
    rename: Renaming | None,
    prefix: str | None,
    parts: Collection[str],
) -> Match:
    """Find the model's name for each name of a source.

    Args:
        names: what the source has.
        known: what the model has, every name of every tie.
        rename: rules for the names, once the prefix is off.
        prefix: take only names that start like this, and take it off; ``None`` to find out which
            part of a nested file is meant.
        parts: the prefixes of the nested parts of the source, each ending in a dot.

    Raises:
        LoadError: if no name has the prefix, or several parts of a nested file fit equally well.
        RuleError: if a rule matches nothing.
    """
    prefix = _choose(names, known, rename, parts) if prefix is None else _given(names, prefix)
    inside = [name for name in names if name.startswith(prefix)]
    found: dict[str, list[str]] = {}
    strangers: dict[str, str] = {}
    wrappers: dict[str, None] = {}
    dropped = 0
    for name in inside:
        bare = name[len(prefix) :]
        there = _resolve(bare, known, rename)
        if there is not None:
            found.setdefault(there, []).append(name)
            if there != bare:
                wrappers.update(dict.fromkeys(_wrappers_of(bare, there)))
            continue
        new = bare if rename is None else rename(bare)
        if new is None:
            dropped += 1
        else:
            strangers[name] = new
    if rename is not None:
        bare_names = [name[len(prefix) :] for name in inside]
        rename.check_used([*bare_names, *filter(None, map(_unwrapped, bare_names))])
    beside = len(names) - len(inside) + dropped
    return Match(found, strangers, beside, prefix, tuple(wrappers))


def suggest_prefix(names: Sequence[str], known: Collection[str], matched: int) -> str:
    """Name a prefix without which many more names would fit, or return an empty string."""
    counts = _counts(names, known, None)
    if not counts:
        return ""
    prefix, count = max(counts.items(), key=lambda item: (item[1], -len(item[0])))
    if not prefix or count <= matched:
        return ""
    return f"{count} names fit without {prefix!r}: pass prefix={prefix!r}"


def suggest_part(names: Collection[str], known: Sequence[str], matched: int) -> str:
    """Name a module of the model that the source fits as a whole, or return an empty string."""
    counts = _counts(known, names, None)
    if not counts:
        return ""
    prefix, count = max(counts.items(), key=lambda item: (item[1], -len(item[0])))
    if not prefix or count <= matched or count < 0.8 * len(names):
        return ""
    module = prefix[:-1]
    return f"the names fit its part {module!r}: load into net.get_submodule({module!r})"


def _given(names: Sequence[str], prefix: str) -> str:
    if not prefix:
        return ""
    for form in (prefix if prefix.endswith(".") else f"{prefix}.", prefix):
        if any(name.startswith(form) for name in names):
            return form
    heads = list(dict.fromkeys(name.split(".")[0] for name in names))
    shown = ", ".join(repr(f"{head}.") for head in heads[:8]) + (", ..." if heads[8:] else "")
    raise LoadError(
        f"no name starts with the prefix {prefix!r}; nothing was loaded. The names start with "
        f"{shown or 'nothing: there are none'}.{did_you_mean(prefix.rstrip('.'), heads)}"
    )


def _choose(
    names: Sequence[str],
    known: Collection[str],
    rename: Renaming | None,
    parts: Collection[str],
) -> str:
    """Return the prefix of the part of a nested file whose names fit best; ``""`` if it is flat."""
    if not parts:
        return ""
    counts = _counts(names, known, rename)
    fitting = {prefix: counts[prefix] for prefix in ("", *parts) if counts[prefix]}
    if not fitting:
        return ""
    most = max(fitting.values())
    best = [prefix for prefix, count in fitting.items() if count == most]
    depth = min(prefix.count(".") for prefix in best)
    # An optimizer's moments have the names of the model, but lie deeper.
    best = [prefix for prefix in best if prefix.count(".") == depth]
    if len(best) > 1:
        shown = ", ".join(map(repr, best))
        raise LoadError(
            f"several parts fit the model, {most} names each: {shown}; nothing was loaded.\n"
            f"  fix: name the one you want, prefix={best[0]!r}"
        )
    return best[0]


def _counts(names: Sequence[str], known: Collection[str], rename: Renaming | None) -> Counter[str]:
    """Count for each prefix how many names the model has once it is taken off."""
    counts: Counter[str] = Counter()
    for name in names:
        start = 0
        for _ in range(_DEEPEST):
            try:
                fits = _resolve(name[start:], known, rename) is not None
            except (KeyError, IndexError):  # a user's function that knows only the right names
                fits = False
            counts[name[:start]] += fits
            start = name.find(".", start) + 1
            if not start:
                break
    return +counts


def _resolve(name: str, known: Collection[str], rename: Renaming | None) -> str | None:
    if rename is None and name in known:
        return name
    for candidate in _candidates(name, rename):
        if candidate in known:
            return candidate
        for spelling in _spellings(candidate):
            if spelling in known:
                return spelling
    return None


def _candidates(name: str, rename: Renaming | None) -> Iterator[str]:
    bare = _unwrapped(name)
    for old in (name, bare):
        new = old if rename is None or old is None else rename(old)
        if new is not None:
            yield new
            again = _unwrapped(new)
            if again is not None:
                yield again


def _unwrapped(name: str) -> str | None:
    """The name without the parts that wrappers put into it; ``None`` if there are none."""
    parts = name.split(".")
    kept = [part for part in parts if part not in _WRAPPERS]
    return ".".join(kept) if len(kept) < len(parts) and kept else None


def _wrappers_of(name: str, there: str) -> list[str]:
    had = there.split(".")
    return [f"{p}." for p in name.split(".") if p in _WRAPPERS and p not in had]


def _spellings(name: str) -> Iterator[str]:
    head, dot, last = name.rpartition(".")
    for pair in _SPELLINGS:
        for forms, others in (pair, pair[::-1]):
            for form, other in zip(forms, others, strict=True):
                before, _, after = form.partition("{}")
                if "{}" not in form:
                    if last == form:
                        yield f"{head}{dot}{other}"
                    continue
                start = name.rfind(f".{before}") + 1 if before else len(head) + len(dot)
                if not name.startswith(before, start) or not name.endswith(after):
                    continue
                middle = name[start + len(before) : len(name) - len(after)]
                if middle and "." not in middle:
                    yield f"{name[:start]}{other.format(middle)}"
