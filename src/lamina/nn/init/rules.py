"""Initialisation by rule: which parameters get which recipe, said in one place and reported."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from ..._core.box import Recipe
from ..._core.errors import LaminaError, RuleError, did_you_mean, format_shape
from ..._core.module import Module
from ..._core.parameter import Parameter

Rule: TypeAlias = str | type[Module] | Callable[[str, Parameter], bool]
Choice: TypeAlias = Recipe | Mapping[str, Recipe]


@dataclasses.dataclass(frozen=True)
class RulesReport:
    """What :func:`rules` did; ``print`` shows it as a table.

    Attributes:
        assigned: parameter name -> the rule that set it.
        matched: rule -> names of all parameters it matched, also those that a later rule took over.
        unmatched: rules that matched nothing.
        defaults: names of the parameters that no rule matched.
        rows: ``(name, shape, rule, recipe)`` of every parameter, in order.

    Example:
        >>> from lamina import nn
        >>> report = nn.init.rules(nn.Linear(3, 2), {"weight": nn.init.Normal(std=0.01)})
        >>> report.assigned, report.defaults
        ({'weight': "'weight'"}, ('bias',))
        >>> print(nn.init.rules(nn.Linear(3, 2), {"*": nn.init.Zeros()}))
        parameter  shape   rule  recipe
        weight     (2, 3)  '*'   Zeros()
        bias       (2,)    '*'   Zeros()
    """

    assigned: dict[str, str]
    matched: dict[str, tuple[str, ...]]
    unmatched: tuple[str, ...]
    defaults: tuple[str, ...]
    rows: tuple[tuple[str, str, str, str], ...]

    def __str__(self) -> str:
        table = [("parameter", "shape", "rule", "recipe"), *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in table
        ]
        if self.unmatched:
            lines.append(f"matched nothing: {', '.join(self.unmatched)}")
        return "\n".join(line.rstrip() for line in lines)


def rules(
    net: Module, recipes: Mapping[Rule, Choice], allow_unmatched: bool = False
) -> RulesReport:
    """Give the parameters of a model their recipes, by name, layer type or predicate.

    Works before and after shapes are known. Parameters that have a value get a new one. Where
    several rules match a parameter the last one wins. Everything is checked before anything is
    changed.

    Args:
        net: the model.
        recipes: from rules to recipes. A rule is a name glob, where ``*`` also matches dots and any
            name of a tied parameter will do; a module type, for the layers' own parameters; or a
            predicate ``(name, parameter) -> bool``. A recipe given for a type goes to the weights
            (two dimensions or more); ``{"weight": recipe, "bias": recipe}`` chooses by local name.
        allow_unmatched: let rules match nothing (default False).

    Returns:
        A :class:`RulesReport`.

    Raises:
        RuleError: if a rule matches nothing, is no rule, or its recipe does not fit a parameter it
            matches; all problems at once, and nothing is changed.

    Example:
        >>> from lamina import nn
        >>> net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = nn.init.rules(net, {
        ...     nn.Linear: nn.init.XavierUniform(),
        ...     "*.bias": nn.init.Zeros(),
        ...     lambda name, p: name.startswith("2."): nn.init.Normal(std=0.01),
        ... })
        >>> report.defaults
        ()
        >>> net[2].bias.init
        Normal(mean=0.0, std=0.01)
    """
    names = _all_names(net)
    chosen: dict[Parameter, tuple[str, Recipe]] = {}
    matched: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    for rule, choice in recipes.items():
        label = _unique(_label(rule), matched)
        try:
            found = _matches(net, names, rule, choice)
        except RuleError as error:
            problems.append(f"{label}: {error}")
            continue
        matched[label] = tuple(names[parameter][0] for parameter in found)
        for parameter, recipe in found.items():
            chosen[parameter] = (label, recipe)
        if not found and not allow_unmatched:
            problems.append(f"{label} matched no parameter.{_hint(net, names, rule)}")
    for parameter, (label, recipe) in chosen.items():
        problem = _misfit(recipe, parameter)
        if problem:
            problems.append(f"{label} does not fit {names[parameter][0]!r}: {problem}")
    if problems:
        raise RuleError(
            "\n".join(["nn.init.rules changed nothing:", *(f"  {p}" for p in problems)])
        )

    for parameter, (_, recipe) in chosen.items():
        parameter.initialize(recipe)
    return _report(names, chosen, matched)


def _all_names(net: Module) -> dict[Parameter, list[str]]:
    """Return every parameter with all its names, the canonical one first."""
    names: dict[Parameter, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _matches(
    net: Module, names: Mapping[Parameter, Sequence[str]], rule: Rule, choice: Choice
) -> dict[Parameter, Recipe]:
    by_type = isinstance(rule, type) and issubclass(rule, Module)
    if isinstance(choice, Mapping):
        if not by_type:
            raise RuleError("a dict of recipes goes with a module type; give a single recipe.")
        for recipe in choice.values():
            _check_recipe(recipe)
        return _by_type(net, rule, choice)  # type: ignore[arg-type]
    _check_recipe(choice)
    if by_type:
        return _by_type(net, rule, choice)  # type: ignore[arg-type]
    if isinstance(rule, str):
        return {
            parameter: choice
            for parameter, own in names.items()
            if any(fnmatch.fnmatchcase(name, rule) for name in own)
        }
    if callable(rule) and not isinstance(rule, type):
        return {
            parameter: choice
            for parameter, own in names.items()
            if any(rule(name, parameter) for name in own)
        }
    raise RuleError(
        "a rule is a name glob, a module type or a predicate (name, parameter) -> bool, "
        f"got {rule!r}."
    )


def _by_type(net: Module, kind: type[Module], choice: Choice) -> dict[Parameter, Recipe]:
    found: dict[Parameter, Recipe] = {}
    layers = [module for _, module in net.named_modules() if isinstance(module, kind)]
    seen: set[str] = set()
    for module in layers:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            seen.add(name)
            if isinstance(choice, Mapping):
                if name in choice:
                    found[parameter] = choice[name]
            elif len(parameter.shape) >= 2:
                found[parameter] = choice
    if isinstance(choice, Mapping) and layers:
        for name in choice:
            if name not in seen:
                raise RuleError(
                    f"no {kind.__name__} has a parameter {name!r}.{did_you_mean(name, seen)}"
                )
    return found


def _check_recipe(recipe: Any) -> None:
    if not callable(recipe) or isinstance(recipe, type):
        mend = f"{recipe.__name__}()" if isinstance(recipe, type) else "nn.init.Constant(value)"
        raise RuleError(
            f"a recipe is a function (key, shape, dtype) -> Array, got {recipe!r}; use {mend}."
        )


def _misfit(recipe: Recipe, parameter: Parameter) -> str:
    check = getattr(recipe, "check", None)
    if check is None or parameter.shape == (None,):
        return ""
    try:
        check(parameter.shape)
    except LaminaError as error:
        return str(error)
    return ""


def _label(rule: Any) -> str:
    if isinstance(rule, str):
        return repr(rule)
    return getattr(rule, "__name__", repr(rule))


def _unique(label: str, taken: Iterable[str]) -> str:
    """Tell lambdas apart, which all have the same name."""
    labels, number = set(taken), 2
    if label not in labels:
        return label
    while f"{label}#{number}" in labels:
        number += 1
    return f"{label}#{number}"


def _hint(net: Module, names: Mapping[Parameter, Sequence[str]], rule: Rule) -> str:
    """Say what a rule that matched nothing may have meant."""
    if isinstance(rule, str):
        full = [name for own in names.values() for name in own]
        globs = [f"*.{name.rpartition('.')[2]}" for name in full if "." in name]
        return did_you_mean(rule, [*full, *globs])
    if isinstance(rule, type):
        kinds = {type(module) for _, module in net.named_modules()}
        if any(issubclass(kind, rule) for kind in kinds):
            return (
                f" {rule.__name__} has no parameter of two dimensions or more; choose by name: "
                f'{{"weight": recipe}}.'
            )
        return did_you_mean(rule.__name__, [kind.__name__ for kind in kinds])
    return ""


def _report(
    names: Mapping[Parameter, Sequence[str]],
    chosen: Mapping[Parameter, tuple[str, Recipe]],
    matched: dict[str, tuple[str, ...]],
) -> RulesReport:
    rows = tuple(
        (
            own[0],
            format_shape(parameter.shape),
            chosen[parameter][0] if parameter in chosen else "(default)",
            _recipe_text(parameter.init),
        )
        for parameter, own in names.items()
    )
    return RulesReport(
        assigned={names[parameter][0]: label for parameter, (label, _) in chosen.items()},
        matched=matched,
        unmatched=tuple(label for label, found in matched.items() if not found),
        defaults=tuple(own[0] for parameter, own in names.items() if parameter not in chosen),
        rows=rows,
    )


def _recipe_text(recipe: Recipe | None) -> str:
    if recipe is None:
        return "(value given)"
    return getattr(recipe, "__qualname__", None) or repr(recipe)
