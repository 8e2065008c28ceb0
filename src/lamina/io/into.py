"""``load_into``: a file into a model, everything checked first, then all of it or nothing."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._core.bind import Frame
from .._core.box import Box
from .._core.errors import LoadError, Problem, did_you_mean
from .._core.shapes import canonical
from .._core.state_dict import misfit, takes_extra_state, translates
from .._core.walk import Tree, walk
from .match import Match, match_names, suggest_part, suggest_prefix
from .place import Item, place_all, same_data
from .rename import Renaming, Rules
from .sniff import open_any
from .source import EXTRA, Source
from .tensorfile import TensorFile, TensorHandle

__all__ = ["LoadReport", "load_into"]

_MOST_LINES = 200
_MOST_COMPARED = 20_000


class LoadReport(NamedTuple):
    """What a load did; ``print`` it.

    Attributes:
        source: the file.
        model: the class of the model.
        loaded: the model's names that got a value, ties by their canonical name.
        missing: the model's names for which there was none.
        unexpected: names in the source that the model has not.
        cast: ``{name: (dtype in the source, dtype in the model)}`` where they differ.
        ties: ``{alias: name}`` of the model's ties that were filled.
        renamed: ``{name in the source: name in the model}`` where they differ beyond the prefix.
        prefix: what was taken off the front of every name.
        wrappers: what wrappers had put into the names (``"module."``), taken off too.
        beside: number of tensors of the source outside of the prefix or of ``only``.

    Example:
        >>> import lamina
        >>> from lamina import nn
        >>> report = lamina.load_into(nn.Linear(2, 3), nn.Linear(2, 3).state_dict())
        >>> report.loaded, report.missing
        (['weight', 'bias'], [])
    """

    source: str
    model: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    cast: dict[str, tuple[str, str]]
    ties: dict[str, str]
    renamed: dict[str, str]
    prefix: str
    wrappers: tuple[str, ...]
    beside: int

    def __str__(self) -> str:
        lines = [f"{self.source}: loaded {len(self.loaded)} tensors into {self.model}"]
        if self.prefix:
            lines.append(f"  prefix removed: {self.prefix}")
        if self.wrappers:
            lines.append(f"  wrappers removed: {' '.join(self.wrappers)}")
        changed = [f"{old} -> {new}" for old, new in self.renamed.items()]
        cast = [f"{name} ({old} -> {new})" for name, (old, new) in self.cast.items()]
        ties = [f"{alias} = {name}" for alias, name in self.ties.items()]
        for word, items in (
            ("renamed", changed), ("cast", cast), ("ties", ties),
            ("missing", self.missing), ("unexpected", self.unexpected),
        ):  # fmt: skip
            if items:
                more = f" and {len(items) - 8} more" if len(items) > 8 else ""
                lines.append(f"  {word} ({len(items)}): {', '.join(items[:8])}{more}")
        if self.beside:
            lines.append(f"  left alone in the source: {self.beside} tensors")
        return "\n".join(lines)

    __repr__ = __str__


def load_into(
    net: Any,
    source: str | os.PathLike[str] | TensorFile | Mapping[str, Any],
    *,
    rename: Rules | None = None,
    strict: bool = True,
    dtype: Any = None,
    prefix: str | None = None,
    only: str | Sequence[str] | None = None,
    copy: bool | None = None,
) -> LoadReport:
    """Give a model the values in a file: all of them, or, if anything is wrong, none.

    Names, shapes, dtypes and ties are all checked before anything is read. Abstract parameters
    never get random values first, sharded ones are read shard by shard straight to their devices,
    and unknown sizes are taken from the file.

    Args:
        net: the model.
        source: a file or directory of any kind that ``lamina.open`` reads, an open file, or a
            mapping ``{name: array}``, also a nested one.
        rename: rules that turn the source's names into the model's; see ``Renaming``. A rule that
            matches nothing is an error.
        strict: names must match exactly (default True). Otherwise missing and unexpected ones are
            reported only; a load that matches nothing is an error all the same.
        dtype: ``None``: dtypes must be equal. ``"model"``: cast to each parameter's. ``"file"``:
            take over the file's. A dtype: floating-point values and parameters get that one.
        prefix: take only names that start with this, and take it off: ``"model."``. Prefixes of
            wrappers (``module.``, ``_orig_mod.``) go without asking, and in a nested file
            (``{"model": ..., "optimizer": ...}``) the part that fits is found.
        only: load only these names or globs of the model; the others stay as they are.
        copy: as for ``lamina.load``: ``None`` maps the file where possible, ``True`` reads it into
            memory of our own, so that it may be overwritten in place.

    Returns:
        What was loaded, missing, unexpected, cast, tied and renamed.

    Raises:
        LoadError: listing all that does not fit; the model is unchanged.
        RuleError: if a rename rule is malformed or has no effect.
        FileError: if the file is damaged; the model is unchanged.

    Example:
        >>> import lamina.io, numpy as np, tempfile, os
        >>> from lamina import nn
        >>> from lamina.io.into import load_into
        >>> path = os.path.join(tempfile.mkdtemp(), "x.safetensors")
        >>> lamina.io.save({"module.fc.weight": np.ones((3, 2), "f4"),
        ...                 "module.fc.bias": np.zeros(3, "f4")}, path)
        >>> net = nn.Sequential(nn.LazyLinear(3))
        >>> print(load_into(net, path, rename={"fc.*": "0.{0}"}))  # doctest: +ELLIPSIS
        /...: loaded 2 tensors into Sequential
          wrappers removed: module.
          renamed (2): module.fc.weight -> 0.weight, module.fc.bias -> 0.bias
        >>> net[0].weight.shape
        (3, 2)
    """
    if isinstance(source, str | os.PathLike):
        with open_any(source) as file:
            return load_into(
                net, file, rename=rename, strict=strict, dtype=dtype, prefix=prefix, only=only,
                copy=copy,
            )  # fmt: skip
    tree = walk(net)
    content = Source(source)
    boxes = {name: box for name, box in tree.entries if getattr(box, "persistent", True)}
    rules = None if rename is None else Renaming(rename)
    match = match_names(
        content.names, boxes.keys(), rename=rules, prefix=prefix, parts=content.parts
    )
    plan = _Plan(net, tree, boxes, content, match, strict, _wanted(dtype), _chosen(boxes, only))
    plan.check()
    state = place_all(plan.items, copy, plan.assign)
    state.update(plan.extras)
    complete = only is None and not (plan.missing or plan.unexpected)
    net.load_state_dict(state, strict=complete, assign=plan.assign, cast=dtype == "model")
    return plan.report()


class _Plan:
    """What goes where, and what is wrong with it.

    Attributes:
        items: the tensors to read and the boxes they are for.
        extras: values for ``set_extra_state``.
        assign: whether some box changes its dtype.
    """

    def __init__(
        self,
        net: Any,
        tree: Tree,
        boxes: dict[str, Box],
        content: Source,
        match: Match,
        strict: bool,
        dtype: Any,
        chosen: set[Box] | None,
    ) -> None:
        self.net = net
        self.tree = tree
        self.boxes = boxes
        self.content = content
        self.match = match
        self.strict = strict
        self.dtype = dtype
        self.chosen = chosen
        self.items: list[Item] = []
        self.extras: dict[str, Any] = {}
        self.problems: list[Problem] = []
        self.beside = match.beside
        self.unexpected = {} if chosen is not None else dict(match.strangers)
        if chosen is not None:
            self.beside += len(match.strangers)
        self._fill()
        taken = {id(item.box) for item in self.items}
        self.missing = [
            name
            for box, name in tree.names.items()
            if name in boxes
            and box.state != "empty"
            and (chosen is None or box in chosen)
            and id(box) not in taken
        ]
        self._take_extra_state()
        self._ask_modules()
        self.assign = any(item.dtype != item.box.declared_dtype for item in self.items)

    def _fill(self) -> None:
        """Make one item for each box that the source has, and compare the values of ties."""
        by_box: dict[Box, list[tuple[str, str]]] = {}
        for name, sources in self.match.found.items():
            box = self.boxes[name]
            if self.chosen is not None and box not in self.chosen:
                self.beside += len(sources)
                continue
            by_box.setdefault(box, []).extend((name, source) for source in sources)
        for box, places in by_box.items():
            name, first = places[0]
            value = self.content.tensors[first]
            for other_name, other in places[1:]:
                if not same_data(value, self.content.tensors[other]):
                    what = (
                        f"both {first!r} and {other!r} would go here, and their values differ"
                        if other_name == name
                        else f"tied to {other_name}, but {first!r} and {other!r} hold two "
                        f"different values; untie the parameters or drop one of the names"
                    )
                    self.problems.append(Problem(name, what))
            item = Item(self.tree.names[box], first, box, value, box.declared_dtype)
            problem, target = _fit(item, self.dtype)
            if problem:
                there = "" if first == name else f" [{first} in the source]"
                self.problems.append(Problem(name, problem, there))
            self.items.append(item._replace(dtype=target))

    def _take_extra_state(self) -> None:
        for name, module in self.tree.modules:
            if not takes_extra_state(module):
                continue
            key = f"{name}.{EXTRA}" if name else EXTRA
            place = self.match.prefix + key
            if place in self.content.extras:
                self.extras[key] = self.content.extras[place]
            elif place in self.unexpected:
                self.extras[key] = self.content.array(place)
                del self.unexpected[place]
            elif self.chosen is None:
                self.missing.append(key)

    def _ask_modules(self) -> None:
        """Let modules that translate older names themselves say what is missing and unexpected.

        The state dict is loaded once with stand-ins, which take no memory, and taken back.
        """
        if self.chosen is not None or not any(map(translates, self.net.modules())):
            return
        strangers = {
            new: old for old, new in self.unexpected.items() if not self.content.refused(old)
        }
        shapes = {item.name: (np.shape(item.value), canonical(item.dtype)) for item in self.items}
        bad = {problem.name for problem in self.problems}
        for new, old in strangers.items():
            value = self.content.tensors[old]
            shapes.setdefault(new, (np.shape(value), canonical(value.dtype)))
        stand_ins = {
            name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items() if name not in bad
        }
        before = [(box, box.known_shape, box.declared_dtype) for box in self.tree.names]
        answer: list[Any] = []

        def load(state: dict[str, Any]) -> None:
            with Frame("load_into", abstract=True):
                answer.append(self.net.load_state_dict(state, strict=False, cast=True))

        try:
            jax.eval_shape(load, stand_ins)
        except LoadError as error:
            self.problems += [
                p if isinstance(p, Problem) else Problem("", p) for p in error.problems
            ]
            return
        except jax.errors.JAXTypeError:
            return  # it wants to see values; the load itself will tell
        finally:
            for box, shape, known in before:
                box.reform(shape, known)
        missing = set(answer[0].missing_keys)
        unknown = set(answer[0].unexpected_keys)
        self.missing = [name for name in self.missing if name in missing]
        for new, old in strangers.items():
            if new not in unknown:
                del self.unexpected[old]
                value = self.content.tensors[old]
                dtype = np.dtype(value.dtype)
                self.items.append(Item(new, old, Box(dtype=dtype), value, dtype))

    def check(self) -> None:
        """Raise ``LoadError`` with everything that is wrong."""
        names = list(self.boxes)
        lines: list[str] = []
        mends: list[str] = []
        matched = len(self.items)
        nothing = not self.strict and not (self.items or self.extras)
        if nothing and (names or self.content.names):
            first = next(iter(self.content.names), "")
            lines.append(
                f"  none of the {len(self.content.names)} names belongs to the model, for "
                f"instance {first!r}.{did_you_mean(first, names)}"
            )
        if self.strict:
            strangers = list(self.unexpected.values())
            lines += _listed("missing", [(name, name) for name in self.missing], strangers)
            lines += _listed("unexpected", list(self.unexpected.items()), names, self._hidden())
        if lines:
            mends += filter(None, [
                suggest_prefix(self.content.names, self.boxes.keys(), matched),
                suggest_part(self.content.names, names, matched),
            ])  # fmt: skip
            if self.strict and (self.items or not mends):
                mends.append(
                    "rename={'old.*': 'new.{0}'} for other names, or strict=False to skip them"
                )
        lines += [f"  {problem}" for problem in self.problems[:_MOST_LINES]]
        if len(self.problems) > _MOST_LINES:
            lines.append(f"  ... and {len(self.problems) - _MOST_LINES} more")
        if lines:
            mend = "".join(f"\n  fix: {text}" for text in mends)
            raise LoadError(
                f"{self.content.label} does not fit {type(self.net).__name__}; nothing was "
                f"loaded:\n" + "\n".join(lines) + mend
            )

    def _hidden(self) -> dict[str, str]:
        """What to say of names of non-persistent buffers."""
        return {
            name: " (a buffer that is not saved; it comes from its recipe)"
            for name, _ in self.tree.entries
            if name not in self.boxes
        }

    def report(self) -> LoadReport:
        """Say what was done."""
        names = {item.name for item in self.items}
        prefix = self.match.prefix
        words = {word.rstrip(".") for word in self.match.wrappers}
        renamed = {}
        for name, sources in self.match.found.items():
            for source in sources if self.tree.aliases.get(name, name) in names else ():
                parts = source[len(prefix) :].split(".")
                if parts != name.split(".") and name.split(".") != [
                    part for part in parts if part not in words
                ]:
                    renamed[source] = name
        cast = {}
        for item in self.items:
            old, new = np.dtype(item.value.dtype), canonical(item.dtype)
            if canonical(old) != new:
                cast[item.name] = (old.name, new.name)
        return LoadReport(
            source=self.content.label,
            model=type(self.net).__name__,
            loaded=[item.name for item in self.items] + list(self.extras),
            missing=self.missing,
            unexpected=list(self.unexpected),
            cast=cast,
            ties={alias: name for alias, name in self.tree.aliases.items() if name in names},
            renamed=renamed,
            prefix=prefix,
            wrappers=self.match.wrappers,
            beside=self.beside,
        )


def _wanted(dtype: Any) -> Any:
    if dtype is None or (isinstance(dtype, str) and dtype in ("model", "file")):
        return dtype
    try:
        wanted = jnp.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted is None or not jnp.issubdtype(wanted, jnp.floating):
        raise ValueError(
            f"dtype is None, 'model', 'file' or a floating-point dtype, got {dtype!r:.100}"
        )
    return wanted


def _chosen(boxes: dict[str, Box], only: str | Sequence[str] | None) -> set[Box] | None:
    if only is None:
        return None
    chosen: set[Box] = set()
    for pattern in [only] if isinstance(only, str) else only:
        found = [pattern] if pattern in boxes else fnmatch.filter(boxes, pattern)
        if not found:
            raise LoadError(
                f"only={pattern!r} matches no name of the model; nothing was loaded."
                f"{did_you_mean(pattern, boxes)}"
            )
        chosen.update(boxes[name] for name in found)
    return chosen


def _fit(item: Item, wanted: Any) -> tuple[str, np.dtype]:
    """Return what is wrong with the shape or dtype of a value, and the dtype its box will have."""
    box, value = item.box, item.value
    own = np.dtype(box.declared_dtype)
    if isinstance(value, TensorHandle) and value.refused:
        return value.refused, own
    problems = []
    if problem := misfit(box, tuple(value.shape)):
        problems.append(problem)
    there = np.dtype(value.dtype)
    if box.is_place or wanted == "file":
        return "; ".join(problems), there
    if isinstance(wanted, np.dtype):
        floating = jnp.issubdtype(there, jnp.floating) and jnp.issubdtype(own, jnp.floating)
        if floating:
            return "; ".join(problems), wanted
        wanted = None
    if wanted is None and canonical(there) != canonical(own):
        problems.append(
            f"expected dtype {own.name}, got {there.name}; pass dtype='model' to cast it or "
            f"dtype='file' to take it over"
        )
    elif wanted == "model" and _rank(there) > _rank(own):
        problems.append(f"a {there.name} does not become a {own.name} without loss of meaning")
    return "; ".join(problems), own


def _rank(dtype: np.dtype) -> int:
    """Bool, integer, float, complex: a value may be cast to a later kind."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next((i for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)), len(kinds))


def _listed(
    word: str,
    names: list[tuple[str, str]],
    known: list[str],
    notes: Mapping[str, str] | None = None,
) -> list[str]:
    """One line for each name, with a hint while there are few."""
    lines = []
    for i, (name, meant) in enumerate(names[:_MOST_LINES]):
        hint = (notes or {}).get(meant, "")
        if not hint and i * len(known) < _MOST_COMPARED:
            hint = did_you_mean(meant, known)
        lines.append(f"  {word}: {name}{hint}")
    if len(names) > _MOST_LINES:
        lines.append(f"  {word}: ... and {len(names) - _MOST_LINES} more")
    return lines
