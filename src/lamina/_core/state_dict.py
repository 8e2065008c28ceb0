"""State dicts: a module's values by name, and loading them all or not at all."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, namedtuple
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import bind
from .bind import Cell
from .box import Box, array
from .errors import DeferredError, LoadError, Problem, ShapeError, did_you_mean, format_shape
from .nesting import nested
from .shapes import canonical, fits
from .walk import own_boxes, walk

__all__ = ["IncompatibleKeys", "StateDict", "all_or_nothing", "load_state_dict", "save_state_dict"]

EXTRA = "_extra_state"
_RECIPE_WAITS = ", but its recipe waits for a size"


class IncompatibleKeys(namedtuple("IncompatibleKeys", ["missing_keys", "unexpected_keys"])):
    """What a non-strict load left out: ``missing_keys`` and ``unexpected_keys``."""

    __slots__ = ()

    def __repr__(self) -> str:
        return super().__repr__() if any(self) else "<All keys matched successfully>"


class StateDict(OrderedDict):
    """An ordered dict ``{name: array}`` that also knows the ties, for saving.

    Attributes:
        ties: ``{further name: canonical name}``.
        wide: ``{name: dtype}`` of values that files hold with a wider dtype than JAX does
            (PyTorch's 64-bit counters).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ties: dict[str, str] = {}
        self.wide: dict[str, np.dtype] = {}
        self._metadata: dict[str, Any] = {}

    def __lamina_tensors__(self) -> tuple[dict[str, Any], dict[str, str], dict[str, np.dtype]]:
        names = self.keys()
        ties = {a: b for a, b in self.ties.items() if a in names and b in names}
        return dict(self), ties, {k: v for k, v in self.wide.items() if k in names}


def _rebuild(facts: Any, values: Any) -> StateDict:
    names, ties, wide = facts
    state = StateDict(zip(names, values, strict=True))
    state.ties, state.wide = dict(ties), dict(wide)
    return state


jax.tree_util.register_pytree_with_keys(
    StateDict,
    lambda s: (
        [(jax.tree_util.DictKey(name), value) for name, value in s.items()],
        (tuple(s), tuple(s.ties.items()), tuple(s.wide.items())),
    ),
    _rebuild,
)


def save_state_dict(module: Any, destination: Any, prefix: str, keep_vars: bool) -> Any:
    """Carry out ``Module.state_dict``."""
    is_top = destination is None
    if is_top:
        waiting = [
            f"  {name}: {format_shape(box.shape)}" + ("" if box.is_unshaped else _RECIPE_WAITS)
            for name, box in walk(module).entries
            if box.state == "unshaped"
        ]
        if waiting and not keep_vars:
            raise DeferredError(
                "no values yet, some sizes are unknown:\n"
                + "\n".join(waiting)
                + "\n    fix: pass data through the model once, net(x), or call lamina.infer"
            )
        destination = StateDict()
    for hook in list(module._state_dict_pre_hooks.values()):
        hook(module, prefix, keep_vars)
    metadata = {"version": module._version}
    if hasattr(destination, "_metadata"):
        destination._metadata[prefix[:-1]] = metadata
    module._save_to_state_dict(destination, prefix, keep_vars)
    for name, child in module._modules.items():
        if child is not None:
            child.state_dict(
                destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars
            )
    if is_top:
        for alias, name in walk(module).aliases.items():
            if prefix + alias in destination and prefix + name in destination:
                destination.ties[prefix + alias] = prefix + name
    for hook in list(module._state_dict_hooks.values()):
        result = hook(module, destination, prefix, metadata)
        if result is not None:
            destination = result
    return destination


def save_own(module: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
    """Put a module's own values into a state dict."""
    for name, box in own_boxes(module):
        if box.state == "empty" or not getattr(box, "persistent", True):
            continue
        destination[prefix + name] = box if keep_vars else box.data
        wide = box.declared_dtype
        if isinstance(destination, StateDict) and canonical(wide) != wide:
            destination.wide[prefix + name] = wide
    if _defines(module, "get_extra_state"):
        destination[prefix + EXTRA] = module.get_extra_state()


def _defines(module: Any, method: str) -> bool:
    return not getattr(type(module), method).__module__.startswith(__package__ or "lamina._core")


def translates(module: Any) -> bool:
    """Tell whether a module reads its values in its own way."""
    return _defines(module, "_load_from_state_dict") or bool(module._load_pre_hooks)


def takes_extra_state(module: Any) -> bool:
    """Tell whether a module has extra state."""
    return _defines(module, "set_extra_state")


def load_state_dict(
    net: Any, state_dict: Mapping[str, Any], strict: bool, assign: bool, cast: bool
) -> IncompatibleKeys:
    """Carry out ``Module.load_state_dict``."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict: expected a mapping of names to arrays, got "
            f"{type(state_dict).__name__}"
        )
    found = _Findings({"assign": assign, "cast": cast}, strict)
    with all_or_nothing(walk(net).names):
        found.visit(net, dict(state_dict), "")
        found.missing = _without_ties(net, found.missing, state_dict)
        result = IncompatibleKeys(found.missing, found.unexpected)
        for module in net.modules():
            for hook in list(module._load_hooks.values()):
                hook(module, result)
        _report(net, state_dict, strict, *result, found.errors)
    return result


class _Findings:
    """What loading finds, module by module."""

    def __init__(self, options: dict[str, Any], strict: bool) -> None:
        self.options, self.strict = options, strict
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.errors: list[str] = []

    @nested
    def visit(self, module: Any, state: dict[str, Any], prefix: str) -> None:
        module._load_from_state_dict(
            state, prefix, dict(self.options), self.strict, self.missing, self.unexpected,
            self.errors,
        )  # fmt: skip
        parts: dict[str, dict[str, Any]] = {}
        for key, value in state.items():
            if key.startswith(prefix):
                parts.setdefault(key[len(prefix) :].partition(".")[0], {})[key] = value
        for name, child in module._modules.items():
            if child is not None:
                self.visit(child, parts.get(name, {}), f"{prefix}{name}.")


def load_own(
    module: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Take a module's own values; override to accept older names or layouts."""
    for hook in list(module._load_pre_hooks.values()):
        hook(
            module, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
            error_msgs,
        )  # fmt: skip
    own = set()
    for name, box in own_boxes(module):
        given = prefix + name in state_dict
        if not getattr(box, "persistent", True) or (box.state == "empty" and not given):
            continue
        own.add(name)
        if not given:
            missing_keys.append(prefix + name)
        elif problem := take(box, state_dict[prefix + name], local_metadata):
            error_msgs.append(Problem(prefix + name, problem))
    if prefix + EXTRA in state_dict:
        if takes_extra_state(module) or strict:
            module.set_extra_state(state_dict[prefix + EXTRA])
    elif takes_extra_state(module):
        missing_keys.append(prefix + EXTRA)
    for key in state_dict:
        if key.startswith(prefix) and key != prefix + EXTRA:
            head = key[len(prefix) :].split(".", 1)
            if not (head[0] in module._modules if len(head) > 1 else head[0] in own):
                unexpected_keys.append(key)


@contextlib.contextmanager
def all_or_nothing(cells: Iterable[Cell]) -> Iterator[None]:
    """Give boxes back what they held if the block fails."""
    cells = list(cells)
    before = bind.raw_values(cells)
    forms = [(c, c.known_shape, c.declared_dtype) for c in cells if isinstance(c, Box)]
    try:
        yield
    except BaseException:
        bind.put_back(cells, before)
        for box, shape, dtype in forms:
            box.reform(shape, dtype)
        raise


def take(box: Box, value: Any, options: Mapping[str, Any]) -> str | None:
    """Write one loaded value into a box, or say why not."""
    try:
        value = array(value) if isinstance(value, Box) else value
        if not isinstance(value, (jax.Array, np.ndarray)):
            value = np.asarray(value)
        wide = np.dtype(value.dtype) if np.dtype(value.dtype) != canonical(value.dtype) else None
        value = value if isinstance(value, jax.Array) else _to_jax(value)
        problem = misfit(box, tuple(value.shape))
        if problem:
            return problem
        if options.get("assign"):
            box.replace(value)
            box.reform(box.known_shape, wide or value.dtype)
            return None
        if value.dtype != box.dtype and not box.is_place:
            if not options.get("cast"):
                return (
                    f"expected dtype {np.dtype(box.dtype).name}, got {value.dtype.name}; pass "
                    f"cast=True to convert it or assign=True to take it over"
                )
            value = value.astype(box.dtype)
        box.data = value
    except (ShapeError, TypeError, ValueError) as error:
        return str(error)
    return None


def misfit(box: Box, shape: tuple[int, ...]) -> str:
    """Say why an array of some shape does not go into a box, or return an empty string."""
    known = None if box.is_place else box.known_shape
    if fits(known, shape):
        return ""
    return (
        f"expected shape {format_shape(box.shape)}, got {format_shape(shape)}"
        f"{_transposed(box.shape, shape)}"
    )


def _transposed(shape: tuple[Any, ...], given: tuple[int, ...]) -> str:
    """A hint if the value fits with its axes in another order that is in use."""
    orders = {2: [(1, 0)], 3: [(2, 1, 0)], 4: [(3, 2, 0, 1)], 5: [(4, 3, 0, 1, 2)]}
    for order in orders.get(len(given), []):
        if len(shape) == len(given) and tuple(given[i] for i in order) == tuple(shape):
            how = "value.T" if len(given) == 2 else f"value.transpose{order}"
            return f"; it fits transposed: {how}"
    return ""


def _to_jax(value: Any) -> jax.Array:
    host = np.asarray(value)
    return jnp.asarray(host.astype(canonical(host.dtype), copy=False))


def _without_ties(net: Any, missing: list[str], state: Mapping[str, Any]) -> list[str]:
    """Drop missing names whose value came under another name of the same box."""
    names: dict[Box, list[str]] = {}
    by_name: dict[str, Box] = {}
    for name, box in walk(net).entries:
        names.setdefault(box, []).append(name)
        by_name[name] = box
    return [
        name
        for name in missing
        if name not in by_name or not any(other in state for other in names[by_name[name]])
    ]


def conflicts(net: Any, state: Mapping[str, Any]) -> list[str]:
    """Find tied names for which a mapping holds different values."""
    problems: list[str] = []
    for alias, name in walk(net).aliases.items():
        if alias in state and name in state and state[alias] is not state[name]:
            first, second = np.asarray(array(state[name])), np.asarray(array(state[alias]))
            if first.shape != second.shape or first.tobytes() != second.tobytes():
                what = (
                    f"tied to {name}, but the state dict holds two different values; untie the "
                    f"parameters or drop one of the names"
                )
                problems.append(Problem(alias, what))
    return problems


def _report(
    net: Any,
    state: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    lines: list[str] = []
    problems = errors + conflicts(net, state)
    names = [name for name, _ in walk(net).entries]
    if strict:
        lines += [f"  missing: {name}{did_you_mean(name, unexpected)}" for name in missing]
        lines += [f"  unexpected: {name}{did_you_mean(name, names)}" for name in unexpected]
    elif state and names and set(unexpected) >= set(state):
        lines.append(
            f"  none of the {len(state)} names in the state dict belongs to the model, for "
            f"instance {next(iter(state))!r}.{did_you_mean(next(iter(state)), names)}"
        )
    lines += [f"  {problem}" for problem in problems]
    if lines:
        renamed = strict and (missing or unexpected)
        fix = (
            "rename the keys, or load_state_dict(state, strict=False) to skip missing and "
            "unexpected names"
            if renamed or not problems
            else "give each name a value of the shape and dtype that the model has"
        )
        raise LoadError(
            f"the state dict does not fit {type(net).__name__}; nothing was loaded:\n"
            + "\n".join(lines)
            + f"\n    fix: {fix}",
            problems,
        )
